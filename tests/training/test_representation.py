"""Measuring a trained policy against its start: CKA, probes, and what each change of a policy moves."""

import copy
import importlib.util
import json
import sys
from pathlib import Path

import micro
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from prismatic.command_line import parse
from prismatic.models.presets import PRESETS
from prismatic.training import representation_passes
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.interpolation import save_policy
from prismatic.training.linear_cka import linear_cka
from prismatic.training.linear_probe import LinearProbe, ProbeTargets, probe_features, r_squared
from prismatic.training.loop import Trainer
from prismatic.training.representation import (
    MeasuredSamples,
    MeasureSettings,
    evenly_spread,
    measure_retention,
    write_report,
)
from prismatic.training.setup import build_setup
from prismatic.vla.datasets.formats import open_data_set
from prismatic.vla.datasets.registry import get_data_set_config

NAME = "libero_mini_no_noops"
FEW = MeasureSettings(max_samples=12, batch_size=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of the micro model after one step."""
    root = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", micro.MICRO)
        plain = {name: value for name, value in micro.flags(root).items() if "craft" not in name}
        flags = plain | {"max_steps": 1, "save_training_state": False}
        cfg = FinetuneConfig(**flags)
        Trainer(cfg, build_setup(cfg), Accelerator(cpu=True)).fit()
    return root / "run--1_chkpt"


@pytest.fixture
def start(folder):
    return load_checkpoint(folder)


def changed(start, part: str, amount: float = 0.3):
    """A copy of the policy with other weights in one of its parts."""
    other = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.model.get_submodule(part).parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += amount * noise * parameter.std(correction=0)
    return other


def measure(start, trained, settings=FEW):
    return measure_retention(start, trained, str(micro.DATA), NAME, settings)


def drifts(report) -> list[float]:
    return [value for source in report["drift"].values() for parts in source.values() for value in parts.values()]


# ------------------------------------------------------------------------------------------------ CKA and probes


@pytest.mark.parametrize("samples", [10, 200])  # fewer than features and more: two ways to compute it
def test_cka_is_one_for_rotated_scaled_and_shifted_features(samples):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(samples, 20))
    rotation = np.linalg.qr(rng.normal(size=(20, 20)))[0]
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1, abs=1e-12)
    assert linear_cka(x, x * np.logspace(-3, 0, 20)) < 0.9


def test_cka_is_the_formula_and_small_for_independent_features():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(30, 8)), rng.normal(size=(30, 40))
    cx, cy = x - x.mean(0), y - y.mean(0)
    expected = np.linalg.norm(cy.T @ cx) ** 2 / (np.linalg.norm(cx.T @ cx) * np.linalg.norm(cy.T @ cy))
    assert linear_cka(x, y) == pytest.approx(expected, rel=1e-10)
    assert linear_cka(*rng.normal(size=(2, 20_000, 5))) < 1e-3


def test_cka_of_constant_features_is_undefined():
    x = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    assert linear_cka(x, np.full((7, 4), 0.1, np.float32)) is None
    with pytest.raises(ValueError, match="7 and 6 samples"):
        linear_cka(x, x[:6])


def synthetic(samples: int, width: int) -> tuple[np.ndarray, ProbeTargets]:
    """Features, and targets that are linear in them: position, and three instructions in three directions."""
    rng = np.random.default_rng(2)
    instruction = np.arange(samples) % 3
    features = rng.normal(size=(samples, width)) * np.linspace(0.1, 10, width) + 100
    features[:, :3] += 20 * np.eye(3)[instruction]
    position = (features[:, 3:] - 100) @ rng.normal(size=(width - 3, 3)) * 0.01
    return features, ProbeTargets(position, instruction, np.arange(samples) // 6 % 2 == 1)


def test_the_probe_reads_linear_targets_on_held_out_episodes_and_nothing_else():
    features, targets = synthetic(600, 12)
    found = probe_features(features, features, targets, 7)
    assert found["start"] == found["trained"] == found["stale"]
    assert found["start"]["position_r2"]["mean"] > 0.95 and found["start"]["instruction_accuracy"] > 0.95
    assert found["chance_accuracy"] == pytest.approx(1 / 3, abs=0.01)
    assert (found["fitted_samples"], found["tested_samples"]) == (300, 300)
    noise = np.random.default_rng(3).normal(size=features.shape)
    nothing = probe_features(noise, noise, targets, 7)["start"]
    assert nothing["position_r2"]["mean"] < 0.1 and nothing["instruction_accuracy"] < 0.45


def test_a_stale_probe_fails_on_rotated_features_where_a_refitted_one_does_not():
    features, targets = synthetic(600, 12)
    rotated = features @ np.linalg.qr(np.random.default_rng(4).normal(size=(12, 12)))[0]
    found = probe_features(features, rotated, targets, 7)
    assert found["trained"]["position_r2"]["mean"] > 0.9
    assert found["stale"]["position_r2"]["mean"] < 0.2


def test_the_probe_is_the_minimum_of_its_objective_in_both_forms():
    rng = np.random.default_rng(5)
    for samples, width in ((9, 30), (30, 9)):
        x, y = rng.normal(size=(samples, width)), rng.normal(size=(samples, 2))
        x[:, 0] = 0.1  # constant: not used, whatever it is later
        probe = LinearProbe(x, y, penalty=0.3)
        z = np.delete((x - x.mean(0)) / x.std(0), 0, axis=1)
        weights = np.linalg.solve(z.T @ z / samples + 0.3 * np.eye(width - 1), z.T @ (y - y.mean(0)) / samples)
        np.testing.assert_allclose(probe.predict(x), z @ weights + y.mean(0), atol=1e-10)
        moved = x.copy()
        moved[:, 0] = 1e6
        np.testing.assert_array_equal(probe.predict(moved), probe.predict(x))


def test_r_squared_of_mean_perfect_and_constant():
    y = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert r_squared(y, y) == [1.0, None]
    assert r_squared(y, np.full_like(y, 2.0))[0] == pytest.approx(0)


# ------------------------------------------------------------------------------------------------ samples


@pytest.mark.parametrize("limit", [1, 5, 7, 12, 29, 30, 99, 0])
def test_samples_are_spread_evenly_over_episodes_and_steps(limit):
    counts = [3, 10, 17]
    chosen = evenly_spread(counts, limit, seed=1)
    assert len(set(chosen)) == len(chosen) == min(limit or 30, 30) and chosen == sorted(chosen)
    episodes = np.searchsorted(np.cumsum(counts), chosen, side="right")
    shares = np.bincount(episodes, minlength=3)
    assert all(share == count or share >= shares.max() - 1 for share, count in zip(shares, counts, strict=True))
    for episode in range(3):
        steps = np.diff([c for c, e in zip(chosen, episodes, strict=True) if e == episode])
        assert len(steps) == 0 or steps.max() - steps.min() <= 1
    assert evenly_spread(counts, limit, seed=1) == chosen


def test_targets_are_recorded_positions_and_half_of_the_episodes_is_held_out(start):
    samples = MeasuredSamples(start, start, str(micro.DATA), NAME, MeasureSettings(max_samples=30))
    targets = samples.targets()
    source = open_data_set(str(micro.DATA), NAME, get_data_set_config(NAME), "train", 2)
    ids = [key for _, batch in samples.batches(7) for key in batch["sample_ids"]]
    for (episode, step), position in zip(ids, targets.position, strict=True):
        np.testing.assert_array_equal(position, source.state(episode)[step, :3])
    episodes = np.array([episode for episode, _ in ids])
    for instruction in range(3):
        tested = set(episodes[(targets.instruction == instruction) & targets.held_out])
        fitted = set(episodes[(targets.instruction == instruction) & ~targets.held_out])
        assert len(tested) == len(fitted) == 1 and not tested & fitted


def test_features_do_not_depend_on_proprioception(start):
    batch, _ = next(MeasuredSamples(start, start, str(micro.DATA), NAME, FEW).batches(4))
    with pytest.raises(KeyError, match="proprio"):
        start.model({name: value for name, value in batch.items() if name != "proprio"})
    with torch.no_grad():
        features, _ = representation_passes._run(start.model, {n: v for n, v in batch.items() if n != "proprio"})
        expected, _ = representation_passes._run(start.model, batch)
    assert all(torch.equal(features[name].f, expected[name].f) for name in expected)


def test_images_are_cropped_as_in_the_evaluation(start):
    start.manifest["image_spec"]["center_crop"] = True
    cropped = next(MeasuredSamples(start, start, str(micro.DATA), NAME, FEW).batches(4))
    start.manifest["image_spec"]["center_crop"] = False
    whole = next(MeasuredSamples(start, start, str(micro.DATA), NAME, FEW).batches(4))
    assert not torch.equal(cropped[0]["pixel_values"], whole[0]["pixel_values"])
    assert torch.equal(cropped[0]["pixel_values"], cropped[1]["pixel_values"])
    assert torch.equal(cropped[0]["actions"], whole[0]["actions"])


# ------------------------------------------------------------------------------------------------ policies


def test_a_policy_against_itself(start):
    report = measure(start, copy.deepcopy(start))
    assert set(drifts(report)) == {0.0} and len(drifts(report)) == 18
    cka = report["cka"]
    assert cka["queries_by_layer"][0] is None  # the input of the action queries is learned, the same in every sample
    values = [cka["raw"], cka["aq"], *cka["patches_by_layer"], *cka["queries_by_layer"][1:]]
    assert values == pytest.approx([1.0] * 7, abs=1e-9) and len(cka["patches_by_layer"]) == 3
    assert report["probe"]["start"] == report["probe"]["trained"] == report["probe"]["stale"]
    assert len(set(report["action_l1"].values())) == 1
    assert (report["data"]["samples"], report["data"]["episodes"], report["data"]["instructions"]) == (12, 6, 3)
    described = report["checkpoints"]
    assert described["trained"]["same_statistics"] is True
    assert described["trained"]["policy_sha256"] == described["start"]["policy_sha256"]


def test_action_l1_is_the_error_of_the_policy_itself(start):
    report = measure(start, changed(start, "vla"))
    errors = []
    for policy, key in ((start, 0), (changed(start, "vla"), 1)):
        batches = MeasuredSamples(start, policy, str(micro.DATA), NAME, FEW).batches(5)
        with torch.no_grad():
            rows = [(policy.model(b[key]).actions - b[key]["actions"]).abs().mean(dim=(1, 2)) for b in batches]
        errors.append(torch.cat(rows).mean().item())
    assert [report["action_l1"][name] for name in ("start", "trained")] == pytest.approx(errors, rel=1e-5)


def test_another_vlm_drifts_and_batches_do_not_matter(start):
    report = measure(start, changed(start, "vla"))
    assert min(drifts(report)) > 0
    assert report["cka"]["raw"] < 0.99 and report["cka"]["aq"] < 0.99
    assert report["probe"]["start"] != report["probe"]["stale"] != report["probe"]["trained"]
    # Head and projector are those of the start model, so its head is the trained one.
    assert report["action_l1"]["start_head"] == report["action_l1"]["trained"] != report["action_l1"]["start"]
    again = measure(start, changed(start, "vla"), MeasureSettings(max_samples=12, batch_size=5))
    assert drifts(again) == pytest.approx(drifts(report), rel=1e-4)
    metrics = report["drift"]["original"]["mse"]
    assert metrics["total"] == pytest.approx((metrics["raw"] + metrics["aq"]) / 2, rel=1e-5)


@pytest.mark.parametrize("part", ["action_head", "proprio_projector"])
def test_another_head_alone_does_not_drift_and_leaves_the_start_head_its_error(start, part):
    report = measure(start, changed(start, part))
    assert set(drifts(report)) == {0.0}
    errors = report["action_l1"]
    assert errors["start_head"] == errors["start"] != errors["trained"]
    assert report["checkpoints"]["trained"]["policy_sha256"] != report["checkpoints"]["start"]["policy_sha256"]


# ------------------------------------------------------------------------------------------------ statistics, errors


def test_each_policy_is_measured_in_its_own_units(start):
    trained = copy.deepcopy(start)
    action = trained.statistics[NAME]["action"]
    action["q01"], action["q99"] = ([4 * value for value in action[key]] for key in ("q01", "q99"))
    report = measure(start, trained)
    assert report["checkpoints"]["trained"]["same_statistics"] is False
    errors = report["action_l1"]
    assert errors["start"] == errors["start_head"] != errors["trained"]
    # Fine-tuned on another data set only: the start model's entry serves both.
    trained.statistics = {"libero_other": trained.statistics[NAME]}
    assert len(set(measure(start, trained)["action_l1"].values())) == 1


def test_missing_statistics_name_file_and_keys_and_can_be_chosen(start):
    trained = copy.deepcopy(start)
    start.statistics = {"libero_other": start.statistics[NAME]}
    message = rf"run--1_chkpt/dataset_statistics.json: no statistics of '{NAME}'.*\['libero_other'\].*--unnorm_key"
    with pytest.raises(ValueError, match=message):
        measure(start, trained)
    report = measure(start, trained, MeasureSettings(max_samples=6, unnorm_key="libero_other"))
    assert report["checkpoints"]["start"]["statistics_key"] == "libero_other"
    assert report["checkpoints"]["trained"]["statistics_key"] == NAME


def test_policies_that_do_not_belong_together_and_bad_settings_are_refused(start):
    other = copy.deepcopy(start)
    other.model.legacy_slices = True
    with pytest.raises(ValueError, match="run--1_chkpt: legacy_slices is True, expected False"):
        measure(start, other)
    other = copy.deepcopy(start)
    other.model.vla.projector.fc1 = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"shape of vla.projector.fc1.weight is \(3, 3\), expected"):
        measure(start, other)
    with pytest.raises(ValueError, match="names 2 data sets, expected one"):
        measure_retention(start, start, str(micro.DATA), f"{NAME},libero_goal", FEW)
    for name in ("max_samples", "batch_size"):
        with pytest.raises(ValueError, match=f"--{name} is -1"):
            MeasureSettings(**{name: -1})


def test_without_a_second_episode_of_an_instruction_there_is_no_probe():
    features, targets = synthetic(12, 5)
    alone = ProbeTargets(targets.position, targets.instruction, np.zeros(12, bool))
    assert probe_features(features, features, alone, 7) is None


def test_a_report_is_whole_or_absent(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_report({"value": float("nan")}, tmp_path / "deep" / "out.json")
    write_report({"value": 1}, tmp_path / "deep" / "out.json")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.json"]


# ------------------------------------------------------------------------------------------------ command line


def run_script(monkeypatch, arguments: str) -> None:
    path = Path(__file__).parents[2] / "vla-scripts" / "measure_retention.py"
    spec = importlib.util.spec_from_file_location("measure_retention", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "measure_retention", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.measure(parse(module.MeasureConfig, arguments.split()))


def test_the_command_line_writes_everything_once(folder, start, tmp_path, monkeypatch, capsys):
    trained = save_policy(changed(start, "vla"), tmp_path / "trained")
    out = tmp_path / "new" / "out.json"
    arguments = (
        f"--checkpoint {trained} --start {folder} --data_root_dir {micro.DATA} --dataset_name {NAME} "
        f"--max_samples 12 --batch_size 8 --device cpu --output {out}"
    )
    run_script(monkeypatch, arguments)
    report = json.loads(out.read_text())
    flags = report.pop("flags")
    assert (flags["max_samples"], flags["checkpoint"]) == (12, str(trained))
    assert report == measure(load_checkpoint(folder), load_checkpoint(trained))
    assert report["checkpoints"]["start"]["step"] == 1 and "torch" in report["versions"]
    assert "relative drift" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="--output .*out.json exists"):
        run_script(monkeypatch, arguments)
    with pytest.raises(ValueError, match="--start is missing"):
        run_script(monkeypatch, f"--checkpoint {trained} --output x.json --dataset_name {NAME}")
