"""Statistics of success counts: intervals, exact McNemar test, paired bootstrap, sample size.

An evaluation is a set of Bernoulli trials, so a bare rate says little: 17 successes of 20 is compatible with true rates
from 0.64 to 0.95. Two policies evaluated on the same (task, initial state) pairs are compared by their discordant
pairs, which is more sensitive than comparing two intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, comb, sqrt
from statistics import NormalDist, fmean, stdev

import numpy as np
from scipy.special import stdtrit  # scipy.stats would take a second of every program that reads records

Z_95 = 1.959963984540054  # standard normal quantile at 0.975
BOOTSTRAP_REPETITIONS = 10_000
BOOTSTRAP_SEED = 0


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
    p: float = 2 * tail / 2**n
    return min(1.0, p)


def intervals_overlap(first: tuple[float, float], second: tuple[float, float]) -> bool:
    """True when two closed intervals (low, high) share a point."""
    return first[0] <= second[1] and second[0] <= first[1]


def mean_rate_interval(counts: Sequence[tuple[int, int]], z: float = Z_95) -> tuple[float, float]:
    """Interval of the unweighted mean of independent success probabilities: the macro mean over tasks.

    Zou, Huang and Zhang 2009 (Computational Statistics & Data Analysis 53:1080): with rates p_i, Wilson intervals
    [l_i, u_i] and k groups, ``low = mean(p) - sqrt(sum (p_i - l_i)^2) / k``,
    ``high = mean(p) + sqrt(sum (u_i - p_i)^2) / k``. With one group it is the Wilson interval. The groups are taken as
    given: the interval says nothing about other tasks.

    Args:
        counts: (successes, trials) of k >= 1 groups, trials >= 1.
        z: as in :func:`wilson_interval`.

    Returns:
        (low, high), both in [0, 1].

    Raises:
        ValueError: no group, or counts that :func:`wilson_interval` rejects.
    """
    if not counts:
        raise ValueError("counts: expected at least one group, found none")
    below = above = total = 0.0
    for successes, trials in counts:
        low, high = wilson_interval(successes, trials, z)
        rate = successes / trials
        below, above, total = below + (rate - low) ** 2, above + (high - rate) ** 2, total + rate
    mean = total / len(counts)
    return max(0.0, mean - sqrt(below) / len(counts)), min(1.0, mean + sqrt(above) / len(counts))


def _check_clusters(clusters: Sequence[Sequence[int]]) -> list[np.ndarray]:
    arrays = [np.asarray(cluster, dtype=np.int64) for cluster in clusters]
    if not arrays or any(array.ndim != 1 or array.size == 0 for array in arrays):
        raise ValueError("clusters: expected one or more non-empty lists of differences")
    if any(not np.isin(array, (-1, 0, 1)).all() for array in arrays):
        raise ValueError("clusters: expected differences -1, 0 or 1")
    return arrays


def _central_95(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def cluster_bootstrap_interval(
    clusters: Sequence[Sequence[int]], seed: int = BOOTSTRAP_SEED, repetitions: int = BOOTSTRAP_REPETITIONS
) -> tuple[float, float] | None:
    """95 % percentile interval of a mean paired difference when whole clusters (tasks) are drawn again.

    Cluster bootstrap (Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8, first strategy):
    as many tasks as there are, with replacement, each with all its pairs. The estimator is the mean over all pairs
    drawn, ``sum of differences / number of pairs``. It answers: what would other tasks of this kind give?

    Args:
        clusters: per task the differences (second minus first outcome) of its pairs, each -1, 0 or 1.
        seed: of numpy's generator; a numpy release may change its stream.
        repetitions: number of draws, >= 1.

    Returns:
        (low, high) in [-1, 1]; None with a single task, which cannot vary.

    Raises:
        ValueError: no cluster, an empty one, another difference, or repetitions < 1.
    """
    arrays = _check_clusters(clusters)
    if repetitions < 1:
        raise ValueError(f"repetitions: expected at least 1, found {repetitions}")
    k = len(arrays)
    if k == 1:
        return None
    draws = np.random.default_rng(seed).multinomial(k, np.full(k, 1.0 / k), size=repetitions)
    sums, sizes = np.array([a.sum() for a in arrays]), np.array([a.size for a in arrays])
    return _central_95((draws @ sums) / (draws @ sizes))


def stratified_bootstrap_interval(
    clusters: Sequence[Sequence[int]], seed: int = BOOTSTRAP_SEED, repetitions: int = BOOTSTRAP_REPETITIONS
) -> tuple[float, float]:
    """95 % percentile interval of a mean paired difference when pairs are drawn again within each cluster (task).

    The estimator is that of :func:`cluster_bootstrap_interval`, but the tasks stay as they are (Davison and Hinkley
    1997, section 3.2). It answers: what would other initial states of these very tasks give?

    Args, raises: as :func:`cluster_bootstrap_interval`.

    Returns:
        (low, high) in [-1, 1].
    """
    arrays = _check_clusters(clusters)
    if repetitions < 1:
        raise ValueError(f"repetitions: expected at least 1, found {repetitions}")
    half, totals = -(-repetitions // 2), []
    # Both signs use the same random numbers, so that exchanging the two runs mirrors the interval exactly.
    for sign in (1, -1):
        rng, total = np.random.default_rng(seed), np.zeros(half, dtype=np.int64)
        for array in arrays:
            drawn = rng.multinomial(array.size, [np.mean(array == sign * v) for v in (-1, 0, 1)], size=half)
            total += sign * (drawn[:, 2] - drawn[:, 0])
        totals.append(total)
    return _central_95(np.concatenate(totals) / sum(array.size for array in arrays))


def pairs_for_difference(discordance: float, difference: float = 0.02, alpha: float = 0.05, power: float = 0.8) -> int:
    """Number of pairs with which McNemar's test finds a difference of two success rates.

    Connor 1987 (Biometrics 43:207): with psi the share of discordant pairs and d the difference,
    ``n = (z_{1-alpha/2} sqrt(psi) + z_{power} sqrt(psi - d^2))^2 / d^2``, rounded up. A normal approximation: the exact
    test needs a few pairs more. Pairs are taken as independent.

    Args:
        discordance: psi in [0, 1]; raised to `difference`, since a difference d takes at least a share d of
            discordant pairs.
        difference: d in (0, 1).
        alpha: two-sided error of the first kind, in (0, 1).
        power: probability of finding the difference, in (alpha, 1).

    Raises:
        ValueError: an argument outside its range.
    """
    if not 0.0 <= discordance <= 1.0:
        raise ValueError(f"discordance: expected 0..1, found {discordance!r}")
    for name, value, low in (("difference", difference, 0.0), ("alpha", alpha, 0.0), ("power", power, alpha)):
        if not low < value < 1.0:
            raise ValueError(f"{name}: expected above {low} and below 1, found {value!r}")
    psi, normal = max(discordance, difference), NormalDist()
    root = normal.inv_cdf(1 - alpha / 2) * sqrt(psi) + normal.inv_cdf(power) * sqrt(psi - difference**2)
    return ceil(root**2 / difference**2)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % Student t interval, ``t(n - 1) s / sqrt(n)``; None with a single value.

    Raises ValueError when there is no value. Equal values give 0: the sample then shows no spread, which does not say
    that there is none.
    """
    if not values:
        raise ValueError("values: expected at least one, found none")
    count, mean = len(values), fmean(values)
    if count == 1:
        return mean, None
    return mean, float(stdtrit(count - 1, 0.975)) * stdev(values) / sqrt(count)


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order of `p_values` (Holm 1979, Scandinavian Journal of Statistics 6:65).

    The i-th smallest of m is multiplied by m - i + 1, then raised to the largest before it, at most 1. Rejecting those
    below alpha keeps the probability of any false rejection in the family below alpha.

    Raises:
        ValueError: a value outside [0, 1].
    """
    if not all(0.0 <= p <= 1.0 for p in p_values):
        raise ValueError(f"p_values: expected numbers from 0 to 1, found {list(p_values)}")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
