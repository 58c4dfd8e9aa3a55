"""Retention methods beside CRaFT, the drift probe, and what must not change a constrained step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft.tuners.lora import LoraLayer

from prismatic.craft import retention_loss
from prismatic.models.vla_policy import CraftRequest, VLAPolicyModel
from prismatic.training.command_line import parse_flags
from prismatic.training.config import FinetuneConfig, RetentionMethod, TuningMode
from prismatic.training.retention.memory import take_rows
from prismatic.training.retention.methods import monitored_batches
from prismatic.training.step import optimizer_step

PROBE = Path(__file__).parents[1] / "golden" / "rlds_mini" / "libero_mini_no_noops"
ALWAYS_TRAINED = ("action_head.", "proprio_projector.", "vla.action_queries.")
TIMINGS = ("samples_per_second", "CRaFT/Anchor Seconds", "Time/", "Memory/")
CONSTRAINT = {"use_craft": True, "craft_retention_weight": 1.0}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


def metrics(trainer) -> list[dict]:
    lines = (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]


def perturb(trainer, seed: int = 0, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainer.bare_model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def step_gradients(trainer, batch, monkeypatch) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients that the optimizer would apply, and the step's metrics. The weights stay."""
    gradients = {}

    def record():
        named = trainer.bare_model.named_parameters()
        gradients.update({n: p.grad.clone() for n, p in named if p.grad is not None})

    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", record)
        return gradients, optimizer_step(trainer.step_context(), [batch], trainer.step)


def language_layers(trainer) -> str:
    return next(n for n, _ in trainer.bare_model.named_modules() if n.endswith("language_model.model.layers"))


def vision(trainer) -> str:
    return next(n for n, _ in trainer.bare_model.named_modules() if n.endswith("vision_backbone"))


def count_calls(module: torch.nn.Module) -> list:
    """A list that grows by one with each call. A pre-hook: recomputation stops inside the last layer it needs."""
    calls: list = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture
def lora(make_trainer) -> dict:
    """Flags of a LoRA run on a checkpoint of the tiny preset."""
    trainer = make_trainer("base", max_steps=1, save_training_state=False)
    trainer.fit()
    folder = trainer.setup.run_dir.parent / "base--1_chkpt"
    return {"use_lora": True, "lora_rank": 4, "config_file_path": str(folder)}


# ------------------------------------------------------------------------------------------------ the flag


@pytest.mark.parametrize("method", [m.value for m in RetentionMethod])
def test_the_method_is_resolved_and_only_craft_uses_craft(method):
    cfg = FinetuneConfig(retention_method=method)
    assert cfg.retention.value == method
    assert cfg.use_craft is (method == "craft")
    assert cfg.retention.measures_drift is (method in ("craft", "feature_penalty"))
    assert cfg.tuning_mode is (TuningMode.FROZEN if method == "frozen" else TuningMode.FULL)


def test_use_craft_alone_selects_craft_and_nothing_selects_none():
    assert FinetuneConfig().retention is RetentionMethod.NONE
    assert FinetuneConfig(use_craft=True).retention is RetentionMethod.CRAFT
    assert FinetuneConfig(use_craft=True, retention_method="craft").retention is RetentionMethod.CRAFT


@pytest.mark.parametrize("method", ["none", "feature_penalty", "l2sp", "frozen"])
def test_use_craft_contradicts_the_other_methods(method):
    with pytest.raises(ValueError, match=f"--use_craft True contradicts --retention_method {method}"):
        FinetuneConfig(use_craft=True, retention_method=method)


def test_an_unknown_method_lists_the_choices_and_frozen_excludes_lora():
    with pytest.raises(ValueError, match="retention_method is 'ewc', expected one of none, craft, l2sp, feature_pen"):
        FinetuneConfig(retention_method="ewc")
    with pytest.raises(ValueError, match="--use_lora True excludes .*--retention_method frozen"):
        FinetuneConfig(retention_method="frozen", use_lora=True)
    with pytest.raises(ValueError, match="l2sp_weight is 0, expected more than 0"):
        FinetuneConfig(retention_method="l2sp", l2sp_weight=0)


@pytest.mark.parametrize("method", ["none", "l2sp"])
def test_the_command_line_takes_the_method(monkeypatch, method):
    monkeypatch.setattr(sys, "argv", ["finetune.py", "--retention_method", method])
    cfg = parse_flags()
    assert (cfg.retention_method, cfg.use_craft) == (method, False)


