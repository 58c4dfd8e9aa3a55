"""Figures of the bench `keep`: what is kept against what is learned, and how fast the old tasks come back."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

from craft_experiments.common_utils.plots import new_figure
from craft_experiments.figures.drawing import GREY, clean, legend_below, method_styles
from craft_experiments.figures.write import save_or_remove
from craft_experiments.keep_data import KeepData

CAPTIONS = {
    "trade_off": "Success in the old tasks at the end of the sequence against that in the new tasks, each at the end "
    "of its stage. Large: means, small: seeds. Dotted: the start. Hollow: rows with few seeds.",
    "course": "Success in the old tasks after each stage, rows with all seeds: mean over the seeds, and single seeds.",
    "recovery": "Success in the old tasks while they are learned again; one seed.",
}


def write_keep_figures(data: KeepData, folder: Path) -> dict[str, tuple[Path, str]]:
    """Draw what the records allow; name -> (PNG, caption). Figures without a point are removed."""
    written = {}
    for name, make in (("trade_off", trade_off), ("course", course), ("recovery", recovery)):
        path = folder / f"keep_{name}.png"
        if save_or_remove(make(data), path):
            written[name] = (path, CAPTIONS[name])
    return written


def trade_off(data: KeepData) -> Any:
    """A point per row; None without one."""
    points = {}
    for method in data.rows():
        values = data.values.get(method.key, {})
        new, old = values.get("new", {}), values.get("old", {})
        if seeds := sorted(new.keys() & old.keys()):
            points[method.key] = [(100 * new[seed], 100 * old[seed]) for seed in seeds]
    if not points:
        return None
    figure = new_figure(7.4, 6.0)
    axis, styles = figure.subplots(), method_styles(data.rows())
    for method in data.rows():
        if found := points.get(method.key):
            _draw_row(axis, found, styles[method.key], method.label, data.is_primary(method))
    start = data.values.get("plain", {}).get("start", {})
    if start:
        axis.axhline(100 * fmean(start.values()), color=GREY, linestyle=":", linewidth=1)
    axis.set(
        xlim=(-3, 103), ylim=(-3, 103), xlabel="new tasks, success in %", ylabel="old tasks at the end, success in %"
    )
    clean(axis, "both")
    legend_below(figure, [axis], 2)
    return figure


def _draw_row(
    axis: Any, points: list[tuple[float, float]], style: dict[str, str], label: str, is_primary: bool
) -> None:
    axis.plot(*zip(*points, strict=True), linestyle="none", markersize=3, alpha=0.5, **style)
    face = {} if is_primary else {"markerfacecolor": "none"}
    x, y = (fmean(values) for values in zip(*points, strict=True))
    axis.plot(x, y, linestyle="none", markersize=8, label=label, **style, **face)


def course(data: KeepData) -> Any:
    """Old tasks after stage 0, 1, 2 of the primary rows; None while no row has a value after a stage."""
    rows = [method for method in data.rows() if data.is_primary(method)]
    stages = range(len(data.bench.new_tasks) + 1)
    figure, drawn = None, False
    styles = method_styles(data.rows())
    for method in rows:
        lines = []
        for seed in data.seeds(method):
            rates = [data.course(method, seed).success[stage] for stage in stages]
            found = [[100 * r[task] for task in data.old_tasks if task in r] for r in rates]
            lines.append([fmean(values) if len(values) == len(data.old_tasks) else None for values in found])
        if not any(value is not None for line in lines for value in line[1:]):
            continue
        if figure is None:
            figure = new_figure(7.2, 4.6)
            axis = figure.subplots()
        drawn = True
        _draw_course(axis, lines, styles[method.key], method.label)
    if figure is None or not drawn:
        return None
    names = ["start", *(f"after {task.name}" for task in data.bench.new_tasks)]
    axis.set_xticks(list(stages), names)
    axis.set(ylim=(-3, 103), ylabel="old tasks, success in %")
    clean(axis)
    legend_below(figure, [axis], 2)
    return figure


def _draw_course(axis: Any, lines: list[list[float | None]], style: dict[str, str], label: str) -> None:
    for line in lines:
        known = [(stage, value) for stage, value in enumerate(line) if value is not None]
        axis.plot(*zip(*known, strict=True), color=style["color"], linewidth=0.6, alpha=0.4)
    columns = [[line[stage] for line in lines if line[stage] is not None] for stage in range(len(lines[0]))]
    means = [(stage, fmean(v for v in values if v is not None)) for stage, values in enumerate(columns) if values]
    axis.plot(*zip(*means, strict=True), linewidth=1.6, markersize=6, label=label, **style)


def recovery(data: KeepData) -> Any:
    """A line per row that learns again; None without two points."""
    found = {key: data.recovery(key) for key in data.bench.recovered}
    found = {key: rates for key, rates in found.items() if len(rates) > 1}
    if not found:
        return None
    figure = new_figure(5.6, 3.8)
    axis, styles = figure.subplots(), method_styles(data.rows())
    for key, rates in found.items():
        steps = sorted(rates)
        axis.plot(steps, [100 * rates[step] for step in steps], label=data.method(key).label, **styles[key])
    axis.set(ylim=(-3, 103), xlabel="optimizer steps on old demonstrations", ylabel="old tasks, success in %")
    clean(axis)
    legend_below(figure, [axis], 1)
    return figure
