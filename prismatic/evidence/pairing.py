"""Two evaluations on the same episodes: which outcomes differ, and whether chance explains it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

from prismatic.evidence.statistics import mcnemar_exact


class _Sortable(Protocol):
    def __hash__(self) -> int: ...

    def __lt__(self, other: Any, /) -> bool: ...


Key = TypeVar("Key", bound=_Sortable)
Cluster = TypeVar("Cluster", bound=Hashable)
Pair = tuple[bool, bool]
"""Success of the first and of the second evaluation in one episode."""


def paired(
    first: Mapping[Key, bool], second: Mapping[Key, bool], cluster: Callable[[Key], Cluster]
) -> dict[Cluster, list[Pair]]:
    """Pairs of the episodes that both have, in the keys' order, by cluster (a task, for instance)."""
    found: dict[Cluster, list[Pair]] = {}
    for key in sorted(first.keys() & second.keys()):
        found.setdefault(cluster(key), []).append((first[key], second[key]))
    return found


@dataclass(frozen=True)
class PairedCounts:
    """Outcomes of pairs: both succeed, only the first (A), only the second (B), neither."""

    both: int = 0
    only_a: int = 0
    only_b: int = 0
    neither: int = 0

    @classmethod
    def of(cls, pairs: Iterable[Pair]) -> PairedCounts:
        """Counts of some pairs."""
        pairs = list(pairs)
        return cls(*(pairs.count(kind) for kind in ((True, True), (True, False), (False, True), (False, False))))

    @property
    def pairs(self) -> int:
        """All pairs."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def differences(self) -> list[int]:
        """B's outcome minus A's, one per pair."""
        return [1] * self.only_b + [-1] * self.only_a + [0] * (self.both + self.neither)

    @property
    def p_value(self) -> float:
        """Exact two-sided McNemar p."""
        return mcnemar_exact(self.only_a, self.only_b)

    def __add__(self, other: PairedCounts) -> PairedCounts:
        sums = {name: getattr(self, name) + getattr(other, name) for name in asdict(self)}
        return PairedCounts(**sums)
