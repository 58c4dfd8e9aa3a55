"""Metrics that cannot be written do not end a training, and are there when they can be written again."""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prismatic.models.presets import PRESETS
from prismatic.training.checkpoint_folder import find_checkpoints
from prismatic.training.tracking import Tracker, say


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
    tracker = Tracker(tmp_path)
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


def test_a_service_that_fails_is_said_once(tmp_path, capsys):
    tracker = Tracker(tmp_path)

    def fail(*_args, **_kwargs):
        raise ConnectionError("no route")

    tracker._wandb = SimpleNamespace(log=fail, finish=fail)
    for step in (1, 2):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().out.count("W&B cannot be written (ConnectionError: no route)") == 1


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
    tracker = Tracker(tmp_path)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a killed process
    tracker = Tracker(tmp_path, start_step=2)
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
            tracker = Tracker(Path(folder), start_step=2 * part, tensorboard=True)
            for step in range(2 * part + 1, 2 * part + 4):
                tracker.log(step, {"part": float(part)})
                written[step] = float(part)
            tracker.close()
        events = reader.EventAccumulator(str(Path(folder, "tensorboard")))
        events.Reload()
        assert {event.step: event.value for event in events.Scalars("part")} == written
