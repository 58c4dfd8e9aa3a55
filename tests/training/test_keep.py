"""Signals and memories in real runs: what is reached and drawn, resume, landing, replay, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import micro
import numpy as np
import pytest
import torch

from prismatic.craft import SignalKind
from prismatic.models.presets import PRESETS
from prismatic.training import loop
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.flags import MEMORIES as NAMES
from prismatic.training.retention.instructions import read_instructions
from prismatic.training.retention.memory import MEMORY_KINDS, DataMemory, InstructionMemory, Memory, take_rows
from prismatic.training.retention.signals import SIGNALS
from prismatic.training.step import optimizer_step

DATA = str(micro.DATA / "libero_mini_no_noops")
OLD = ["open the oven", "Close the oven"]
TIMINGS = micro.MEASURED
MEMORIES = {name: {"craft_memory": name} for name in NAMES} | {
    "data": {"craft_memory": "data", "craft_memory_data": DATA},
    "both": {"craft_memory": "instructions,data", "craft_memory_data": DATA},
}


@pytest.fixture
def make(make_trainer, monkeypatch, tmp_path):
    """Runs of a small policy with a trained head that was trained on other instructions."""
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    start = make_trainer("start", max_steps=1, save_training_state=False)
    start.fit()
    folder = tmp_path / "runs" / "start--1_chkpt"
    manifest = json.loads((folder / "craft_checkpoint.json").read_text())
    manifest["instructions"] = {"old_set": OLD}
    (folder / "craft_checkpoint.json").write_text(json.dumps(manifest))
    (folder / "files.json").unlink(missing_ok=True)

    def build(name: str = "run", **flags):
        return make_trainer(name, **({"config_file_path": str(folder), "seed": 3} | flags))

    return build


def keep(**flags) -> dict:
    return {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": 1e-3} | flags


def weights(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters()}


def gradients(trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in trainer.bare_model.named_parameters() if p.grad is not None}


def metrics(trainer) -> list[dict]:
    lines = (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMINGS} for line in lines]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert [n for n, value in first.items() if not torch.equal(value, second[n])] == []


def perturb(trainer, size: float = 0.02) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in trainer.bare_model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))


def test_a_name_has_a_class_and_a_class_a_name():
    assert set(MEMORY_KINDS) == set(NAMES)
    assert set(SIGNALS) == set(SignalKind)


# Every memory, and with both of them every tuning mode in which a pass may draw or share something.
FULL, LORA, FROZEN_TOWERS = {}, {"use_lora": True, "lora_rank": 2, "lora_dropout": 0.3}, {"freeze_vision": True}
BF16 = {"mixed_precision": "bf16"}


@pytest.mark.parametrize(
    ("memory", "tuning"),
    [*((memory, FULL) for memory in MEMORIES), *(("both", tuning) for tuning in (LORA, FROZEN_TOWERS, BF16))],
)
@pytest.mark.parametrize("signal", [kind.value for kind in SignalKind])
def test_the_first_step_is_a_plain_one(make, signal, memory, tuning):
    """L_ret(theta_0) is exactly zero, and measuring it leaves gradients and random numbers alone."""
    results = {}
    for name, flags in {"plain": {}, "kept": keep(craft_signal=signal, **MEMORIES[memory])}.items():
        trainer = make(name, max_steps=1, **tuning, **flags)
        trainer.fit()
        results[name] = weights(trainer)
    assert metrics(trainer)[0]["CRaFT/Retention Loss"] == 0.0
    assert_same(results["kept"], results["plain"])


@pytest.mark.parametrize("tuning", [{}, {"use_lora": True, "lora_rank": 2}, {"use_fz": True}, {"freeze_vision": True}])
@pytest.mark.parametrize("signal", ["features", "actions"])
def test_what_changes_the_signal_is_reached_and_nothing_else(make, monkeypatch, signal, tuning):
    trainer = make(**keep(craft_signal=signal, craft_memory="instructions", **tuning))
    perturb(trainer)
    batch = next(trainer.batches())
    constraint = trainer.retention.constraint
    constraint.dual.controller.price = lambda act, ret: 1.0
    held = trainer.retention.memories[0].batch(batch)
    named = {n: p for n, p in trainer.bare_model.named_parameters() if p.requires_grad}
    loss = constraint.signal.loss(constraint.current(held), constraint.reference(held))
    by_autograd = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    reached = {n for n, g in zip(named, by_autograd, strict=True) if g is not None}
    found, plain = {}, make("plain", **tuning)
    perturb(plain)
    for target, run in ((found, trainer), (expected := {}, plain)):
        with monkeypatch.context() as patch:
            patch.setattr(run.optimizer, "step", lambda t=target, r=run: t.update(gradients(r)))
            optimizer_step(run.step_context(), [batch], 0)
    assert set(constraint.gradient.names) == reached
    # Adapters are switched off for the reference: only what they do not cover is kept.
    assert set(trainer.retention.weights.state_dict()) == {n for n in reached if "lora_" not in n}
    changed = {n for n, g in found.items() if not torch.equal(g, expected[n])}
    assert changed <= reached  # the head keeps its action gradient bit for bit when the signal is the features
    assert {n for n in reached if by_autograd[list(named).index(n)].any()} == changed
    assert any(n.startswith("action_head.") for n in reached) == (signal == "actions")


def test_memory_of_data_equals_the_batch_when_it_holds_the_same_samples(make):
    results = []
    for name in ("batch", "data"):
        trainer = make(name, **keep(craft_memory_batch_size=1, max_steps=4, craft_every=1, **MEMORIES[name]))
        size, cfg = trainer.cfg.batch_size, trainer.cfg
        if name == "data":  # in the order of the training
            same = DataMemory(trainer.setup.dataset, trainer._collator(), size, cfg.seed)
            same.name = "batch"
            trainer.retention.memories = [same]
        else:
            trainer.retention.memories = [Memory(size)]
        trainer.fit()
        results.append((weights(trainer), [line["CRaFT/Retention Loss"] for line in metrics(trainer)]))
    assert results[0][1] == results[1][1] and results[0][1][-1] > 0
    assert_same(results[0][0], results[1][0])


class TestInstructions:
    @pytest.fixture
    def memory(self, make):
        trainer = make(**keep())
        return lambda size=None, seed=3: InstructionMemory(OLD, trainer._collator(), seed, size), trainer

    def test_images_and_state_are_those_of_the_batch_and_the_prompt_is_old(self, memory):
        build, trainer = memory
        batch = next(trainer.batches())
        held = build().batch(batch)
        assert torch.equal(held["pixel_values"], batch["pixel_values"])
        assert torch.equal(held["proprio"], batch["proprio"])
        assert set(held["instructions"]) <= set(OLD)
        expected = trainer._collator().tokenize(held["instructions"])
        assert all(torch.equal(held[name], ids) for name, ids in expected.items())

    def test_draws_depend_on_the_sample_and_the_seed_alone(self, memory):
        build, trainer = memory
        batches = trainer.batches()
        both = [next(batches) for _ in range(8)]
        alone = {}
        for batch in both:
            for row in (1, 0):  # another order, other batches
                part = take_rows(batch, [row])
                alone[part["keys"][0]] = build().batch(part)["instructions"][0]
        for batch in both:
            assert build().batch(batch)["instructions"] == [alone[key] for key in batch["keys"]]
        assert set(alone.values()) == set(OLD)
        assert [build(seed=4).batch(b)["instructions"] for b in both] != [
            build().batch(b)["instructions"] for b in both
        ]

    def test_a_smaller_memory_is_the_first_rows_and_a_larger_one_goes_round(self, memory):
        build, trainer = memory
        batch = next(trainer.batches())
        small, large = build(1).batch(batch), build(5).batch(batch)
        assert len(small["instructions"]) == 1 and len(large["instructions"]) == 5
        assert small["instructions"] == large["instructions"][:1]
        assert torch.equal(large["proprio"], batch["proprio"][[0, 1, 0, 1, 0]])


def test_an_instruction_that_the_data_show_is_asked_on_their_images_alone(make, tmp_path, capsys):
    shown = "pick up the bbq sauce and place it in the basket"
    file = tmp_path / "old.txt"
    file.write_text(f"{shown.upper()}\nopen the oven\n")
    flags = {"craft_memory_data": TestReplay.OLD_DATA, "craft_memory_instructions": str(file)}
    named = {memory.name: memory for memory in make(**keep(**flags)).retention.memories}
    assert named["instructions"].instructions == ["open the oven"] and "data" in named
    assert "CRaFT: 1 of 2 old instructions are in --craft_memory_data and held there alone" in capsys.readouterr().out
    file.write_text(shown)
    assert [memory.name for memory in make(**keep(**flags)).retention.memories] == ["data"]


def test_a_memory_of_data_sets_side_by_side_shows_all_of_them(make):
    old = Path(TestReplay.OLD_DATA)
    folders = [str(old), str(old.with_name("libero_spatial_scripted_no_noops"))]
    flags = {"craft_memory": "data", "craft_memory_data": ",".join(folders)}
    alone = [make(**keep(**flags | {"craft_memory_data": folder})).retention.memories[0] for folder in folders]
    both = make(**keep(**flags)).retention.memories[0]
    assert both.shown() == alone[0].shown() | alone[1].shown() and len(both.shown()) > len(alone[0].shown())
    assert both.dataset.group_sizes == [size for memory in alone for size in memory.dataset.group_sizes]
    assert list(both.dataset.data_set_names) == [Path(folder).name for folder in folders]
    with pytest.raises(ValueError, match="found several folders, expected folders side by side"):
        make(**keep(**flags | {"craft_memory_data": f"{folders[0]},{MEMORIES['data']['craft_memory_data']}"}))


@pytest.mark.parametrize(("memory", "more"), [("data", {"ema_decay": 0.9}), ("both", {})])
def test_resumed_equals_uninterrupted(make, memory, more):
    flags = keep(max_steps=5, save_freq=3, craft_every=2, grad_accumulation_steps=2, **more, **MEMORIES[memory])
    whole = make("run", **flags)
    whole.fit()
    expected, lines = weights(whole), metrics(whole)
    resumed = make("run", **flags, resume=True, resume_step=3)
    resumed.fit()
    assert_same(weights(resumed), expected)
    assert metrics(resumed) == lines
    assert resumed.retention.state_dict() == whole.retention.state_dict()


def test_gradient_checkpointing_changes_no_weight(make):
    results = []
    for checkpointing in (False, True):
        trainer = make(f"c{checkpointing}", gradient_checkpointing=checkpointing, **keep(max_steps=3))
        trainer.fit()
        results.append(weights(trainer))
    assert_same(*results)


def test_out_of_reach_is_said_once_logged_and_recorded(make, capsys):
    trainer = make(**keep(craft_retention_budget=1e-9, max_steps=4, craft_every=1))
    trainer.retention.constraint.dual.controller.patience = 1
    trainer.retention.constraint.dual.controller.z = 1.0
    trainer.fit()
    said = capsys.readouterr().out
    assert said.count("is out of reach: the drift stays at") == 1
    assert "CRaFT: budget 1e-09 (RMS of normalised actions) out of reach" in said
    assert metrics(trainer)[-1]["CRaFT/Out Of Reach"] == 1.0
    # A controller that had to pull with all it has, and meets the budget by it, has met it.
    trainer.retention.config = replace(trainer.retention.config, retention_budget=trainer.retention.drift / 1.09)
    assert " met: averaged drift" in trainer.retention.verdict()
    trainer.retention.config = replace(trainer.retention.config, retention_budget=trainer.retention.drift / 1.11)
    assert " out of reach: averaged drift" in trainer.retention.verdict()


class TestLanding:
    @pytest.fixture(autouse=True)
    def few_samples(self, monkeypatch):
        monkeypatch.setattr(loop, "SAMPLES", 6)

    @pytest.mark.parametrize("tuning", [{}, {"use_lora": True, "lora_rank": 2}])
    def test_the_last_checkpoint_meets_the_budget_and_training_could_go_on(self, make, capsys, tuning):
        flags = keep(craft_land=True, craft_retention_budget=0.1, max_steps=3, use_val_set=True, **tuning)
        trainer = make("landed", **flags)
        trainer.fit()
        said = capsys.readouterr().out
        assert "CRaFT: landed at " in said and "CRaFT: budget 0.1 (RMS of normalised actions) exceeded" in said
        policy = load_checkpoint(trainer.setup.run_dir.parent / "landed--3_chkpt").model
        of_policy = trainer.validator.measure(policy)["VLA Val/Loss"]
        assert metrics(trainer)[-1]["VLA Val/Loss"] == pytest.approx(of_policy, rel=1e-4)
        trained = {n: p.detach().clone() for n, p in trainer.bare_model.named_parameters() if p.requires_grad}
        with trainer.landing.policy_weights():
            for name, p in trainer.bare_model.named_parameters():
                if "lora_A" in name:
                    assert torch.equal(p, trained[name])
                elif "lora_B" in name:
                    assert torch.equal(p, trained[name] * trainer.landing.scale)
        assert 0 < trainer.landing.scale < 1
        assert 0.05 < trainer.landing.drift <= 0.1
        folder = trainer.setup.run_dir.parent / "landed--3_chkpt"
        loaded = load_checkpoint(folder)
        assert loaded.manifest["craft"]["landing"] == {"scale": trainer.landing.scale, "drift": trainer.landing.drift}
        batch = next(trainer.batches())
        with torch.no_grad():
            saved = loaded.model(batch).actions
            trained = trainer.bare_model.eval()(batch).actions
            with trainer.landing.policy_weights():
                landed = trainer.bare_model(batch).actions
            start = trainer.retention.constraint.reference(batch)
        torch.testing.assert_close(saved, landed, rtol=1e-4, atol=1e-5)
        assert (landed - start).square().mean() < (trained - start).square().mean()
        # The weights that training goes on with are not the landed ones.
        resumed = make("landed", **flags | {"max_steps": 4}, resume=True)
        assert_same(weights(resumed), weights(trainer))

    def test_a_run_within_its_budget_is_left_as_it_is(self, make):
        trainer = make(**keep(craft_land=True, craft_retention_budget=10.0, max_steps=2))
        trainer.fit()
        assert trainer.landing.scale == 1.0


class TestReplay:
    OLD_DATA = str(micro.DATA.parents[2] / "datasets" / "rlds" / "libero_object_scripted_no_noops")

    def flags(self, **more) -> dict:
        return {"replay_data": self.OLD_DATA, "replay_fraction": 0.5, "max_steps": 3, "batch_size": 4} | more

    def test_old_samples_come_with_their_labels_or_with_those_of_the_start(self, make):
        trainer = make("data", **self.flags())
        batch = next(b for b in trainer.batches() if 0 < sum(b["is_replay"]) < 4)
        assert trainer.retention is None
        distilled = make("start_labels", **self.flags(replay_labels="start"))
        perturb(distilled)
        changed = distilled.retention.before_pass(batch, 1.0, 1.0)["actions"]
        old = torch.tensor(batch["is_replay"])
        assert torch.equal(changed[~old], batch["actions"][~old])
        with torch.no_grad():
            start = trainer.bare_model.eval()(take_rows(batch, old.nonzero().flatten().tolist())).actions
        torch.testing.assert_close(changed[old], start, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("labels", ["data", "start"])
    def test_resumed_equals_uninterrupted(self, make, labels):
        flags = self.flags(replay_labels=labels, max_steps=4, save_freq=2)
        whole = make("run", **flags)
        whole.fit()
        resumed = make("run", **flags, resume=True, resume_step=2)
        resumed.fit()
        assert_same(weights(resumed), weights(whole))
        assert metrics(resumed)[-1]["samples_seen"] == 16  # replayed samples count


class TestBadInput:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "empty, expected one instruction a line"),
            ("\n  \n", "empty, expected one instruction a line"),
        ],
    )
    def test_an_instructions_file_that_cannot_be_used(self, tmp_path, text, message):
        file = tmp_path / "old.txt"
        file.write_text(text)
        with pytest.raises(ValueError, match=f"--craft_memory_instructions {file}: {message}"):
            read_instructions(str(file))

    def test_repetitions_are_left_out_with_a_warning(self, tmp_path, capsys):
        file = tmp_path / "old.txt"
        file.write_text("\ufeffopen the oven\nclose it\n Open  the oven \n", encoding="utf-8")
        assert read_instructions(str(file)) == ["open the oven", "close it"]
        assert "'Open the oven' stands there more than once" in capsys.readouterr().out

    def test_an_instruction_that_is_too_long_for_the_tokenizer(self, make, tmp_path):
        file = tmp_path / "old.txt"
        file.write_text("open the oven\n" + "and then open it again " * 2000)
        with pytest.raises(
            ValueError, match="--craft_memory instructions: prompt of 'and then .* the tokenizer allows"
        ):
            make(**keep(craft_memory_instructions=str(file)))

    def test_a_missing_file_and_one_that_is_not_text(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="--craft_memory_instructions no/file: no such file"):
            read_instructions("no/file")
        (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="not UTF-8 text"):
            read_instructions(str(tmp_path / "x"))

    def test_instructions_of_the_new_task_are_dropped_with_a_warning(self, make, tmp_path, capsys):
        trainer = make("probe")
        new = next(iter(trainer.setup.dataset.manifest()["libero_mini_no_noops"]["episodes"]))
        file = tmp_path / "old.txt"
        file.write_text(f"{new.upper()}\nopen the oven\n")
        kept = make(**keep(craft_memory_instructions=str(file))).retention.memories[0].instructions
        assert kept == ["open the oven"]
        assert "is an instruction of the new task and is left out" in capsys.readouterr().out
        file.write_text(new)
        with pytest.raises(ValueError, match="expected at least one old instruction"):
            make(**keep(craft_memory_instructions=str(file)))

    def test_a_start_without_recorded_instructions_and_a_new_head(self, make_trainer, monkeypatch, tmp_path):
        monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
        with pytest.raises(ValueError, match="--craft_signal actions: the start tiny has a new action head"):
            make_trainer("x", **keep(craft_memory="batch"))
        with pytest.raises(ValueError, match="tiny records no instructions it was trained on; give them with"):
            make_trainer("x", **keep(craft_signal="features"))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"craft_memory": "data"}, "--craft_memory data needs --craft_memory_data FOLDER"),
            ({"craft_memory": "old"}, "craft_memory is 'old', expected one of batch, data, instructions"),
            ({"craft_memory": ""}, "craft_memory is '', expected one of batch, data, instructions"),
            ({"craft_memory": "batch", "craft_memory_batch_size": 9}, "--craft_memory_batch_size is 9, but the memory"),
            ({"craft_memory": "batch,batch"}, "names a memory twice"),
            ({"craft_memory": "batch", "craft_memory_data": "x"}, "--craft_memory_data x needs --craft_memory data"),
            ({"craft_memory_batch_size": 0}, "craft_memory_batch_size is 0, expected at least 1"),
            ({"craft_land": True, "ema_decay": 0.9}, "--craft_land True excludes --ema_decay"),
            ({"craft_land": True, "craft_retention_budget": np.inf}, "needs a finite --craft_retention_budget"),
            ({"craft_retention_budget": 0.0}, "--craft_retention_budget is 0.0, expected more than 0"),
            ({"craft_retention_budget": np.nan}, "--craft_retention_budget is nan, expected more than 0"),
            ({"craft_anchor_type": "aq_only"}, "--craft_anchor_type aq_only is about features"),
            ({"craft_retention_metric": "cosine"}, "--craft_retention_metric cosine is about features"),
            ({"craft_dual_lr": 0.5}, "--craft_dual_lr 0.5 has no effect: --craft_dual share does not read it"),
            ({"craft_fixed_lambda": 5.0}, "--craft_fixed_lambda 5.0 has no effect"),
            ({"craft_dual": "ascent", "craft_share_limit": 3.0}, "--craft_share_limit 3.0 has no effect"),
            (
                {"craft_projection_rule": "barrier", "craft_projection_granularity": "global"},
                "--craft_projection_rule barrier reads no multiplier",
            ),
            ({"craft_probe_size": 8}, "--craft_probe_size 8 has no effect: it needs --craft_probe_data"),
        ],
    )
    def test_flags_that_do_not_fit(self, flags, message):
        with pytest.raises(ValueError, match=message):
            FinetuneConfig(**keep(**flags))

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({"lora_rank": 8}, "--lora_rank 8 has no effect: it needs --use_lora True"),
            ({"craft_retention_budget": 0.5}, "--craft_retention_budget 0.5 has no effect: it needs --use_craft True"),
            ({"craft_preset": "keep"}, "needs --use_craft True"),
            ({"retention_method": "l2sp", "craft_every": 2}, "--craft_every 2 has no effect"),
            ({"l2sp_weight": 1.0}, "--l2sp_weight 1.0 has no effect: it needs --retention_method l2sp"),
            ({"replay_fraction": 0.5}, "--replay_fraction 0.5 has no effect: it needs --replay_data FOLDER"),
            ({"replay_data": "x", "replay_fraction": 1.0}, "--replay_fraction is 1.0, expected at least 0.001"),
            ({"replay_data": "x", "replay_labels": "start", "use_craft": True}, "--replay_labels start excludes"),
        ],
    )
    def test_flags_without_their_switch(self, flags, message):
        with pytest.raises(ValueError, match=message):
            FinetuneConfig(**flags)

    def test_a_method_without_a_controller(self):
        with pytest.raises(ValueError, match="--craft_dual share has no effect: --retention_method feature_penalty"):
            FinetuneConfig(retention_method="feature_penalty", craft_dual="share")

    @pytest.mark.parametrize("name", ["craft_memory_data", "craft_probe_data", "replay_data"])
    def test_a_folder_that_is_no_data_set_of_this_policy(self, make, tmp_path, name):
        def build(folder):
            kept = {"craft_memory_data": keep, "craft_probe_data": keep, "replay_data": dict}[name]
            return make(**kept(**{name: str(folder)}))

        with pytest.raises(FileNotFoundError, match=f"--{name} no/folder: not a data-set folder"):
            build("no/folder")
        for folder in (tmp_path, tmp_path / "runs" / "start--1_chkpt", micro.DATA):
            with pytest.raises(ValueError, match=rf"--{name} {folder}: not a data set, found .* expected <x.y.z>/"):
                build(folder)

    def test_distilled_replay_needs_a_skill(self, make_trainer, monkeypatch):
        monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
        with pytest.raises(ValueError, match="--replay_labels start: the start tiny has a new action head"):
            make_trainer("new", replay_data=TestReplay.OLD_DATA, replay_labels="start")


def test_a_data_set_that_the_start_knows_keeps_its_units_everywhere(make, capsys):
    """What is kept is in the start's units: in training, memory, probe and replay; other values are said."""
    new, old = "libero_mini_no_noops", "libero_object_scripted_no_noops"
    probe = make("probe", replay_data=TestReplay.OLD_DATA)
    folder = probe.cfg.config_file_path
    known = {name: scaled(probe.setup.statistics[name], 0.01) for name in (new, old)}
    for file in Path(folder).rglob("dataset_statistics*.json"):
        file.write_text(json.dumps(known))
    capsys.readouterr()
    memories = {"craft_memory_data": TestReplay.OLD_DATA, "craft_probe_data": TestReplay.OLD_DATA}
    trainer = make(**keep(replay_data=TestReplay.OLD_DATA, **memories))
    assert trainer.setup.statistics == known
    memory = next(m for m in trainer.retention.memories if m.name == "data")
    assert memory.dataset.normalizers[old].statistics["proprio"]["q99"] == known[old]["proprio"]["q99"]
    said = capsys.readouterr().out
    for flag in ("dataset_name", "craft_memory_data", "craft_probe_data", "replay_data"):
        assert said.count(f"Warning: --{flag}: ") == 1
    assert memory.dataset.settings.image_aug and not memory.dataset.settings.blind_images
    assert make(**keep(blind_images=True, **memories)).retention.memories[1].dataset.settings.blind_images


