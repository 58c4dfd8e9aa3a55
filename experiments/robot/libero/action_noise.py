"""Disturbance of executed actions, so that demonstrations show how to recover."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class NoiseProcess:
    """First-order autoregressive disturbance of the six arm components (DART: execute it, do not record it).

    n[t] = rho n[t-1] + sqrt(1 - rho^2) std e[t], so that the stationary standard deviation is `std`.
    """

    std: float
    rng: np.random.Generator
    correlation: float = 0.8
    _value: np.ndarray = field(default_factory=lambda: np.zeros(6))

    def disturb(self, action: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """The action (7,) to execute instead of the clean one, clipped to [-1, 1]; the gripper is untouched."""
        drive = np.sqrt(1.0 - self.correlation**2) * self.std
        self._value = self.correlation * self._value + drive * self.rng.standard_normal(6)
        executed = np.array(action, dtype=np.float64)
        executed[:6] = np.clip(executed[:6] + scale * self._value, -1.0, 1.0)
        return executed
