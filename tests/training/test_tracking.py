"""Metrics that cannot be written do not end a training, and are there when they can be written again."""

import json
import os
import resource
import signal
import sys
from types import SimpleNamespace

import pytest

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
