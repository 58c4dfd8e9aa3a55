"""From records to numbers: success rates with intervals, paired comparisons, measures of training and retention.

Everything a table or figure shows is computed here, from the records of the table's jobs and the codes of failed cells.
Rates, differences and intervals are shares in [0, 1] (differences in [-1, 1]); the formats make percent of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import fsum
from typing import Any

from craft_experiments.jobs.base import Job
from craft_experiments.jobs.evaluate import Evaluate
from craft_experiments.jobs.plan import plan
from craft_experiments.records import RETENTION, RecordError, check_settings, read_manifest, read_record
from craft_experiments.settings import Settings
from craft_experiments.tables import Cell, Evaluation, Kind, Method, Table
from prismatic.evidence.pairing import PairedCounts, paired
from prismatic.evidence.results import TrainingMetrics
from prismatic.evidence.statistics import (
    holm_adjusted,
    mean_and_half_width,
    stratified_bootstrap_interval,
    wilson_interval,
)

TAIL = 0.25  # share of the logged values, at the end, that a final training metric is the mean of
ALPHA = 0.05
START_KINDS = (Kind.START_TASKS, Kind.START_TASKS_START_HEAD)
Pair = tuple[int, int]  # task, initial state


@dataclass(frozen=True)
class Column:
    """One question of a table. shots: demonstrations per task, in the table of few demonstrations only."""

    kind: Kind
    suite: str
    shots: int | None = None


@dataclass(frozen=True)
class Entry:
    """What is known of one method in one column.

    Attributes:
        wanted: seeds the table asks for.
        rates: seed -> success rate in [0, 1].
        outcomes: seed -> (task, initial state) -> success; empty for a rate without recorded episodes.
        codes: seed -> failure code, where there is no rate.
    """

    wanted: tuple[int, ...]
    rates: Mapping[int, float]
    outcomes: Mapping[int, Mapping[Pair, bool]]
    codes: Mapping[int, str]

    @property
    def complete(self) -> bool:
        """Whether every seed has a rate."""
        return len(self.rates) == len(self.wanted)

    @property
    def successes(self) -> int:
        """Successful episodes of all seeds."""
        return sum(sum(episodes.values()) for episodes in self.outcomes.values())

    @property
    def trials(self) -> int:
        """Episodes of all seeds."""
        return sum(len(episodes) for episodes in self.outcomes.values())

    @property
    def mean(self) -> float | None:
        """Mean of the seeds' rates; None without any."""
        return fsum(self.rates.values()) / len(self.rates) if self.rates else None

    @property
    def half_width(self) -> float | None:
        """Half width of the 95 % Student t interval over the seeds' rates; None with fewer than two seeds."""
        return mean_and_half_width(list(self.rates.values()))[1] if self.rates else None

    @property
    def wilson(self) -> tuple[float, float] | None:
        """95 % Wilson interval of all episodes together; None without episodes."""
        return wilson_interval(self.successes, self.trials) if self.trials else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Over the seeds (Student t, cut at 0 and 1); with one seed over its episodes (Wilson)."""
        if self.half_width is None:
            return self.wilson
        return max(0.0, self.mean - self.half_width), min(1.0, self.mean + self.half_width)

    @property
    def episodes(self) -> dict[tuple[int, int, int], bool]:
        """Success by (seed, task, initial state)."""
        return {(seed, *pair): done for seed, episodes in self.outcomes.items() for pair, done in episodes.items()}


@dataclass(frozen=True)
class Comparison:
    """Two entries on the episodes (seed, task, initial state) that both have; `difference` is first minus second.

    Attributes:
        interval: 95 % bootstrap interval of the difference; pairs are drawn again within each seed and task.
        only_first, only_second: pairs where only one of the two succeeded. p: exact McNemar test of these.
        p_holm: p adjusted for the other comparisons of the same column; None where it belongs to no family.
        by_seed: seed -> difference of that seed.
        same_pairs: whether neither entry has further episodes.
    """

    pairs: int
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    by_seed: Mapping[int, float]
    same_pairs: bool
    p_holm: float | None = None


def compare(first: Entry, second: Entry) -> Comparison | None:
    """Compare on the common episodes; None when there are none."""
    pairs = paired(first.episodes, second.episodes, lambda key: key[:2])
    if not pairs:
        return None
    clusters = {key: [one - two for one, two in found] for key, found in pairs.items()}
    every = [change for changes in clusters.values() for change in changes]
    by_seed = {}
    for seed in sorted({seed for seed, _ in clusters}):
        of_seed = [change for (s, _), changes in clusters.items() if s == seed for change in changes]
        by_seed[seed] = fsum(of_seed) / len(of_seed)
    counts = sum(map(PairedCounts.of, pairs.values()), PairedCounts())
    return Comparison(
        pairs=len(every),
        difference=fsum(every) / len(every),
        interval=stratified_bootstrap_interval(list(clusters.values())),
        only_first=counts.only_a,
        only_second=counts.only_b,
        p=counts.p_value,
        by_seed=by_seed,
        same_pairs=first.episodes.keys() == second.episodes.keys(),
    )


def with_holm(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons as one family."""
    adjusted = holm_adjusted([comparison.p for comparison in comparisons.values()])
    return {k: replace(c, p_holm=p) for (k, c), p in zip(comparisons.items(), adjusted, strict=True)}


