"""Metrics of a run: a JSONL file always, console lines, Weights & Biases and TensorBoard when asked."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prismatic.evidence.checks import is_integer, parse_object
from prismatic.evidence.files import write_text
from prismatic.training.run_folder import METRICS

_EVENTS = "events.out.tfevents."


class Tracker:
    """Writes one JSON object per logged step to `{run_dir}/metrics.jsonl` and a line to the console.

    Steps count from 1, as in the names of the checkpoints. A resumed run drops the lines after the step it resumes
    from, so that every step appears once. What cannot be written is said once, kept, and tried again with the next
    line: a full disk or a lost connection does not end a training.

    Args:
        run_dir: folder of the run, created when missing.
        start_step: number of optimizer steps that were made before.
        wandb_settings: keyword arguments of `wandb.init`, or None for no W&B.
        tensorboard: also write event files to `{run_dir}/tensorboard`.
    """

    def __init__(
        self,
        run_dir: Path,
        start_step: int = 0,
        wandb_settings: dict[str, Any] | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._wandb = self._tensorboard = None
        if wandb_settings is not None:
            import wandb  # optional dependency, only when asked for

            self._wandb = wandb.init(**wandb_settings)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional dependency, only when asked for

            _put_in_the_past(run_dir / "tensorboard")
            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=start_step + 1)
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS
        _truncate_after(self._path, start_step)
        self._file = self._path.open("ab", buffering=0)
        self._pending: list[bytes] = []
        self._warned: set[str] = set()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics (plain numbers) of optimizer step `step`, counted from 1."""
        self._pending.append((json.dumps({"step": step, **metrics}) + "\n").encode())
        with self._said_once(str(self._path)):
            self._write_pending()
        if self._wandb is not None:
            with self._said_once("W&B"):
                self._wandb.log(metrics, step=step)
        if self._tensorboard is not None:
            with self._said_once("TensorBoard"):
                for name, value in metrics.items():
                    self._tensorboard.add_scalar(name, value, step)

    def _write_pending(self) -> None:
        while self._pending:
            end = self._file.seek(0, os.SEEK_END)
            written = 0
            try:
                written = self._file.write(self._pending[0])
            finally:
                if written != len(self._pending[0]):
                    self._file.truncate(end)  # half a line would make the file unreadable
            if written != len(self._pending[0]):
                raise OSError(errno.ENOSPC, "no space for another line")
            self._pending.pop(0)

    @contextmanager
    def _said_once(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the libraries raise many kinds
            if what not in self._warned:
                say(f"WARNING: {what} cannot be written ({type(error).__name__}: {error}); the training goes on")
            self._warned.add(what)

    def message(self, text: str) -> None:
        """A line on the console that does not disturb a progress bar."""
        say(text)

    def sync(self) -> None:
        """Flush the metrics to the disk."""
        with self._said_once(str(self._path)):
            self._write_pending()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the W&B run."""
        self.sync()
        self._file.close()
        if self._wandb is not None:
            with self._said_once("W&B"):
                self._wandb.finish()
        if self._tensorboard is not None:
            with self._said_once("TensorBoard"):
                self._tensorboard.close()


def say(text: str) -> None:
    """A line on the console that does not disturb a progress bar; nothing when the console is gone."""
    with suppress(OSError, ValueError):
        tqdm.write(text)


def _put_in_the_past(folder: Path) -> None:
    """Rename event files whose names say a later time: TensorBoard reads files in the order of these times.

    After a clock was set back it would else drop what a resumed run adds.
    """
    files = sorted(folder.glob(f"{_EVENTS}*"))
    first = int(time.time()) - len(files)
    if files and files[-1].name[len(_EVENTS) :] >= f"{first + len(files):010d}":
        for number, file in enumerate(files, start=first):
            file.rename(file.with_name(f"{_EVENTS}{number:010d}.{file.name[len(_EVENTS) :].partition('.')[2]}"))


def _truncate_after(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    kept = [line for line in lines if _step_of(line) <= start_step]
    write_text(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    """Infinite for what is no row: a killed process can leave half a line, whose step will be repeated."""
    try:
        step = parse_object(line, METRICS, finite=False).get("step")
    except ValueError:
        return math.inf
    return step if is_integer(step) else math.inf
