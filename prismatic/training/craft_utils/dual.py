"""The multiplier lambda: the price of drift, moved once per optimizer step."""

from __future__ import annotations

import math

from prismatic.training.craft_utils.config import CRaFTConfig, DualError, DualKind


class CRaFTDualOptimizer:
    """Rule of the multiplier, in fp64 on the CPU, with e = L_ret - eps or (L_ret - eps) / eps.

    ascent: lambda <- clip(lambda + eta e, 0, lambda_max)
    pi:     xi <- nu xi + (1 - nu) e;  lambda <- clip(lambda + eta (K_I e + K_P (xi - xi_before)), 0, lambda_max)
            (nuPI, arXiv 2406.04558; the first xi is the first e; K_P = 0, K_I = 1 is ascent)
    off:    lambda is constant.
    """

    def __init__(self, config: CRaFTConfig) -> None:
        self.config = config
        self._lambda = 0.0
        self._xi: float | None = None
        self._loss_ema: float | None = None
        self.reset()

    def reset(self) -> None:
        """Back to the initial value, without memory."""
        self._lambda = self.config.initial_lambda
        self._xi = None
        self._loss_ema = None

    def get_lambda(self) -> float:
        """Current multiplier, in [0, lambda_max]."""
        return self._lambda

    @property
    def is_active(self) -> bool:
        """Whether the averaged retention loss is above gamma * eps (the gate of `projection_when = active`)."""
        return self._loss_ema is not None and self._loss_ema > (
            self.config.projection_gamma * self.config.retention_budget
        )

    def step(self, l_ret: float, can_reduce: bool = True) -> float:
        """Take in the retention loss of a step; returns the new multiplier.

        Args:
            l_ret: measured loss, averaged over micro-batches and processes. Not finite: nothing changes.
            can_reduce: False when the retention gradient vanished. A price that has no effect must not grow, so PI
                then skips positive errors (conditional integration).
        """
        l_ret = float(l_ret)
        if not math.isfinite(l_ret):
            return self._lambda
        nu = self.config.dual_nu
        self._loss_ema = l_ret if self._loss_ema is None else nu * self._loss_ema + (1 - nu) * l_ret
        error = self.error(l_ret)
        # An infinite budget only monitors.
        if math.isfinite(error) and self.config.dual_kind is not DualKind.OFF:
            self._lambda = min(max(0.0, self._lambda + self._increment(error, can_reduce)), self.config.lambda_max)
        return self._lambda

    def error(self, l_ret: float) -> float:
        """The violation e of a loss; -inf or nan for an infinite budget."""
        error = l_ret - self.config.retention_budget
        return error / self.config.retention_budget if self.config.dual_error is DualError.RELATIVE else error

    def _increment(self, error: float, can_reduce: bool) -> float:
        if self.config.dual_kind is DualKind.ASCENT:
            return self.config.dual_lr * error
        before = error if self._xi is None else self._xi
        self._xi = self.config.dual_nu * before + (1 - self.config.dual_nu) * error
        if error > 0 and not can_reduce:
            return 0.0
        return self.config.dual_lr * (self.config.dual_ki * error + self.config.dual_kp * (self._xi - before))

    def state_dict(self) -> dict[str, float | None]:
        """Multiplier and memory."""
        return {"lambda": self._lambda, "xi": self._xi, "loss_ema": self._loss_ema}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore `state_dict`; ValueError when the multiplier is outside [0, lambda_max]."""
        if not 0 <= state["lambda"] <= self.config.lambda_max:
            raise ValueError(f"CRaFT lambda is {state['lambda']}, expected 0 <= lambda <= {self.config.lambda_max}")
        self._lambda, self._xi, self._loss_ema = float(state["lambda"]), state.get("xi"), state.get("loss_ema")
