"""What is kept of the start model against what is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from craft_experiments.cells import Kind, Method
from craft_experiments.common_utils.plots import new_figure
from craft_experiments.figures.drawing import GREY, MARKERS, PALETTE, clean, legend_below
from craft_experiments.figures.families import family
from craft_experiments.table_data import TableData
from craft_experiments.table_grids import has_start_kinds

Values = Mapping[str, Mapping[int, float]]  # method key -> seed -> number


def _success_values(data: TableData, kind: Kind) -> Values:
    """Success in percent, of the first column of that kind."""
    column = next((column for column in data.columns if column.kind is kind), None)
    entries = data.column(column, data.competitors) if column else {}
    return {key: {seed: 100 * rate for seed, rate in e.rates.items()} for key, e in entries.items()}


def _measure_values(data: TableData, measure: str) -> Values:
    return {key: found[measure] for (key, _), found in data.values.items() if measure in found}


def frontier_figure(data: TableData) -> Any:
    """Panels (x, y) that have a point; drift on a logarithmic axis."""
    if not has_start_kinds(data):
        return None
    loss = ("action loss in training (L1)", _measure_values(data, "action_loss"))
    target = ("success on the target, %", _success_values(data, Kind.STANDARD))
    kept = ("start tasks, start's head, %", _success_values(data, Kind.START_TASKS_START_HEAD))
    forgetting = ("forgetting (L1, start's head)", _measure_values(data, "forgetting"))
    drift = ("drift on held-out images", _measure_values(data, "drift"))
    panels = [(loss, kept), (loss, forgetting), (loss, drift), (target, kept)]
    panels = [(x, y) for x, y in panels if x[1].keys() & y[1].keys()]
    if not panels:
        return None
    down = -(-len(panels) // 2)
    figure = new_figure(4.4 if len(panels) == 1 else 8.0, 3.3 * down + 0.8)
    axes = list(figure.subplots(down, min(2, len(panels)), squeeze=False).flat)
    for axis, (x, y) in zip(axes, panels, strict=False):
        _frontier_panel(axis, data, x[1], y[1])
        axis.set(xlabel=x[0], ylabel=y[0])
        axis.locator_params(axis="x", nbins=5)
        if y is drift:
            axis.set_yscale("log")
        if y is kept and "start" in _start_rates(data):
            axis.axhline(100 * _start_rates(data)["start"], color=GREY, linestyle=":", linewidth=1)
            axis.plot([], [], color=GREY, linestyle=":", linewidth=1, label="start checkpoint")
        clean(axis, "both")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    legend_below(figure, axes, 3)
    return figure


def _start_rates(data: TableData) -> dict[str, float]:
    column = next((column for column in data.columns if column.kind is Kind.START_TASKS), None)
    entry = data.entries.get(("start", column)) if column else None
    return {} if entry is None or entry.mean is None else {"start": entry.mean}


def _frontier_panel(axis: Any, data: TableData, xs: Values, ys: Values) -> None:
    families: dict[str, list[tuple[float | None, Method]]] = {}
    for method in data.competitors:
        name, number = family(method)
        families.setdefault(name, []).append((number, method))
    for index, (name, members) in enumerate(families.items()):
        style = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        means = []
        for number, method in sorted(members, key=lambda member: member[0] or 0.0):
            points = _points(method, xs, ys)
            if points:
                axis.plot(*zip(*points, strict=True), linestyle="none", markersize=2.5, alpha=0.5, **style)
                means.append((number, *_centre(points)))
        _draw_family(axis, name, means, style)
        _draw_way_to_parent(axis, data, members, (xs, ys), means[-1:], style)


def _points(method: Method, xs: Values, ys: Values) -> list[tuple[float, float]]:
    """One point per seed that has both values."""
    seeds = sorted(xs.get(method.key, {}).keys() & ys.get(method.key, {}).keys())
    return [(xs[method.key][seed], ys[method.key][seed]) for seed in seeds]


def _centre(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return fmean(x for x, _ in points), fmean(y for _, y in points)


def _draw_family(axis: Any, name: str, means: Sequence[tuple], style: Mapping[str, str]) -> None:
    """Means of a family, joined in the order of its number, which is written beside each."""
    if not means:
        return
    _, xs, ys = zip(*means, strict=True)
    options = {"markersize": 6, "markeredgecolor": "white", "markeredgewidth": 0.6, "linewidth": 1, "label": name}
    axis.plot(xs, ys, **style, **options)
    for number, x, y in means:
        if number is not None:
            note = {"textcoords": "offset points", "fontsize": 6.5, "color": style["color"]}
            axis.annotate(f"{number:g}", (x, y), xytext=(4, 4), **note)


def _draw_way_to_parent(
    axis: Any,
    data: TableData,
    members: Sequence[tuple],
    values: tuple[Values, Values],
    last: Sequence[tuple],
    style: dict,
) -> None:
    """The line of interpolated policies ends at the trained one, which has a mark of its own."""
    parents = [m for m in data.competitors if m.key in {method.parent for _, method in members}]
    points = [point for method in parents for point in _points(method, *values)]
    if points and last:
        (_, x, y), (end_x, end_y) = last[0], _centre(points)
        axis.plot([x, end_x], [y, end_y], color=style["color"], linewidth=1, zorder=1)
