"""The picture of a demo on a README's first screen: what each way of fine-tuning learns and keeps, over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo_results import COLUMN_LABELS, DemoResults

from craft_experiments.common_utils.plots import COLOURS, new_figure
from prismatic.evidence.files import replacing
from prismatic.evidence.statistics import mean_and_half_width

ROWS = {
    "start": "before fine-tuning",
    "plain": "plain fine-tuning",
    "replay": "replay of old demonstrations",
    "keep": "CRaFT keep, no old data",
    "keep_data": "CRaFT keep, old images",
}
COLOUR = dict(zip(ROWS, ("#888888", COLOURS[1], COLOURS[4], COLOURS[5], COLOURS[0]), strict=True))
THEMES = {"light": "#1f2328", "dark": "#e6edf3"}
"""Colour of the text; the ground is transparent."""


def draw_picture(group: Sequence[DemoResults], folder: Path) -> list[Path]:
    """Write `picture_light.svg` and `picture_dark.svg` from the records of one setting, a seed each.

    A bar is the mean success rate over seeds, the line its 95 % interval (Student t, cut at 0 and 1), a dot one seed.
    """
    paths = []
    for theme, ink in THEMES.items():
        figure = _figure(group, ink)
        paths.append(folder / f"picture_{theme}.svg")
        with replacing(paths[-1]) as temporary:
            _save(figure, temporary)
    return paths


def _figure(group: Sequence[DemoResults], ink: str) -> Any:
    figure = new_figure(9.0, 2.3)
    axes = figure.subplots(1, len(COLUMN_LABELS), sharey=True)
    for axis, (column, title) in zip(axes, COLUMN_LABELS.items(), strict=True):
        for position, row in enumerate(ROWS):
            rates = [r.table[column][row].rate for r in group if row in r.table.get(column, {})]
            if rates:
                _draw_row(axis, position, rates, COLOUR[row], ink)
        axis.set_title(title, fontsize=10, color=ink)
        axis.set_xlim(-0.02, 1.02)
        axis.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
        axis.tick_params(colors=ink, labelsize=9, length=0)
        axis.spines[:].set_visible(False)
        axis.grid(axis="x", color=ink, alpha=0.2)
        axis.patch.set_alpha(0)
    axes[0].set_yticks(range(len(ROWS)), ROWS.values(), fontsize=9)
    axes[0].invert_yaxis()
    figure.patch.set_alpha(0)
    return figure


def _draw_row(axis: Any, position: int, rates: list[float], colour: str, ink: str) -> None:
    mean, half = mean_and_half_width(rates)
    axis.barh(position, mean, color=colour, height=0.62)
    if half:
        axis.plot([max(0, mean - half), min(1, mean + half)], [position, position], color=ink, linewidth=1.2)
    axis.plot(rates, [position] * len(rates), "o", color=ink, markersize=3.2)


def _save(figure: Any, path: str | Path) -> None:
    from matplotlib import rc_context

    # The same records give the same bytes: names of parts from a fixed seed, no date.
    with rc_context({"svg.hashsalt": "craft"}):
        figure.savefig(path, format="svg", metadata={"Date": None}, transparent=True)
