"""One coefficient per group of parameters: how much retention gradient the step takes. One object per rule.

With a = the action gradient, r = the retention gradient of a group, d = <a, r>, n = ||r||^2, all fp32:

    g = a + kappa r
    off      kappa = lambda
    add      kappa = lambda + [d < 0] (-d) / (n + delta)                     the original procedure
    max      kappa = max(lambda, [d < 0] (-d) / n)                           one force, not two
    barrier  kappa = clip((phi (L_ret - eps) - d) / n, 0, lambda_max)   argmin ||g - a||^2, <g, r> >= phi (L_ret - eps)

The bracket is also zero while the gate is closed. The barrier is the dynamic barrier of Gong et al. (NeurIPS 2021) with
L_ret - eps as the barrier function. A new rule is a class here, in `RULES`, and a name in `settings.Rule`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prismatic.craft.gradients import Products
from prismatic.craft.projection import Groups, projection_coefficients, threshold
from prismatic.craft.settings import CRaFTConfig, Rule


@dataclass(frozen=True)
class RuleInputs:
    """What the coefficients depend on beside the gradients.

    `multiplier` is lambda, `violation` L_ret - eps (scalar tensor, for the barrier), `gate_is_open` whether projection
    is on.
    """

    multiplier: float
    violation: Tensor | float = 0.0
    gate_is_open: bool = True


class ProjectionRule:
    """The rule `off`: the multiplier is the only force."""

    def separates(self, gate_is_open: bool) -> bool:
        """Whether kappa may differ from lambda in the coming step, so that the two gradients have to be told apart."""
        return False

    def projection(self, products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTConfig) -> Tensor:
        """What the projection adds or would add, per group (G,) fp32, >= 0."""
        return torch.zeros_like(groups.sum(products.dot))

    def kappa(self, projection: Tensor, multiplier: float) -> Tensor:
        """Coefficients (G,) fp32 of the retention gradient."""
        return projection + multiplier

    def shed(self, projection: Tensor) -> Tensor:
        """The part of kappa that takes a conflict away, (G,) fp32."""
        return projection


class Add(ProjectionRule):
    """Projection on top of the multiplier, while the gate is open."""

    def separates(self, gate_is_open: bool) -> bool:
        return gate_is_open

    def projection(self, products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTConfig) -> Tensor:
        projection = projection_coefficients(products, groups, config)
        return projection if inputs.gate_is_open else torch.zeros_like(projection)


class Max(Add):
    """The larger of projection and multiplier."""

    def kappa(self, projection: Tensor, multiplier: float) -> Tensor:
        return projection.clamp(min=multiplier)


class Barrier(ProjectionRule):
    """Has no multiplier: the coefficient follows from the violation."""

    def separates(self, gate_is_open: bool) -> bool:
        return True

    def projection(self, products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTConfig) -> Tensor:
        dot, ret, act = (groups.sum(x) for x in (products.dot, products.ret, products.act))
        wanted = ((config.barrier_phi * inputs.violation - dot) / ret).clamp(0.0, config.lambda_max)
        return torch.where(ret > threshold(act), wanted, torch.zeros_like(ret))

    def kappa(self, projection: Tensor, multiplier: float) -> Tensor:
        return projection

    def shed(self, projection: Tensor) -> Tensor:
        return torch.zeros_like(projection)


RULES: dict[Rule, ProjectionRule] = {
    Rule.OFF: ProjectionRule(),
    Rule.ADD: Add(),
    Rule.MAX: Max(),
    Rule.BARRIER: Barrier(),
}


def kappa(products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTConfig) -> tuple[Tensor, Tensor]:
    """Coefficients of the retention gradient, and the projection that is in them, both per group (G,) fp32."""
    rule = RULES[config.rule]
    projection = rule.projection(products, groups, inputs, config)
    return rule.kappa(projection, inputs.multiplier), rule.shed(projection)