def test_run_ids_tell_the_methods_apart():
    ids = {FinetuneConfig(retention_method=method.value).run_id for method in RetentionMethod}
    assert len(ids) == len(RetentionMethod)
    assert FinetuneConfig(retention_method="none").run_id == FinetuneConfig().run_id


def test_frozen_trains_head_projector_and_queries_like_use_fz(make_trainer):
    trainer, reference = make_trainer("frozen", retention_method="frozen"), make_trainer("fz", use_fz=True)
    trained = {n for n, p in trainer.bare_model.named_parameters() if p.requires_grad}
    assert trained == {n for n in weights(trainer) if n.startswith(ALWAYS_TRAINED)}
    before = weights(trainer)
    trainer.fit()
    reference.fit()
    after = weights(trainer)
    assert_same_weights(after, weights(reference))
    # Pro heads have layers that see only zeros at the start, so not every tensor moves in three steps.
    changed = {n for n, p in after.items() if not torch.equal(p, before[n])}
    assert changed <= trained
    assert {n.split(".")[0] for n in changed} == {"action_head", "proprio_projector", "vla"}


def test_none_equals_no_flag_bit_for_bit(make_trainer):
    first, second = make_trainer("none", retention_method="none"), make_trainer("plain")
    first.fit()
    second.fit()
    assert_same_weights(weights(first), weights(second))
    assert metrics(first) == metrics(second)


# ------------------------------------------------------------------------------------------------ L2-SP


def l2sp_by_autograd(trainer, start: dict[str, torch.Tensor], weight: float) -> dict[str, torch.Tensor]:
    """Gradient of weight/2 ||theta - theta_0||^2, with the product of the matrices for adapters."""
    named = {n: p for n, p in trainer.bare_model.named_parameters() if p.requires_grad}
    plain = {n: p for n, p in named.items() if n.startswith("vla.") and "lora_" not in n}
    penalty = sum((p - start[n]).square().sum() for n, p in plain.items())
    for layer in trainer.bare_model.modules():
        if isinstance(layer, LoraLayer):
            penalty = penalty + layer.get_delta_weight("default").square().sum()
    gradients = torch.autograd.grad(weight / 2 * penalty, list(named.values()), allow_unused=True)
    return dict(zip(named, gradients, strict=True))