def scaled(statistics: dict, factor: float) -> dict:
    """The statistics of values `factor` times as large."""
    numbers = ("min", "max", "mean", "std", "q01", "q99")
    groups = {
        name: {k: [factor * x for x in v] if k in numbers else v for k, v in statistics[name].items()}
        for name in ("action", "proprio")
    }
    return statistics | groups


def test_half_precision_trains_with_and_without_old_inputs(make):
    for name, flags in {"plain": {}, "kept": keep(craft_every=1)}.items():
        trainer = make(name, mixed_precision="fp16", **flags)
        before = weights(trainer)
        assert trainer.scaler is not None
        trainer.fit()
        assert all(np.isfinite(line["VLA Train/Loss"]) for line in metrics(trainer))
        assert any(not torch.equal(before[n], p) for n, p in weights(trainer).items())


class TestResumedFlags:
    @pytest.fixture
    def interrupted(self, make):
        flags = keep(max_steps=2)
        make("run", **flags).fit()
        return lambda **changed: make("run", **{**flags, "max_steps": 3, **changed}, resume=True)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"craft_signal": "features"}, "--craft_signal is features, but the interrupted run in .* had actions"),
            ({"craft_dual": "pi"}, "--craft_dual is pi, but the interrupted run in .* had share"),
            ({"craft_memory": "batch"}, "--craft_memory is batch, but the interrupted run in .* had instructions"),
        ],
    )
    def test_what_is_held_must_be_the_same(self, interrupted, changed, message):
        with pytest.raises(ValueError, match=message):
            interrupted(**changed)

    def test_a_constrained_run_does_not_go_on_plain(self, make, interrupted):
        with pytest.raises(ValueError, match="--retention_method is none, but the interrupted run in .* had craft"):
            make("run", max_steps=3, resume=True)

    def test_another_budget_is_said(self, interrupted, capsys):
        interrupted(craft_retention_budget=0.5, craft_log_freq=2)
        said = capsys.readouterr().out
        assert "Warning: --craft_retention_budget is 0.5 from here on, until the checkpoint it was 0.001" in said
        assert said.count("from here on") == 1
