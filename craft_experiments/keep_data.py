"""All numbers of the bench `keep`, from the records of its jobs. Rates are shares in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from craft_experiments.cells import Cell, Evaluation, Kind, Method, Role
from craft_experiments.jobs.base import Job
from craft_experiments.jobs.evaluate import Evaluate
from craft_experiments.jobs.plan import plan
from craft_experiments.jobs.train import Train
from craft_experiments.keep_cells import AGAIN, curve_steps, sequence_cell
from craft_experiments.keep_metrics import (
    Course,
    area_under_curve,
    backward_transfer,
    final_success,
    forward_transfer,
)
from craft_experiments.origins import origin_lines
from craft_experiments.preset import Bench, Preset
from craft_experiments.records import RecordError, read_manifest
from craft_experiments.settings import Settings, preset_of
from craft_experiments.table_data import record_of
from craft_experiments.table_measures import TAIL, training_metrics
from craft_experiments.tables import Table, methods_of

Outcomes = Mapping[tuple[int, int], bool]  # (task number, initial state) -> success
DRIFT = "CRaFT/Retention Loss"


@dataclass(frozen=True)
class KeepData:
    """Numbers of the bench.

    Attributes:
        outcomes: (cell, evaluation) -> what its episodes gave; missing records leave gaps.
        trainings: cell -> record of its training.
        codes: cells that failed, with their code.
        missing: recorded jobs that are not there. wanted: their number in all.
        seconds: of all recorded programs together, see `_time`. origins: lines of the page, see `origin_lines`.
    """

    preset: Preset
    table: Table
    outcomes: Mapping[tuple[str, str], Outcomes]
    trainings: Mapping[str, Mapping[str, Any]]
    codes: Mapping[str, str]
    missing: tuple[str, ...]
    wanted: int
    seconds: float | None = None
    origins: tuple[str, ...] = ()

    @property
    def bench(self) -> Bench:
        """What the bench adds to the preset."""
        assert self.preset.bench is not None  # `table` has looked
        return self.preset.bench

    def rows(self) -> list[Method]:
        """Rows that learn the sequence, without controls."""
        shown = {*self.bench.primary, *self.bench.secondary}
        return [method for method in self.table.methods if method.key in shown]

    def is_primary(self, method: Method) -> bool:
        """Whether a row has all seeds and episodes."""
        return method.key in self.bench.primary

    def seeds(self, method: Method) -> tuple[int, ...]:
        """Seeds that the table asks of a row."""
        return tuple(dict.fromkeys(r.cell.seed for r in self.table.requests if r.cell.method.key == method.key))

    def cell(self, method: Method, seed: int, stage: int) -> Cell:
        """The cell of a row after a stage; after stage 0 it is the start's."""
        return sequence_cell(self.preset, self.method("start") if stage == 0 else method, seed, stage)

    def planned_seeds(self, method: Method) -> tuple[int, ...]:
        """Seeds that a verdict on a row rests on: of a primary row all of the preset, whatever the table asks."""
        return preset_of(self.preset.name, self.table.name).seeds if self.is_primary(method) else self.seeds(method)

    @cached_property
    def _known(self) -> dict[str, Method]:
        return methods_of(self.preset)

    def method(self, key: str) -> Method:
        """A row by key, also one that was not chosen."""
        return self._known[key]

    def found(self, cell: Cell, kind: Kind, name: str, step: int | None = None) -> Outcomes | None:
        """Outcomes of one evaluation; None while there is no record."""
        return self.outcomes.get((cell.name, Evaluation(kind, name, step=step).name))

    def old_outcomes(self, cell: Cell, step: int | None = None) -> Outcomes | None:
        """Of the old tasks."""
        return self.found(cell, Kind.START_TASKS, self.preset.start_suite, step)

    @property
    def old_tasks(self) -> tuple[str, ...]:
        """Names of the start's tasks."""
        return tuple(f"old {number}" for number in self.preset.start_task_ids.split(","))

    @cached_property
    def values(self) -> dict[str, dict[str, dict[int, float]]]:
        """Row -> measure -> seed -> number; what is missing has no entry."""
        found: dict[str, dict[str, dict[int, float]]] = {}
        for method in self.rows():
            for seed in self.seeds(method):
                for name, value in self._measures(method, seed).items():
                    if value is not None:
                        found.setdefault(method.key, {}).setdefault(name, {})[seed] = value
        return found

    def _measures(self, method: Method, seed: int) -> dict[str, float | None]:
        course = self.course(method, seed)
        tasks = [task.name for task in self.bench.new_tasks]
        last = len(tasks)
        old = [mean_rate([course.success[stage].get(task) for task in self.old_tasks]) for stage in range(last + 1)]
        ends = [self.cell(method, seed, stage) for stage in range(1, last + 1)]
        unseen = [rate(self.found(cell, Kind.UNSEEN, task)) for cell, task in zip(ends, tasks, strict=True)]
        return {
            "new": mean_rate([course.success[stage].get(task) for stage, task in enumerate(tasks, start=1)]),
            "unseen": mean_rate(unseen),
            "old": old[-1],
            "old_between": mean_rate(old[1:-1]),
            "start": old[0],
            "final": final_success(course),
            "forward": forward_transfer(course),
            "backward": backward_transfer(course),
            "area": area_under_curve(course),
            **self._costs(ends),
        }

    def _costs(self, cells: list[Cell]) -> dict[str, float | None]:
        records = [self.trainings.get(cell.name) for cell in cells]
        known = [record for record in records if record is not None]
        if len(known) < len(records):
            return {}
        series = [training_metrics(record, record["cell"]) for record in known]
        drifts = [metrics.tail_mean(DRIFT, TAIL) for metrics in series]
        peaks = [max(metrics.series("Memory/Peak GiB")[1], default=None) for metrics in series]
        gave_up = [metrics.series("CRaFT/Out Of Reach")[1] for metrics in series]
        found_peaks = [peak for peak in peaks if peak is not None]
        return {
            "time": _time(self.preset, known),
            "drift": max((drift for drift in drifts if drift is not None), default=None),
            "memory": max(found_peaks, default=None),
            "out_of_reach": max((float(flags[-1]) for flags in gave_up if flags), default=None),
        }

    def course(self, method: Method, seed: int) -> Course:
        """The sequence of a row with a seed."""
        tasks = [task.name for task in self.bench.new_tasks]
        cells = [self.cell(method, seed, stage) for stage in range(len(tasks) + 1)]
        success = tuple(self._after(cell) for cell in cells)
        curve = {}
        for stage, task in enumerate(tasks, start=1):
            steps = (*curve_steps(self.preset), None) if method.role is Role.TRAINED else (None,)
            rates = [rate(self.found(cells[stage], Kind.NEW, task, step)) for step in steps]
            known = [value for value in rates if value is not None]
            if len(known) == len(rates) and method.role is Role.TRAINED:
                curve[task] = tuple(known)
        learned = dict.fromkeys(self.old_tasks, 0) | {task: stage for stage, task in enumerate(tasks, start=1)}
        return Course(learned, success, curve)

    def _after(self, cell: Cell) -> dict[str, float]:
        """Success by task at the end of a stage."""
        found = by_task(self.old_outcomes(cell))
        for task in cell.tasks or ():
            value = rate(self.found(cell, Kind.NEW, task))
            if value is not None:
                found[task] = value
        return found

    def recovery(self, key: str) -> dict[int, float]:
        """Optimizer steps on old demonstrations -> success in the old tasks, of the row `key`; 0 is the end before."""
        again = next((r.cell for r in self.table.requests if r.cell.method.parent == key and _is_again(r.cell)), None)
        if again is None:
            return {}
        before = self.cell(self.method(key), again.seed, len(self.bench.new_tasks))
        steps = self.bench.recovery_steps
        found = {0: self.old_outcomes(before)} | {step: self.old_outcomes(again, step) for step in steps[:-1]}
        found[steps[-1]] = self.old_outcomes(again)
        rates = {step: mean_rate(list(by_task(outcomes).values())) for step, outcomes in found.items() if outcomes}
        return {step: value for step, value in rates.items() if value is not None}


