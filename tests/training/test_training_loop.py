"""Properties of whole training runs with the tiny model on a real (small) RLDS data set."""

import json
import math

import micro
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.robot.policy import VLAPolicy
from prismatic.craft import CRaFTConstraint
from prismatic.models.presets import PRESETS
from prismatic.training import loop
from prismatic.training.checkpoint_files import tensors_hash
from prismatic.training.checkpoint_folder import LISTING, CheckpointError
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.step import NonFiniteLossError, optimizer_step
from prismatic.vla.datasets.sampler import EpochSampler

MONITOR = {
    "use_craft": True,
    "craft_retention_weight": 0.0,
    "craft_enable_projection": False,
    "craft_retention_budget": math.inf,
}


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert different == []


def metrics(trainer) -> list[dict]:
    lines = (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def without_timings(line: dict) -> dict:
    timings = ("samples_per_second", "CRaFT/Anchor Seconds", "Time/", "Memory/")
    return {name: value for name, value in line.items() if not name.startswith(timings)}


def two_batches(trainer):
    batches = trainer.batches()
    return next(batches), next(batches)


@pytest.fixture
def start_checkpoint(make_trainer):
    """A checkpoint of the tiny preset after one step, the base of LoRA runs."""
    trainer = make_trainer("base", max_steps=1)
    trainer.fit()
    return trainer.setup.run_dir.parent / "base--1_chkpt"


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_monitor_mode_equals_plain_bit_for_bit(make_trainer, start_checkpoint, lora):
    flags = {"max_steps": 20, "save_freq": 100}
    if lora:
        flags |= {"use_lora": True, "lora_dropout": 0.1, "config_file_path": str(start_checkpoint)}
    # One after the other: building a trainer seeds the generator that dropout draws from.
    plain = make_trainer("plain", **flags)
    before = weights(plain)
    plain.fit()
    random_state = torch.get_rng_state()
    monitored = make_trainer("monitor", **flags, **MONITOR)
    monitored.fit()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same_weights(weights(plain), weights(monitored))
    for p, q in zip(
        plain.optimizer.param_groups[0]["params"], monitored.optimizer.param_groups[0]["params"], strict=True
    ):
        ours, theirs = plain.optimizer.state[p], monitored.optimizer.state[q]
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert any(not torch.equal(before[n], p) for n, p in weights(plain).items())
    assert metrics(monitored)[-1]["CRaFT/Retention Loss"] > 0


def test_without_craft_nothing_of_it_is_reached(make_trainer, monkeypatch):
    def forbidden(*_args, **_kwargs):
        raise AssertionError("CRaFT code was reached")

    for name in ("__init__", "reference", "hold", "accumulate", "combine_"):
        monkeypatch.setattr(CRaFTConstraint, name, forbidden)
    trainer = make_trainer("plain", max_steps=2)
    trainer.fit()
    assert not any("CRaFT" in key for line in metrics(trainer) for key in line)


def test_only_every_nth_step_is_constrained(make_trainer, monkeypatch):
    trainer = make_trainer("run", use_craft=True, craft_every=3, max_steps=7)
    asked, measure = [], trainer.retention.constraint.reference
    record = lambda batch: asked.append(trainer.step) or measure(batch)  # noqa: E731
    monkeypatch.setattr(trainer.retention.constraint, "reference", record)
    trainer.fit()
    assert asked == [0, 3, 6]
    lambdas = [line["CRaFT/Lambda"] for line in metrics(trainer)]
    assert lambdas[0] == lambdas[1] == lambdas[2] != lambdas[3] == lambdas[5]


@pytest.mark.parametrize("lora", [False, True])
def test_retention_loss_is_exactly_zero_at_the_first_step(make_trainer, start_checkpoint, lora):
    flags = {"use_craft": True}
    if lora:
        flags |= {"use_lora": True, "config_file_path": str(start_checkpoint)}
    trainer = make_trainer("craft", **flags)
    trainer.fit()
    first, second, third = metrics(trainer)
    assert first["CRaFT/Retention Loss"] == 0.0
    assert second["CRaFT/Retention Loss"] > 0
    assert (first["CRaFT/Lambda"], second["CRaFT/Lambda"]) == (1.0, pytest.approx(1.0 - 0.01 * 0.1))


def test_weights_are_current_after_an_exception_in_the_anchor_pass(make_trainer, monkeypatch):
    trainer = make_trainer("craft", use_craft=True)
    batch, other = two_batches(trainer)
    context = trainer.step_context()
    optimizer_step(context, [batch], 0)
    current = weights(trainer)

    def fail(*_args):
        raise KeyError("in the anchor pass")

    monkeypatch.setattr(type(trainer.bare_model), "anchor_features", fail)
    with pytest.raises(KeyError, match="in the anchor pass"):
        optimizer_step(context, [other], 1)
    assert_same_weights(weights(trainer), current)
    assert not trainer.retention.weights.is_swapped


# A tiny budget: lambda, its memory and the gate have all moved when the run is interrupted.
TIGHT = {"use_craft": True, "craft_preset": "budget", "craft_retention_budget": 1e-5}


@pytest.mark.parametrize("method", [{}, {"use_craft": True}, TIGHT, TIGHT | {"craft_every": 2}])
def test_resumed_equals_uninterrupted_bit_for_bit(make_trainer, start_checkpoint, method):
    flags = {"max_steps": 6, "save_freq": 3, "lr_schedule": "cosine", "grad_accumulation_steps": 2} | method
    # Dropout makes the result depend on the random generator's state.
    flags |= {"config_file_path": str(start_checkpoint), "use_lora": True, "lora_rank": 4, "lora_dropout": 0.2}
    whole = make_trainer("run", **flags)
    whole.fit()
    expected, expected_metrics = weights(whole), metrics(whole)
    resumed = make_trainer("run", **flags, resume=True, resume_step=3)
    assert resumed.step == 3
    resumed.fit()
    assert_same_weights(weights(resumed), expected)
    for a, b in zip(metrics(resumed), expected_metrics, strict=True):
        assert without_timings(a) == without_timings(b)


@pytest.mark.parametrize("craft", [False, True])
def test_micro_batches_equal_one_batch(make_trainer, craft):
    results = []
    for batch_size, accumulation in ((4, 1), (1, 4)):
        # Two steps: by a third one rounding can have put a ReLU on the other side of zero (seen with torch 2.6).
        flags = {"batch_size": batch_size, "grad_accumulation_steps": accumulation, "max_steps": 2}
        trainer = make_trainer(f"b{batch_size}", **flags, use_craft=craft)
        # SGD: AdamW's first steps are sign(gradient), which turns rounding of tiny gradients into full steps.
        trainer.optimizer = torch.optim.SGD([p for p in trainer.bare_model.parameters() if p.requires_grad], lr=0.1)
        trainer.cfg.learning_rate = 0.1
        trainer.fit()
        results.append((weights(trainer), metrics(trainer)))
    for name, value in results[0][0].items():
        torch.testing.assert_close(value, results[1][0][name], rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
    for one, many in zip(results[0][1], results[1][1], strict=True):
        assert one["VLA Train/Loss"] == pytest.approx(many["VLA Train/Loss"], rel=1e-4)


def test_nan_loss_stops_names_the_step_and_keeps_the_last_checkpoint(make_trainer, monkeypatch):
    trainer = make_trainer("nan", max_steps=4, save_freq=2)
    original = loop.optimizer_step

    def poisoned(context, micro_batches, step):
        if step == 3:
            micro_batches[0]["actions"][0, 0, 0] = float("nan")
        return original(context, micro_batches, step)

    monkeypatch.setattr(loop, "optimizer_step", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"action loss is nan at optimizer step 3.*sample"):
        trainer.fit()
    good = load_checkpoint(trainer.setup.run_dir.parent / "nan--2_chkpt")
    assert all(p.isfinite().all() for p in good.model.parameters())
    assert all(p.isfinite().all() for p in trainer.bare_model.parameters())


@pytest.mark.parametrize("tuning", ["full", "frozen", "lora"])
def test_loaded_checkpoint_predicts_like_the_trained_model(make_trainer, start_checkpoint, tuning):
    flags = {"full": {}, "frozen": {"use_fz": True}, "lora": {"use_lora": True, "lora_rank": 4}}[tuning]
    trainer = make_trainer("run", config_file_path=str(start_checkpoint), **flags)
    trainer.fit()
    batch = two_batches(trainer)[0]
    with torch.no_grad():
        expected = trainer.bare_model.eval()(batch).actions
    loaded = load_checkpoint(trainer.setup.run_dir.parent / "run--3_chkpt")
    with torch.no_grad():
        actual = loaded.model(batch).actions
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=1e-5)
    assert loaded.manifest["action_spec"]["chunk_len"] == 8


def test_frozen_tuning_leaves_the_backbone_alone(make_trainer):
    trainer = make_trainer("frozen", use_fz=True)
    before = weights(trainer)
    trainer.fit()
    changed = {n for n, p in weights(trainer).items() if not torch.equal(p, before[n])}
    assert changed
    assert all(n.startswith(("action_head.", "proprio_projector.", "vla.action_queries.")) for n in changed)


def test_every_trainable_parameter_gets_a_gradient(make_trainer, start_checkpoint):
    for name, flags in {"full": {}, "lora": {"use_lora": True, "config_file_path": str(start_checkpoint)}}.items():
        trainer = make_trainer(name, **flags)
        loss = (trainer.bare_model(two_batches(trainer)[0]).actions ** 2).mean()
        loss.backward()
        missing = [n for n, p in trainer.bare_model.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_policy_predicts_unnormalised_actions_from_raw_observations(start_checkpoint):
    policy = VLAPolicy.from_checkpoint(start_checkpoint)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    actions = policy.predict(image, image, np.zeros(8), "pick up the bowl")
    assert actions.shape == (8, 7)
    assert actions.dtype == np.float64
    statistics = load_checkpoint(start_checkpoint).statistics["libero_mini_no_noops"]["action"]
    span = np.array(statistics["q99"]) - np.array(statistics["q01"])
    assert (np.abs(actions[:, :6] - np.array(statistics["mean"])[:6]) < 5 * span[:6] + 1e-6).all()
    again = policy.predict(image, image, np.zeros(8), "pick up the bowl")
    assert np.array_equal(actions, again)
    with pytest.raises(KeyError, match="libero_mini_no_noops"):
        VLAPolicy.from_checkpoint(start_checkpoint, unnorm_key="libero_goal")


def test_wrong_number_of_images_is_refused(make_trainer, start_checkpoint):
    with pytest.raises(ValueError, match="num_images_in_input 1.*made with 2"):
        make_trainer("one", config_file_path=str(start_checkpoint), num_images_in_input=1)


def test_missing_start_and_missing_files_are_named(make_trainer, start_checkpoint):
    with pytest.raises(FileNotFoundError, match="no_such_model"):
        make_trainer("x", config_file_path="no_such_model")
    (start_checkpoint / "action_head--1_checkpoint.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="action_head--1_checkpoint"):
        make_trainer("y", config_file_path=str(start_checkpoint))


def test_lora_on_a_changed_base_is_refused(make_trainer, start_checkpoint):
    trainer = make_trainer("lora", use_lora=True, config_file_path=str(start_checkpoint), max_steps=1)
    trainer.fit()
    file = start_checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="sha256"):
        load_checkpoint(trainer.setup.run_dir.parent / "lora--1_chkpt")


def test_resume_takes_the_anchor_of_the_interrupted_run(make_trainer):
    trainer = make_trainer("run", use_craft=True, max_steps=1)
    trainer.fit()
    resumed = make_trainer("run", use_craft=True, max_steps=2, resume=True)
    kept, current = resumed.retention.weights.state_dict(), weights(resumed)
    assert all(torch.equal(kept[name], tensor) for name, tensor in trainer.retention.weights.state_dict().items())
    assert not all(torch.equal(kept[name], current[name]) for name in kept)  # a new snapshot would equal them
    assert tensors_hash(kept) == tensors_hash(trainer.retention.weights.state_dict())


def test_a_changed_anchor_file_is_refused(make_trainer):
    trainer = make_trainer("run", use_craft=True, max_steps=1)
    trainer.fit()
    file = trainer.setup.run_dir.parent / "run--1_chkpt" / "training_state" / "craft_anchor.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match="craft_anchor.safetensors: sha256 is"):
        make_trainer("run", use_craft=True, max_steps=2, resume=True)
    (file.parents[1] / LISTING).unlink()  # as in an older folder
    with pytest.raises(ValueError, match="craft_anchor.safetensors is not the anchor"):
        make_trainer("run", use_craft=True, max_steps=2, resume=True)


def test_resume_without_the_anchor_is_refused(make_trainer):
    trainer = make_trainer("run", use_craft=True, max_steps=1)
    trainer.fit()
    (trainer.setup.run_dir.parent / "run--1_chkpt" / "training_state" / "craft_anchor.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="craft_anchor"):
        make_trainer("run", use_craft=True, max_steps=2, resume=True)


@pytest.mark.slow
def test_overfitting_sixteen_samples_reaches_an_l1_below_two_percent(make_trainer, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    trainer = make_trainer(
        "overfit", batch_size=16, max_steps=650, save_freq=1000, image_aug=False, learning_rate=4e-3,
        lr_schedule="cosine", lr_warmup_steps=0.05, weight_decay=0.0, max_grad_norm=1.0, wandb_log_freq=50,
    )  # fmt: skip
    trainer.sampler = EpochSampler(16, seed=7)
    trainer.fit()
    assert metrics(trainer)[-1]["VLA Train/Loss"] < 0.02
