"""What the folder of a run says about it, read while the run writes there: metrics, flags, checkpoints."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismatic.command_line import UsageError
from prismatic.evidence.checks import is_integer, is_number, parse_object
from prismatic.model_files import CheckpointError, nothing_there, read_json
from prismatic.output_folder import is_held
from prismatic.training.checkpoint_folder import LATEST, MANIFEST, find_checkpoints
from prismatic.training.run_folder import FLAGS, METRICS

_TRACES = (METRICS, FLAGS, "data_manifest.json", LATEST)
_LONGEST_LINE = 1 << 20
_BLOCK = 1 << 22


@dataclass
class MetricsTail:
    """The rows of `metrics.jsonl`, read on from where the last reading ended.

    A resumed run writes steps again: a row drops those of its step and later ones, so that the last one counts. Half a
    line at the end waits for its other half. A file that was replaced or cut is read from its beginning. Rows hold
    numbers alone, NaN included.

    Args:
        path: the file, which need not exist.
    """

    path: Path
    rows: list[dict[str, float]] = field(default_factory=list)
    unreadable: int = 0
    """Lines that are no rows."""
    written: float | None = None
    """Time of the last change of the file, seconds since 1970."""
    _file: int = -1
    _offset: int = 0
    _rest: bytes = b""

    def read(self) -> None:
        """Take what is new. A file that is not there has no rows. Raises OSError for one that cannot be read."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._offset:
                    self.rows, self.unreadable, self._offset, self._rest = [], 0, 0, b""
                self._file, self.written = status.st_ino, status.st_mtime
                file.seek(self._offset)
                while block := file.read(_BLOCK):
                    self._offset += len(block)
                    self._take(block)
        except FileNotFoundError:
            self.rows, self.unreadable, self._file, self.written = [], 0, -1, None

    def _take(self, block: bytes) -> None:
        *lines, rest = (self._rest + block).split(b"\n")
        self._rest = rest[: _LONGEST_LINE + 1]  # a longer one is no row, however it ends
        for line in lines:
            row = _row(line)
            if row is None:
                self.unreadable += bool(line.strip())
                continue
            while self.rows and self.rows[-1]["step"] >= row["step"]:
                self.rows.pop()
            self.rows.append(row)


def _row(line: bytes) -> dict[str, float] | None:
    if len(line) > _LONGEST_LINE:
        return None
    try:
        found = parse_object(line.decode(), METRICS, finite=False)
    except ValueError:
        return None
    if not is_integer(found.get("step")):
        return None
    return {name: float(value) for name, value in found.items() if type(value) in (int, float)}


@dataclass(frozen=True)
class RunView:
    """A run at one moment.

    rows: of the metrics, steps ascend. flags: as recorded, {} when there is no record. checkpoint: (step, folder) of
    the newest one. is_written: whether a process writes to the folder, as far as this machine knows. age: seconds since
    the last line, None without one.
    """

    name: str
    rows: list[dict[str, float]]
    flags: Mapping[str, Any]
    checkpoint: tuple[int | None, Path] | None
    is_written: bool
    age: float | None
    unreadable: int = 0

    @property
    def step(self) -> int:
        """The last logged step, 0 before the first."""
        return int(self.rows[-1]["step"]) if self.rows else 0

    @property
    def total(self) -> int | None:
        """Steps of the whole run; None when nothing says it."""
        total = self.flags.get("max_steps")
        return total if is_integer(total) and total > 0 else None

    @property
    def state(self) -> str:
        """`finished`, `running` or `stopped`. Without a record of the flags a run that nobody writes to has ended."""
        if self.total is not None and self.step >= self.total:
            return "finished"
        if self.is_written:
            return "running"
        return "ended" if self.total is None else "stopped"

    @property
    def budget(self) -> float | None:
        """The budget of the drift, None for a run without one."""
        if self.flags.get("retention_method") not in ("craft", "feature_penalty"):
            return None
        budget = self.flags.get("craft_retention_budget")  # "inf" is recorded as text
        return float(budget) if isinstance(budget, (int, float)) and is_number(budget) and budget > 0 else None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, NaN included."""
        found = [(int(row["step"]), row[name]) for row in self.rows if name in row]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def seconds_left(self) -> float | None:
        """Time until the last step at the speed of the last lines, without saving and validation; None if unknown."""
        steps, seen = self.series("samples_seen")
        rates = [rate for rate in self.series("samples_per_second")[1][-10:] if 0 < rate < math.inf]
        if self.total is None or not rates or not steps or not math.isfinite(seen[-1] - seen[0]):
            return None
        done, samples = (steps[-1] - steps[0], seen[-1] - seen[0]) if len(steps) > 1 else (steps[0], seen[0])
        if done <= 0 or samples <= 0:
            return None
        return max(0, self.total - self.step) * samples / done * sum(1 / rate for rate in rates) / len(rates)


class WatchedRun:
    """The folder of a run, looked at again and again.

    Raises UsageError for a folder that is not that of a run; the message says which one was meant, as far as that can
    be seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(_run_folder(folder)))
        self._tail = MetricsTail(self.folder / METRICS)

    def look(self) -> RunView:
        """The run now."""
        self._tail.read()
        written = self._tail.written
        return RunView(
            self.folder.name,
            self._tail.rows,
            self._flags(),
            self._checkpoint(),
            is_held(self.folder),
            None if written is None else max(0.0, time.time() - written),
            self._tail.unreadable,
        )

    def _flags(self) -> Mapping[str, Any]:
        """Of the run's own record, else of its newest checkpoint, which older runs have alone."""
        if (recorded := _json(self.folder / FLAGS)) is not None:
            return recorded
        found = self._checkpoint()
        manifest = None if found is None else _json(found[1] / MANIFEST)
        training = (manifest or {}).get("training")
        return training if isinstance(training, dict) else {}

    def _checkpoint(self) -> tuple[int | None, Path] | None:
        found = find_checkpoints(self.folder.parent, self.folder.name)
        if found:
            return found[-1]
        manifest = _json(self.folder / MANIFEST)  # `--save_latest_checkpoint_only True`
        if manifest is None:
            return None
        step = manifest.get("step")
        return step if is_integer(step) else None, self.folder


def _json(file: Path) -> dict[str, Any] | None:
    """A record, None when it is not there or cannot be read: the page does without."""
    try:
        return read_json(file)
    except (CheckpointError, OSError):
        return None


def _run_folder(folder: Path) -> Path:
    try:
        if any((folder / name).is_file() for name in _TRACES):
            return folder
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, ValueError) as error:  # a name that is too long, or no name
        raise UsageError(f"RUN_DIR {str(folder)[:200]!r}: {error}, expected the folder of a run") from None
    if not exists:
        raise UsageError(f"RUN_DIR {nothing_there(str(folder), 'the folder of a run')}")
    if not is_folder:
        raise UsageError(f"RUN_DIR {folder} is a file, expected the folder of a run{_if_run(folder.parent)}")
    run = folder.with_name(folder.name.rpartition("--")[0] or folder.name)
    inside = [path for path in sorted(folder.iterdir())[:1000] if (path / METRICS).is_file()]
    hint = f"; it holds runs, such as {inside[-1]}" if inside else _if_run(run)
    raise UsageError(f"RUN_DIR {folder} has no {METRICS}, expected the folder of a run{hint}")


def _if_run(folder: Path) -> str:
    return f"; name {folder}" if (folder / METRICS).is_file() else ""
