"""Control of the share of the retention gradient in the step (docs/IDEA.md, "The controller").

    D  <- 0.9 D + 0.1 L_ret            a, r: running means (0.95) of |a| and |r| over the constrained weights
    l  = clip(ln(D / eps), -1, 1)
    z  <- clip(z + 0.05 l, -5, limit)  z starts at -4
    u  = clip(z + 4 l, -5, limit)
    w  = sigmoid(u)                    lambda = w / (1 - w) * a / r

AdamW divides the step by its own size, so what a multiplier does is decided by lambda |r| / |a|. This ratio is what
moves here, between e^-5 and e^limit: no unit of the loss, the budget or the gradients is left, and there is nothing to
wind up.
"""

from __future__ import annotations

import math
from typing import Any

from prismatic.craft.duals.base import Dual, is_finite
from prismatic.craft.fields import CRaFTFields

_LOW = -5.0
_START = -4.0
_INTEGRAL, _PROPORTIONAL = 0.05, 4.0
_LOSS_DECAY, _NORM_DECAY = 0.9, 0.95


class Share(Dual):
    """lambda |r| is at most e^`share_limit` |a|, in every single step.

    The multiplier is zero until a retention gradient has been seen: at theta_0 there is none.
    """

    needs_norms = True
    own = ("share_limit",)
    unread = ("retention_weight", "dual_lr", "dual_error", "dual_ki", "dual_kp", "lambda_max", "fixed_lambda")
    patience = 100
    """Steps in a row at the limit, with the averaged loss above the budget, after which it is out of reach."""

    def __init__(self, config: CRaFTFields) -> None:
        super().__init__(config)
        self.drift: float | None = None  # D
        self.act: float | None = None
        self.ret: float | None = None
        self.z = _START
        self.stuck = 0
        self._u = _START

    def multiplier_for(self, act_norm: float, ret_norm: float) -> float:
        """Takes in the norms as well; norms that say nothing (zero, not finite) leave the means as they are."""
        if not (is_finite(act_norm, ret_norm) and act_norm > 0 and ret_norm > 0):
            return 0.0
        self.act, self.ret = _mean(self.act, act_norm), _mean(self.ret, ret_norm)
        # The means may lag behind a sudden gradient: the bound holds for this step's norms too.
        self.value = min(math.exp(self._u) * self.act / self.ret, math.exp(self.limit) * act_norm / ret_norm)
        return self.value

    @property
    def limit(self) -> float:
        """Upper end of z and u: the logarithm of the largest ratio lambda |r| / |a|."""
        return self.config.share_limit

    def step(self, loss: float, can_reduce: bool) -> None:
        budget = self.config.loss_budget
        if not is_finite(budget):
            return
        self.drift = loss if self.drift is None else _LOSS_DECAY * self.drift + (1 - _LOSS_DECAY) * loss
        # Logarithms apart: the quotient of a tiny drift may be zero.
        error = min(max(math.log(self.drift) - math.log(budget), -1.0), 1.0) if self.drift > 0 else -1.0
        self.z = min(max(self.z + _INTEGRAL * error, _LOW), self.limit)
        self._u = min(max(self.z + _PROPORTIONAL * error, _LOW), self.limit)
        self.stuck = self.stuck + 1 if self.z >= self.limit and self.drift > budget else 0

    @property
    def out_of_reach(self) -> bool:
        return self.stuck >= self.patience

    def state_dict(self) -> dict[str, float | None]:
        own = {"drift": self.drift, "act": self.act, "ret": self.ret, "z": self.z, "u": self._u, "stuck": self.stuck}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.drift, self.act, self.ret = state["drift"], state["act"], state["ret"]
        self.z, self._u, self.stuck = float(state["z"]), float(state["u"]), int(state["stuck"])


def _mean(mean: float | None, value: float) -> float:
    return value if mean is None else _NORM_DECAY * mean + (1 - _NORM_DECAY) * value
