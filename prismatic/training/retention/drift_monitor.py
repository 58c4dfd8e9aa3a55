"""Drift of the signal on held-out observations that the training never uses: the number to believe."""

from __future__ import annotations

from typing import Any

from prismatic.craft import CRaFTConstraint
from prismatic.craft.telemetry import as_reported
from prismatic.training.retention.craft import CRaFT


class DriftMonitor:
    """Measures the signal of a constrained run on fixed batches, in eval mode. theta_0's values are computed once.

    Args:
        craft: the run's method.
        batches: on the training device.
    """

    def __init__(self, craft: CRaFT, batches: list[dict[str, Any]]) -> None:
        self._craft, self._batches = craft, batches
        self._references: list[Any] | None = None

    def measure(self) -> dict[str, float]:
        """`CRaFT/Probe/Retention Loss` in the unit of the budget and the drift of each part, means over the samples."""
        constraint = self._craft.constraint
        if self._references is None:
            self._references = [constraint.reference(batch) for batch in self._batches]
            constraint.forget_anchor_time()
        measured = mean_measurement(constraint, self._batches, self._references)
        return {f"CRaFT/Probe/{name}": value for name, value in reported(self._craft, measured).items()}


def mean_measurement(
    constraint: CRaFTConstraint, batches: list[dict[str, Any]], references: list[Any]
) -> dict[str, float]:
    """`CRaFTConstraint.measure`, averaged over the samples of the batches."""
    totals: dict[str, float] = {}
    count = sum(len(batch["input_ids"]) for batch in batches)
    for batch, reference in zip(batches, references, strict=True):
        for name, value in constraint.measure(batch, reference).items():
            totals[name] = totals.get(name, 0.0) + float(value) * len(batch["input_ids"]) / count
    return totals


def reported(craft: CRaFT, measured: dict[str, float]) -> dict[str, float]:
    """Mean losses in the unit of the budget, parts in the unit of their name."""
    parts = {name: as_reported(name, value) for name, value in measured.items() if name != "loss"}
    return {"Retention Loss": craft.config.drift_of(measured["loss"])} | parts
