"""Dual ascent, the original procedure's rule: lambda <- clip(lambda + eta e, 0, lambda_max)."""

from prismatic.craft.duals.base import Dual, is_finite


class Ascent(Dual):
    """Integral control of the violation e = L_ret - eps, or (L_ret - eps) / eps."""

    def step(self, loss: float, can_reduce: bool) -> None:
        error = self.error(loss)
        if is_finite(error):
            self._move(self.config.dual_lr * error)
