"""Running and recording cells: what is recorded, what is skipped, what a failure costs."""

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from craft_experiments.common_utils import drift_runs
from craft_experiments.common_utils.drift_runs import DRIFT, Cell, DriftConfig, read_runs, run_missing, tail_mean


@pytest.fixture
def cfg(tmp_path):
    return DriftConfig(
        start="start", data_root_dir="data", dataset_name="set", seeds="0,1", max_steps=8, batch_size=1,
        learning_rate=0.1, lr_warmup_steps=0.5, slots=2, work_dir=str(tmp_path / "work"),
        results_dir=str(tmp_path / "results"),
    )  # fmt: skip


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the training program: steps with a measurement in every fourth, failure for seed 13."""
    commands = []

    def train(words, **_):
        commands.append(words)
        flag = dict(zip(words[2::2], words[3::2], strict=True))
        if flag["--seed"] == "13":
            return CompletedProcess(words, 1, "", "no room on the device")
        run = Path(flag["--run_root_dir"]) / flag["--run_id_override"]
        run.mkdir(parents=True, exist_ok=True)
        steps = [
            {"step": s, "VLA Train/Loss": 1 / (s + 1), DRIFT: s // 4 + 0.123456789, "CRaFT/Measured Step": s - s % 4}
            for s in range(int(flag["--max_steps"]))
        ]  # fmt: skip
        (run / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        return CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(drift_runs.subprocess, "run", train)
    return commands


def test_only_steps_that_measured_are_recorded_and_a_recorded_cell_is_not_run_again(cfg, trained):
    cells = [Cell("a, b", 0.1, 0, ("--extra", "1")), Cell("a, b", float("inf"), 1)]
    run_missing(cfg, cells, (DRIFT, "CRaFT/Out Of Reach"))
    first, second = read_runs(Path(cfg.results_dir))
    assert (first["measured_steps"], first[DRIFT], first["CRaFT/Out Of Reach"]) == (
        [0, 4],
        [0.12346, 1.1235],
        [None] * 2,
    )
    assert len(first["all_losses"]) == cfg.max_steps
    assert (first["achieved"], first["loss"]) == pytest.approx((1.1235, (1 / 7 + 1 / 8) / 2), abs=1e-6)
    assert (first["budget"], second["budget"]) == (0.1, None)
    assert first["command"].endswith("--extra 1")
    run_missing(cfg, cells, (DRIFT,))
    assert len(trained) == 2


def test_a_failed_run_is_named_and_leaves_no_record_and_the_others_are_made(cfg, trained):
    cells = [Cell("a", 0.1, seed) for seed in (13, 0, 1)]
    with pytest.raises(RuntimeError, match=r"a--eps_0.1--seed_13: exit code 1\nno room on the device"):
        run_missing(cfg, cells, (DRIFT,))
    assert [run["seed"] for run in read_runs(Path(cfg.results_dir))] == [0, 1]


def test_a_run_that_stopped_early_is_not_recorded(cfg, trained):
    short = replace(cfg, max_steps=7)
    cell = Cell("a", 0.1, 0)
    command = drift_runs.command
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="has 7 steps, expected 8"):
        patch.setattr(drift_runs, "command", lambda _, cell: command(short, cell))
        run_missing(cfg, [cell], (DRIFT,))
    with pytest.raises(FileNotFoundError, match="no run has been recorded"):
        read_runs(Path(cfg.results_dir))


@pytest.mark.parametrize(("count", "share", "kept"), [(8, 0.25, 2), (800, 0.1, 80), (3, 0.1, 1), (1, 0.25, 1)])
def test_a_tail_is_a_share_of_the_values_and_at_least_one(count, share, kept):
    values = [float(i) for i in range(count)]
    assert tail_mean(values, share) == pytest.approx(sum(values[-kept:]) / kept)
