"""Figures of a table, from the same numbers as its text: PNG and PDF, byte for byte the same when drawn again.

matplotlib writes its version into both files and no time; the same versions give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from craft_experiments.common_utils.plots import COLOURS, new_figure, save_figure
from craft_experiments.table_data import Column, Entry, TableData, Training, budgeted, training_of
from craft_experiments.table_formats import column_group, column_name, has_start_kinds, ordered, training_label
from craft_experiments.tables import Kind, Method, Role

MARKERS = "osD^vPX<>*hd"
CONTROL_MARKERS = "x+1|"
GREY = "0.45"
_PALETTE = (*COLOURS, "#000000", "#8C6D31", "#7F3C8D")  # beyond six, markers tell as well
_INTERVALS = "Bars: 95 % intervals (over seeds; with one seed over its episodes)."


def write_figures(data: TableData, folder: Path) -> dict[str, tuple[Path, str]]:
    """Draw what the records allow.

    Returns:
        name -> (PNG, caption). A figure without any point is not drawn, and its files of an earlier time are removed.
    """
    makers: list[tuple[str, Callable[[TableData], Any], str]] = [
        ("success", _success_figure, "Success. Grey: controls. " + _INTERVALS),
        ("shots", _shots_figure, "Success against the number of demonstrations per task. " + _INTERVALS),
        (
            "frontier",
            _frontier_figure,
            "What is kept of the start model against what is learned. Large: means over the seeds, small: single "
            "seeds. Lines join the settings of one method. Interpolated policies are not trained: no action loss.",
        ),
        ("budget", _budget_figure, "Drift at the end of training (mean of the last quarter) against the budget."),
        ("traces", _traces_figure, "Drift and multiplier during each method's first training. Dashed: the budget."),
        (
            "cost",
            _cost_figure,
            "Training time as a multiple of plain fine-tuning on the same data with the same seed. Bars: means, dots: "
            "single pairs.",
        ),
    ]
    written = {}
    for name, make, caption in makers:
        path = folder / f"{data.table.name}_{name}.png"
        figure = make(data)
        if figure is None:
            for old in (path, path.with_suffix(".pdf")):
                old.unlink(missing_ok=True)
            continue
        save_figure(figure, path)
        _save_pdf(figure, path.with_suffix(".pdf"))
        written[name] = (path, caption)
    return written


def _save_pdf(figure: Any, path: Path) -> None:
    """As `save_figure`; fonts are embedded as TrueType, so that the text stays text."""
    from matplotlib import rc_context

    figure.set_layout_engine("none")  # the PNG has settled it
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    os.replace(temporary, path)


def _styles(methods: Sequence[Method]) -> dict[str, dict[str, str]]:
    """Method key -> colour and marker; controls are grey."""
    found, counts = {}, {True: 0, False: 0}
    for method in methods:
        index = counts[method.control]
        counts[method.control] += 1
        if method.control:
            found[method.key] = {"color": GREY, "marker": CONTROL_MARKERS[index % len(CONTROL_MARKERS)]}
        else:
            found[method.key] = {"color": _PALETTE[index % len(_PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
    return found


def _clean(axis: Any, grid: str = "y") -> None:
    axis.grid(axis=grid, alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _legend_below(figure: Any, axes: Sequence[Any], columns: int, order: Sequence[str] = ()) -> None:
    """One legend for all panels, under them; labels of `order` first."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    if labels:
        options = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
        figure.legend([handles[label] for label in labels], labels, ncols=min(columns, len(labels)), **options)


# --- Success ------------------------------------------------------------------------------------------------------


def _success_figure(data: TableData) -> Any:
    """Few rows and several suites: suites side by side. Many rows: one line per method."""
    shown = [column for column in data.columns if any(e.mean is not None for e in _entries(data, column).values())]
    if not shown or data.table.name == "table3":
        return None
    several = len({column.suite for column in shown if column.kind is Kind.STANDARD}) > 1
    return _by_suite(data, shown) if several else _by_method(data, shown)


def _entries(data: TableData, column: Column) -> dict[str, Entry]:
    return data.column(column, data.table.methods)


