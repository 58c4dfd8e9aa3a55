"""Linear CKA: whether features of the same samples lie alike, up to rotation and scale."""

from __future__ import annotations

from typing import Any

import numpy as np

from prismatic.training.representation_passes import Pooled

# Share of the mean square below which a spread is rounding of fp32 features: they are constant.
CONSTANT = 1e-12


def linear_cka(x: np.ndarray, y: np.ndarray) -> float | None:
    """Linear CKA of two feature sets of the same samples, in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414).

    |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) with centred columns, in float64. x: (N, F), y: (N, G). None when one of the
    two is constant over the samples, as the action queries are at the input of the language model.
    """
    if len(x) != len(y):
        raise ValueError(f"features of {len(x)} and {len(y)} samples, expected the same samples")
    first, second = _centred(x), _centred(y)
    if first is None or second is None:
        return None
    x, y = first, second
    if len(x) < x.shape[1] + y.shape[1]:  # the same numbers from (N, N) matrices, which are smaller
        x, y = x @ x.T, y @ y.T
        value = (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y))
    else:
        value = np.square(y.T @ x).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return min(float(value), 1.0)  # rounding may exceed 1


def _centred(values: np.ndarray) -> np.ndarray | None:
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    return None if np.square(centred).sum() <= CONSTANT * np.square(values).sum() else centred


def cka_of_parts(start: Pooled, trained: Pooled) -> dict[str, Any]:
    """CKA of both halves of the features, and of patches and queries by hidden state."""
    width = start.f.shape[1] // 2
    result: dict[str, Any] = {
        "raw": linear_cka(start.f[:, :width], trained.f[:, :width]),
        "aq": linear_cka(start.f[:, width:], trained.f[:, width:]),
    }
    for name in ("patches", "queries"):
        pairs = (np.moveaxis(getattr(pooled, name), 1, 0) for pooled in (start, trained))
        result[f"{name}_by_layer"] = [linear_cka(x, y) for x, y in zip(*pairs, strict=True)]
    return result
