"""Statistics that are known before the data are read: whose they are, and values that do not look like them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prismatic.vla.datasets.registry import alternative_name


def known_key(statistics: Mapping[str, dict], name: str) -> str | None:
    """The key of a data set under either spelling of its name, None without one."""
    return next((key for key in (name, alternative_name(name)) if key in statistics), None)


def outside(what: str, values: np.ndarray, known: Mapping) -> list[tuple[float, str]]:
    """(share, text) of the dimensions with more than 5 % of their values beyond [q01, q99] widened by half its width.

    Of the data that the quantiles come from no more are: 2 % lie beyond them at all, or one value at each end of fewer
    than 100, and of fewer than 40 values not both are that far out. Other scenes of the same robot move the values by
    parts of the range; another unit or convention moves them out of it. A constant has no width: it may be off by 1 %.
    """
    low, high = np.asarray(known["q01"]), np.asarray(known["q99"])
    slack = np.maximum(0.5 * (high - low), 1e-6 + 0.01 * np.abs(high))
    share = ((values < low - slack) | (values > high + slack)).mean(axis=0)
    return [
        (
            float(share[d]),
            f"{what} dimension {d} has values from {values[:, d].min():.3g} to {values[:, d].max():.3g}, "
            f"{share[d]:.0%} of them far from the {low[d]:.3g} to {high[d]:.3g} (q01 to q99) of its known statistics",
        )
        for d in np.flatnonzero(share > 0.05)
    ]
