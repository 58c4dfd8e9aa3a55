"""Metrics of a run: its own file, services when asked (`writers.py`), and lines on the console."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from prismatic.evidence.checks import is_integer, parse_object
from prismatic.evidence.files import write_text
from prismatic.progress import say
from prismatic.training.run_folder import METRICS
from prismatic.training.writers import Writer


class MetricsFile(Writer):
    """`metrics.jsonl`: one JSON object per line. What cannot be written is kept, and tried again with the next line.

    Steps count from 1, as in the names of the checkpoints. A resumed run drops the lines after the step it resumes
    from, so that every step appears once.

    Args:
        run_dir: folder of the run, created when missing.
        start_step: number of optimizer steps that were made before.
    """

    def __init__(self, run_dir: Path, start_step: int = 0) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.name = str(run_dir / METRICS)
        _truncate_after(run_dir / METRICS, start_step)
        self._file = (run_dir / METRICS).open("ab", buffering=0)
        self._pending: list[bytes] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pending.append((json.dumps({"step": step, **metrics}) + "\n").encode())
        self._write_pending()

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

    def sync(self) -> None:
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._file.close()


class Tracker:
    """Gives the metrics of a run to its writers.

    What a writer raises is said once per writer: a full disk or a lost connection ends no run.
    """

    def __init__(self, writers: Sequence[Writer]) -> None:
        self._writers = list(writers)
        self._warned: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record metrics, as `Writer.log`."""
        for writer in self._writers:
            with self._said_once(writer):
                writer.log(step, metrics)

    def attach(self, file: Path) -> None:
        """Keep a finished file where files are kept."""
        for writer in self._writers:
            with self._said_once(writer):
                writer.attach(file)

    @contextmanager
    def _said_once(self, writer: Writer) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the libraries raise many kinds
            if writer.name not in self._warned:
                say(f"WARNING: {writer.name} cannot be written ({type(error).__name__}: {error}); the run goes on")
            self._warned.add(writer.name)

    def message(self, text: str) -> None:
        """A line on the console that does not disturb a progress bar."""
        say(text)

    def sync(self) -> None:
        """Flush the metrics to the disk."""
        for writer in self._writers:
            with self._said_once(writer):
                writer.sync()

    def close(self) -> None:
        """The run has ended."""
        for writer in self._writers:
            with self._said_once(writer):
                writer.close()


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
