"""The numbers of a table as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from craft_experiments.cells import Method
from craft_experiments.table_comparisons import Comparison
from craft_experiments.table_data import TableData, Training
from craft_experiments.table_entries import Column, Entry
from craft_experiments.table_grids import ordered, trainings
from craft_experiments.table_measures import RETENTION_MEASURES, START_MEASURES, TRAINING_MEASURES, Measure
from prismatic.evidence.cells import csv_cell
from prismatic.evidence.statistics import mean_and_half_width


def success_csv(data: TableData) -> str:
    """A row per method and column. Rates and intervals in [0, 1]; lists as `seed:value` separated by blanks."""
    rows = []
    for method in ordered(data.table.methods):
        for column in data.columns:
            entry = data.entries.get((method.key, column))
            if entry is not None:
                rows.append(_column_fields(method, column) | _entry_fields(data, method, column, entry))
    return csv_text(rows)


def _column_fields(method: Method, column: Column) -> dict[str, object]:
    return {
        "method": method.key,
        "label": method.label,
        "control": int(method.control),
        "kind": column.kind.value,
        "suite": column.suite,
        "demonstrations": column.shots,
    }


def _entry_fields(data: TableData, method: Method, column: Column, entry: Entry) -> dict[str, object]:
    half = entry.half_width
    low, high = entry.wilson or (None, None)
    ends = entry.interval or (None, None)
    return {
        "state": "complete" if entry.complete else "partial" if entry.rates else "failed" if entry.codes else "missing",
        "codes": pairs_text(entry.codes),
        "seeds_wanted": len(entry.wanted),
        "seeds": len(entry.rates),
        "mean": entry.mean,
        "half_width": half,
        "low": ends[0],
        "high": ends[1],
        "interval": "" if entry.interval is None else "wilson" if half is None else "t",
        "rates": pairs_text(entry.rates),
        "episodes": entry.trials,
        "successes": entry.successes,
        "wilson_low": low,
        "wilson_high": high,
        "bold": int(data.best.get(column) == method.key),
    }


def pairs_csv(data: TableData) -> str:
    """A row per comparison on the same episodes: method minus reference, in [-1, 1]."""
    rows = []
    for reference, found in (("plain", data.against_plain), ("start", data.against_start)):
        for method in data.competitors:
            for column in data.columns:
                comparison = found.get((method.key, column))
                if comparison is not None:
                    head = _column_fields(method, column) | {"reference": reference}
                    rows.append(head | _comparison_fields(comparison))
    return csv_text(rows)


def _comparison_fields(found: Comparison) -> dict[str, object]:
    return {
        "pairs": found.pairs,
        "same_pairs": int(found.same_pairs),
        "difference": found.difference,
        "bootstrap_low": found.interval[0],
        "bootstrap_high": found.interval[1],
        "only_method": found.only_first,
        "only_reference": found.only_second,
        "p": found.p,
        "p_holm": found.p_holm,
        "by_seed": pairs_text(found.by_seed),
    }


def measures_csv(data: TableData) -> str:
    """A row per method, training and measure."""
    rows = []
    for method in data.competitors:
        for training in trainings(data):
            for measure in (*TRAINING_MEASURES, *RETENTION_MEASURES, *START_MEASURES):
                values = data.value(method.key, training, measure.key)
                if values:
                    rows.append(_measure_fields(method, training, measure, values))
    return csv_text(rows)


def _measure_fields(
    method: Method, training: Training, measure: Measure, values: Mapping[int, float]
) -> dict[str, object]:
    mean, half = mean_and_half_width(list(values.values()))
    return {
        "method": method.key,
        "label": method.label,
        "trained_on": training.suites,
        "demonstrations": training.shots,
        "measure": measure.key,
        "unit": measure.unit,
        "seeds": len(values),
        "mean": mean,
        "half_width": half,
        "values": pairs_text(values),
    }


def pairs_text(values: Mapping[int, float | str] | Mapping[int, float]) -> str:
    """`0:0.9 1:0.85`."""
    return " ".join(f"{key}:{_plain(value)}" for key, value in sorted(values.items()))


def _plain(value: object) -> str:
    """Numbers with six digits: further ones are noise, and may differ between machines."""
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def csv_text(rows: Sequence[Mapping[str, object]]) -> str:
    """Comma-separated with a header; empty text when there is no row."""
    if not rows:
        return ""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _plain(csv_cell(value)) for name, value in row.items()} for row in rows)
    return stream.getvalue()
