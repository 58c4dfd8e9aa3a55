"""What the figures share: colours, markers, legend, a rate with its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from craft_experiments.cells import Method
from craft_experiments.common_utils.plots import COLOURS
from craft_experiments.table_data import TableData
from craft_experiments.table_entries import Column, Entry

MARKERS = "osD^vPX<>*hd"
CONTROL_MARKERS = "x+1|"
GREY = "0.45"
PALETTE = (*COLOURS, "#000000", "#8C6D31", "#7F3C8D")  # beyond six, markers tell as well


def method_styles(methods: Sequence[Method]) -> dict[str, dict[str, str]]:
    """Method key -> colour and marker; controls are grey."""
    found, counts = {}, {True: 0, False: 0}
    for method in methods:
        index = counts[method.control]
        counts[method.control] += 1
        if method.control:
            found[method.key] = {"color": GREY, "marker": CONTROL_MARKERS[index % len(CONTROL_MARKERS)]}
        else:
            found[method.key] = {"color": PALETTE[index % len(PALETTE)], "marker": MARKERS[index % len(MARKERS)]}
    return found


def clean(axis: Any, grid: str = "y") -> None:
    """Faint grid lines behind the data, no frame above and to the right."""
    axis.grid(axis=grid, alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Any, axes: Sequence[Any], columns: int, order: Sequence[str] = ()) -> None:
    """One legend for all panels, under them; labels of `order` first."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    labels = sorted(handles, key=lambda label: order.index(label) if label in order else len(order))
    if labels:
        options = {"loc": "outside lower center", "frameon": False, "fontsize": 8}
        figure.legend([handles[label] for label in labels], labels, ncols=min(columns, len(labels)), **options)


def column_entries(data: TableData, column: Column) -> dict[str, Entry]:
    """Entries of a column by method key, those of controls too."""
    return data.column(column, data.table.methods)


def draw_rate(axis: Any, place: float, entry: Entry, style: Mapping[str, str], **options: Any) -> None:
    """A point with its interval, in percent; `horizontal` puts the rate on the x axis."""
    horizontal = options.pop("horizontal", False)
    mean = entry.mean
    assert mean is not None  # `has_rate`
    rate = 100 * mean
    low, high = (100 * end for end in entry.interval or (mean, mean))
    error = [[max(0.0, rate - low)], [max(0.0, high - rate)]]
    faint = {"linestyle": "none", "markersize": 5, "capsize": 2, "elinewidth": 1, "clip_on": False}
    if horizontal:
        axis.errorbar(rate, place, xerr=error, **style, **faint, **options)
    else:
        axis.errorbar(place, rate, yerr=error, **style, **faint, **options)


def has_rate(data: TableData, method: Method, column: Column) -> bool:
    """Whether there is something to draw."""
    entry = data.entries.get((method.key, column))
    return entry is not None and entry.mean is not None
