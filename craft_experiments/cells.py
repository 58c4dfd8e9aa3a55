"""What a table asks for: policies, and the evaluations of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from craft_experiments.preset import Demonstrations


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
    flags of the evaluation. control: a row that shows what a success rate is worth, not a competitor.

    parent: key of the row whose policy an interpolated one lies on the way to, or, of a trained row of the bench
    `keep`, whose policy a later task begins with; empty: its own. scale and parts: of an interpolated policy.
    memory: demonstrations per old task that the training has, with the flag `memory_flag`; 0: none.
    """

    key: str
    label: str
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, object] = field(default_factory=dict)
    role: Role = Role.TRAINED
    parent: str = ""
    scale: float = 1.0
    parts: str = "all"
    memory: int = 0
    memory_flag: str = ""
    control: bool = False


class Kind(str, Enum):
    """What an evaluation asks."""

    STANDARD = "standard"  # the suite's own initial states
    PERTURBED = "perturbed"  # the preset's perturbation
    SWAP = "swap"  # LIBERO-PRO: positions exchanged
    OBJECT = "object"  # LIBERO-PRO: the object looks different
    START_TASKS = "start_tasks"  # the tasks the start model was trained on, as it was trained on them
    START_TASKS_START_HEAD = "start_tasks_start_head"  # the same, read by the action head of the start model
    NEW = "new"  # a new task of the bench `keep`, displaced as its demonstrations were
    UNSEEN = "unseen"  # the same, perturbed in a way that no demonstration shows


PRO_SUFFIX = {Kind.SWAP: "_swap", Kind.OBJECT: "_object"}
"""What is appended to the name of a suite."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of a policy.

    suite: whose tasks; of NEW and UNSEEN the name of the new task. trials: episodes per task, None: as the preset says
    for the kind. step: of an earlier checkpoint, None: the last.
    """

    kind: Kind
    suite: str
    trials: int | None = None
    step: int | None = None

    @property
    def name(self) -> str:
        """Unique within a cell, safe in file names."""
        return f"{self.kind.value}@{self.suite}" + ("" if self.step is None else f"--step{self.step}")


@dataclass(frozen=True)
class Cell:
    """One policy: a method, trained (or not) on demonstrations of `suites`, at most `shots` per task, with `seed`.

    tasks: of the bench `keep`, the new tasks that were learned one after the other; empty: none yet. None elsewhere.
    """

    method: Method
    suites: tuple[str, ...]
    seed: int
    shots: int | None = None
    tasks: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """Unique over all tables, safe in file names."""
        learned = (
            self.tasks if self.tasks is not None else tuple(suite.removeprefix("libero_") for suite in self.suites)
        )
        shots = "" if self.shots is None else f"--{self.shots}shot"
        return f"{self.method.key}--{'+'.join(learned) or 'nothing'}{shots}--seed{self.seed}"


@dataclass(frozen=True)
class Request:
    """What a table wants of a cell. rank: lower ones are run first, whatever the seed."""

    cell: Cell
    evaluations: tuple[Evaluation, ...]
    measured: tuple[Demonstrations, ...] = ()  # drift, CKA, probes and action error on held-out demonstrations
    rank: int = 0
