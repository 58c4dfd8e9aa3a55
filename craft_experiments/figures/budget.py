"""How trainings kept to their budgets: at their end, and on the way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from craft_experiments.cells import Cell
from craft_experiments.common_utils.plots import new_figure
from craft_experiments.figures.drawing import MARKERS, PALETTE, clean, legend_below
from craft_experiments.figures.families import family
from craft_experiments.table_data import TableData, budgeted, training_of
from craft_experiments.table_grids import training_label


def budget_figure(data: TableData) -> Any:
    """One point per run, with the line on which they should lie."""
    series: dict[str, list[tuple[float, float]]] = {}
    for method, budget in budgeted(data):
        drifts = [d for (key, _), v in data.values.items() if key == method.key for d in _positive(v)]
        if drifts:
            name = "CRaFT" if family(method)[1] is not None else method.label
            series.setdefault(name, []).extend((budget, drift) for drift in drifts)
    if not series:
        return None
    budgets = sorted({budget for points in series.values() for budget, _ in points})
    line = [budgets[0] / 1.6, budgets[-1] * 1.6]
    figure = new_figure(5.0, 4.6)
    axis = figure.subplots()
    axis.plot(line, line, color="0.3", linestyle="--", linewidth=1, label="achieved = budget")
    axis.fill_between(line, [0.85 * b for b in line], [1.15 * b for b in line], color="0.9", label="±15 %")
    for index, (name, points) in enumerate(series.items()):
        shift = 1 + 0.06 * (index - (len(series) - 1) / 2)  # side by side, so that no point hides another
        xs, ys = [budget * shift for budget, _ in points], [drift for _, drift in points]
        style = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        axis.plot(xs, ys, linestyle="none", alpha=0.8, markersize=5, label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="budget", ylabel="drift at the end of training", xlim=line)
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(budgets, [f"{budget:g}" for budget in budgets])
    axis.minorticks_off()
    clean(axis, "both")
    legend_below(figure, [axis], 2)
    return figure


def _positive(values: Mapping[str, Mapping[int, float]]) -> list[float]:
    """A logarithmic axis has no place for a drift of 0."""
    return [drift for drift in values.get("achieved_drift", {}).values() if drift > 0]


def traces_figure(data: TableData) -> Any:
    """L_ret and lambda over steps; of several trainings of a method the first."""
    cells: dict[str, Cell] = {}
    for request in data.table.requests:
        if request.cell.name in data.metrics:
            cells.setdefault(request.cell.method.key, request.cell)
    shown = [(m, b, cells[m.key]) for m, b in budgeted(data) if m.key in cells]
    shown = [found for found in shown if data.metrics[found[2].name].series("CRaFT/Retention Loss")[0]]
    if not shown:
        return None
    figure = new_figure(7.2, 5.4)
    upper, lower = figure.subplots(2, 1, sharex=True)
    for index, (method, budget, cell) in enumerate(shown):
        colour, metrics = PALETTE[index % len(PALETTE)], data.metrics[cell.name]
        style = {"color": colour, "linewidth": 1, "alpha": 0.85, "linestyle": "-" if index < len(PALETTE) else "-."}
        label = f"{method.label} ({training_label(training_of(cell))})"
        for axis, name in ((upper, "CRaFT/Retention Loss"), (lower, "CRaFT/Lambda")):
            axis.plot(*metrics.series(name), label=label, **style)
        upper.axhline(budget, color=colour if len({b for _, b, _ in shown}) > 1 else "0.3", linestyle="--", linewidth=1)
    upper.set(yscale="log", ylabel="drift, L_ret")
    lower.set(xlabel="optimizer step", ylabel="multiplier λ")
    lower.set_ylim(bottom=0)
    for axis in (upper, lower):
        clean(axis)
    legend_below(figure, [upper], 2)
    return figure
