"""Where the metrics of a training or an evaluation go beside its own files: a class per service, and their table.

A service's package is optional and imported when its flag asks for it (`--use_wandb True`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from prismatic.command_line import UsageError, require_package

_EVENTS = "events.out.tfevents."


@dataclass(frozen=True)
class RunFacts:
    """What a writer may want to know of a run.

    folder: of the run. run_id: its name. start_step: optimizer steps that were made before. project, entity: of the
    service, as the flags say. flags: all of them, JSON-ready. prefix: what published code puts before the name at W&B.
    """

    folder: Path
    run_id: str
    start_step: int = 0
    project: str = "craft-vla"
    entity: str | None = None
    flags: Mapping[str, Any] | None = None
    prefix: str = ""


class Writer(ABC):
    """Takes the metrics of a run. What it raises is said once, and the training goes on (`Tracker`)."""

    name: str
    """For messages."""

    @abstractmethod
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics (plain numbers, also NaN) of optimizer step `step`, counted from 1.

        Of an evaluation `step` is the number of its episodes.
        """

    def attach(self, file: Path) -> None:
        """Keep a finished file with the run."""
        return  # not every one keeps files

    def sync(self) -> None:
        """Bring to the disk what has been logged, as far as that is in this process's hands."""
        return  # not every one can

    @abstractmethod
    def close(self) -> None:
        """The run has ended."""


class Service(Writer):
    """A writer that a flag asks for. It is made of the run's facts; its package is imported then."""

    package: ClassVar[str]
    """What is imported; the extra of `pyproject.toml` has the name of the flag."""

    @abstractmethod
    def __init__(self, facts: RunFacts) -> None:
        """Open the service; raises what its library raises."""


class WandbWriter(Service):
    """Weights & Biases. Its own environment variables count: WANDB_MODE=offline keeps everything on this machine."""

    name, package = "W&B", "wandb"

    def __init__(self, facts: RunFacts) -> None:
        import wandb

        self._run = wandb.init(
            project=facts.project,
            entity=facts.entity,
            name=f"{facts.prefix}{facts.run_id}",
            config=dict(facts.flags or {}),
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def attach(self, file: Path) -> None:
        self._run.save(str(file), base_path=str(file.parent), policy="now")

    def close(self) -> None:
        self._run.finish()


class TensorBoardWriter(Service):
    """Event files in `{run folder}/tensorboard`."""

    name, package = "TensorBoard", "tensorboard"

    def __init__(self, facts: RunFacts) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = facts.folder / "tensorboard"
        _put_in_the_past(folder)
        self._events = SummaryWriter(folder, purge_step=facts.start_step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


def _put_in_the_past(folder: Path) -> None:
    """Rename event files whose names say a later time: TensorBoard reads files in the order of these times.

    After a clock was set back it would else drop what a resumed run adds.
    """
    files = sorted(folder.glob(f"{_EVENTS}*"))
    first = int(time.time()) - len(files)
    if files and files[-1].name[len(_EVENTS) :] >= f"{first + len(files):010d}":
        for number, file in enumerate(files, start=first):
            file.rename(file.with_name(f"{_EVENTS}{number:010d}.{file.name[len(_EVENTS) :].partition('.')[2]}"))


class TrackioWriter(Service):
    """Trackio's data base on this machine (TRACKIO_DIR says where). A resumed run continues the one of its name."""

    name, package = "trackio", "trackio"

    def __init__(self, facts: RunFacts) -> None:
        import trackio

        self._run = trackio.init(
            project=facts.project, name=facts.run_id, config=dict(facts.flags or {}), resume="allow", embed=False
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, type[Service]] = {
    "wandb": WandbWriter,
    "tensorboard": TensorBoardWriter,
    "trackio": TrackioWriter,
}
"""By the name of the flag `--use_{name}` and of the extra that installs the package."""


def services_of(flags: object) -> list[str]:
    """Names of the services that the flags `use_{name}` of a config ask for."""
    return [name for name in WRITERS if getattr(flags, f"use_{name}")]


def require_services(flags: object) -> None:
    """UsageError for a service that is asked for and whose package is not installed; nothing is imported."""
    for name in services_of(flags):
        require_package(f"--use_{name} True", WRITERS[name].package, name)


def open_writers(names: list[str], facts: RunFacts) -> list[Writer]:
    """The writers of these names.

    Raises UsageError naming the flag when a service cannot be opened: at the start of a run nothing is lost.
    """
    opened: list[Writer] = []
    for name in names:
        try:
            opened.append(WRITERS[name](facts))
        except Exception as error:  # the libraries raise many kinds
            raise UsageError(f"--use_{name} True: {type(error).__name__}: {error}") from error
    return opened
