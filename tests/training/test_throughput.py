"""Throughput numbers, with a clock of our own."""

import json

import pytest
import torch

from prismatic.training.throughput import Throughput, peak_memory

NAMES = ("Time/Samples Per Second", "Time/Data Wait Share", "Memory/Peak GiB", "samples_per_second")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def one_step(throughput, clock, data: float, rest: float) -> None:
    with throughput.step():
        with throughput.waiting_for_data():
            clock.now += data
        clock.now += rest


def test_rates_are_over_the_steps_since_the_last_line_and_without_what_is_between():
    clock = Clock()
    throughput = Throughput(8, torch.device("cpu"), clock)
    one_step(throughput, clock, 1.0, 1.0)
    clock.now += 100.0  # a checkpoint
    one_step(throughput, clock, 0.0, 2.0)
    values = throughput.measure()
    assert values["Time/Samples Per Second"] == values["samples_per_second"] == pytest.approx(4.0)
    assert values["Time/Data Wait Share"] == pytest.approx(0.25)
    one_step(throughput, clock, 0.5, 0.5)
    assert throughput.measure()["Time/Data Wait Share"] == pytest.approx(0.5)


def test_a_line_without_steps_is_zero():
    assert Throughput(8, torch.device("cpu"), Clock()).measure()["Time/Samples Per Second"] == 0.0


def test_peak_memory_is_that_of_the_process():
    assert 0.01 < peak_memory(torch.device("cpu")) < 1000


def test_every_line_and_the_console_have_them(make_trainer, capsys):
    trainer = make_trainer("run")
    trainer.fit()
    lines = [json.loads(line) for line in (trainer.setup.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    for line in lines:
        assert all(name in line for name in NAMES)
        assert 0 <= line["Time/Data Wait Share"] <= 1
    output = capsys.readouterr().out
    assert output.count("samples/s  data wait ") == output.count(" GiB") == 3
