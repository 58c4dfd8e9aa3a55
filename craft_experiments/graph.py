"""Picture of the jobs of a table: what waits for what. matplotlib is imported when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from craft_experiments.common_utils.plots import COLOURS, new_figure, save_figure
from craft_experiments.jobs.base import Job

_WIDTH, _HEIGHT, _COLUMN = 3.1, 0.34, 4.1  # of a box, and from one column to the next, in inches
_STEP = 0.5  # from one row to the next
_COLUMNS = {
    "collect demonstrations": ("collect",),
    "train": ("train",),
    "interpolate": ("interpolate",),
    "evaluate, measure": ("evaluate", "measure"),
}


def draw_jobs(jobs: dict[str, Job], title: str, path: Path) -> Path:
    """Write a PNG with predecessors left of what waits for them; returns the path."""
    places = place(jobs)
    columns = _columns(jobs)
    width = _COLUMN * (len(columns) - 1) + _WIDTH
    height = _STEP * max(row for _, row in places.values()) + _HEIGHT
    figure = new_figure(width + 0.4, height + 1.3)
    axes = figure.add_subplot()
    axes.set(xlim=(-0.1, width + 0.1), ylim=(height + 0.2, -0.9), title=title)
    axes.axis("off")
    for column, head in enumerate(columns):
        axes.text(column * _COLUMN + _WIDTH / 2, -0.4, head, ha="center", va="center", weight="bold")
    for name, job in jobs.items():
        _draw_job(axes, job, places)
        for before in job.after:
            _draw_arrow(axes, places[before], places[name], COLOURS[_index(jobs[before].kind)])
    return save_figure(figure, path)


def place(jobs: dict[str, Job]) -> dict[str, tuple[int, float]]:
    """(column, row) of every job: last stages in rows one below the other, the others amid what waits for them."""
    waiting: dict[str, list[str]] = {name: [] for name in jobs}
    for name, job in jobs.items():
        for before in job.after:
            waiting[before].append(name)
    rows: dict[str, float] = {}
    last = [name for name in jobs if not waiting[name]]
    # What waits for the same jobs stays together: arrows cross less.
    order = sorted(last, key=lambda name: (not jobs[name].after, _first_ancestor(jobs, name), list(jobs).index(name)))
    rows.update({name: float(row) for row, name in enumerate(order)})
    for name in reversed(jobs):
        if name not in rows:
            rows[name] = sum(rows[after] for after in waiting[name]) / len(waiting[name])
    _spread(jobs, rows)
    columns = list(_columns(jobs).values())
    column = {stage: number for number, stages in enumerate(columns) for stage in stages}
    return {name: (column[job.kind], rows[name]) for name, job in jobs.items()}


def _first_ancestor(jobs: dict[str, Job], name: str) -> list[int]:
    """Positions of the predecessors, of the farthest first."""
    found: list[int] = []
    while jobs[name].after:
        name = jobs[name].after[0]
        found.insert(0, list(jobs).index(name))
    return found


def _spread(jobs: dict[str, Job], rows: dict[str, float]) -> None:
    """Boxes of one column do not overlap."""
    for stages in _columns(jobs).values():
        free = 0.0
        for name in sorted((n for n, job in jobs.items() if job.kind in stages), key=rows.__getitem__):
            rows[name] = max(rows[name], free)
            free = rows[name] + 1


def _columns(jobs: dict[str, Job]) -> dict[str, tuple[str, ...]]:
    """Those that have a job."""
    found = {job.kind for job in jobs.values()}
    return {head: stages for head, stages in _COLUMNS.items() if found & set(stages)}


def _index(kind: str) -> int:
    return [kind for kinds in _COLUMNS.values() for kind in kinds].index(kind)


def _draw_job(axes: Any, job: Job, places: dict[str, tuple[int, float]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = _corner(places[job.name])
    colour = COLOURS[_index(job.kind)]
    style = "round,pad=0,rounding_size=0.08"
    for face in ("white", f"{colour}22"):  # opaque: arrows pass behind
        box = FancyBboxPatch((x, y), _WIDTH, _HEIGHT, boxstyle=style, facecolor=face, edgecolor=colour, zorder=2)
        axes.add_patch(box)
    text = job.name.split("/", 1)[1].replace("/", "  ").replace("libero_", "").replace("--seed0", "")
    axes.text(x + _WIDTH / 2, y + _HEIGHT / 2, text, ha="center", va="center", fontsize=8, zorder=3)


def _draw_arrow(axes: Any, start: tuple[int, float], end: tuple[int, float], colour: str) -> None:
    """From the right edge of a box to the left edge of another: to its row between the columns, then level."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    (x0, y0), (x1, y1) = _corner(start), _corner(end)
    x0, y0, y1 = x0 + _WIDTH, y0 + _HEIGHT / 2, y1 + _HEIGHT / 2
    gap = _COLUMN - _WIDTH
    points = [(x0, y0), (x0 + gap / 2, y0), (x0 + gap / 2, y1), (x0 + gap * 0.9, y1), (x1, y1)]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4, Curve.LINETO])
    axes.add_patch(
        FancyArrowPatch(path=curve, arrowstyle="-|>", mutation_scale=8, color=colour, linewidth=0.9, zorder=1)
    )


def _corner(place: tuple[int, float]) -> tuple[float, float]:
    return place[0] * _COLUMN, place[1] * _STEP
