"""All numbers of a table, from the records of its jobs and the codes of failed cells.

Everything a table or figure shows comes from here. Rates, differences and intervals are shares in [0, 1] (differences
in [-1, 1]); the formats make percent of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from craft_experiments.cells import Cell, Evaluation, Kind, Method
from craft_experiments.jobs.base import Job
from craft_experiments.jobs.evaluate import Evaluate
from craft_experiments.jobs.measure import Measure
from craft_experiments.jobs.plan import plan
from craft_experiments.origins import origin_lines
from craft_experiments.records import RETENTION, RecordError, check_settings, read_manifest, read_record
from craft_experiments.settings import Settings
from craft_experiments.table_comparisons import Comparison, best_of, compare, with_holm
from craft_experiments.table_entries import Column, Entry
from craft_experiments.table_measures import retention_values, target_values, training_metrics, training_values
from craft_experiments.tables import Table
from prismatic.evidence.results import TrainingMetrics

START_KINDS = (Kind.START_TASKS, Kind.START_TASKS_START_HEAD)


@dataclass(frozen=True)
class Training:
    """What a policy was trained on: the suites joined by +, and the demonstrations per task (None: all)."""

    suites: str
    shots: int | None


@dataclass(frozen=True)
class TableData:
    """All numbers of a table.

    Attributes:
        columns: in the order of kinds, suites and numbers of demonstrations.
        entries: (method key, column) -> entry; columns a method is not asked about have none.
        values: (method key, training) -> measure key -> seed -> number.
        metrics: cell -> logged values of its training.
        codes: cells that failed, with their code.
        complete, wanted: cells with all results, and cells of the table. seconds: of all records.
        origins: lines of the page, see `origin_lines`.
    """

    table: Table
    columns: tuple[Column, ...]
    entries: Mapping[tuple[str, Column], Entry]
    values: Mapping[tuple[str, Training], Mapping[str, Mapping[int, float]]]
    metrics: Mapping[str, TrainingMetrics]
    codes: Mapping[str, str]
    complete: int
    wanted: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    origins: tuple[str, ...] = ()

    @property
    def competitors(self) -> tuple[Method, ...]:
        """Rows that are no controls."""
        return tuple(method for method in self.table.methods if not method.control)

    def column(self, column: Column, methods: Iterable[Method]) -> dict[str, Entry]:
        """Entries of a column by method key."""
        return {m.key: self.entries[m.key, column] for m in methods if (m.key, column) in self.entries}

    @cached_property
    def best(self) -> dict[Column, str]:
        """Column -> method key to print in bold, where a test supports one (`best_of`)."""
        found = {column: best_of(self.column(column, self.competitors)) for column in self.columns}
        return {column: key for column, key in found.items() if key is not None}

    @cached_property
    def against_plain(self) -> dict[tuple[str, Column], Comparison]:
        """Each competitor minus plain fine-tuning, Holm within a column."""
        return self._against("plain", {column: column for column in self.columns})

    @cached_property
    def against_start(self) -> dict[tuple[str, Column], Comparison]:
        """Each competitor minus the start checkpoint, on the start's own tasks; Holm within a column."""
        before = {c: replace(c, kind=Kind.START_TASKS) for c in self.columns if c.kind in START_KINDS}
        return self._against("start", before)

    def _against(self, key: str, reference_of: Mapping[Column, Column]) -> dict[tuple[str, Column], Comparison]:
        result = {}
        for column, reference_column in reference_of.items():
            reference = self.entries.get((key, reference_column))
            if reference is None:
                continue
            entries = self.column(column, (m for m in self.competitors if m.key != key))
            found = {k: compare(entry, reference) for k, entry in entries.items()}
            tested = with_holm({k: comparison for k, comparison in found.items() if comparison is not None})
            result.update({(k, column): comparison for k, comparison in tested.items()})
        return result

    def value(self, key: str, training: Training, measure: str) -> dict[int, float]:
        """seed -> number; empty when there is none."""
        return dict(self.values.get((key, training), {}).get(measure, {}))


def training_of(cell: Cell) -> Training:
    """What the policy of a cell was trained on."""
    return Training("+".join(suite.removeprefix("libero_") for suite in cell.suites), cell.shots)


def budgeted(data: TableData) -> list[tuple[Method, float]]:
    """Methods whose multiplier follows a budget, with the budget."""
    found = [m for m in data.competitors if m.train.get("use_craft") and m.train.get("craft_enable_dual", True)]
    return [(m, float(m.train["craft_retention_budget"])) for m in found if "craft_retention_budget" in m.train]


def achieved(data: TableData, key: str) -> list[float]:
    """Drift at the end of every training of a method, in the unit of its budget."""
    found = [values.get("achieved_drift", {}) for (method, _), values in data.values.items() if method == key]
    return [drift for values in found for drift in values.values()]


def load(s: Settings, table: Table) -> TableData:
    """Read the records of a table; missing ones leave gaps.

    Raises:
        RecordError: not one record and no failure code (names the folder); a record that cannot be read, or was made
            with other settings (names the file).
    """
    jobs = plan(s, table)
    records = {name: record for name, job in jobs.items() if (record := record_of(s, job)) is not None}
    manifest = read_manifest(s.records_dir)
    names = {request.cell.name for request in table.requests}
    codes = {name: entry["code"] for name, entry in sorted(manifest.items()) if name in names and "code" in entry}
    if not records and not codes:
        raise RecordError(
            f"{s.records_dir}: found no record of {table.name}, expected "
            f"<cell>/<evaluation>.json.gz as `python -m craft_experiments run {table.name}` writes them"
        )
    needed = {
        name: {j.name for j in jobs.values() if j.cell == cell and _is_recorded(j)} for name, cell in _cells(table)
    }
    data = TableData(
        table=table,
        columns=_columns(s, table),
        entries=_entries(s, table, records, codes),
        values=_values(s, jobs, records),
        metrics=_metrics(s, jobs, records),
        codes=codes,
        complete=sum(jobs_of <= records.keys() for jobs_of in needed.values()),
        wanted=len(needed),
        seconds={name: float(record["seconds"]) for name, record in records.items()},
        origins=tuple(origin_lines(s, jobs, records)),
    )
    return replace(data, values=_with_lost_success(data))


