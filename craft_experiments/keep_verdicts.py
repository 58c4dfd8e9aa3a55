"""Verdicts on H4, H5 and H6 of docs/experiments.md, from the data of the bench `keep`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from craft_experiments.cells import Kind, Method
from craft_experiments.keep_data import KeepData, Outcomes
from craft_experiments.paired_seeds import ALPHA, FAMILY, MARGIN, flip_p, t_p
from prismatic.evidence.pairing import PairedCounts, paired
from prismatic.evidence.statistics import holm_adjusted, mean_and_half_width

OLD, NEW = "old", "new"


@dataclass(frozen=True)
class Difference:
    """First row minus second, in rates, over the seeds that both have.

    Attributes:
        measure: `old`: old tasks after the last stage; `new`: new tasks, each at the end of its stage.
        by_seed: seed -> difference. planned: seeds the comparison rests on; complete when all are there.
        p: of the t test over seeds; None with fewer than two. two_sided: asks for any difference, else for one above
            `bound`. p_holm: adjusted within the primary family, None outside it or while that is incomplete.
        only_first, only_second, p_pairs: episodes that one of both solved, and McNemar's p of them. A description: it
            takes the policies as given.
    """

    first: str
    second: str
    measure: str
    by_seed: dict[int, float]
    planned: tuple[int, ...]
    p: float | None
    flips: float | None
    only_first: int
    only_second: int
    p_pairs: float
    bound: float = 0.0
    two_sided: bool = False
    p_holm: float | None = None

    @property
    def wanted(self) -> int:
        """Number of planned seeds."""
        return len(self.planned)

    @property
    def complete(self) -> bool:
        """Whether every planned seed is there."""
        return self.by_seed.keys() >= set(self.planned)

    @property
    def mean(self) -> float:
        """Mean over the seeds; 0 without any."""
        return sum(self.by_seed.values()) / len(self.by_seed) if self.by_seed else 0.0

    @property
    def half_width(self) -> float | None:
        """Of the 95 % Student t interval."""
        return mean_and_half_width(list(self.by_seed.values()))[1] if self.by_seed else None


@dataclass(frozen=True)
class Verdict:
    """One hypothesis. decision: `supported`, `half supported`, `not supported`, `open` (runs are missing), or for H6
    what each comparison shows.
    """

    name: str
    question: str
    decision: str
    differences: list[Difference] = field(default_factory=list)


def compare_rows(
    data: KeepData, first: str, second: str, measure: str, bound: float = 0.0, two_sided: bool = False
) -> Difference:
    """The difference of two rows in `measure`; its p-values are None while fewer than two seeds have both."""
    values = [data.values.get(key, {}).get(measure, {}) for key in (first, second)]
    seeds = sorted(values[0].keys() & values[1].keys())
    found = {seed: values[0][seed] - values[1][seed] for seed in seeds}
    planned = [data.planned_seeds(data.method(key)) for key in (first, second)]
    counts = sum((_pairs(data, (first, second), measure, seed) for seed in seeds), PairedCounts())
    known, two = list(found.values()), len(found) > 1
    return Difference(
        first=first,
        second=second,
        measure=measure,
        by_seed=found,
        planned=tuple(seed for seed in planned[0] if seed in planned[1]),
        p=t_p(known, bound, two_sided) if two else None,
        flips=flip_p(known, bound) if two and not two_sided else None,
        only_first=counts.only_a,
        only_second=counts.only_b,
        p_pairs=counts.p_value,
        bound=bound,
        two_sided=two_sided,
    )


def _pairs(data: KeepData, keys: tuple[str, str], measure: str, seed: int) -> PairedCounts:
    """Episodes that both rows had with a seed."""
    first, second = (_episodes(data, data.method(key), measure, seed) for key in keys)
    return sum(map(PairedCounts.of, paired(first, second, lambda key: key[0]).values()), PairedCounts())


def _episodes(data: KeepData, method: Method, measure: str, seed: int) -> dict[tuple[str, int, int], bool]:
    """What the measure is the mean of: (stage's task or `old`, task number, initial state) -> success."""
    tasks = [task.name for task in data.bench.new_tasks]
    if measure == OLD:
        asked: list[tuple[str, Outcomes | None]] = [(OLD, data.old_outcomes(data.cell(method, seed, len(tasks))))]
    else:
        ends = [(task, data.cell(method, seed, stage)) for stage, task in enumerate(tasks, start=1)]
        asked = [(task, data.found(cell, Kind.NEW, task)) for task, cell in ends]
    return {(name, *place): won for name, found in asked for place, won in (found or {}).items()}


def verdicts(data: KeepData) -> list[Verdict]:
    """H4, H5, H6. Holm's correction spans the two retention hypotheses and the two comparisons with replay."""
    most = max(data.preset.memory_sizes)
    with_data = f"keep_data_{most}"
    kept = {key: [_against_plain(data, key, measure) for measure in (OLD, NEW)] for key in (with_data, "keep_none")}
    rivals = [compare_rows(data, with_data, f"{kind}_{most}", OLD, two_sided=True) for kind in ("replay", "distilled")]
    adjusted = _holm([*(_joint_p(halves) for halves in kept.values()), *(found.p for found in rivals)])
    whole = all(found.complete for found in (*rivals, *(half for halves in kept.values() for half in halves)))
    if not whole:
        adjusted = [None] * FAMILY
    rivals = [replace(found, p_holm=p) for found, p in zip(rivals, adjusted[2:], strict=True)]
    names = {
        with_data: ("H4, with old observations", f"observations of {most} demonstrations per old task"),
        "keep_none": ("H5, without old data", "old instructions alone"),
    }
    found = [_retention(names[key], halves, p) for (key, halves), p in zip(kept.items(), adjusted[:2], strict=True)]
    return [*found, _against_replay(data, with_data, rivals)]


def _against_plain(data: KeepData, key: str, measure: str) -> Difference:
    return compare_rows(data, key, "plain", measure, bound=0.0 if measure == OLD else -MARGIN)


def _joint_p(halves: list[Difference]) -> float | None:
    """Both halves must hold: the larger p is a p-value of the whole."""
    values = [half.p for half in halves]
    known = [p for p in values if p is not None]
    return max(known) if len(known) == len(values) else None


def _holm(values: list[float | None]) -> list[float | None]:
    known = [p for p in values if p is not None]
    return list(holm_adjusted(known)) if len(known) == len(values) == FAMILY else [None] * len(values)


def _retention(name: tuple[str, str], halves: list[Difference], p: float | None) -> Verdict:
    title, memory = name
    question = (
        f"With {memory}: more success in the old tasks than plain after both new tasks, and success in the new tasks "
        f"not lower by {100 * MARGIN:.0f} points?"
    )
    old = replace(halves[0], p_holm=p)
    if p is None:
        decision = "open"
    elif p < ALPHA:
        decision = "supported"
    else:  # the half about the old tasks, as if the other one held
        half = "half supported: more of the old tasks is kept, the new tasks are undecided"
        decision = half if _old_alone(halves) else "not supported"
    return Verdict(title, question, decision, [old, halves[1]])


def _old_alone(halves: list[Difference]) -> bool:
    """Whether the retention half passes the strictest step of the correction by itself."""
    p = halves[0].p
    return p is not None and p < ALPHA / FAMILY


def _against_replay(data: KeepData, with_data: str, rivals: list[Difference]) -> Verdict:
    question = "The same demonstrations in a memory, replayed, or replayed with the start's actions: which keeps more?"
    most = max(data.preset.memory_sizes)
    others = [
        compare_rows(data, f"keep_data_{size}", f"{kind}_{size}", measure, two_sided=True)
        for size in sorted(data.preset.memory_sizes, reverse=True)
        for kind in ("replay", "distilled")
        for measure in (OLD, NEW)
        if (size, measure) != (most, OLD)
    ]
    if any(found.p_holm is None for found in rivals):
        return Verdict("H6, against replay", question, "open", [*rivals, *others])
    return Verdict("H6, against replay", question, "; ".join(map(_shown, rivals)), [*rivals, *others])


def _shown(found: Difference) -> str:
    if found.p_holm is None or found.p_holm >= ALPHA:
        return f"no difference to {found.second} shown"
    return f"{'more' if found.mean > 0 else 'less'} is kept than by {found.second}"