def best_of(entries: Mapping[str, Entry]) -> str | None:
    """Key of the entry that a test shows to be the best of all, for bold print; None when there is no such entry.

    It has the highest mean, and against each other entry, on the same pairs, the difference is positive in every seed
    and Holm's adjusted p of the exact McNemar test is below 0.05. An incomplete entry leaves the question open.
    """
    if len(entries) < 2 or not all(entry.complete and entry.trials for entry in entries.values()):
        return None
    best = max(entries, key=lambda key: entries[key].mean)
    found = {key: compare(entries[best], entry) for key, entry in entries.items() if key != best}
    if not all(comparison and comparison.same_pairs for comparison in found.values()):
        return None
    tested = with_holm(found).values()
    clear = all(c.p_holm < ALPHA and min(c.by_seed.values()) > 0 for c in tested)
    return best if clear else None


# --- Measures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measure:
    """A number per training, beside the success rates."""

    key: str
    label: str
    unit: str


TRAINING_MEASURES = (
    Measure("achieved_drift", "drift in training", "L_ret, unit of the method's metric"),
    Measure("final_lambda", "final λ", ""),
    Measure("action_loss", "action loss", "L1, normalised actions"),
    Measure("action_l1_now", "L1 of the next action", "L1, normalised actions"),
    Measure("seconds", "training", "s"),
)
RETENTION_MEASURES = (
    Measure("lost", "success lost, own head", "percentage points"),
    Measure("lost_start_head", "success lost, start's head", "percentage points"),
    Measure("forgetting", "forgetting", "L1, start's head, after minus before"),
    Measure("drift", "held-out drift", "relative squared"),
    Measure("cka_raw", "CKA, patches", "0 to 1"),
    Measure("cka_aq", "CKA, action queries", "0 to 1"),
    Measure("probe_r2", "probe R²", "position, refitted"),
    Measure("probe_r2_stale", "probe R², start's probe", "position"),
    Measure("probe_accuracy", "probe accuracy", "instruction, refitted"),
    Measure("probe_accuracy_stale", "probe accuracy, start's probe", "instruction"),
    Measure("l1_target", "L1 on the target", "normalised actions, held-out"),
    Measure("drift_target", "drift on the target", "relative squared, held-out"),
    Measure("l1_own_head", "L1, own head", "normalised actions, held-out"),
    Measure("l1_start_head", "L1, start's head", "normalised actions, held-out"),
)
START_MEASURES = (
    Measure("probe_r2_start", "probe R²", "start checkpoint"),
    Measure("probe_accuracy_start", "probe accuracy", "start checkpoint"),
    Measure("l1_start", "L1", "start checkpoint"),
)
"""Of the start checkpoint itself, as every measurement states them again."""
_WHERE = {
    "probe_r2_start": ("probe", "start", "position_r2", "mean"),
    "probe_accuracy_start": ("probe", "start", "instruction_accuracy"),
    "drift": ("drift", "original", "rel_mse", "total"),
    "cka_raw": ("cka", "raw"),
    "cka_aq": ("cka", "aq"),
    "probe_r2": ("probe", "trained", "position_r2", "mean"),
    "probe_r2_stale": ("probe", "stale", "position_r2", "mean"),
    "probe_accuracy": ("probe", "trained", "instruction_accuracy"),
    "probe_accuracy_stale": ("probe", "stale", "instruction_accuracy"),
    "l1_start": ("action_l1", "start"),
    "l1_own_head": ("action_l1", "trained"),
    "l1_start_head": ("action_l1", "start_head"),
}
"""Where `measure_retention.py` puts each number. A number it could not compute is null there, at any level."""


