"""What every rule of the multiplier has: its value, how it takes in a loss, and its state."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from prismatic.craft.fields import CRaFTFields, DualError


class Dual:
    """A multiplier in fp64 on the CPU. This class is the rule `off`: the multiplier is constant.

    Losses and the budget are in the unit of `CRaFTFields.loss_budget`.
    """

    needs_norms = False
    """Whether `multiplier_for` reads the norms of this step's two gradients, which then have to be told apart."""
    own: Collection[str] = ()
    """Settings that this rule alone reads. Given with another one, their flags are refused."""
    unread: Collection[str] = ()
    """Settings of multipliers that this rule does not read. Their flags are refused with it."""

    def __init__(self, config: CRaFTFields) -> None:
        self.config = config
        self.value = config.initial_lambda

    def multiplier_for(self, act_norm: float, ret_norm: float) -> float:
        """Multiplier of a step with these norms |a| and |r| of the gradients over the constrained weights."""
        return self.value

    def step(self, loss: float, can_reduce: bool) -> None:
        """Take in the retention loss of a step, a finite number.

        `can_reduce`: False when the retention gradient vanished, so that a larger multiplier would have no effect.
        """

    @property
    def out_of_reach(self) -> bool:
        """Whether the rule has pulled as hard as it may for long, and the budget is still exceeded."""
        return False

    def error(self, loss: float) -> float:
        """The violation e of a loss; -inf or nan for an infinite budget."""
        error = loss - self.config.loss_budget
        return error / self.config.loss_budget if self.config.dual_error is DualError.RELATIVE else error

    def state_dict(self) -> dict[str, float | None]:
        """Multiplier and memory, JSON-ready."""
        return {"lambda": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; ValueError when the multiplier is outside [0, lambda_max]."""
        if not 0 <= state["lambda"] <= self.config.lambda_max:
            raise ValueError(f"CRaFT lambda is {state['lambda']}, expected 0 <= lambda <= {self.config.lambda_max}")
        self.value = float(state["lambda"])

    def _move(self, increment: float) -> None:
        self.value = min(max(0.0, self.value + increment), self.config.lambda_max)


def is_finite(*values: float) -> bool:
    """Whether all values are finite; an infinite budget only monitors."""
    return all(math.isfinite(value) for value in values)
