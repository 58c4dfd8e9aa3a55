"""Success of one method in one column of a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

from craft_experiments.cells import Kind
from prismatic.evidence.statistics import mean_and_half_width, wilson_interval

Pair = tuple[int, int]  # task, initial state


@dataclass(frozen=True)
class Column:
    """One question of a table. shots: demonstrations per task, in the table of few demonstrations only."""

    kind: Kind
    suite: str
    shots: int | None = None


@dataclass(frozen=True)
class Entry:
    """What is known of one method in one column.

    Attributes:
        wanted: seeds the table asks for.
        rates: seed -> success rate in [0, 1].
        outcomes: seed -> (task, initial state) -> success; empty for a rate without recorded episodes.
        codes: seed -> failure code, where there is no rate.
    """

    wanted: tuple[int, ...]
    rates: Mapping[int, float]
    outcomes: Mapping[int, Mapping[Pair, bool]]
    codes: Mapping[int, str]

    @property
    def complete(self) -> bool:
        """Whether every seed has a rate."""
        return len(self.rates) == len(self.wanted)

    @property
    def successes(self) -> int:
        """Successful episodes of all seeds."""
        return sum(sum(episodes.values()) for episodes in self.outcomes.values())

    @property
    def trials(self) -> int:
        """Episodes of all seeds."""
        return sum(len(episodes) for episodes in self.outcomes.values())

    @property
    def mean(self) -> float | None:
        """Mean of the seeds' rates; None without any."""
        return fsum(self.rates.values()) / len(self.rates) if self.rates else None

    @property
    def half_width(self) -> float | None:
        """Half width of the 95 % Student t interval over the seeds' rates; None with fewer than two seeds."""
        return mean_and_half_width(list(self.rates.values()))[1] if self.rates else None

    @property
    def wilson(self) -> tuple[float, float] | None:
        """95 % Wilson interval of all episodes together; None without episodes."""
        return wilson_interval(self.successes, self.trials) if self.trials else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Over the seeds (Student t, cut at 0 and 1); with one seed over its episodes (Wilson)."""
        mean, half_width = self.mean, self.half_width
        if half_width is None:
            return self.wilson
        assert mean is not None  # it has rates
        return max(0.0, mean - half_width), min(1.0, mean + half_width)

    @property
    def episodes(self) -> dict[tuple[int, int, int], bool]:
        """Success by (seed, task, initial state)."""
        return {(seed, *pair): done for seed, episodes in self.outcomes.items() for pair, done in episodes.items()}
