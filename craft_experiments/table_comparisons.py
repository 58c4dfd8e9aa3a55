"""Two rows of a table on the same episodes, and which row is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum

from craft_experiments.table_entries import Entry
from prismatic.evidence.pairing import PairedCounts, paired
from prismatic.evidence.statistics import holm_adjusted, stratified_bootstrap_interval

ALPHA = 0.05


@dataclass(frozen=True)
class Comparison:
    """Two entries on the episodes (seed, task, initial state) that both have; `difference` is first minus second.

    Attributes:
        interval: 95 % bootstrap interval of the difference; pairs are drawn again within each seed and task.
        only_first, only_second: pairs where only one of the two succeeded. p: exact McNemar test of these.
        p_holm: p adjusted for the other comparisons of the same column; None where it belongs to no family.
        by_seed: seed -> difference of that seed.
        same_pairs: whether neither entry has further episodes.
    """

    pairs: int
    difference: float
    interval: tuple[float, float]
    only_first: int
    only_second: int
    p: float
    by_seed: Mapping[int, float]
    same_pairs: bool
    p_holm: float | None = None


def compare(first: Entry, second: Entry) -> Comparison | None:
    """Compare on the common episodes; None when there are none."""
    pairs = paired(first.episodes, second.episodes, lambda key: key[:2])
    if not pairs:
        return None
    clusters = {key: [one - two for one, two in found] for key, found in pairs.items()}
    every = [change for changes in clusters.values() for change in changes]
    by_seed = {}
    for seed in sorted({seed for seed, _ in clusters}):
        of_seed = [change for (s, _), changes in clusters.items() if s == seed for change in changes]
        by_seed[seed] = fsum(of_seed) / len(of_seed)
    counts = sum(map(PairedCounts.of, pairs.values()), PairedCounts())
    return Comparison(
        pairs=len(every),
        difference=fsum(every) / len(every),
        interval=stratified_bootstrap_interval(list(clusters.values())),
        only_first=counts.only_a,
        only_second=counts.only_b,
        p=counts.p_value,
        by_seed=by_seed,
        same_pairs=first.episodes.keys() == second.episodes.keys(),
    )


def with_holm(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons as one family."""
    adjusted = holm_adjusted([comparison.p for comparison in comparisons.values()])
    return {k: replace(c, p_holm=p) for (k, c), p in zip(comparisons.items(), adjusted, strict=True)}


def best_of(entries: Mapping[str, Entry]) -> str | None:
    """Key of the entry that a test shows to be the best of all, for bold print; None when there is no such entry.

    It has the highest mean, and against each other entry, on the same pairs, the difference is positive in every seed
    and Holm's adjusted p of the exact McNemar test is below 0.05. An incomplete entry leaves the question open.
    """
    if len(entries) < 2 or not all(entry.complete and entry.trials for entry in entries.values()):
        return None
    means = {key: entry.mean for key, entry in entries.items() if entry.mean is not None}  # complete: all have one
    best = max(means, key=means.__getitem__)
    found = {key: compare(entries[best], entry) for key, entry in entries.items() if key != best}
    same = {key: comparison for key, comparison in found.items() if comparison and comparison.same_pairs}
    if len(same) < len(found):
        return None
    tested = with_holm(same).values()
    clear = all(c.p_holm is not None and c.p_holm < ALPHA and min(c.by_seed.values()) > 0 for c in tested)
    return best if clear else None
