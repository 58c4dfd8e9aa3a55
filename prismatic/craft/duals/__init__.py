"""The multiplier lambda: the price of drift, moved once per optimizer step.

One file per rule; its name is the file's. Nothing here imports torch, for the names are flags.
"""

from __future__ import annotations

import math
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from prismatic.craft.duals.base import Dual
from prismatic.craft.fields import OFF, CRaFTFields
from prismatic.craft.gate import Gate


def _dual_in(file: str) -> type[Dual]:
    """The one `Dual` that a file of this folder defines."""
    module = import_module(f"{__name__}.{file}")
    kinds = (kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Dual))
    (dual,) = (kind for kind in kinds if kind.__module__ == module.__name__)
    return dual


_FILES = sorted(found.name for found in iter_modules(__path__) if found.name != "base")
DUALS: dict[str, type[Dual]] = {name: _dual_in(name) for name in _FILES} | {OFF: Dual}
"""By the name that is a flag's value."""


class CRaFTDualOptimizer:
    """The multiplier by the configured rule, and the gate that follows the same losses."""

    def __init__(self, config: CRaFTFields) -> None:
        self.config = config
        self.reset()

    def reset(self) -> None:
        """Back to the initial value and state."""
        self.controller, self.gate = DUALS[self.config.dual_kind](self.config), Gate(self.config)

    def get_lambda(self) -> float:
        """Current multiplier, in [0, lambda_max]."""
        return self.controller.value

    @property
    def is_active(self) -> bool:
        """Whether the averaged retention loss is above gamma * eps (the gate of `projection_when = active`)."""
        return self.gate.is_active

    def step(self, l_ret: float, can_reduce: bool = True) -> float:
        """Take in the retention loss of a step; returns the new multiplier.

        Args:
            l_ret: measured loss, averaged over micro-batches and processes, in the unit of `CRaFTFields.loss_budget`.
                Not finite: nothing changes.
            can_reduce: False when the retention gradient vanished.
        """
        l_ret = float(l_ret)
        if math.isfinite(l_ret):
            self.gate.step(l_ret)
            self.controller.step(l_ret, can_reduce)
        return self.controller.value

    def error(self, l_ret: float) -> float:
        """The violation e of a loss; -inf or nan for an infinite budget."""
        return self.controller.error(l_ret)

    def state_dict(self) -> dict[str, float | None]:
        """Multiplier and what the controller remembers."""
        return self.controller.state_dict() | {"loss_ema": self.gate.loss_mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`; ValueError when the multiplier is outside [0, lambda_max]."""
        self.controller.load_state_dict(state)
        self.gate.loss_mean = state.get("loss_ema")
