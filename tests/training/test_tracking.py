"""Metrics that cannot be written do not end a training, and are there when they can be written again."""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismatic.command_line import UsageError
from prismatic.models.presets import PRESETS
from prismatic.progress import say
from prismatic.training.checkpoint_folder import find_checkpoints
from prismatic.training.command_line import parse_flags
from prismatic.training.flags import TrackingFlags
from prismatic.training.tracking import MetricsFile, Tracker
from prismatic.training.writers import WRITERS, RunFacts, Writer, open_writers, services_of


def steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def file_size_limit():
    """Set the largest size (bytes) of a file of this process: writes beyond fail, the last one in its middle."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_lines_wait_for_space(tmp_path, capsys, file_size_limit):
    tracker = Tracker([MetricsFile(tmp_path)])
    tracker.log(1, {"loss": 0.5})
    file_size_limit(40)  # two lines and a half
    for step in (2, 3, 4):
        tracker.log(step, {"loss": 0.5})
    tracker.sync()
    assert steps(tmp_path) in ([1], [1, 2])  # whole lines only
    file_size_limit(10_000)
    tracker.log(5, {"loss": 0.5})
    tracker.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().out.count("WARNING: ") == 1


class Unreachable(Writer):
    name = "far away"

    def log(self, step, metrics):
        raise ConnectionError("no route")

    def close(self):
        raise ConnectionError("no route")


class Kept(Writer):
    name = "kept"

    def __init__(self):
        self.seen, self.closed = [], False

    def log(self, step, metrics):
        self.seen.append((step, dict(metrics)))

    def close(self):
        self.closed = True


def test_a_service_that_fails_is_said_once_and_the_others_go_on(tmp_path, capsys):
    kept = Kept()
    tracker = Tracker([MetricsFile(tmp_path), Unreachable(), kept])
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    assert steps(tmp_path) == [1, 2]
    assert kept.seen == [(1, {"loss": 0.5}), (2, {"loss": 0.5})] and kept.closed
    assert capsys.readouterr().out.count("far away cannot be written (ConnectionError: no route)") == 1


def test_a_service_that_fails_does_not_end_a_training(make_trainer, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    monkeypatch.setitem(WRITERS, "trackio", lambda facts: Unreachable())
    make_trainer("run", use_trackio=True).fit()
    assert (tmp_path / "runs" / "run--3_chkpt").is_dir() and steps(tmp_path / "runs" / "run") == [1, 2, 3]
    assert capsys.readouterr().out.count("WARNING: far away") == 1


def test_a_service_that_cannot_be_opened_is_refused_with_its_flag(tmp_path, monkeypatch):
    def closed(facts):
        raise RuntimeError("no account")

    monkeypatch.setitem(WRITERS, "wandb", closed)
    with pytest.raises(UsageError, match="--use_wandb True: RuntimeError: no account"):
        open_writers(["wandb"], RunFacts(tmp_path, "run"))


def test_every_service_has_a_flag_and_an_extra_and_its_package_is_asked_for(monkeypatch):
    flags = {f.name for f in fields(TrackingFlags) if f.name.startswith("use_")}
    assert flags == {f"use_{name}" for name in WRITERS}
    for name, writer in WRITERS.items():
        assert services_of(parse_flags([f"--use_{name}", "False"])) == []
        monkeypatch.setattr("prismatic.command_line.is_installed", lambda package: False)
        with pytest.raises(UsageError, match=rf"--use_{name} True needs {writer.package}, .*craft-vla\[{name}\]"):
            parse_flags([f"--use_{name}", "True"])
        monkeypatch.setattr("prismatic.command_line.is_installed", lambda package: True)
        assert services_of(parse_flags([f"--use_{name}", "True"])) == [name]
        assert f"\n{name} = [" in (Path(__file__).parents[2] / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_run_flags_and_every_step(tmp_path, monkeypatch, name):
    """What each service's client is told, with a stand-in for its package."""
    told = []
    run = SimpleNamespace(
        log=lambda metrics, step: told.append((step, metrics)), finish=lambda: told.append("finished")
    )
    package = SimpleNamespace(init=lambda **settings: told.append(settings) or run)
    monkeypatch.setitem(sys.modules, name, package)
    facts = RunFacts(tmp_path, "my run", project="p", flags={"seed": 7})
    tracker = Tracker(open_writers([name], facts))
    tracker.log(3, {"loss": 0.5})
    tracker.close()
    assert told[0]["project"] == "p" and "my run" in told[0]["name"] and told[0]["config"] == {"seed": 7}
    assert told[1:] == [(3, {"loss": 0.5}), "finished"]


def test_a_console_that_is_gone_is_no_error(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        say("a line")
        say("another line")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # what is left in its buffer goes nowhere


def test_a_resumed_run_holds_every_step_once(tmp_path):
    tracker = Tracker([MetricsFile(tmp_path)])
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a killed process
    tracker = Tracker([MetricsFile(tmp_path, 2)])
    tracker.log(3, {"loss": 0.25})
    tracker.close()
    assert steps(tmp_path) == [1, 2, 3] and "0.25" in (tmp_path / "metrics.jsonl").read_text()


def test_console_metrics_and_checkpoints_count_alike(make_trainer, monkeypatch, tmp_path, capsys):
    """A step is one update of the weights, however many batches go into it and however often the run was resumed."""
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    places = {"data_root_dir": str(micro.DATA), "grad_accumulation_steps": 2, "save_freq": 1}
    make_trainer("run", max_steps=2, **places).fit()
    make_trainer("run", max_steps=4, resume="auto", **places).fit()
    counted = [1, 2, 3, 4]
    assert [int(number) for number in re.findall(r"^step +(\d+) ", capsys.readouterr().out, re.M)] == counted
    assert steps(tmp_path / "runs" / "run") == counted
    assert [step for step, _ in find_checkpoints(tmp_path / "runs", "run")] == counted


@given(jumps=st.lists(st.integers(-(10**6), 10**6), min_size=1, max_size=3))
def test_tensorboard_shows_what_was_written_last_wherever_the_clock_jumps(jumps):
    """Each part of the run resumes one step before the end of the one before it."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    now, written = time.time(), {}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for part, jump in enumerate([0, *jumps]):
            patch.setattr(time, "time", lambda moved=now + jump: moved)
            services = open_writers(["tensorboard"], RunFacts(Path(folder), "run", 2 * part))
            tracker = Tracker([MetricsFile(Path(folder), 2 * part), *services])
            for step in range(2 * part + 1, 2 * part + 4):
                tracker.log(step, {"part": float(part)})
                written[step] = float(part)
            tracker.close()
        events = reader.EventAccumulator(str(Path(folder, "tensorboard")))
        events.Reload()
        assert {event.step: event.value for event in events.Scalars("part")} == written
