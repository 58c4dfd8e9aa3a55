"""How fast a run is, and what it waits for: numbers for every metrics line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class Throughput:
    """Times optimizer steps of this process; what happens between them (saving, validation) is not counted.

    A step ends with the transfer of its metrics to the host, so host time is the time of the device as well.

    Args:
        samples_per_step: samples of all processes in one optimizer step.
        device: where peak memory is read: the device's allocator on CUDA, the process's resident size otherwise.
        clock: seconds, monotonic.
    """

    def __init__(
        self, samples_per_step: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._samples, self._device, self._clock = samples_per_step, device, clock
        self._start_interval()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around one optimizer step, its data included."""
        started = self._clock()
        yield
        self._total += self._clock() - started
        self._steps += 1

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Around the part of a step that fetches its micro-batches."""
        started = self._clock()
        yield
        self._waited += self._clock() - started

    def measure(self) -> dict[str, float]:
        """Averages over the steps since the last call, by log name; `samples_per_second` is kept for old readers."""
        seconds = max(self._total, 1e-9)
        rate = self._steps * self._samples / seconds
        values = {
            "samples_per_second": rate,
            "Time/Samples Per Second": rate,
            "Time/Data Wait Share": self._waited / seconds,
            "Memory/Peak GiB": peak_memory(self._device),
        }
        self._start_interval()
        return values

    def _start_interval(self) -> None:
        self._steps, self._total, self._waited = 0, 0.0, 0.0


def throughput_text(metrics: dict[str, float]) -> str:
    """`measure()` for a console line."""
    return (
        f"{metrics['Time/Samples Per Second']:.1f} samples/s  data wait {metrics['Time/Data Wait Share']:.0%}  "
        f"peak {metrics['Memory/Peak GiB']:.2f} GiB"
    )


def peak_memory(device: torch.device) -> float:
    """GiB: most memory of tensors on a CUDA device, else the largest resident size of this process; 0.0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    try:
        import resource  # not on Windows
    except ImportError:
        return 0.0
    # Kilobytes on Linux, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB
