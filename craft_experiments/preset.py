"""What a preset of the experiments holds. The presets themselves: `presets.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Demonstrations:
    """A data set.

    task_ids: task numbers, "" for all. room: folder below that of the data sets; the name of a data set says how it is
    normalised, so that the same name lies in several rooms. changes: of the preset's flags of `collect_demos`.
    """

    suite: str
    task_ids: str
    dataset: str
    room: str = ""
    changes: Mapping[str, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """`libero_goal_no_noops`, or `held_out/libero_goal_no_noops`."""
        return f"{self.room}/{self.dataset}" if self.room else self.dataset


@dataclass(frozen=True)
class NewTask:
    """A task of the bench `keep`, learned after the start. name: `near`, `far`; also the room of its demonstrations."""

    name: str
    suite: str
    task_id: str

    @property
    def dataset(self) -> str:
        """Name of its normalisation."""
        return f"{self.suite}_{self.name}_no_noops"


@dataclass(frozen=True)
class Bench:
    """The bench `keep`: new tasks one after the other, what is kept of the old ones, what is learned.

    Attributes:
        new_tasks: in the order in which they are learned.
        changes: what the preset's fields are for this bench.
        unseen: evaluation flags beyond `perturbed` that no demonstration shows, as `perturbed` has them.
        primary, secondary: keys of rows; secondary ones have the first `secondary_seeds` seeds and a quarter of the
            episodes.
        recovered: rows that learn the old tasks again, with the first seed; recovery_steps: when they are asked.
        again_collect: flags of the demonstrations for that, beside those of the start's tasks.
    """

    new_tasks: tuple[NewTask, ...]
    primary: tuple[str, ...]
    secondary: tuple[str, ...]
    recovered: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)
    unseen: Mapping[str, Any] = field(default_factory=lambda: {"suite_suffix": "_object"})
    secondary_seeds: int = 2
    recovery_steps: tuple[int, ...] = (25, 50, 100, 200)
    again_collect: Mapping[str, object] = field(default_factory=lambda: {"episodes_per_task": 5, "seed": 3000})

    def task(self, name: str) -> NewTask:
        """The task of that name."""
        return next(task for task in self.new_tasks if task.name == name)


@dataclass(frozen=True)
class Pace:
    """How fast one core is at a preset's sizes, for estimates before a run; seconds.

    program: until a program does its work. sample: of a plain optimizer step, per sample of its batch. control_step: of
    an episode, the policy's share included, times the share of its limit that an episode takes. demonstration: with
    the failed attempts.
    """

    program: float
    sample: float
    control_step: float
    demonstration: float


@dataclass(frozen=True)
class Preset:
    """One scale of the experiments.

    Attributes:
        suites: suites that are fine-tuned on and evaluated.
        task_ids: suite -> task numbers; "" is all.
        start: checkpoint folder or model geometry (`--config_file_path`).
        dataset_suffix: the demonstrations of a suite are called suite + dataset_suffix.
        max_steps, save_freq: optimizer steps; a policy of several suites takes a multiple of them.
        num_trials, pro_trials, start_trials: episodes per task: on the suite, on LIBERO-PRO's variants of it, on the
            tasks of the start model.
        craft: flags of the method called CRaFT.
        perturbed: evaluation flags that make the perturbed column of the standard one; `suite_suffix` is no flag but is
            appended to the name of the suite.
        budgets, penalties, l2sp_weights: the values tried in the retention protocol.
        keep: flags of the recommended constraint, on actions; empty: no table has it, nor replay.
        memory_sizes: demonstrations per old task that a row may have; the largest is that of the tables.
        bench: what the bench `keep` adds; None: the preset has none.
        pace: for estimates of hours; None: not known.
        shots: demonstrations per task in Table 3; `demos_per_task` of them are all.
        seeds: of every table; also choose the demonstrations of Table 3.
        ablation_suite: the suite of Table 3, Table 4 and the retention protocol.
        start_suite, start_task_ids, start_dataset: what the start model is competent at, and the name of its
            normalisation. Empty: it is no policy, and nothing is asked about it.
        other_start_datasets: suite -> normalisation of the start model for it, where it has learned that suite too.
        metric_flags: flags that give every constraint of the retention protocol the same unit.
        train, evaluate: further flags of every training and evaluation.
        start_perturbed: as `perturbed`, for the start's tasks: how its own demonstrations began.
        collect, start_collect, heldout_collect: flags of `collect_demos`, how they change for the start's tasks, and
            how for held-out demonstrations, which no training uses; None: the demonstrations are downloaded.
        memory_collect: as these, for the demonstrations of old tasks that a memory or replay holds.
        num_gpus: 1 or more: torchrun; 0: plain python.
    """

    name: str
    suites: tuple[str, ...]
    task_ids: Mapping[str, str]
    start: str
    data_root_dir: str
    dataset_suffix: str
    max_steps: int
    save_freq: int
    batch_size: int
    learning_rate: float
    num_trials: int
    pro_trials: int
    start_trials: int
    craft: Mapping[str, object]
    perturbed: Mapping[str, Any]
    budgets: tuple[float, ...]
    penalties: tuple[float, ...]
    shots: tuple[int, ...]
    demos_per_task: int
    seeds: tuple[int, ...]
    ablation_suite: str = "libero_spatial"
    start_suite: str = ""
    start_task_ids: str = ""
    start_dataset: str = ""
    other_start_datasets: Mapping[str, str] = field(default_factory=dict)
    l2sp_weights: tuple[float, ...] = (0.01,)
    metric_flags: Mapping[str, object] = field(default_factory=dict)
    train: Mapping[str, object] = field(default_factory=dict)
    evaluate: Mapping[str, object] = field(default_factory=dict)
    start_perturbed: Mapping[str, Any] = field(default_factory=dict)
    collect: Mapping[str, object] | None = None
    start_collect: Mapping[str, object] = field(default_factory=dict)
    heldout_collect: Mapping[str, object] = field(default_factory=dict)
    memory_collect: Mapping[str, object] = field(default_factory=lambda: {"seed": 2000})
    keep: Mapping[str, object] = field(default_factory=dict)
    memory_sizes: tuple[int, ...] = (1, 5)
    bench: Bench | None = None
    pace: Pace | None = None
    num_gpus: int = 0

    def dataset(self, suite: str) -> str:
        """Name of the demonstrations of a suite."""
        return suite + self.dataset_suffix

    def demonstrations(self, suite: str) -> Demonstrations:
        """What a policy of a suite is trained on."""
        return Demonstrations(suite, self.task_ids[suite], self.dataset(suite))

    def start_units(self, suite: str) -> str:
        """Normalisation with which the start model acts on a suite."""
        return self.other_start_datasets.get(suite, self.start_dataset) or self.dataset(suite)

    def held_out(self) -> tuple[Demonstrations, ...]:
        """Other demonstrations of the start's tasks and of the suite of the retention protocol."""
        changes = {**self.start_collect, **self.heldout_collect}
        start = Demonstrations(self.start_suite, self.start_task_ids, self.start_dataset, "held_out", changes)
        target = self.demonstrations(self.ablation_suite)
        return start, replace(target, room="held_out", changes=self.heldout_collect)

    def old(self, room: str, changes: Mapping[str, object]) -> Demonstrations:
        """Demonstrations of the start's tasks, in the start's units, with these changes of their collection."""
        how = {**self.start_collect, **changes}
        return Demonstrations(self.start_suite, self.start_task_ids, self.start_dataset, room, how)

    def memory(self, size: int) -> Demonstrations:
        """So many demonstrations of each of the start's tasks; a smaller memory is part of a larger one."""
        return self.old(f"memory_{size}", {**self.memory_collect, "episodes_per_task": size})

    def learned(self, task: NewTask) -> Demonstrations:
        """Demonstrations of a new task of the bench."""
        return Demonstrations(task.suite, task.task_id, task.dataset, task.name)
