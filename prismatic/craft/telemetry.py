"""What a constrained step reports about its gradients and its drift (docs/telemetry.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prismatic.craft.gradients import Products
from prismatic.craft.projection import Groups, part_label, threshold
from prismatic.craft.signals import ROOT_MEAN_SQUARE


@dataclass(frozen=True)
class GradientFacts:
    """Scalars about a step's two gradients over the constrained weights, on the host.

    act_norm, ret_norm: |a| and |r|. is_informative: whether r is more than rounding. is_finite: of r. metrics: by log
    name.
    """

    act_norm: float
    ret_norm: float
    is_informative: bool
    is_finite: bool
    metrics: dict[str, float]


def gradient_facts(products: Products, projection: Tensor, groups: Groups) -> GradientFacts:
    """The facts of a step, in one transfer from the device; `projection` (G,) is what the projection adds to lambda.

    Shed energy: share of ||a||^2 that the projection removes, from ||a + c r||^2 = ||a||^2 + 2 c d + c^2 n.
    """
    act, ret, dot = products.act.sum(), products.ret_euclid.sum(), products.dot_euclid.sum()
    shed = -2 * projection * groups.sum(products.dot_euclid) - projection.square() * groups.sum(products.ret_euclid)
    tiny = torch.finfo(torch.float32).tiny
    summary = {
        "CRaFT/Conflict Ratio": (products.dot < 0).float().mean(),
        "CRaFT/Shed Energy": shed.sum() / act.clamp(min=tiny),
        "CRaFT/Gradient Cosine": dot / (act.sqrt() * ret.sqrt()).clamp(min=tiny),
        "CRaFT/Retention Gradient Norm": ret.sqrt(),
        "act": act.sqrt(),
        "informative": (ret > threshold(act)).float(),
        "finite": torch.isfinite(ret + products.ret.sum()).float(),
    }
    values = dict(zip(summary, torch.stack(list(summary.values())).tolist(), strict=True))
    act_norm, informative, finite = (values.pop(name) for name in ("act", "informative", "finite"))
    return GradientFacts(act_norm, values["CRaFT/Retention Gradient Norm"], bool(informative), bool(finite), values)


def conflicts_by_part(products: Products, names: Sequence[str]) -> dict[str, float]:
    """Share of conflicting tensors per part of the model, by log name."""
    counts: dict[str, list[bool]] = {}
    for name, conflict in zip(names, (products.dot < 0).tolist(), strict=True):
        counts.setdefault(part_label(name), []).append(conflict)
    return {f"CRaFT/Conflict Ratio/{part}": sum(c) / len(c) for part, c in counts.items()}


def as_reported(name: str, value: float) -> float:
    """A drift in the unit of its name: mean squares become their root where the name says so."""
    return math.sqrt(value) if name.endswith(ROOT_MEAN_SQUARE) else value
