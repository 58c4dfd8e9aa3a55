"""Numbers of a training beside its success: losses, drift, what was kept of the start model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from craft_experiments.records import RETENTION, RecordError
from prismatic.evidence.results import TrainingMetrics

TAIL = 0.25  # share of the logged values, at the end, that a final training metric is the mean of


@dataclass(frozen=True)
class Measure:
    """A number per training, beside the success rates."""

    key: str
    label: str
    unit: str


TRAINING_MEASURES = (
    Measure("achieved_drift", "drift in training", "L_ret, unit of the method's metric"),
    Measure("final_lambda", "final λ", ""),
    Measure("action_loss", "action loss", "L1, normalised actions"),
    Measure("action_l1_now", "L1 of the next action", "L1, normalised actions"),
    Measure("seconds", "training", "s"),
)
RETENTION_MEASURES = (
    Measure("lost", "success lost, own head", "percentage points"),
    Measure("lost_start_head", "success lost, start's head", "percentage points"),
    Measure("forgetting", "forgetting", "L1, start's head, after minus before"),
    Measure("drift", "held-out drift", "relative squared"),
    Measure("cka_raw", "CKA, patches", "0 to 1"),
    Measure("cka_aq", "CKA, action queries", "0 to 1"),
    Measure("probe_r2", "probe R²", "position, refitted"),
    Measure("probe_r2_stale", "probe R², start's probe", "position"),
    Measure("probe_accuracy", "probe accuracy", "instruction, refitted"),
    Measure("probe_accuracy_stale", "probe accuracy, start's probe", "instruction"),
    Measure("l1_target", "L1 on the target", "normalised actions, held-out"),
    Measure("drift_target", "drift on the target", "relative squared, held-out"),
    Measure("l1_own_head", "L1, own head", "normalised actions, held-out"),
    Measure("l1_start_head", "L1, start's head", "normalised actions, held-out"),
)
START_MEASURES = (
    Measure("probe_r2_start", "probe R²", "start checkpoint"),
    Measure("probe_accuracy_start", "probe accuracy", "start checkpoint"),
    Measure("l1_start", "L1", "start checkpoint"),
)
"""Of the start checkpoint itself, as every measurement states them again."""
_WHERE = {
    "probe_r2_start": ("probe", "start", "position_r2", "mean"),
    "probe_accuracy_start": ("probe", "start", "instruction_accuracy"),
    "drift": ("drift", "original", "rel_mse", "total"),
    "cka_raw": ("cka", "raw"),
    "cka_aq": ("cka", "aq"),
    "probe_r2": ("probe", "trained", "position_r2", "mean"),
    "probe_r2_stale": ("probe", "stale", "position_r2", "mean"),
    "probe_accuracy": ("probe", "trained", "instruction_accuracy"),
    "probe_accuracy_stale": ("probe", "stale", "instruction_accuracy"),
    "l1_start": ("action_l1", "start"),
    "l1_own_head": ("action_l1", "trained"),
    "l1_start_head": ("action_l1", "start_head"),
}
"""Where `measure_retention.py` puts each number. A number it could not compute is null there, at any level."""


def retention_values(measured: Mapping[str, Any], where: str) -> dict[str, float]:
    """Measures of a retention record, by key; numbers that are null there are left out.

    Raises:
        RecordError: a field is missing or no number; names the record (`where`) and the field.
    """
    found = {}
    for key, path in _WHERE.items():
        value: Any = measured
        for depth, name in enumerate(path):
            if value is None:
                break
            if not isinstance(value, Mapping) or name not in value:
                place = ".".join((RETENTION, *path[: depth + 1]))
                raise RecordError(f"{where}: {place}: found nothing, expected a field of that name")
            value = value[name]
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecordError(f"{where}: {RETENTION}.{'.'.join(path)}: found {value!r}, expected a number")
        found[key] = float(value)
    if found.keys() >= {"l1_start_head", "l1_start"}:
        found["forgetting"] = found["l1_start_head"] - found["l1_start"]
    return found


def target_values(values: Mapping[str, float]) -> dict[str, float]:
    """Of held-out demonstrations of the target: the policy's own error, and how far its features moved."""
    names = {"l1_own_head": "l1_target", "drift": "drift_target"}
    return {new: values[old] for old, new in names.items() if old in values}


def training_metrics(record: Mapping[str, Any], where: str) -> TrainingMetrics:
    """The logged values of a training record as a series.

    Raises:
        RecordError: columns of different length; names the record (`where`) and the column.
    """
    columns = record["metrics"]
    steps = columns.get("step", [])
    for name, values in columns.items():
        if len(values) != len(steps):
            raise RecordError(f"{where}: metrics.{name}: found {len(values)} values, expected {len(steps)}")
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return TrainingMetrics(str(record["cell"]), rows)


def training_values(metrics: TrainingMetrics, seconds: float) -> dict[str, float]:
    """Measures of a training, by key; what was not logged is left out."""
    _, multipliers = metrics.series("CRaFT/Lambda")
    found = {
        "achieved_drift": metrics.tail_mean("CRaFT/Retention Loss", TAIL),
        "final_lambda": multipliers[-1] if multipliers else None,
        "action_loss": metrics.tail_mean("VLA Train/Loss", TAIL),
        "action_l1_now": metrics.tail_mean("VLA Train/Curr Action L1 Loss", TAIL),
        "seconds": seconds,
    }
    return {key: value for key, value in found.items() if value is not None}
