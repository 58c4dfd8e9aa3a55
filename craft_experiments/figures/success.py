"""Success of every method, by suite or by method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from craft_experiments.cells import Kind
from craft_experiments.common_utils.plots import COLOURS, new_figure
from craft_experiments.figures.drawing import (
    GREY,
    clean,
    column_entries,
    draw_rate,
    has_rate,
    legend_below,
    method_styles,
)
from craft_experiments.table_data import TableData
from craft_experiments.table_entries import Column
from craft_experiments.table_grids import column_group, column_name, ordered


def success_figure(data: TableData) -> Any:
    """Few rows and several suites: suites side by side. Many rows: one line per method."""
    shown = [
        column for column in data.columns if any(e.mean is not None for e in column_entries(data, column).values())
    ]
    if not shown or data.table.name == "table3":
        return None
    several = len({column.suite for column in shown if column.kind is Kind.STANDARD}) > 1
    return _by_suite(data, shown) if several else _by_method(data, shown)


def _by_suite(data: TableData, columns: Sequence[Column]) -> Any:
    kinds = list(dict.fromkeys(column.kind for column in columns))
    suites = list(dict.fromkeys(column.suite for column in columns))
    rows = 1 if len(kinds) <= 2 else 2
    across = -(-len(kinds) // rows)
    methods, styles = ordered(data.table.methods), method_styles(ordered(data.table.methods))
    figure = new_figure(1.2 + across * max(2.6, 0.9 * len(suites)), 3.1 * rows)
    axes = list(figure.subplots(rows, across, sharey=True, squeeze=False).flat)
    for axis, kind in zip(axes, kinds, strict=False):
        _suite_panel(axis, data, [c for c in columns if c.kind is kind], suites, styles)
        axis.set_title(column_group(Column(kind, "")), fontsize=10)
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    for axis in axes[::across]:
        axis.set_ylabel("success, %")
    legend_below(figure, axes, 2 if max(len(m.label) for m in methods) > 30 else 3)
    return figure


def _suite_panel(
    axis: Any,
    data: TableData,
    columns: Sequence[Column],
    suites: Sequence[str],
    styles: Mapping[str, Mapping[str, str]],
) -> None:
    labels = {method.key: method.label for method in data.table.methods}
    for column in columns:
        entries = column_entries(data, column)
        for index, (key, style) in enumerate(styles.items()):
            entry = entries.get(key)
            if entry is not None and entry.mean is not None:
                place = suites.index(column.suite) + 0.7 * ((index + 0.5) / len(styles) - 0.5)
                draw_rate(axis, place, entry, style, label=labels[key])
    axis.set_xticks(range(len(suites)), [suite.removeprefix("libero_") for suite in suites])
    axis.set(ylim=(0, 100), xlim=(-0.5, len(suites) - 0.5))
    for edge in range(1, len(suites)):
        axis.axvline(edge - 0.5, color="0.85", linewidth=0.8)
    clean(axis)


def _by_method(data: TableData, columns: Sequence[Column]) -> Any:
    methods = [m for m in ordered(data.table.methods) if any(has_rate(data, m, c) for c in columns)]
    figure = new_figure(2.6 + 2.0 * len(columns), 1.0 + 0.27 * len(methods))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        for place, method in enumerate(methods):
            if has_rate(data, method, column):
                style = {"color": GREY if method.control else COLOURS[0], "marker": "x" if method.control else "o"}
                draw_rate(axis, place, data.entries[method.key, column], style, horizontal=True)
        _plain_line(axis, data, column)
        axis.set_title(f"{column_group(column)}\n({column_name(column)})", fontsize=9)
        axis.set(xlim=(0, 100), ylim=(len(methods) - 0.5, -0.5), xlabel="success, %")
        clean(axis, "x")
    axes[0].set_yticks(range(len(methods)), [method.label for method in methods], fontsize=8)
    return figure


def _plain_line(axis: Any, data: TableData, column: Column) -> None:
    """Where plain fine-tuning is, through all rows."""
    entry = data.entries.get(("plain", column))
    if entry is not None and entry.mean is not None:
        axis.axvline(100 * entry.mean, color="0.6", linestyle=":", linewidth=1)
