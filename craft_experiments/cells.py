"""What a table asks for: policies, and the evaluations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from craft_experiments.presets import Demonstrations


class Role(str, Enum):
    """How a policy comes about."""

    TRAINED = "trained"
    INTERPOLATED = "interpolated"  # between the start model and a trained policy
    START = "start"  # the start checkpoint as it is
    REPLAY = "replay"  # open-loop replay of one demonstration: no policy


@dataclass(frozen=True)
class Method:
    """One row of a table.

    key: name in files and flags. label: name in tables. train: flags of `finetune.py` beyond the preset's. evaluate:
    flags of the evaluation. parent and scale: of an interpolated policy. control: a row that shows what a success rate
    is worth, not a competitor.
    """

    key: str
    label: str
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, object] = field(default_factory=dict)
    role: Role = Role.TRAINED
    parent: str = ""
    scale: float = 1.0
    control: bool = False


class Kind(str, Enum):
    """What an evaluation asks."""

    STANDARD = "standard"  # the suite's own initial states
    PERTURBED = "perturbed"  # the preset's perturbation
    SWAP = "swap"  # LIBERO-PRO: positions exchanged
    OBJECT = "object"  # LIBERO-PRO: the object looks different
    START_TASKS = "start_tasks"  # the tasks the start model was trained on, as it was trained on them
    START_TASKS_START_HEAD = "start_tasks_start_head"  # the same, read by the action head of the start model


PRO_SUFFIX = {Kind.SWAP: "_swap", Kind.OBJECT: "_object"}
"""What is appended to the name of a suite."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a policy."""

    kind: Kind
    suite: str

    @property
    def name(self) -> str:
        """Unique within a cell, safe in file names."""
        return f"{self.kind.value}@{self.suite}"


@dataclass(frozen=True)
class Cell:
    """One policy: a method, trained (or not) on demonstrations of `suites`, at most `shots` per task, with `seed`."""

    method: Method
    suites: tuple[str, ...]
    seed: int
    shots: int | None = None

    @property
    def name(self) -> str:
        """Unique over all tables, safe in file names."""
        suites = "+".join(suite.removeprefix("libero_") for suite in self.suites)
        shots = "" if self.shots is None else f"--{self.shots}shot"
        return f"{self.method.key}--{suites}{shots}--seed{self.seed}"


@dataclass(frozen=True)
class Request:
    """What a table wants of a cell."""

    cell: Cell
    evaluations: tuple[Evaluation, ...]
    measured: tuple[Demonstrations, ...] = ()  # drift, CKA, probes and action error on held-out demonstrations