def _is_recorded(job: Job) -> bool:
    return bool(job.measured)


def _cells(table: Table) -> list[tuple[str, Cell]]:
    return list({request.cell.name: request.cell for request in table.requests}.items())


def record_of(s: Settings, job: Job) -> dict[str, Any] | None:
    """The record of a job, None while there is none. RecordError for one of other settings, or without a field."""
    path = job.record(s)
    if path is None or not path.exists():
        return None
    record = read_record(path)
    if "flags" not in record and "command" not in record:
        raise RecordError(f"{path}: flags: found nothing, expected a field of that name")
    for name in ("cell", "seconds", job.measured):
        if name not in record:
            raise RecordError(f"{path}: {name}: found nothing, expected a field of that name")
    check_settings(path, record, job.flags(s))
    return record


def _column(s: Settings, table: Table, cell: Cell, evaluation: Evaluation) -> Column:
    shots = (cell.shots or s.preset.demos_per_task) if table.name == "table3" else None
    return Column(evaluation.kind, evaluation.suite, shots)


def _columns(s: Settings, table: Table) -> tuple[Column, ...]:
    found = {_column(s, table, r.cell, e): None for r in table.requests for e in r.evaluations}
    kinds, suites = list(Kind), [*s.preset.suites, s.preset.start_suite]
    suites += [column.suite for column in found]
    return tuple(sorted(found, key=lambda c: (kinds.index(c.kind), suites.index(c.suite), c.shots or 0)))


def _entries(
    s: Settings, table: Table, records: Mapping[str, Mapping[str, Any]], codes: Mapping[str, str]
) -> dict[tuple[str, Column], Entry]:
    seeds: dict[tuple[str, Column], dict[int, tuple[str, str]]] = {}
    for request in table.requests:
        cell = request.cell
        for evaluation in request.evaluations:
            place = (cell.method.key, _column(s, table, cell, evaluation))
            job = Evaluate(cell, evaluation).name
            seeds.setdefault(place, {})[cell.seed] = (job, cell.name)
    return {place: _entry(found, records, codes) for place, found in seeds.items()}


def _entry(
    seeds: Mapping[int, tuple[str, str]], records: Mapping[str, Mapping[str, Any]], codes: Mapping[str, str]
) -> Entry:
    there = {seed: records[job] for seed, (job, _) in seeds.items() if job in records}
    outcomes = {
        seed: {(task, start): bool(success) for task, start, success, *_ in record["episodes"]}
        for seed, record in there.items()
        if record["episodes"]
    }
    failed = {seed: codes[cell] for seed, (_, cell) in seeds.items() if seed not in there and cell in codes}
    return Entry(tuple(seeds), {seed: float(record["rate"]) for seed, record in there.items()}, outcomes, failed)


def _values(
    s: Settings, jobs: Mapping[str, Job], records: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, Training], dict[str, dict[int, float]]]:
    found: dict[tuple[str, Training], dict[str, dict[int, float]]] = {}
    for name, record in records.items():
        job = jobs[name]
        if job.kind == "train":
            metrics = training_metrics(record, str(job.record(s)))
            values = training_values(metrics, float(record["seconds"]))
        elif job.kind == "measure":
            values = retention_values(record[RETENTION], str(job.record(s)))
            assert isinstance(job, Measure)  # what its kind says
            if job.data.dataset != s.preset.start_dataset:
                values = target_values(values)
        else:
            continue
        cell = _policy(job)
        place = found.setdefault((cell.method.key, training_of(cell)), {})
        for key, value in values.items():
            place.setdefault(key, {})[cell.seed] = value
    return found


def _policy(job: Job) -> Cell:
    """The policy of a job that trains, measures or evaluates one."""
    assert job.cell is not None
    return job.cell


def _metrics(
    s: Settings, jobs: Mapping[str, Job], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, TrainingMetrics]:
    trained = {name: record for name, record in records.items() if jobs[name].kind == "train"}
    return {_policy(jobs[n]).name: training_metrics(r, str(jobs[n].record(s))) for n, r in trained.items()}


def _with_lost_success(data: TableData) -> dict[tuple[str, Training], dict[str, Mapping[int, float]]]:
    """`data.values` with the start checkpoint's rate on its tasks minus the rate after training, per seed, in points.

    A seed the start checkpoint was not evaluated with takes the mean of the seeds it was evaluated with.
    """
    values = {place: dict(found) for place, found in data.values.items()}
    names = {Kind.START_TASKS: "lost", Kind.START_TASKS_START_HEAD: "lost_start_head"}
    trainings = {r.cell.method.key: training_of(r.cell) for r in data.table.requests if not r.cell.method.control}
    for (key, column), entry in data.entries.items():
        before = data.entries.get(("start", replace(column, kind=Kind.START_TASKS)))
        if column.kind not in names or key not in trainings or before is None or before.mean is None:
            continue
        lost = {seed: 100 * (before.rates.get(seed, before.mean) - rate) for seed, rate in entry.rates.items()}
        if lost:
            values.setdefault((key, trainings[key]), {})[names[column.kind]] = lost
    return values
