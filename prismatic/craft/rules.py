"""One coefficient per group of parameters: how much retention gradient the step takes. One object per rule.

With a = the action gradient, r = the retention gradient of a group, d = <a, r>, n = ||r||^2, all fp32:

    g = a + kappa r
    off      kappa = lambda
    add      kappa = lambda + [d < 0] (-d) / (n + delta)                     the original procedure
    max      kappa = max(lambda, [d < 0] (-d) / n)                           one force, not two
    barrier  kappa = clip((phi (L_ret - eps) - d) / n, 0, lambda_max)   argmin ||g - a||^2, <g, r> >= phi (L_ret - eps)

The bracket is also zero while the gate is closed. The barrier is the dynamic barrier of Gong et al. (NeurIPS 2021) with
L_ret - eps as the barrier function. A new rule is a class and a line in `RULES`. The names are flags, which are
answered without torch: nothing here imports it, tensors have what is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prismatic.craft.fields import OFF, CRaFTFields

if TYPE_CHECKING:
    from torch import Tensor

    from prismatic.craft.gradients import Products
    from prismatic.craft.projection import Groups


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

    reads_multiplier = True
    """Whether `kappa` depends on lambda. Where it does not, a dual of the share has no meaning and is refused."""
    one_group = False
    """Whether the rule is defined for `projection_granularity` global only."""

    def separates(self, gate_is_open: bool) -> bool:
        """Whether kappa may differ from lambda in the coming step, so that the two gradients have to be told apart."""
        return False

    def projection(self, products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTFields) -> Tensor:
        """What the projection adds or would add, per group (G,) fp32, >= 0."""
        return products.dot.new_zeros(groups.count)

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

    def projection(self, products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTFields) -> Tensor:
        if not inputs.gate_is_open:
            return super().projection(products, groups, inputs, config)
        return groups.projection(products, config)


class Max(Add):
    """The larger of projection and multiplier."""

    def kappa(self, projection: Tensor, multiplier: float) -> Tensor:
        return projection.clamp(min=multiplier)


class Barrier(ProjectionRule):
    """Has no multiplier: the coefficient follows from the violation."""

    reads_multiplier = False
    one_group = True

    def separates(self, gate_is_open: bool) -> bool:
        return True

    def projection(self, products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTFields) -> Tensor:
        dot, ret = groups.sum(products.dot), groups.sum(products.ret)
        wanted = ((config.barrier_phi * inputs.violation - dot) / ret).clamp(0.0, config.lambda_max)
        return wanted.where(groups.informative(products), 0.0)

    def kappa(self, projection: Tensor, multiplier: float) -> Tensor:
        return projection

    def shed(self, projection: Tensor) -> Tensor:
        return projection.new_zeros(projection.shape)


RULES: dict[str, ProjectionRule] = {
    "add": Add(),
    "max": Max(),
    "barrier": Barrier(),
    OFF: ProjectionRule(),
}
"""By the name that is a flag's value."""


def kappa(products: Products, groups: Groups, inputs: RuleInputs, config: CRaFTFields) -> tuple[Tensor, Tensor]:
    """Coefficients of the retention gradient, and the projection that is in them, both per group (G,) fp32."""
    rule = RULES[config.rule]
    projection = rule.projection(products, groups, inputs, config)
    return rule.kappa(projection, inputs.multiplier), rule.shed(projection)
