"""Linear probes: whether position and instruction can be read from features, and by whose reader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prismatic.training.linear_cka import CONSTANT

# Weight of |W|^2 beside the mean squared error, for features of unit variance. Fixed, so that probes of two models
# differ by their features only; large enough that a few hundred samples do not fit the noise of as many features.
RIDGE_PENALTY = 0.1
_AXES = ("x", "y", "z")


@dataclass(frozen=True)
class ProbeTargets:
    """What a probe reads off N samples.

    position: (N, 3) float64, the first three numbers of the recorded robot state, in LIBERO's conventions the
    end-effector position in metres. instruction: (N,) index of the instruction. held_out:
    (N,) bool, whether the sample's episode is one of those the probe is tested on.
    """

    position: np.ndarray
    instruction: np.ndarray
    held_out: np.ndarray


class LinearProbe:
    """Ridge regression in closed form: minimises mean_n |y_n - b - W z_n|^2 + penalty |W|_F^2, z standardised.

    b is the mean of the targets. Features that are constant over the fitted samples are not used.

    Args:
        features: (N, F), N >= 1.
        targets: (N, T).
        penalty: > 0.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, penalty: float = RIDGE_PENALTY) -> None:
        features = features.astype(np.float64)
        self._mean, spread = features.mean(axis=0), features.std(axis=0)
        constant = np.square(spread) <= CONSTANT * np.square(features).mean(axis=0)
        self._scale = np.where(constant, np.inf, spread)
        self._offset = targets.mean(axis=0)
        z, y = self._standardised(features), targets - self._offset
        count, width = z.shape
        if count < width:  # the dual form, of the same solution: an (N, N) system
            self._weights = z.T @ np.linalg.solve(z @ z.T + count * penalty * np.eye(count), y)
        else:
            self._weights = np.linalg.solve(z.T @ z + count * penalty * np.eye(width), z.T @ y)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(N, F) -> (N, T) float64."""
        predicted: np.ndarray = self._standardised(features.astype(np.float64)) @ self._weights + self._offset
        return predicted

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        standardised: np.ndarray = (features - self._mean) / self._scale
        return standardised


def r_squared(targets: np.ndarray, predicted: np.ndarray) -> list[float | None]:
    """1 - residual / total sum of squares per column of (N, T), at most 1; None for a constant target."""
    residual = np.square(targets - predicted).sum(axis=0)
    total = np.square(targets - targets.mean(axis=0)).sum(axis=0)
    columns = zip(residual, total, np.ptp(targets, axis=0), strict=True)
    return [float(1 - r / t) if spread > 0 else None for r, t, spread in columns]


def probe_features(start: np.ndarray, trained: np.ndarray, targets: ProbeTargets, seed: int) -> dict[str, Any] | None:
    """Linear probes from features (N, F) to the position in metres and to the instruction (one-hot least squares).

    Fitted on the episodes that are not held out, tested on those that are: `start`, `trained` (fitted anew) and `stale`
    (the start model's probes on the trained features). None when no episode is held out: every instruction has one.
    """
    tested = targets.held_out
    if not tested.any():
        return None
    one_hot = np.eye(targets.instruction.max() + 1)[targets.instruction]
    values = np.concatenate([targets.position, one_hot], axis=1)
    probes = {name: LinearProbe(f[~tested], values[~tested]) for name, f in (("start", start), ("trained", trained))}
    predictions = {
        "start": probes["start"].predict(start[tested]),
        "trained": probes["trained"].predict(trained[tested]),
        "stale": probes["start"].predict(trained[tested]),
    }
    instruction = targets.instruction[tested]
    return {
        "penalty": RIDGE_PENALTY,
        "seed": seed,
        "fitted_samples": int((~tested).sum()),
        "tested_samples": int(tested.sum()),
        "chance_accuracy": float(np.bincount(instruction).max() / len(instruction)),
        **{name: _scores(targets.position[tested], instruction, values) for name, values in predictions.items()},
    }


def _scores(position: np.ndarray, instruction: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    found = r_squared(position, predicted[:, :3])
    defined = [value for value in found if value is not None]
    error = np.sqrt(np.square(position - predicted[:, :3]).mean(axis=0))
    return {
        "position_r2": {
            **dict(zip(_AXES, found, strict=True)),
            "mean": float(np.mean(defined)) if defined else None,
        },
        "position_rmse_m": dict(zip(_AXES, error.tolist(), strict=True)),
        "instruction_accuracy": float((predicted[:, 3:].argmax(axis=1) == instruction).mean()),
    }
