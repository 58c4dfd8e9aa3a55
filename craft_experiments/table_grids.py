"""The numbers of a table as grids of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from craft_experiments.cells import Kind, Method
from craft_experiments.table_comparisons import Comparison
from craft_experiments.table_data import START_KINDS, TableData, Training, achieved, budgeted
from craft_experiments.table_entries import Column, Entry
from craft_experiments.table_measures import Measure
from prismatic.evidence.statistics import mean_and_half_width

KIND_LABELS = {
    Kind.STANDARD: "standard",
    Kind.PERTURBED: "perturbed",
    Kind.SWAP: "LIBERO-PRO, positions exchanged",
    Kind.OBJECT: "LIBERO-PRO, objects look different",
    Kind.START_TASKS: "start tasks, own head",
    Kind.START_TASKS_START_HEAD: "start tasks, start's head",
}
MISSING, DAGGER = "-", "†"
NOTES = (
    "Success in percent: mean over the seeds ± half width of its 95 % interval (Student t over the seeds' rates). "
    "± 0 means that all seeds gave the same rate, not that the rate is certain.",
    "Brackets: one seed only, 95 % Wilson interval of its episodes.",
    f"{DAGGER}: so many of the seeds are there. {MISSING}: not run. A code in capitals: the cell failed.",
    "Bold: the row has the highest mean of the column and a test says it is the best: against every other row that is "
    "no control, on the same (seed, task, initial state), the exact McNemar test of all pairs has p < 0.05 after "
    "Holm's correction, and the difference is positive in every seed. Nothing is bold while a row is incomplete.",
    "Rows in italics are controls: they show what a rate is worth and do not compete.",
)


@dataclass(frozen=True)
class GridRow:
    """A row; `bold` holds the positions of bold cells."""

    label: str
    cells: tuple[str, ...]
    bold: frozenset[int] = frozenset()
    control: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of texts. groups: a heading above each column, "" for none; equal neighbours are joined in LaTeX."""

    corner: str
    groups: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[GridRow, ...]


# --- Texts of cells -----------------------------------------------------------------------------------------------


def column_group(column: Column) -> str:
    """What an evaluation asks, in words."""
    return KIND_LABELS[column.kind]


def column_name(column: Column) -> str:
    """Suite or number of demonstrations."""
    if column.shots is not None:
        return f"{column.shots} demo{'' if column.shots == 1 else 's'}"
    return column.suite.removeprefix("libero_")


def rate_text(entry: Entry | None) -> str:
    """`85.0 ± 3.2`, `85.0 [70.1, 93.2]`, with `† 2 of 3` for missing seeds; a failure code; `-`."""
    if entry is None or (entry.mean is None and not entry.codes):
        return MISSING
    if entry.mean is None:
        return next(iter(entry.codes.values()))
    text = f"{100 * entry.mean:.1f}"
    if entry.half_width is not None:
        text += f" ± {100 * entry.half_width:.1f}"
    elif entry.interval is not None:
        text += f" [{100 * entry.interval[0]:.1f}, {100 * entry.interval[1]:.1f}]"
    return text if entry.complete else f"{text} {DAGGER} {len(entry.rates)} of {len(entry.wanted)}"


def number_text(values: Mapping[int, float], key: str) -> str:
    """Mean ± half width of the 95 % t interval over the seeds; the number of seeds in brackets when it is one."""
    if not values:
        return MISSING
    mean, half = mean_and_half_width(list(values.values()))
    digits = ".1f" if key.startswith("lost") else ".0f" if key == "seconds" else ".3g"
    return (
        f"{mean:{digits}} (1)" if half is None else f"{mean:{digits}} ± {half:{'.2g' if digits == '.3g' else digits}}"
    )


def comparison_text(found: Comparison | None) -> str:
    """`+3.3 [-1.0, +7.5], p 0.041`: points, bootstrap interval, Holm's p."""
    if found is None:
        return MISSING
    low, high = (_signed(100 * bound) for bound in found.interval)
    return f"{_signed(100 * found.difference)} [{low}, {high}], p {found.p_holm:.2g}"


def _signed(points: float) -> str:
    rounded = round(points, 1)
    return f"{rounded:+.1f}" if rounded else "0.0"


# --- Grids --------------------------------------------------------------------------------------------------------


def ordered(methods: Iterable[Method]) -> list[Method]:
    """Controls last."""
    return sorted(methods, key=lambda method: method.control)


