"""Tests of two rows over training seeds: what the seeds' differences show, and how large a difference would be seen.

The unit is the training seed: episodes of one policy say nothing about other trainings. `python -m
craft_experiments.paired_seeds` prints the power of the tests of docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import fsum, sqrt

import numpy as np
from scipy.special import stdtrit

from prismatic.command_line import flag, parse_or_exit

FAMILY = 4
"""Tests that Holm's correction spans: H4, H5, and H6 against replay and distilled replay."""
MARGIN = 0.10
"""By how much the success in the new tasks may be lower and still count as not lower."""
ALPHA, POWER = 0.05, 0.8


def t_p(differences: Sequence[float], bound: float = 0.0, two_sided: bool = False) -> float:
    """p of Student's test that the mean of the differences is above `bound` (or not equal to it).

    Without spread it is 0 or 1, as the differences are above `bound` or not. ValueError for fewer than two.
    """
    if len(differences) < 2:
        raise ValueError(f"differences: found {len(differences)}, expected two or more")
    if max(differences) - min(differences) < 1e-12:
        above = abs(differences[0] - bound) > 1e-12 if two_sided else differences[0] - bound > 1e-12
        return float(not above)
    from scipy import stats  # takes a second, and only reports test

    found = stats.ttest_1samp(differences, bound, alternative="two-sided" if two_sided else "greater")
    return float(found.pvalue)


def flip_p(differences: Sequence[float], bound: float = 0.0) -> float:
    """One-sided p of the exact sign-flip test: the share of all signs that give as large a sum, at least 2^-seeds."""
    shifted = [value - bound for value in differences]
    seen = fsum(shifted)
    sums = [fsum(sign * abs(v) for sign, v in zip(signs, shifted, strict=True)) for signs in _signs(len(shifted))]
    return sum(total >= seen - 1e-12 for total in sums) / len(sums)


def _signs(count: int) -> list[tuple[int, ...]]:
    return list(product((1, -1), repeat=count))


@dataclass
class PowerConfig:
    """Sizes of the comparison, and what the seeds are thought to do."""

    seeds: int = flag(5, "training seeds", at_least=2, at_most=100)
    episodes: int = flag(160, "episodes of a row and seed: tasks x episodes", at_least=1, at_most=100_000)
    new_episodes: int = flag(80, "the same in the new tasks", at_least=1, at_most=100_000)
    repetitions: int = flag(4000, "simulated experiments", at_least=100, at_most=10_000_000)
    seed: int = flag(0, "of the simulation", at_least=0)


def draw_rates(rng: np.random.Generator, mean: float, spread: float, shape: tuple[int, ...]) -> np.ndarray:
    """Success probabilities of policies: a beta distribution with this mean and standard deviation.

    A spread that no distribution on [0, 1] with the mean has is cut to nine tenths of the largest.
    """
    if mean <= 0 or mean >= 1 or spread == 0:
        return np.full(shape, min(1.0, max(0.0, mean)))
    spread = min(spread, 0.9 * sqrt(mean * (1 - mean)))
    size = mean * (1 - mean) / spread**2 - 1
    return rng.beta(mean * size, (1 - mean) * size, shape)


def simulated_differences(
    cfg: PowerConfig, means: tuple[float, float], spreads: tuple[float, float], episodes: int
) -> np.ndarray:
    """(repetitions, seeds) differences of the rates of two rows; seeds and episodes are drawn independently."""
    rng, shape = np.random.default_rng(cfg.seed), (cfg.repetitions, cfg.seeds)
    rates = [
        rng.binomial(episodes, draw_rates(rng, m, s, shape)) / episodes for m, s in zip(means, spreads, strict=True)
    ]
    return rates[0] - rates[1]


def power(differences: np.ndarray, alpha: float, bound: float = 0.0, two_sided: bool = False) -> float:
    """Share of the simulated experiments in which the t test has p below alpha; without spread the mean decides."""
    count = differences.shape[1]
    mean, spread = differences.mean(axis=1) - bound, differences.std(axis=1, ddof=1)
    limit = stdtrit(count - 1, 1 - alpha / (2 if two_sided else 1))
    values = (np.abs(mean) if two_sided else mean) * sqrt(count)
    return float(np.mean(np.where(spread > 0, values > limit * spread, values > 0)))


def smallest_difference(cfg: PowerConfig, base: float, spreads: tuple[float, float], alpha: float) -> float | None:
    """The smallest true difference above `base`, in steps of 0.01, that is seen with a probability of 0.8.

    One-sided. None: not even the largest that there can be.
    """
    for points in range(1, round(100 * (1 - base)) + 1):
        mean = base + points / 100
        if power(simulated_differences(cfg, (mean, base), spreads, cfg.episodes), alpha) >= POWER:
            return points / 100
    return None


SPREADS = (0.05, 0.09, 0.18, 0.27, 0.38)
"""Standard deviation of a rate over seeds. In results/keep, three seeds, one task, 20 episodes each: keep with data
0.09 (20, 17, 20 successes), keep without old data 0.13 (13, 18, 16) and 0.38 (19, 19, 6), replay 0.27 (9, 18, 19)."""


def lines(cfg: PowerConfig) -> list[str]:
    """Two Markdown tables: the smallest differences that are seen, and how often a margin of 10 points is shown."""
    first, alone = ALPHA / FAMILY, ALPHA
    found = [
        f"{cfg.seeds} seeds, {cfg.episodes} episodes each, 80 % power, one-sided t test over seeds:",
        "",
        "| spread over seeds "
        + "".join(f"| from {base} %, p < {alpha:g} " for base in (0, 50) for alpha in (first, alone))
        + "|",
        "|---|---|---|---|---|",
    ]
    for spread in SPREADS:
        cells = [
            smallest_difference(cfg, base, (spread, spread if base else 0.0), alpha)
            for base in (0.0, 0.5)
            for alpha in (first, alone)
        ]
        texts = ["none" if cell is None else f"{100 * cell:.0f} points" for cell in cells]
        found.append(f"| {100 * spread:.0f} points | {' | '.join(texts)} |")
    found += ["", f"Probability of showing that the new tasks are not lower by {100 * MARGIN:.0f} points:", ""]
    found += [
        "| spread over seeds | truly equal | truly 10 points higher | truly 10 points lower |",
        "|---|---|---|---|",
    ]
    for spread in SPREADS[:4]:
        shares = [
            power(simulated_differences(cfg, (0.5 + d, 0.5), (spread, spread), cfg.new_episodes), alone, -MARGIN)
            for d in (0.0, MARGIN, -MARGIN)
        ]
        found.append(f"| {100 * spread:.0f} points | {' | '.join(f'{100 * share:.0f} %' for share in shares)} |")
    return found


def main() -> None:
    """Print the tables."""
    print("\n".join(lines(parse_or_exit(PowerConfig, __doc__))))


if __name__ == "__main__":
    main()
