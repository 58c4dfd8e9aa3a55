"""What every kind of job has. A new kind is a file beside this one and a line in `plan.py`."""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from craft_experiments.cells import Cell
from craft_experiments.preset import Demonstrations
from craft_experiments.records import check_settings, contents_of, flags_in, read_record, write_record
from craft_experiments.settings import ROOT, Settings
from prismatic.evidence.failure_codes import FailureCode


class JobFailed(RuntimeError):
    """A job ended without its result. `code` goes into the manifest."""

    def __init__(self, code: FailureCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Job(ABC):
    """One job. `after`: names of the jobs it waits for.

    Attributes:
        kind: first part of its name.
        failure: code when one of its programs fails.
        measured: name of what its record holds; empty for a job that leaves none.
        environment: variables that its programs get, whatever the user set.
    """

    after: tuple[str, ...] = field(default=(), kw_only=True)

    kind: ClassVar[str]
    failure: ClassVar[FailureCode]
    measured: ClassVar[str] = ""
    environment: ClassVar[Mapping[str, str]] = {}

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """What tells it from others of its kind: names of cell, evaluation, data."""

    @property
    def name(self) -> str:
        """`evaluate/plain--spatial--seed0/standard@libero_spatial`."""
        return "/".join((self.kind, *self.parts))

    @property
    def cell(self) -> Cell | None:
        """The policy it belongs to; None for demonstrations, which many use."""
        return None

    @abstractmethod
    def commands(self, s: Settings) -> list[list[str]]:
        """What it runs, one after the other; the last decides the result. Files that do not exist yet are named as
        they will be.
        """

    def flags(self, s: Settings) -> dict[str, str]:
        """Flags of the last command, {"seed": "0", ...}."""
        return flags_in(portable(self.commands(s)[-1]))

    def content(self, s: Settings) -> dict[str, str]:
        """What the files and folders hold that decide its result, by flag."""
        return contents_of(self.flags(s))

    def record(self, s: Settings) -> Path | None:
        """The record it writes; None when what it makes is no measurement."""
        return None

    def has_result(self, s: Settings) -> bool:
        """Whether what it is run for is there.

        Raises:
            RecordError: the record was made with other settings.
        """
        path = self.record(s)
        if path is None or not path.exists():
            return False
        check_settings(path, read_record(path), self.flags(s))
        return True

    def is_done(self, s: Settings) -> bool:
        """As `has_result`; a training also needs its last checkpoint, which may have been deleted since."""
        return self.has_result(s)

    def log(self, s: Settings) -> Path:
        """Where everything its programs print goes."""
        return s.logs_dir / (self.name.replace("/", "--") + ".log")

    def begin(self, s: Settings) -> None:
        """What has to be so before its first program starts."""
        return

    def finish(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> None:
        """Check what its programs left and write the record. `content`: as it was before they started. `spent`:
        `seconds` on the clock and, where the system counts them, `processor_seconds`.

        Raises:
            JobFailed: something is missing. OSError, ValueError, KeyError, TypeError: it cannot be read.
        """
        return

    def facts(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> dict[str, Any]:
        """What every record holds."""
        words = portable(self.commands(s)[-1])
        started = next(
            word for word in words if word.endswith(".py") or word.startswith(("prismatic.", "experiments."))
        )
        flags = {"flags": self.flags(s), "content": dict(content)}
        return {"cell": self.parts[0], "program": started, **flags, "processor": processor(), **spent}

    def keep(self, s: Settings, record: Mapping[str, Any]) -> None:
        """Write the record."""
        path = self.record(s)
        assert path is not None  # jobs without a record keep none
        write_record(path, record)


@dataclass(frozen=True)
class PolicyJob(Job):
    """A job of one policy, after which it is named."""

    policy: Cell

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.policy.name,)

    @property
    def cell(self) -> Cell:
        return self.policy


@cache
def processor() -> str:
    """What this machine's processor is called."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(errors="replace").splitlines() if listed.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def as_words(flags: Mapping[str, object]) -> list[str]:
    """{"a": 1} -> ["--a", "1"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def portable(command: Sequence[str]) -> list[str]:
    """The command as anyone would type it in the repository: no interpreter path, no absolute folder inside it."""
    program = "python" if Path(command[0]).name.startswith("python") else Path(command[0]).name
    return [program, *(word.removeprefix(f"{ROOT}{os.sep}") for word in command[1:])]


def program(script: str, module: str) -> list[str]:
    """Words that start a program: its script in a checkout, its module where only the package is installed."""
    return [script] if (ROOT / script).is_file() else ["-m", module]


def data_root(s: Settings, data: Demonstrations) -> str:
    """Folder that holds the data set."""
    return str(Path(s.preset.data_root_dir, data.room))