def l2sp_weight(method: str, weight: float) -> dict:
    return {"l2sp_weight": weight} if method == "l2sp" else {}


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_l2sp_gradient_equals_autograd_and_leaves_the_head_alone(make_trainer, lora, tuning):
    flags = {"full": {}, "lora": lora, "frozen": {"use_fz": True}}[tuning]
    trainer = make_trainer("l2sp", retention_method="l2sp", l2sp_weight=0.3, **flags)
    start = weights(trainer)
    perturb(trainer)
    trainer.retention.add_gradient()
    trainer.retention.add_gradient()  # adds to what is there
    for name, expected in l2sp_by_autograd(trainer, start, 0.6).items():
        found = trainer.bare_model.get_parameter(name).grad
        if name.startswith(("action_head.", "proprio_projector.")):
            assert found is None and expected is None
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert found.any(), name
    if tuning == "lora":
        # Convolutions of the patch embeddings are among them.
        assert any("lora_" in n and p.ndim == 4 for n, p in trainer.bare_model.named_parameters())


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_l2sp_adds_its_gradient_to_that_of_the_action_loss(make_trainer, lora, monkeypatch, tuning):
    flags, results = lora if tuning == "lora" else {}, {}
    for method in ("none", "l2sp"):
        trainer = make_trainer(method, retention_method=method, **flags, **l2sp_weight(method, 0.3))
        start = weights(trainer)
        perturb(trainer)
        results[method] = step_gradients(trainer, next(trainer.batches()), monkeypatch)[0]
    penalty = l2sp_by_autograd(trainer, start, 0.3)
    for name, gradient in results["none"].items():
        if penalty[name] is None:
            assert torch.equal(results["l2sp"][name], gradient), name
        else:
            torch.testing.assert_close(results["l2sp"][name], gradient + penalty[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_l2sp_is_zero_at_the_start(make_trainer, lora, tuning):
    flags, results = lora if tuning == "lora" else {}, []
    for method in ("none", "l2sp"):
        trainer = make_trainer(method, retention_method=method, max_steps=1, **flags, **l2sp_weight(method, 100.0))
        trainer.fit()
        results.append(weights(trainer))
    assert_same_weights(*results)


def test_a_larger_l2sp_weight_keeps_the_model_nearer(make_trainer):
    distances = []
    for weight in (0.01, 1.0, 100.0):
        flags = {"retention_method": "l2sp", "l2sp_weight": weight, "max_steps": 10, "save_training_state": False}
        trainer = make_trainer(f"w{weight}", **flags)
        start = weights(trainer)
        trainer.fit()
        moved = [(p - start[n]).square().sum() for n, p in weights(trainer).items() if n.startswith("vla.")]
        distances.append(float(torch.stack(moved).sum().sqrt()))
    assert distances[0] > 1.1 * distances[1] > 1.1 * 1.1 * distances[2] > 0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_l2sp_resumed_equals_uninterrupted_and_keeps_the_anchor(make_trainer, lora, tuning):
    flags = {"retention_method": "l2sp", "l2sp_weight": 10.0, "max_steps": 4, "save_freq": 2}
    flags |= lora | {"lora_dropout": 0.2} if tuning == "lora" else {}
    whole = make_trainer("run", **flags)
    start = weights(whole)
    whole.fit()
    expected, expected_metrics = weights(whole), metrics(whole)
    resumed = make_trainer("run", **flags, resume=True, resume_step=2)
    anchor = resumed.retention.weights.state_dict()
    assert all(torch.equal(tensor, start[name]) for name, tensor in anchor.items())
    assert any(not torch.equal(tensor, weights(resumed)[name]) for name, tensor in anchor.items())
    if tuning == "lora":  # adapters need none: they start at the product zero
        assert [name.rpartition("action_queries")[1:] for name in anchor] == [("action_queries", ".weight")]
    resumed.fit()
    assert_same_weights(weights(resumed), expected)
    assert metrics(resumed) == expected_metrics


@pytest.mark.parametrize("file", ["craft_anchor.safetensors", "craft.json"])
def test_l2sp_does_not_resume_without_its_anchor(make_trainer, file):
    trainer = make_trainer("run", retention_method="l2sp", max_steps=1)
    trainer.fit()
    (trainer.setup.run_dir.parent / "run--1_chkpt" / "training_state" / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        make_trainer("run", retention_method="l2sp", max_steps=2, resume=True)


# ------------------------------------------------------------------------------------------------ feature penalty


@pytest.mark.parametrize("preset", ["original", "budget"])
def test_feature_penalty_is_craft_without_projection_and_dual(make_trainer, preset):
    flags = {"craft_preset": preset, "craft_fixed_lambda": 0.4, "max_steps": 4}
    penalty = make_trainer("penalty", retention_method="feature_penalty", **flags)
    penalty.fit()
    craft = make_trainer("craft", use_craft=True, craft_enable_projection=False, craft_enable_dual=False, **flags)
    craft.fit()
    assert_same_weights(weights(penalty), weights(craft))
    assert metrics(penalty) == metrics(craft)
    assert {line["CRaFT/Lambda"] for line in metrics(penalty)} == {0.4}
    assert metrics(penalty)[-1]["CRaFT/Retention Loss"] > 0


def test_feature_penalty_has_the_gradient_of_the_weighted_sum(make_trainer, monkeypatch):
    trainer = make_trainer("penalty", retention_method="feature_penalty", craft_fixed_lambda=0.7)
    perturb(trainer)
    batch = next(trainer.batches())
    anchor = trainer.retention.constraint.reference(batch)
    loss = (trainer.bare_model(batch).actions - batch["actions"]).abs().mean()
    loss = loss + 0.7 * retention_loss(trainer.retention.constraint.current(batch), anchor, trainer.retention.config)
    named = {n: p for n, p in trainer.bare_model.named_parameters() if p.requires_grad}
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    found, _ = step_gradients(trainer, batch, monkeypatch)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


# ------------------------------------------------------------------------------------------------ probe


@torch.no_grad()
def drift(trainer, batch) -> float:
    craft = trainer.retention.constraint
    return float(retention_loss(craft.current(batch), craft.reference(batch), craft.config))


def test_the_probe_metric_is_logged_and_changes_nothing(make_trainer, lora):
    results = []
    for name, flags in {"without": {}, "with": {"craft_probe_data": str(PROBE), "craft_probe_size": 3}}.items():
        # Dropout makes the result depend on the random generator's state.
        trainer = make_trainer(name, **CONSTRAINT, **lora, lora_dropout=0.2, **flags)
        trainer.fit()
        results.append((weights(trainer), metrics(trainer)))
    assert_same_weights(results[0][0], results[1][0])
    without, probed = results[0][1], results[1][1]
    assert [{k: v for k, v in line.items() if "Probe" not in k} for line in probed] == without
    names = {"Retention Loss", "raw_mse", "raw_relative", "aq_mse", "aq_relative"}
    assert {k for k in probed[0] if "Probe" in k} == {f"CRaFT/Probe/{name}" for name in names}
    assert all(line["CRaFT/Probe/Retention Loss"] > 0 for line in probed)  # measured after the step


def test_the_probe_metric_is_the_mean_drift_of_the_fixed_samples(make_trainer):
    trainer = make_trainer("run", **CONSTRAINT, craft_probe_data=str(PROBE), craft_probe_size=3)
    assert all(value == 0.0 for value in trainer.monitor.measure().values())
    perturb(trainer)
    batches = monitored_batches(trainer.cfg, trainer.setup, trainer._collator(), trainer.accelerator)
    losses = [drift(trainer, take_rows(batch, [row])) for batch in batches for row in range(len(batch["input_ids"]))]
    assert len(losses) == 3
    assert trainer.monitor.measure()["CRaFT/Probe/Retention Loss"] == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_a_probe_that_cannot_be_used_is_an_error(make_trainer):
    with pytest.raises(FileNotFoundError, match="--craft_probe_data no/such/folder: not a data-set folder"):
        make_trainer("x", use_craft=True, craft_probe_data="no/such/folder")
    for method in ("none", "l2sp", "frozen"):
        with pytest.raises(ValueError, match="--craft_probe_data .* has no effect: it needs --use_craft True"):
            make_trainer("x", retention_method=method, craft_probe_data=str(PROBE))


# ------------------------------------------------------------------------------------------------ precision


@pytest.fixture
def make_bf16_trainer(make_trainer, monkeypatch):
    """`make_trainer` under bf16 autocast on the CPU; accelerate keeps the precision in a global state."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    yield lambda name, **flags: make_trainer(name, mixed_precision="bf16", **flags)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_bf16_keeps_weights_and_constraint_finite(make_bf16_trainer, lora, tuning):
    flags = lora if tuning == "lora" else {}
    trainer = make_bf16_trainer("run", **CONSTRAINT, **flags)
    assert trainer.accelerator.mixed_precision == "bf16"
    dtypes, linear = set(), trainer.bare_model.get_submodule(language_layers(trainer) + ".0.mlp.down_proj")
    linear.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output.dtype))
    before = weights(trainer)
    trainer.fit()
    assert dtypes == {torch.bfloat16}
    lines, after = metrics(trainer), weights(trainer)
    assert all(torch.isfinite(torch.tensor([v for k, v in line.items() if k != "step"])).all() for line in lines)
    assert [line["CRaFT/Retention Loss"] > 0 for line in lines] == [False, True, True]
    assert all(p.isfinite().all() for p in after.values())
    assert {p.dtype for p in trainer.bare_model.parameters() if p.requires_grad} == {torch.float32}
    assert any(not torch.equal(p, before[n]) for n, p in after.items())


# Inside one autocast region a cache of bf16 weights could outlive a swap of weights.
def test_the_first_probe_measurement_under_bf16_is_that_of_the_current_weights(make_bf16_trainer):
    flags = {"craft_probe_data": str(PROBE), "craft_probe_size": 2, "max_steps": 1, "save_training_state": False}
    found = {}
    for anchor in ("online_swap", "frozen_copy"):
        trainer = make_bf16_trainer(anchor, **CONSTRAINT, craft_anchor=anchor, **flags)
        trainer.fit()
        found[anchor] = metrics(trainer)[0]["CRaFT/Probe/Retention Loss"]
    assert found["online_swap"] == pytest.approx(found["frozen_copy"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ memory savers


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_gradient_checkpointing_changes_no_weight(request, make_trainer, lora, tuning, precision):
    make = make_trainer if precision == "no" else request.getfixturevalue("make_bf16_trainer")
    flags = CONSTRAINT | (lora | {"lora_dropout": 0.2} if tuning == "lora" else {})
    results, calls = [], []
    for checkpointing in (False, True):
        trainer = make(f"c{checkpointing}", gradient_checkpointing=checkpointing, **flags)
        calls.append(count_calls(trainer.bare_model.get_submodule(language_layers(trainer) + ".0")))
        trainer.fit()
        results.append((weights(trainer), metrics(trainer)))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    # Per step: anchor and main pass, and a recomputation for each of the two backward passes.
    assert [len(c) for c in calls] == [3 * 2, 3 * 4]


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_frozen_towers_run_once_and_the_step_stays_the_same(make_trainer, lora, monkeypatch, tuning):
    flags, results, calls = lora if tuning == "lora" else {}, [], []
    for shared in (True, False):
        trainer = make_trainer(f"s{shared}", **CONSTRAINT, **flags, freeze_vision=True)
        perturb(trainer, size=0.01)
        calls.append(count_calls(trainer.bare_model.get_submodule(vision(trainer))))
        with monkeypatch.context() as patch:
            if not shared:
                patch.setattr(VLAPolicyModel, "share_vision", lambda _self, batch: batch)
            results.append(step_gradients(trainer, next(trainer.batches()), monkeypatch))
    assert [len(c) for c in calls] == [1, 2]
    (shared, shared_metrics), (twice, twice_metrics) = results
    assert_same_weights(shared, twice)
    assert shared_metrics["CRaFT/Retention Loss"] == twice_metrics["CRaFT/Retention Loss"] > 0


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_freeze_vision_leaves_the_towers_alone(make_trainer, lora, tuning):
    flags = lora if tuning == "lora" else {}
    trainer = make_trainer("run", **CONSTRAINT, **flags, freeze_vision=True)
    before = weights(trainer)
    trainer.fit()
    changed = {n for n, p in weights(trainer).items() if not torch.equal(p, before[n])}
    assert changed and not any("vision_backbone" in n for n in changed)
    assert any("language_model" in n for n in changed)
    if tuning == "lora":
        assert not any("vision_backbone" in n and "lora_" in n for n in before)
        free = make_trainer("free", **flags)
        assert any("vision_backbone" in n and "lora_" in n for n in weights(free))


# Layer 0 are the input embeddings.
@pytest.mark.parametrize("mode", ["vision_only", "vision_plus_prompt"])
@pytest.mark.parametrize("layer", [0, 1, None, -1])
def test_a_pass_for_the_raw_latent_alone_stops_at_its_layer(make_trainer, layer, mode):
    trainer = make_trainer("run", **CONSTRAINT, craft_anchor_type="raw_only", craft_anchor_layer_idx=layer)
    model, batch = trainer.bare_model.eval(), next(trainer.batches())
    layers = trainer.bare_model.get_submodule(language_layers(trainer))
    needed = {None: (len(layers) + 1) // 2, -1: len(layers)}.get(layer, layer)
    with torch.no_grad():
        full, aq, full_mask = model.anchor_features(batch, CraftRequest(layer, mode))
        calls = [count_calls(block) for block in layers]
        raw, none, mask = model.anchor_features(batch, CraftRequest(layer, mode, raw_only=True))
    assert [len(c) for c in calls] == [1] * needed + [0] * (len(layers) - needed)
    assert torch.equal(raw, full)
    assert aq is not None and (none is None or needed == len(layers))
    assert (mask is None and full_mask is None) or torch.equal(mask, full_mask)


def test_raw_only_anchor_passes_skip_the_later_layers_in_training(make_trainer):
    results = []
    for anchor in ("online_swap", "frozen_copy"):
        trainer = make_trainer(anchor, **CONSTRAINT, craft_anchor_type="raw_only", craft_anchor=anchor)
        calls = [count_calls(block) for block in trainer.bare_model.get_submodule(language_layers(trainer))]
        trainer.fit()
        results.append((weights(trainer), [len(c) for c in calls]))
    assert_same_weights(results[0][0], results[1][0])
    assert results[0][1] == [6, 6, 3, 3]  # three steps, anchor and main pass; layers 2 and 3 in the main pass only


# ------------------------------------------------------------------------------------------------ tracking


def test_tensorboard_files_hold_the_constraint(make_trainer):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer("run", **CONSTRAINT, use_tensorboard=True)
    trainer.fit()
    events = EventAccumulator(str(trainer.setup.run_dir / "tensorboard"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("CRaFT/Lambda")]
    expected = [(line["step"], line["CRaFT/Lambda"]) for line in metrics(trainer)]
    assert logged == [(step, pytest.approx(value)) for step, value in expected]
