"""nuPI (arXiv 2406.04558): integral and proportional control of the violation."""

from __future__ import annotations

from typing import Any

from prismatic.craft.duals.base import Dual, is_finite
from prismatic.craft.fields import CRaFTFields


class PI(Dual):
    """xi <- nu xi + (1 - nu) e;  lambda <- clip(lambda + eta (K_I e + K_P (xi - xi_before)), 0, lambda_max).

    The first xi is the first e; K_P = 0, K_I = 1 is ascent. A multiplier that has no effect must not grow: positive
    errors are skipped while the retention gradient vanishes (conditional integration).
    """

    def __init__(self, config: CRaFTFields) -> None:
        super().__init__(config)
        self._xi: float | None = None

    def step(self, loss: float, can_reduce: bool) -> None:
        error, c = self.error(loss), self.config
        if not is_finite(error):
            return
        before = error if self._xi is None else self._xi
        self._xi = c.dual_nu * before + (1 - c.dual_nu) * error
        skip = error > 0 and not can_reduce
        self._move(0.0 if skip else c.dual_lr * (c.dual_ki * error + c.dual_kp * (self._xi - before)))

    def state_dict(self) -> dict[str, float | None]:
        return super().state_dict() | {"xi": self._xi}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._xi = state.get("xi")
