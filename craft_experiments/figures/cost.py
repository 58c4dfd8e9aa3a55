"""Training time beside that of plain fine-tuning."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from craft_experiments.common_utils.plots import COLOURS, new_figure
from craft_experiments.figures.drawing import clean
from craft_experiments.table_data import TableData, Training


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


def cost_figure(data: TableData) -> Any:
    """A bar per method; None without a training that can be compared."""
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
    clean(axis, "x")
    return figure
