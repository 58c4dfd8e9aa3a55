"""Success against the number of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from craft_experiments.cells import Method
from craft_experiments.common_utils.plots import new_figure
from craft_experiments.figures.drawing import clean, column_entries, draw_rate, has_rate, legend_below, method_styles
from craft_experiments.table_data import TableData
from craft_experiments.table_entries import Column, Entry
from craft_experiments.table_grids import column_group


def shots_figure(data: TableData) -> Any:
    """A panel per kind of evaluation; None for a table that does not vary the demonstrations."""
    columns = [c for c in data.columns if c.shots is not None]
    columns = [c for c in columns if any(e.mean is not None for e in column_entries(data, c).values())]
    if not columns:
        return None
    kinds = list(dict.fromkeys(column.kind for column in columns))
    figure = new_figure(0.8 + 3.0 * len(kinds), 3.5)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    styles = method_styles(data.table.methods)
    for axis, kind in zip(axes, kinds, strict=True):
        for method in data.table.methods:
            _shots_curve(axis, data, method, [c for c in columns if c.kind is kind], styles)
        shots = sorted({_shots(column) for column in columns})
        axis.set_xscale("log")
        axis.set_xticks(shots, [str(number) for number in shots])
        axis.minorticks_off()
        axis.set(ylim=(0, 100), xlabel="demonstrations per task")
        axis.set_title(column_group(Column(kind, "")), fontsize=10)
        clean(axis)
    axes[0].set_ylabel("success, %")
    legend_below(figure, axes, 3, [method.label for method in data.table.methods])
    return figure


def _shots(column: Column) -> int:
    """Demonstrations per task; the columns of this figure name them."""
    assert column.shots is not None
    return column.shots


def _mean(entry: Entry) -> float:
    """Mean of an entry that has a rate."""
    mean = entry.mean
    assert mean is not None
    return mean


def _shots_curve(
    axis: Any, data: TableData, method: Method, columns: Sequence[Column], styles: Mapping[str, Mapping[str, str]]
) -> None:
    """A curve for a competitor; a control stands at one number and is a mark beside it, without interval."""
    found = [(_shots(c), data.entries[method.key, c]) for c in columns if has_rate(data, method, c)]
    rank = [m.key for m in data.table.methods if m.control == method.control].index(method.key)
    shift = 1.2 + 0.1 * rank if method.control else 0.97 + 0.05 * rank  # side by side: nothing is hidden
    if method.control:
        options = {"linestyle": "none", "markersize": 6, "clip_on": False, "label": method.label}
        axis.plot([c * shift for c, _ in found], [100 * _mean(e) for _, e in found], **options, **styles[method.key])
        return
    for shots, entry in found:
        draw_rate(axis, shots * shift, entry, styles[method.key], label=method.label)
    if found:
        xs, ys = zip(*[(shots * shift, 100 * _mean(entry)) for shots, entry in found], strict=True)
        axis.plot(xs, ys, color=styles[method.key]["color"], linewidth=1.2)
