"""Times of the same round, compared."""

from __future__ import annotations

import random
import statistics


def per_step(rounds: list[list[float]]) -> list[float]:
    """Seconds per optimizer step of each round."""
    return [sum(steps) / len(steps) for steps in rounds]


def paired_ratio(times: list[float], base: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of times[i] / base[i] with a 95 % bootstrap interval of the median (2000 resamples)."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[49], medians[1949]
