"""Verdicts on H1 to H3 (results/archive/README.md), from the data of the archived retention table.

H1: the budget preset meets its budget. H2: CRaFT forgets less than plain fine-tuning at equal action error. H3: CRaFT
against the fixed penalty and the interpolation whose action error is closest to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from craft_experiments.table_comparisons import ALPHA
from craft_experiments.table_data import TableData, Training, achieved, budgeted
from prismatic.evidence.statistics import holm_adjusted, mean_and_half_width

CONTROL_LIMIT = 0.15  # H1: median relative deviation from the budget
MARGIN = 0.05  # H2: action error may be worse by this share of plain's
FORGETTING, ERROR = "forgetting", "l1_target"
OPEN = "open"


@dataclass(frozen=True)
class Verdict:
    """One hypothesis. decision: `supported`, `not supported` or `open` (runs are missing). lines: the numbers."""

    name: str
    question: str
    decision: str
    lines: list[str] = field(default_factory=list)


def verdicts(data: TableData, training: Training) -> list[Verdict]:
    """H1, H2 and H3. training: the demonstrations of the protocol. Holm's correction spans the tests of H2 and H3."""
    tests = _tests(data, training)
    adjusted = dict(zip(tests, holm_adjusted([test.p for test in tests.values()]), strict=True))
    return [_control(data), _retention(tests, adjusted), _simpler_means(data, training, tests, adjusted)]


# --- H1 -----------------------------------------------------------------------------------------------------------


def _control(data: TableData) -> Verdict:
    deviations: dict[bool, list[float]] = {True: [], False: []}
    for method, budget in budgeted(data):
        follows = method.train.get("craft_preset") == "budget"
        if method.key == "craft_original" or method.key == "craft" or method.key.startswith("craft_budget"):
            deviations[follows] += [abs(drift - budget) / budget for drift in achieved(data, method.key)]
    question = (
        f"Median of |drift - ε| / ε of the preset `budget` at most {CONTROL_LIMIT:.0%}, and below the original's?"
    )
    if not deviations[True] or not deviations[False]:
        return Verdict("H1, control", question, OPEN)
    ours, original = median(deviations[True]), median(deviations[False])
    lines = [
        f"preset `budget`: median {ours:.1%} over {len(deviations[True])} runs, largest {max(deviations[True]):.1%}",
        f"original rule: median {original:.1%} over {len(deviations[False])} runs",
    ]
    return Verdict("H1, control", question, _decision(ours <= CONTROL_LIMIT and ours < original), lines)


# --- Paired tests over seeds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairedTest:
    """One-sided paired t test that the mean of `differences` (one per seed) is below `bound`."""

    differences: tuple[float, ...]
    bound: float

    @property
    def p(self) -> float:
        """p-value; without spread it is 0 or 1."""
        if len(set(self.differences)) == 1:
            return float(self.differences[0] >= self.bound)
        from scipy import stats  # takes a second, and only reports test

        return float(stats.ttest_1samp(self.differences, self.bound, alternative="less").pvalue)

    def text(self, digits: str) -> str:
        """`-0.012 ± 0.003 (3 seeds)`."""
        mean, half = mean_and_half_width(list(self.differences))
        return f"{mean:+{digits}} ± {half:{digits}} ({len(self.differences)} seeds)"


def _paired(data: TableData, training: Training, keys: tuple[str, str], measure: str) -> dict[int, tuple[float, float]]:
    """seed -> value of both methods, for the seeds both have."""
    first, second = (data.value(key, training, measure) for key in keys)
    return {seed: (first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())}


def _difference(pairs: dict[int, tuple[float, float]], bound: float = 0.0, relative: bool = False) -> PairedTest | None:
    if len(pairs) < 2:
        return None
    return PairedTest(tuple((a - b) / (b if relative else 1.0) for a, b in pairs.values()), bound)


def _tests(data: TableData, training: Training) -> dict[str, PairedTest]:
    """All tests of H2 and H3 that have their data."""
    plain = ("craft", "plain")
    found = {
        "forgetting": _difference(_paired(data, training, plain, FORGETTING)),
        "error": _difference(_paired(data, training, plain, ERROR), MARGIN, relative=True),
    }
    for family in ("penalty_", "interpolate_"):
        rival = closest(data, training, family)
        if rival is not None:
            pairs = _paired(data, training, ("craft", rival), FORGETTING)
            found[family] = _difference(dict(list(pairs.items())[1:]))
    return {name: test for name, test in found.items() if test is not None}


def closest(data: TableData, training: Training, family: str) -> str | None:
    """The method of a family whose action error on the target is closest to CRaFT's on the first seed both have."""
    keys = [method.key for method in data.competitors if method.key.startswith(family)]
    distances = {}
    for key in keys:
        pairs = _paired(data, training, ("craft", key), ERROR)
        if pairs:
            ours, theirs = next(iter(pairs.values()))
            distances[key] = abs(ours - theirs)
    return min(distances, key=distances.__getitem__) if distances else None


# --- H2, H3 -------------------------------------------------------------------------------------------------------


def _retention(tests: dict[str, PairedTest], adjusted: dict[str, float]) -> Verdict:
    question = f"Less forgetting than plain, and an action error at most {MARGIN:.0%} above plain's?"
    if not {"forgetting", "error"} <= tests.keys():
        return Verdict("H2, retention at equal loss", question, OPEN)
    lines = [
        f"forgetting, CRaFT minus plain: {tests['forgetting'].text('.4f')}, {_p(adjusted['forgetting'])}",
        f"action error on the target relative to plain's: {tests['error'].text('.1%')}, "
        f"{_p(adjusted['error'])} against +{MARGIN:.0%}",
    ]
    passed = adjusted["forgetting"] < ALPHA and adjusted["error"] < ALPHA
    return Verdict("H2, retention at equal loss", question, _decision(passed), lines)


def _simpler_means(
    data: TableData, training: Training, tests: dict[str, PairedTest], adjusted: dict[str, float]
) -> Verdict:
    """Reported either way; supported means less forgetting than the interpolation."""
    question = "Less forgetting than the interpolation, and how much against the fixed penalty, at equal action error?"
    lines = []
    for family in ("penalty_", "interpolate_"):
        if family in tests:
            rival = closest(data, training, family)
            assert rival is not None  # it was tested
            seeds = list(_paired(data, training, ("craft", rival), ERROR).items())
            errors = fmean(a / b - 1 for _, (a, b) in seeds[1:])
            lines.append(
                f"forgetting, CRaFT minus `{rival}`: {tests[family].text('.4f')}, {_p(adjusted[family])}; action error "
                f"on the target {errors:+.1%}"
            )
    if len(lines) < 2:
        return Verdict("H3, against simpler means", question, OPEN, lines)
    passed = adjusted["interpolate_"] < ALPHA
    return Verdict("H3, against simpler means", question, _decision(passed), lines)


def _decision(passed: bool) -> str:
    return "supported" if passed else "not supported"


def _p(value: float) -> str:
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def page(found: Sequence[Verdict]) -> str:
    """`hypotheses.md`."""
    lines = [
        "# Hypotheses",
        "",
        "Written by `python -m craft_experiments report retention` from the records alone; the hypotheses and how they "
        "are decided: results/archive/README.md. "
        "± is the half width of the 95 % interval over seeds (Student t); p-values "
        "are one-sided and Holm-corrected over H2 and H3.",
    ]
    for verdict in found:
        lines += ["", f"## {verdict.name}: {verdict.decision}", "", verdict.question]
        lines += ["", *(f"- {line}" for line in verdict.lines)] if verdict.lines else []
    return "\n".join(lines) + "\n"