def _draw_rate(axis: Any, place: float, entry: Entry, style: Mapping[str, str], **options: Any) -> None:
    """A point with its interval, in percent; `horizontal` puts the rate on the x axis."""
    horizontal = options.pop("horizontal", False)
    rate = 100 * entry.mean
    low, high = (100 * end for end in entry.interval or (entry.mean, entry.mean))
    error = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
    faint = {"linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 1, "clip_on": False}
    if horizontal:
        axis.errorbar(rate, place, xerr=error, **style, **faint, **options)
    else:
        axis.errorbar(place, rate, yerr=error, **style, **faint, **options)


def _by_suite(data: TableData, columns: Sequence[Column]) -> Any:
    kinds = list(dict.fromkeys(column.kind for column in columns))
    suites = list(dict.fromkeys(column.suite for column in columns))
    rows = 1 if len(kinds) <= 2 else 2
    across = -(-len(kinds) // rows)
    methods, styles = ordered(data.table.methods), _styles(ordered(data.table.methods))
    figure = new_figure(1.2 + across * max(2.6, 0.9 * len(suites)), 3.1 * rows)
    axes = list(figure.subplots(rows, across, sharey=True, squeeze=False).flat)
    for axis, kind in zip(axes, kinds, strict=False):
        _suite_panel(axis, data, [c for c in columns if c.kind is kind], suites, styles)
        axis.set_title(column_group(Column(kind, "")), fontsize=10)
    for axis in axes[len(kinds) :]:
        axis.set_axis_off()
    for axis in axes[::across]:
        axis.set_ylabel("success, %")
    _legend_below(figure, axes, 2 if max(len(m.label) for m in methods) > 30 else 3)
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
        entries = _entries(data, column)
        for index, (key, style) in enumerate(styles.items()):
            entry = entries.get(key)
            if entry is not None and entry.mean is not None:
                place = suites.index(column.suite) + 0.7 * ((index + 0.5) / len(styles) - 0.5)
                _draw_rate(axis, place, entry, style, label=labels[key])
    axis.set_xticks(range(len(suites)), [suite.removeprefix("libero_") for suite in suites])
    axis.set(ylim=(0, 100), xlim=(-0.5, len(suites) - 0.5))
    for edge in range(1, len(suites)):
        axis.axvline(edge - 0.5, color="0.85", linewidth=0.8)
    _clean(axis)


def _by_method(data: TableData, columns: Sequence[Column]) -> Any:
    methods = [m for m in ordered(data.table.methods) if any(_has_rate(data, m, c) for c in columns)]
    figure = new_figure(2.6 + 2.0 * len(columns), 1.0 + 0.27 * len(methods))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        for place, method in enumerate(methods):
            if _has_rate(data, method, column):
                style = {"color": GREY if method.control else COLOURS[0], "marker": "x" if method.control else "o"}
                _draw_rate(axis, place, data.entries[method.key, column], style, horizontal=True)
        _plain_line(axis, data, column)
        axis.set_title(f"{column_group(column)}\n({column_name(column)})", fontsize=9)
        axis.set(xlim=(0, 100), ylim=(len(methods) - 0.5, -0.5), xlabel="success, %")
        _clean(axis, "x")
    axes[0].set_yticks(range(len(methods)), [method.label for method in methods], fontsize=8)
    return figure


def _has_rate(data: TableData, method: Method, column: Column) -> bool:
    entry = data.entries.get((method.key, column))
    return entry is not None and entry.mean is not None


def _plain_line(axis: Any, data: TableData, column: Column) -> None:
    """Where plain fine-tuning is, through all rows."""
    entry = data.entries.get(("plain", column))
    if entry is not None and entry.mean is not None:
        axis.axvline(100 * entry.mean, color="0.6", linestyle=":", linewidth=1)


# --- Few demonstrations -------------------------------------------------------------------------------------------


def _shots_figure(data: TableData) -> Any:
    columns = [c for c in data.columns if c.shots is not None]
    columns = [c for c in columns if any(e.mean is not None for e in _entries(data, c).values())]
    if not columns:
        return None
    kinds = list(dict.fromkeys(column.kind for column in columns))
    figure = new_figure(0.8 + 3.0 * len(kinds), 3.5)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    styles = _styles(data.table.methods)
    for axis, kind in zip(axes, kinds, strict=True):
        for method in data.table.methods:
            _shots_curve(axis, data, method, [c for c in columns if c.kind is kind], styles)
        shots = sorted({column.shots for column in columns})
        axis.set_xscale("log")
        axis.set_xticks(shots, [str(number) for number in shots])
        axis.minorticks_off()
        axis.set(ylim=(0, 100), xlabel="demonstrations per task")
        axis.set_title(column_group(Column(kind, "")), fontsize=10)
        _clean(axis)
    axes[0].set_ylabel("success, %")
    _legend_below(figure, axes, 3, [method.label for method in data.table.methods])
    return figure


def _shots_curve(
    axis: Any, data: TableData, method: Method, columns: Sequence[Column], styles: Mapping[str, Mapping[str, str]]
) -> None:
    """A curve for a competitor; a control stands at one number and is a mark beside it, without interval."""
    found = [(c.shots, data.entries[method.key, c]) for c in columns if _has_rate(data, method, c)]
    rank = [m.key for m in data.table.methods if m.control == method.control].index(method.key)
    shift = 1.2 + 0.1 * rank if method.control else 0.97 + 0.05 * rank  # side by side: nothing is hidden
    if method.control:
        options = {"linestyle": "none", "markersize": 6, "clip_on": False, "label": method.label}
        axis.plot([c * shift for c, _ in found], [100 * e.mean for _, e in found], **options, **styles[method.key])
        return
    for shots, entry in found:
        _draw_rate(axis, shots * shift, entry, styles[method.key], label=method.label)
    if found:
        xs, ys = zip(*[(shots * shift, 100 * entry.mean) for shots, entry in found], strict=True)
        axis.plot(xs, ys, color=styles[method.key]["color"], linewidth=1.2)


# --- Retention against learning -----------------------------------------------------------------------------------


def _family(method: Method) -> tuple[str, float | None]:
    """Methods that differ by one number form a family; (name, that number)."""
    if method.role is Role.INTERPOLATED:
        return "interpolation, α", method.scale
    for prefix, name, flag in (
        ("penalty_", "fixed penalty, λ", "craft_fixed_lambda"),
        ("l2sp_", "L2-SP, weight", "l2sp_weight"),
        ("craft_budget_", "CRaFT, budget", "craft_retention_budget"),
    ):
        if method.key.startswith(prefix):
            return name, float(method.train[flag])
    if method.key == "craft":
        return "CRaFT, budget", float(method.train["craft_retention_budget"])
    return method.label, None


Values = dict[str, dict[int, float]]  # method key -> seed -> number


def _success_values(data: TableData, kind: Kind) -> Values:
    """Success in percent, of the first column of that kind."""
    column = next((column for column in data.columns if column.kind is kind), None)
    entries = data.column(column, data.competitors) if column else {}
    return {key: {seed: 100 * rate for seed, rate in e.rates.items()} for key, e in entries.items()}


def _measure_values(data: TableData, measure: str) -> Values:
    return {key: found[measure] for (key, _), found in data.values.items() if measure in found}


def _frontier_figure(data: TableData) -> Any:
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
        _clean(axis, "both")
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    _legend_below(figure, axes, 3)
    return figure


def _start_rates(data: TableData) -> dict[str, float]:
    column = next((column for column in data.columns if column.kind is Kind.START_TASKS), None)
    entry = data.entries.get(("start", column)) if column else None
    return {} if entry is None or entry.mean is None else {"start": entry.mean}


def _frontier_panel(axis: Any, data: TableData, xs: Values, ys: Values) -> None:
    families: dict[str, list[tuple[float | None, Method]]] = {}
    for method in data.competitors:
        name, number = _family(method)
        families.setdefault(name, []).append((number, method))
    for index, (name, members) in enumerate(families.items()):
        style = {"color": _PALETTE[index % len(_PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
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


# --- Budget and traces --------------------------------------------------------------------------------------------


def _budget_figure(data: TableData) -> Any:
    """One point per run, with the line on which they should lie."""
    series: dict[str, list[tuple[float, float]]] = {}
    for method, budget in budgeted(data):
        drifts = [d for (key, _), v in data.values.items() if key == method.key for d in _positive(v)]
        if drifts:
            name = "CRaFT" if _family(method)[1] is not None else method.label
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
        style = {"color": _PALETTE[index % len(_PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
        axis.plot(xs, ys, linestyle="none", alpha=0.8, markersize=5, label=name, **style)
    axis.set(xscale="log", yscale="log", xlabel="budget", ylabel="drift at the end of training", xlim=line)
    for set_ticks in (axis.set_xticks, axis.set_yticks):
        set_ticks(budgets, [f"{budget:g}" for budget in budgets])
    axis.minorticks_off()
    _clean(axis, "both")
    _legend_below(figure, [axis], 2)
    return figure


def _positive(values: Mapping[str, Mapping[int, float]]) -> list[float]:
    """A logarithmic axis has no place for a drift of 0."""
    return [drift for drift in values.get("achieved_drift", {}).values() if drift > 0]


def _traces_figure(data: TableData) -> Any:
    """L_ret and lambda over steps; of several trainings of a method the first."""
    cells = {}
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
        colour, metrics = _PALETTE[index % len(_PALETTE)], data.metrics[cell.name]
        style = {"color": colour, "linewidth": 1, "alpha": 0.85, "linestyle": "-" if index < len(_PALETTE) else "-."}
        label = f"{method.label} ({training_label(training_of(cell))})"
        for axis, name in ((upper, "CRaFT/Retention Loss"), (lower, "CRaFT/Lambda")):
            axis.plot(*metrics.series(name), label=label, **style)
        upper.axhline(budget, color=colour if len({b for _, b, _ in shown}) > 1 else "0.3", linestyle="--", linewidth=1)
    upper.set(yscale="log", ylabel="drift, L_ret")
    lower.set(xlabel="optimizer step", ylabel="multiplier λ")
    lower.set_ylim(bottom=0)
    for axis in (upper, lower):
        _clean(axis)
    _legend_below(figure, [upper], 2)
    return figure


# --- Cost ---------------------------------------------------------------------------------------------------------


def cost_ratios(data: TableData) -> dict[str, list[float]]:
    """Method key -> training seconds over those of plain fine-tuning, one per training and seed that both have."""
    found: dict[str, list[float]] = {}
    for method in data.competitors:
        for training in {training for key, training in data.values if key == method.key}:
            found.setdefault(method.key, []).extend(_ratios(data, method.key, training))
    return {key: sorted(ratios) for key, ratios in found.items() if ratios and key != "plain"}


def _ratios(data: TableData, key: str, training: Training) -> list[float]:
    plain, own = data.value("plain", training, "seconds"), data.value(key, training, "seconds")
    return [own[seed] / plain[seed] for seed in own if plain.get(seed, 0) > 0]


def _cost_figure(data: TableData) -> Any:
    ratios = cost_ratios(data)
    if not ratios:
        return None
    labels = {method.key: method.label for method in data.competitors}
    figure = new_figure(6.0, 1.0 + 0.3 * len(ratios))
    axis = figure.subplots()
    longest = max(max(values) for values in ratios.values())
    for place, values in enumerate(ratios.values()):
        axis.barh(place, fmean(values), color=COLOURS[5], height=0.65)
        axis.plot(values, [place] * len(values), ".", color="0.2", markersize=5)
        axis.text(longest * 1.04, place, f"{fmean(values):.2f}", va="center", fontsize=8)
    axis.axvline(1, color="0.3", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(ratios)), [labels[key] for key in ratios], fontsize=8)
    axis.set(xlim=(0, longest * 1.15), ylim=(len(ratios) - 0.4, -0.6), xlabel="training time, plain fine-tuning = 1")
    _clean(axis, "x")
    return figure