def success_grid(data: TableData) -> Grid:
    """Success rates: a row per method, a column per evaluation."""
    rows = []
    for method in ordered(data.table.methods):
        cells = tuple(rate_text(data.entries.get((method.key, column))) for column in data.columns)
        bold = frozenset(i for i, c in enumerate(data.columns) if data.best.get(c) == method.key)
        rows.append(GridRow(method.label, cells, bold, method.control))
    groups = tuple(column_group(column) for column in data.columns)
    return Grid("method", groups, tuple(column_name(column) for column in data.columns), tuple(rows))


def comparison_grid(data: TableData, found: Mapping[tuple[str, Column], Comparison]) -> Grid | None:
    """Paired differences; None when nothing can be compared yet."""
    columns = [column for column in data.columns if any(place[1] == column for place in found)]
    rows = [
        GridRow(method.label, tuple(comparison_text(found.get((method.key, column))) for column in columns))
        for method in data.competitors
        if any(place[0] == method.key for place in found)
    ]
    groups = tuple(column_group(column) for column in columns)
    return Grid("method", groups, tuple(map(column_name, columns)), tuple(rows)) if rows else None


def training_label(training: Training) -> str:
    """`spatial`, `spatial, 5 demos`."""
    if training.shots is None:
        return training.suites
    return f"{training.suites}, {training.shots} demo{'' if training.shots == 1 else 's'}"


def trainings(data: TableData) -> list[Training]:
    """Everything policies of the table were trained on, in its order."""
    return list(dict.fromkeys(training for _, training in data.values))


def measure_grid(data: TableData, measures: Sequence[Measure]) -> Grid | None:
    """A row per method and training, a column per measure that has a value; None when none has."""
    places = [(m, t) for m in data.competitors for t in trainings(data) if (m.key, t) in data.values]
    shown = [q for q in measures if any(data.value(m.key, t, q.key) for m, t in places)]
    several = len({training for _, training in places}) > 1
    rows = []
    for method, training in places:
        cells = tuple(number_text(data.value(method.key, training, q.key), q.key) for q in shown)
        if any(cell != MISSING for cell in cells):
            label = f"{method.label}: {training_label(training)}" if several else method.label
            rows.append(GridRow(label, cells))
    units = tuple(f"({measure.unit})" if measure.unit else "" for measure in shown)
    return Grid("method", tuple(measure.label for measure in shown), units, tuple(rows)) if rows else None


def trade_off_grid(data: TableData) -> Grid | None:
    """Action error on the target against forgetting, best error first, and which rows have a lower mean of both."""
    found = {}
    for (key, training), values in data.values.items():
        if values.get("l1_target") and values.get("forgetting"):
            found[key, training] = [values[measure] for measure in ("l1_target", "forgetting")]
    means = {place: [fmean(numbers.values()) for numbers in pair] for place, pair in found.items()}
    labels = {method.key: method.label for method in data.competitors}
    rows = []
    for key, training in sorted(((k, t) for k, t in means if k in labels), key=means.__getitem__):
        error, forgetting = means[key, training]
        better = [labels[k] for k, t in means if k in labels and means[k, t][0] < error and means[k, t][1] < forgetting]
        texts = [number_text(values, "") for values in found[key, training]]
        rows.append(GridRow(labels[key], (*texts, "; ".join(better) or "none")))
    header = ("action error on the target (L1)", "forgetting (L1)", "rows with a lower mean of both")
    return Grid("method", ("",) * len(header), header, tuple(rows)) if len(rows) > 1 else None


def budget_grid(data: TableData) -> Grid | None:
    """How well each budget is met, over all trainings of a method; None when nothing with a budget was trained."""
    rows = []
    for method, budget in budgeted(data):
        drifts = achieved(data, method.key)
        if drifts:
            spread = f"{median(drifts):.3g} ({min(drifts):.3g} to {max(drifts):.3g})"
            off = f"{100 * median(abs(drift - budget) / budget for drift in drifts):.1f} %"
            above = f"{sum(drift > budget for drift in drifts)} of {len(drifts)}"
            rows.append(GridRow(method.label, (f"{budget:g}", spread, off, above)))
    header = ("budget", "drift, median (range)", "deviation, median", "above budget")
    return Grid("method", ("",) * len(header), header, tuple(rows)) if rows else None


def has_start_kinds(data: TableData) -> bool:
    """Whether the table asks about the start's own tasks."""
    return any(column.kind in START_KINDS for column in data.columns)
