"""Figures as PNG files. matplotlib is imported inside the functions, without pyplot: no global state, no display."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prismatic.evidence.files import replacing
from prismatic.evidence.results import Evaluation, TrainingMetrics

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito, safe for colour blindness
DRIFT = "CRaFT/Retention Loss"


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: str | os.PathLike) -> Path:
    """Write a PNG beside `path` and rename it; returns the path."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
    return Path(path)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values (fewer at the start); same length as `values`. window >= 1."""
    if window < 1:
        raise ValueError(f"window: found {window}, expected at least 1")
    averages, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        averages.append(total / min(index + 1, window))
    return averages


def plot_drift(
    runs: Sequence[tuple[TrainingMetrics, float]], path: str | os.PathLike, colours: dict[str, str] | None = None
) -> Path:
    """Drift as a multiple of its budget over optimizer steps, one colour per run, with the line that it is held to.

    Budgets of actions and of features have different units; their multiples can be drawn into one figure. Thin lines
    are the logged values, thick lines their moving average.

    Args:
        runs: (metrics, budget above 0 in the unit of the drift), at least one.
        path: PNG to write.
        colours: run name -> colour; others are taken from ``COLOURS`` in order.

    Returns:
        The path. Raises ValueError when a run logged no drift.
    """
    figure = new_figure(6.4, 3.6)
    axis = figure.subplots()
    for index, (run, budget) in enumerate(runs):
        steps, drifts = run.series(DRIFT)
        if not steps:
            raise ValueError(f"run {run.name}: found no metric {DRIFT!r}")
        shares, colour = [drift / budget for drift in drifts], _colour(run.name, index, colours)
        axis.plot(steps, shares, color=colour, alpha=0.25, linewidth=0.8)
        smooth = moving_average(shares, max(1, len(shares) // 20))
        axis.plot(steps, smooth, color=colour, linewidth=1.8, label=run.name)
    axis.axhline(1.0, color="0.3", linestyle="--", linewidth=1, label="budget")
    axis.set(xlabel="optimizer step", ylabel="drift / budget")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _colour(label: str, index: int, colours: dict[str, str] | None) -> str:
    return (colours or {}).get(label, COLOURS[index % len(COLOURS)])


def plot_success_bars(
    columns: dict[str, dict[str, Evaluation]], path: str | os.PathLike, colours: dict[str, str] | None = None
) -> Path:
    """Success rates with 95 % Wilson intervals and k/n: one panel per column, one horizontal bar per row.

    Args:
        columns: column label -> row label -> evaluation. A row may be missing in some columns.
        path: PNG to write.
        colours: row label -> colour; others are taken from ``COLOURS`` in order.
    """
    labels = list(dict.fromkeys(label for rows in columns.values() for label in rows))
    figure = new_figure(3.0 + 2.9 * len(columns), 1.3 + 0.38 * len(labels))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (title, rows) in zip(axes, columns.items(), strict=True):
        for label, evaluation in rows.items():
            position = labels.index(label)
            low, high = evaluation.interval
            error = [[evaluation.rate - low], [high - evaluation.rate]]
            colour = _colour(label, position, colours)
            axis.barh(position, evaluation.rate, xerr=error, color=colour, capsize=3, height=0.7)
            axis.text(high + 0.03, position, f"{evaluation.successes}/{evaluation.trials}", va="center", fontsize=9)
        axis.set_title(title, fontsize=9)
        axis.set_xlim(0, 1.25)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axis.grid(axis="x", alpha=0.3)
        axis.set_xlabel("success rate, 95 % interval", fontsize=9)
    axes[0].set_yticks(range(len(labels)), labels, fontsize=9)
    axes[0].invert_yaxis()
    return save_figure(figure, path)
