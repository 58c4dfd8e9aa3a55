"""SIGTERM, SIGUSR1 and Ctrl-C as a request: finish the step, save, end the process with exit code 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator


class StopSignal:
    """Notes that a signal asked the run to stop. A context, which puts the previous handlers back.

    A second SIGTERM or Ctrl-C ends the process at once. Outside the main thread, where Python allows no handlers,
    nothing is noted.

    Args:
        accelerator: the processes that have to agree.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._previous: dict[signal.Signals, Any] = {}
        self.requested: str | None = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop, the same answer on all of them; call it once per step on each.

        One process looks at its flag; several need one collective, since signals reach them at different steps.
        """
        if self._accelerator.num_processes == 1:
            return self.requested is not None
        flag = torch.tensor(float(self.requested is not None), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum") > 0)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        if number != signal.SIGUSR1:
            # The kernel ends the process at the next one, whatever the main thread is doing.
            signal.signal(number, signal.SIG_DFL)


def ignore_stop_signals(_worker: int = 0) -> None:
    """Start-up function of data workers: a signal to the whole process group must not end them before the step ends."""
    for number in StopSignal.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
