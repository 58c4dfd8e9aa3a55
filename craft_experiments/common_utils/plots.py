"""Figures as PNG files. matplotlib is imported inside the functions, without pyplot: no global state, no display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from craft_experiments.common_utils.results import Evaluation, TrainingMetrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito, safe for colour blindness
CURVES = (
    ("VLA Train/Curr Action L1 Loss", "action L1 loss (current action)"),
    ("CRaFT/Retention Loss", "retention loss"),
    ("CRaFT/Lambda", "multiplier lambda"),
)


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> Path:
    """Write a PNG beside `path` and rename it; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure.savefig(temporary, format="png", dpi=130)
    os.replace(temporary, path)
    return path


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values (fewer at the start); same length as `values`. window >= 1."""
    if window < 1:
        raise ValueError(f"window: found {window}, expected at least 1")
    averages, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        averages.append(total / min(index + 1, window))
    return averages


def plot_training_curves(
    runs: Sequence[TrainingMetrics],
    path: str | os.PathLike,
    retention_budget: float | None = None,
    colours: dict[str, str] | None = None,
) -> Path:
    """Action loss, retention loss and lambda over optimizer steps: one panel each, one colour per run.

    Thin lines are the logged values, thick lines their moving average. A panel no run has values for is left out.

    Args:
        runs: metrics, at least one.
        path: PNG to write.
        retention_budget: eps, drawn into the retention panel.
        colours: run name -> colour; others are taken from ``COLOURS`` in order.

    Returns:
        The path. Raises ValueError when no run carries any of the three metrics.
    """
    panels = [(key, label) for key, label in CURVES if any(run.series(key)[0] for run in runs)]
    if not panels:
        raise ValueError(f"runs {[run.name for run in runs]}: found none of the metrics {[key for key, _ in CURVES]}")
    figure = new_figure(4.6 * len(panels), 3.4)
    for axis, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for index, run in enumerate(runs):
            _draw_curve(axis, run, key, _colour(run.name, index, colours))
        if key == "CRaFT/Retention Loss" and retention_budget is not None:
            axis.axhline(retention_budget, color="0.4", linestyle="--", linewidth=1, label="budget eps")
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    return save_figure(figure, path)


def _colour(label: str, index: int, colours: dict[str, str] | None) -> str:
    return (colours or {}).get(label, COLOURS[index % len(COLOURS)])


def _draw_curve(axis: Any, run: TrainingMetrics, key: str, colour: str) -> None:
    steps, values = run.series(key)
    if not steps:
        return
    axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axis.plot(steps, moving_average(values, max(1, len(values) // 20)), color=colour, linewidth=1.8, label=run.name)


def plot_success_bars(
    columns: dict[str, dict[str, Evaluation]], path: str | os.PathLike, colours: dict[str, str] | None = None
) -> Path:
    """Success rates with 95 % Wilson intervals and k/n: one panel per column, one bar per row.

    Args:
        columns: column label -> row label -> evaluation.
        path: PNG to write.
        colours: row label -> colour; others are taken from ``COLOURS`` in order.
    """
    width = sum(1.2 + 0.95 * len(rows) for rows in columns.values())
    figure = new_figure(max(4.0, width), 3.8)
    ratios = [len(rows) for rows in columns.values()]
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False, gridspec_kw={"width_ratios": ratios})[0]
    for axis, (title, rows) in zip(axes, columns.items(), strict=True):
        for position, (label, evaluation) in enumerate(rows.items()):
            colour = _colour(label, position, colours)
            low, high = evaluation.interval
            error = [[evaluation.rate - low], [high - evaluation.rate]]
            axis.bar(position, evaluation.rate, yerr=error, color=colour, capsize=4, width=0.7)
            axis.text(position, high + 0.02, f"{evaluation.successes}/{evaluation.trials}", ha="center", fontsize=9)
        axis.set_xticks(range(len(rows)), [label.replace(" ", "\n") for label in rows], fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.12)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("success rate, 95 % interval")
    return save_figure(figure, path)
