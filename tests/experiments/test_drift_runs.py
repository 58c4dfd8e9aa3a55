"""Running and recording cells: what is recorded, what is skipped, what a failure costs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from craft_experiments.common_utils import drift_runs
from craft_experiments.common_utils.drift_runs import (
    DRIFT,
    GROUP,
    HEAD,
    Cell,
    DriftConfig,
    RunFailed,
    compacted,
    expanded,
    read_runs,
    run_experiment,
    run_missing,
    tail_mean,
)
from prismatic.command_line import UsageError, parse


@pytest.fixture
def cfg(tmp_path):
    return DriftConfig(
        start="start", data_root_dir="data", dataset_name="set", seeds=(0, 1), max_steps=8, batch_size=1,
        learning_rate=0.1, lr_warmup_steps=0.5, slots=2, work_dir=str(tmp_path / "work"),
        results_dir=str(tmp_path / "results"),
    )  # fmt: skip


TRAINING = """import json, os, pathlib, sys
flag = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flag["--seed"] == "13":
    sys.exit("no room on the device")
run = pathlib.Path(flag["--run_root_dir"]) / flag["--run_id_override"]
run.mkdir(parents=True, exist_ok=True)
with (run.parent / "started").open("a") as started:
    started.write(json.dumps([os.environ["OMP_NUM_THREADS"], *sys.argv[1:]]) + "\\n")