def _is_again(cell: Cell) -> bool:
    return bool(cell.tasks) and (cell.tasks or ())[-1] == AGAIN


def by_task(outcomes: Outcomes | None) -> dict[str, float]:
    """Rates of the old tasks by name."""
    found: dict[str, list[bool]] = {}
    for (task, _), success in (outcomes or {}).items():
        found.setdefault(f"old {task}", []).append(success)
    return {name: sum(values) / len(values) for name, values in sorted(found.items())}


def rate(outcomes: Outcomes | None) -> float | None:
    """Share of successes; None without an episode."""
    return sum(outcomes.values()) / len(outcomes) if outcomes else None


def mean_rate(values: list[float | None] | list[float]) -> float | None:
    """Mean; None when there is none or one is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if values and len(known) == len(values) else None


def load_keep(s: Settings, table: Table) -> KeepData:
    """Read the records of the bench; missing ones leave gaps.

    Raises:
        RecordError: not one record and no failure code (names the folder); a record that cannot be read, or was made
            with other settings (names the file).
    """
    jobs = {name: job for name, job in plan(s, table).items() if job.measured}
    records = {name: record for name, job in jobs.items() if (record := record_of(s, job)) is not None}
    manifest = read_manifest(s.records_dir)
    cells = {job.cell.name for job in jobs.values() if job.cell is not None}
    codes = {name: entry["code"] for name, entry in sorted(manifest.items()) if name in cells and "code" in entry}
    if not records and not codes:
        raise RecordError(
            f"{s.records_dir}: found no record of {table.name}, expected <cell>/<evaluation>.json.gz as "
            f"`python -m craft_experiments run {table.name}` writes them"
        )
    return KeepData(
        preset=s.preset,
        table=table,
        outcomes=dict(_outcomes(jobs, records)),
        trainings={job.policy.name: records[n] for n, job in jobs.items() if isinstance(job, Train) and n in records},
        codes=codes,
        missing=tuple(name for name in jobs if name not in records),
        wanted=len(jobs),
        seconds=_time(s.preset, records.values()),
        origins=tuple(origin_lines(s, jobs, records)),
    )


def _time(preset: Preset, records: Iterable[Mapping[str, Any]]) -> float | None:
    """Seconds of processor, which do not depend on what else runs; with GPUs on the clock. None: one is unknown."""
    found = [record.get("seconds" if preset.num_gpus else "processor_seconds") for record in records]
    return None if None in found else sum(map(float, filter(None, found)))


def _outcomes(
    jobs: Mapping[str, Job], records: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[tuple[str, str], Outcomes]]:
    for name, job in jobs.items():
        if isinstance(job, Evaluate) and name in records:
            episodes = records[name]["episodes"]
            found = {(task, start): bool(success) for task, start, success, *_ in episodes}
            yield (job.policy.name, job.evaluation.name), found
