"""Writes the figures of a table: PNG and PDF, byte for byte the same when drawn again.

matplotlib writes its version into both files and no time; the same versions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from craft_experiments.common_utils.plots import save_figure
from craft_experiments.figures.budget import budget_figure, traces_figure
from craft_experiments.figures.cost import cost_figure
from craft_experiments.figures.frontier import frontier_figure
from craft_experiments.figures.shots import shots_figure
from craft_experiments.figures.success import success_figure
from craft_experiments.table_data import TableData
from prismatic.evidence.files import replacing

_INTERVALS = "Bars: 95 % intervals (over seeds; with one seed over its episodes)."


def write_figures(data: TableData, folder: Path) -> dict[str, tuple[Path, str]]:
    """Draw what the records allow.

    Returns:
        name -> (PNG, caption). A figure without any point is not drawn, and its files of an earlier time are removed.
    """
    makers: list[tuple[str, Callable[[TableData], Any], str]] = [
        ("success", success_figure, "Success. Grey: controls. " + _INTERVALS),
        ("shots", shots_figure, "Success against the number of demonstrations per task. " + _INTERVALS),
        (
            "frontier",
            frontier_figure,
            "What is kept of the start model against what is learned. Large: means over the seeds, small: single "
            "seeds. Lines join the settings of one method. Interpolated policies are not trained: no action loss.",
        ),
        ("budget", budget_figure, "Drift at the end of training (mean of the last quarter) against the budget."),
        ("traces", traces_figure, "Drift and multiplier during each method's first training. Dashed: the budget."),
        (
            "cost",
            cost_figure,
            "Training time as a multiple of plain fine-tuning on the same data with the same seed. Bars: means, dots: "
            "single pairs.",
        ),
    ]
    written = {}
    for name, make, caption in makers:
        path = folder / f"{data.table.name}_{name}.png"
        if save_or_remove(make(data), path):
            written[name] = (path, caption)
    return written


def save_or_remove(figure: Any, path: Path) -> bool:
    """Save as PNG and PDF, or for None remove what earlier records gave; whether there is a figure."""
    if figure is None:
        for old in (path, path.with_suffix(".pdf")):
            old.unlink(missing_ok=True)
        return False
    save_figure(figure, path)
    save_pdf(figure, path.with_suffix(".pdf"))
    return True


def save_pdf(figure: Any, path: Path) -> None:
    """As `save_figure`; fonts are embedded as TrueType, so that the text stays text."""
    from matplotlib import rc_context

    figure.set_layout_engine("none")  # the PNG has settled it
    with replacing(path) as temporary, rc_context({"pdf.fonttype": 42}):
        figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