def retention_values(measured: Mapping[str, Any], where: str) -> dict[str, float]:
    """Measures of a retention record, by key; numbers that are null there are left out.

    Raises:
        RecordError: a field is missing or no number; names the record (`where`) and the field.
    """
    found = {}
    for key, path in _WHERE.items():
        value: Any = measured
        for depth, name in enumerate(path):
            if value is None:
                break
            if not isinstance(value, Mapping) or name not in value:
                place = ".".join((RETENTION, *path[: depth + 1]))
                raise RecordError(f"{where}: {place}: found nothing, expected a field of that name")
            value = value[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecordError(f"{where}: {RETENTION}.{'.'.join(path)}: found {value!r}, expected a number")
        found[key] = float(value)
    if found.keys() >= {"l1_start_head", "l1_start"}:
        found["forgetting"] = found["l1_start_head"] - found["l1_start"]
    return found


def target_values(values: Mapping[str, float]) -> dict[str, float]:
    """Of held-out demonstrations of the target: the policy's own error, and how far its features moved."""
    names = {"l1_own_head": "l1_target", "drift": "drift_target"}
    return {new: values[old] for old, new in names.items() if old in values}


def training_metrics(record: Mapping[str, Any], where: str) -> TrainingMetrics:
    """The logged values of a training record as a series.

    Raises:
        RecordError: columns of different length; names the record (`where`) and the column.
    """
    columns = record["metrics"]
    steps = columns.get("step", [])
    for name, values in columns.items():
        if len(values) != len(steps):
            raise RecordError(f"{where}: metrics.{name}: found {len(values)} values, expected {len(steps)}")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return TrainingMetrics(str(record["cell"]), rows)


def _training_values(metrics: TrainingMetrics, seconds: float) -> dict[str, float]:
    _, multipliers = metrics.series("CRaFT/Lambda")
    found = {
        "achieved_drift": metrics.tail_mean("CRaFT/Retention Loss", TAIL),
        "final_lambda": multipliers[-1] if multipliers else None,
        "action_loss": metrics.tail_mean("VLA Train/Loss", TAIL),
        "action_l1_now": metrics.tail_mean("VLA Train/Curr Action L1 Loss", TAIL),
        "seconds": seconds,
    }
    return {key: value for key, value in found.items() if value is not None}


# --- The table ----------------------------------------------------------------------------------------------------


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
    records = {name: record for name, job in jobs.items() if (record := _read(s, job)) is not None}
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
    )
    return replace(data, values=_with_lost_success(data))


def _is_recorded(job: Job) -> bool:
    return bool(job.measured)


def _cells(table: Table) -> list[tuple[str, Cell]]:
    return list({request.cell.name: request.cell for request in table.requests}.items())


def _read(s: Settings, job: Job) -> dict[str, Any] | None:
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
            values = _training_values(metrics, float(record["seconds"]))
        elif job.kind == "measure":
            values = retention_values(record[RETENTION], str(job.record(s)))
            if job.data.dataset != s.preset.start_dataset:
                values = target_values(values)
        else:
            continue
        place = found.setdefault((job.cell.method.key, training_of(job.cell)), {})
        for key, value in values.items():
            place.setdefault(key, {})[job.cell.seed] = value
    return found


def _metrics(
    s: Settings, jobs: Mapping[str, Job], records: Mapping[str, Mapping[str, Any]]
) -> dict[str, TrainingMetrics]:
    trained = {name: record for name, record in records.items() if jobs[name].kind == "train"}
    return {jobs[n].cell.name: training_metrics(r, str(jobs[n].record(s))) for n, r in trained.items()}


def _with_lost_success(data: TableData) -> dict[tuple[str, Training], dict[str, dict[int, float]]]:
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
