"""Statistics of success counts: Wilson score interval and exact McNemar test. Standard library only.

An evaluation is a set of Bernoulli trials, so a bare rate says little: 17 successes of 20 is compatible with true rates
from 0.64 to 0.95. Two policies evaluated on the same (task, initial state) pairs are compared by their discordant
pairs, which is more sensitive than comparing two intervals.
"""

from __future__ import annotations

from math import comb, sqrt

Z_95 = 1.959963984540054  # standard normal quantile at 0.975


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or int(value) != value or value < 0:
        raise ValueError(f"{name}: expected a whole number >= 0, found {value!r}")
    return int(value)


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson score interval of a success probability (Wilson 1927, JASA 22:209).

    Centre ``(p + z^2/2n) / (1 + z^2/n)``, half width ``z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n)``. Unlike the normal
    approximation it stays inside [0, 1] and has a width at p = 0 and p = 1.

    Args:
        successes: number of successes, 0 <= successes <= trials.
        trials: number of trials, >= 1.
        z: standard normal quantile; the default gives 95 %.

    Returns:
        (low, high), both in [0, 1].

    Raises:
        ValueError: counts that are no whole numbers, trials < 1, successes > trials, or z <= 0.
    """
    k, n = _check_count("successes", successes), _check_count("trials", trials)
    if n < 1:
        raise ValueError(f"trials: expected at least 1, found {trials!r}")
    if k > n:
        raise ValueError(f"successes: expected at most trials={n}, found {k}")
    if not z > 0:
        raise ValueError(f"z: expected > 0, found {z!r}")
    p, shrink = k / n, 1.0 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # The ends are exactly 0 and 1 there; floating point leaves 1e-17.
    low = 0.0 if k == 0 else max(0.0, centre - half)
    high = 1.0 if k == n else min(1.0, centre + half)
    return low, high


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact McNemar p-value of paired binary outcomes (binomial test of the discordant pairs at 1/2).

    Args:
        b: pairs where only the first policy succeeded.
        c: pairs where only the second policy succeeded.

    Returns:
        p in (0, 1]; 1.0 when there is no discordant pair.

    Raises:
        ValueError: a count that is no whole number >= 0.
    """
    b, c = _check_count("b", b), _check_count("c", c)
    n = b + c
    tail = sum(comb(n, i) for i in range(min(b, c) + 1))  # integers: exact up to the last division
    return min(1.0, 2 * tail / 2**n)


def intervals_overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """True when two closed intervals (low, high) share a point."""
    return first[0] <= second[1] and second[0] <= first[1]
