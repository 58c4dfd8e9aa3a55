"""How the coming optimizer step treats the retention loss. Decided before its first micro-batch."""

from __future__ import annotations

from enum import Enum

from prismatic.craft.duals import CRaFTDualOptimizer
from prismatic.craft.rules import RULES


class Plan(str, Enum):
    """Whether the two gradients are told apart.

    When kappa is lambda for every group, which the gate or the rule tells beforehand, they need not be: one backward
    pass of L_act + lambda L_ret gives their sum, and none of L_ret when lambda is zero.
    """

    SEPARATE = "separate"
    FUSED = "fused"
    MEASURE = "measure"


def next_plan(rule: str, dual: CRaFTDualOptimizer, has_own_passes: bool) -> Plan:
    """The cheapest plan that gives the gradient of the rule; passes of their own tell gradients apart at no cost."""
    if RULES[rule].separates(dual.gate.is_open) or dual.controller.needs_norms:
        return Plan.SEPARATE
    if dual.get_lambda() > 0:
        return Plan.SEPARATE if has_own_passes else Plan.FUSED
    return Plan.MEASURE