with (run / "metrics.jsonl").open("w") as lines:
    for step in range(int(flag["--max_steps"])):
        row = {"step": step, "VLA Train/Loss": 1 / (step + 1), "CRaFT/Measured Step": step - step % 4}
        lines.write(json.dumps(row | {"CRaFT/Retention Loss": step // 4 + 0.123456789}) + "\\n")
"""
"""Stands in for the training program: steps with a measurement in every fourth, failure for seed 13."""


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What was started, so far."""
    (tmp_path / "train.py").write_text(TRAINING)
    command = drift_runs.command
    monkeypatch.setattr(drift_runs, "command", lambda cfg, cell: [str(tmp_path / "train.py"), *command(cfg, cell)[1:]])
    started = tmp_path / "work" / "started"
    return lambda: [json.loads(line) for line in started.read_text().splitlines()] if started.exists() else []


def test_only_steps_that_measured_are_recorded_and_a_recorded_cell_is_not_run_again(cfg, trained, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    cells = [Cell("a, b", 0.1, 0, ("--extra", "1")), Cell("a, b", float("inf"), 1)]
    one_by_one = replace(cfg, slots=1)  # two at a time may end together, and nothing is said between them
    run_missing(one_by_one, [*cells, cells[0]], (DRIFT, "CRaFT/Out Of Reach"))
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
    assert [words[0] for words in trained()] == ["1", "1"]  # a core each, whatever the user set
    assert re.search(r"1 of 2 jobs done, about \d+ (s|min \d\d s) left\n", capsys.readouterr().out)


def test_a_failed_run_is_named_and_leaves_no_record_and_the_others_are_made(cfg, trained):
    cells = [Cell("a", 0.1, seed) for seed in (13, 0, 1)]
    with pytest.raises(RunFailed, match=r"(?s)a--eps_0.1--seed_13: TRAINING_FAILED\n.*no room on the device"):
        run_missing(cfg, cells, (DRIFT,))
    assert [run["seed"] for run in read_runs(Path(cfg.results_dir))] == [0, 1]


def test_a_run_that_stopped_early_is_not_recorded(cfg, trained, capsys):
    short = replace(cfg, max_steps=7)
    cell = Cell("a", 0.1, 0)
    command = drift_runs.command
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunFailed, match="seed_0: PARSE_FAILED"):
        patch.setattr(drift_runs, "command", lambda _, cell: command(short, cell))
        run_missing(cfg, [cell], (DRIFT,))
    assert "has 7 steps, expected 8" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no run has been recorded"):
        read_runs(Path(cfg.results_dir))


def test_the_checkpoint_goes_once_the_record_is_there_and_stays_when_the_run_fails(cfg, trained):
    folders = [Path(cfg.work_dir) / f"a--eps_0.1--seed_{seed}--8_chkpt" for seed in (0, 13)]
    for folder in folders:
        folder.mkdir(parents=True)
    with pytest.raises(RunFailed, match="seed_13"):
        run_missing(cfg, [Cell("a", 0.1, seed) for seed in (0, 13)], (DRIFT,))
    assert [folder.exists() for folder in folders] == [False, True]
    assert (Path(cfg.work_dir) / "a--eps_0.1--seed_0" / "metrics.jsonl").exists()


def test_a_run_that_was_broken_off_begins_again_unless_it_is_still_at_work(cfg, trained):
    run_missing(cfg, [Cell("a", 0.1, 0)], (DRIFT,))
    assert trained()[0][-2:] == ["--overwrite", "True"]  # the folder of a live run is refused all the same
    (run,) = read_runs(Path(cfg.results_dir))
    assert "overwrite" not in run["command"]


@pytest.mark.parametrize("folder", ["results_dir", "work_dir"])
def test_two_experiments_do_not_share_a_folder(cfg, trained, folder, capsys, held_elsewhere):
    path = getattr(cfg, folder)
    with held_elsewhere(Path(path)) as other, pytest.raises(SystemExit) as ended:
        run_experiment(cfg, lambda _: [Cell("a", 0.1, 0)], (DRIFT,), Path("report.py"))
    (line,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert f"--{folder} {path}" in line
    assert f"process {other.pid}" in line
    assert not trained()


def test_a_failed_run_ends_the_program_without_a_traceback(cfg, trained, capsys):
    with pytest.raises(SystemExit) as ended:
        run_experiment(cfg, lambda _: [Cell("a", 0.1, 13)], (DRIFT,), Path("report.py"))
    assert ended.value.code == 1
    assert "no room on the device" in capsys.readouterr().err
    assert not Path(cfg.results_dir).exists()


@pytest.mark.parametrize(
    "mistake",
    [
        ["--seeds", "0,b"],
        ["--seeds", "-1"],
        ["--max_steps", "0"],
        ["--batch_size", "0"],
        ["--slots", "0"],
        ["--learning_rate", "nan"],
        ["--learning_rate", "inf"],
        ["--lr_warmup_steps", "-1"],
    ],
)
def test_sizes_out_of_range_are_named(mistake):
    needed = ["--start", "a", "--work_dir", "b", "--results_dir", "c"]
    with pytest.raises(UsageError, match=f"{mistake[0]} is "):
        parse(DriftConfig, [*needed, *mistake])


def long_record(steps):
    drift = [0.012345678 / (step + 1) + 1e-4 * (step % 7) for step in range(steps)]
    return {
        "variant": "a", "budget": 0.1, "seed": 0, "command": "python x", "measured_steps": list(range(steps)),
        "all_losses": [0.1 + value for value in drift], DRIFT: drift, "CRaFT/Out Of Reach": [None] * steps,
    }  # fmt: skip


@pytest.mark.parametrize("steps", [800, 400, 10])
@pytest.mark.parametrize("share", [0.25, 0.1])
def test_a_compact_record_keeps_the_means_over_the_end_and_the_first_steps(steps, share):
    record = long_record(steps)
    again = expanded(compacted(record))
    assert again["measured_steps"] == record["measured_steps"]
    for name in (DRIFT, "all_losses"):
        assert len(again[name]) == steps
        assert again[name][:HEAD] == pytest.approx(record[name][:HEAD], rel=1e-3)
        assert tail_mean(again[name], share) == pytest.approx(tail_mean(record[name], share), rel=1e-3)
    assert again["CRaFT/Out Of Reach"] == [None] * steps


@pytest.mark.parametrize("rest", [1, GROUP - 1, GROUP, GROUP + 1])
def test_the_last_mean_of_a_compact_record_may_stand_for_fewer_steps(rest):
    again = expanded(compacted(long_record(HEAD + rest)))
    assert len(again[DRIFT]) == HEAD + rest
    assert again[DRIFT][-1] == pytest.approx(
        sum(values := long_record(HEAD + rest)[DRIFT][HEAD + (rest - 1) // GROUP * GROUP :]) / len(values), rel=1e-3
    )


def test_a_compact_record_of_800_steps_is_small_and_others_are_read_as_they_are():
    record = long_record(800)
    assert len(json.dumps(compacted(record | {"CRaFT/Lambda": [123.456789] * 800}))) < 30_000
    assert expanded(record) == record


def test_a_compact_record_needs_a_measurement_in_every_step():
    with pytest.raises(ValueError, match="found 2 in 8 steps"):
        compacted(long_record(8) | {"measured_steps": [0, 4]})


@pytest.mark.parametrize(("count", "share", "kept"), [(8, 0.25, 2), (800, 0.1, 80), (3, 0.1, 1), (1, 0.25, 1)])
def test_a_tail_is_a_share_of_the_values_and_at_least_one(count, share, kept):
    values = [float(i) for i in range(count)]
    assert tail_mean(values, share) == pytest.approx(sum(values[-kept:]) / kept)
