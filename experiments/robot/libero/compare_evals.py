"""Compares two evaluations episode by episode.

    python -m experiments.robot.libero.compare_evals A B [--output FILE]

A and B are results folders or `episodes.jsonl` files, several separated by commas. Episodes are paired on (suite,
perturbation, task, initial state, seed). Episodes that ended in an error are left out and counted. Exit code 0:
compared; 2: the input cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prismatic.command_line import OneLineParser, bad_input_in_one_line, in_range
from prismatic.evidence.cells import markdown_cell, one_line
from prismatic.evidence.episodes import (
    DECISIVE_FIELDS,
    EpisodeId,
    ProtocolDifference,
    RecordedRun,
    protocol_differences,
    read_run,
)
from prismatic.evidence.files import write_json, write_text
from prismatic.evidence.pairing import PairedCounts, paired
from prismatic.evidence.statistics import (
    BOOTSTRAP_REPETITIONS,
    BOOTSTRAP_SEED,
    cluster_bootstrap_interval,
    mcnemar_exact,
    pairs_for_difference,
    stratified_bootstrap_interval,
    wilson_interval,
)
from prismatic.output_folder import check_file

ALPHA = 0.05
POWER = 0.8
TARGET_DIFFERENCE = 0.02
FEW_TASKS = 5


class NotComparableError(ValueError):
    """Two runs that share no finished episode, or followed different protocols; the message names the fields."""


@dataclass(frozen=True)
class Unpaired:
    """An episode left out, and why."""

    episode: EpisodeId
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare_runs`. Rates and differences are shares, difference = B - A over the pairs."""

    a: RecordedRun
    b: RecordedRun
    per_task: dict[tuple[str, str, int], PairedCounts]
    total: PairedCounts
    unpaired: list[Unpaired]
    protocol: list[ProtocolDifference]
    p_value: float
    cluster_95: tuple[float, float] | None
    stratified_95: tuple[float, float]
    bootstrap: dict[str, int] = field(default_factory=dict)

    @property
    def difference(self) -> float:
        """Success rate of B minus that of A, over the pairs."""
        return (self.total.only_b - self.total.only_a) / self.total.pairs

    @property
    def discordance(self) -> float:
        """Share of pairs with different outcomes."""
        return (self.total.only_a + self.total.only_b) / self.total.pairs

    @property
    def distinguishable(self) -> bool:
        """True when the exact McNemar test rejects equality at 5 %."""
        return self.p_value < ALPHA

    def pairs_needed(self) -> tuple[int, int]:
        """Pairs for a difference of 2 points: with the discordance observed, and with its upper 95 % Wilson limit."""
        upper = wilson_interval(self.total.only_a + self.total.only_b, self.total.pairs)[1]
        one, two = (pairs_for_difference(psi, TARGET_DIFFERENCE, ALPHA, POWER) for psi in (self.discordance, upper))
        return one, two


def pair_episodes(
    a: RecordedRun, b: RecordedRun
) -> tuple[dict[tuple[str, str, int], PairedCounts], list[EpisodeId], list[Unpaired]]:
    """(counts per task, episodes that both finished, episodes left out), in ascending order."""
    first, second = a.outcomes, b.outcomes
    unpaired = []
    for key in sorted((a.episodes.keys() | b.episodes.keys()) - (first.keys() & second.keys())):
        reasons = [
            f"{'error' if key in run.episodes else 'absent'} in {name}"
            for name, run, outcomes in (("A", a, first), ("B", b, second))
            if key not in outcomes
        ]
        unpaired.append(Unpaired(key, ", ".join(reasons)))
    counts = {task: PairedCounts.of(pairs) for task, pairs in paired(first, second, lambda key: key.task).items()}
    return counts, sorted(first.keys() & second.keys()), unpaired


def compare_runs(
    a: RecordedRun,
    b: RecordedRun,
    allow: Iterable[str] = (),
    seed: int = BOOTSTRAP_SEED,
    repetitions: int = BOOTSTRAP_REPETITIONS,
) -> Comparison:
    """Paired comparison of two runs.

    Args:
        a, b: see :func:`read_run`.
        allow: decisive protocol fields that may differ; `all` allows every one.
        seed, repetitions: of the bootstraps.

    Raises:
        NotComparableError: no common finished episode, or decisive protocol fields differ that are not allowed.
        ValueError: an unknown field in `allow`.
    """
    allowed = set(allow)
    if allowed - DECISIVE_FIELDS - {"all"}:
        unknown = ", ".join(sorted(allowed - DECISIVE_FIELDS - {"all"}))
        raise ValueError(f"allow: found {unknown}, expected all or some of {', '.join(sorted(DECISIVE_FIELDS))}")
    counts, common, unpaired = pair_episodes(a, b)
    if not common:
        raise NotComparableError(_no_pairs_message(a, b))
    differences = protocol_differences(a, b, common)
    refused = [item for item in differences if item.decisive and not {item.field, "all"} & allowed]
    if refused:
        raise NotComparableError(
            "the runs followed different protocols, so a difference would not be the policies':\n"
            + "\n".join(f"  {item}" for item in refused)
            + f"\nTo compare all the same: --allow {','.join(dict.fromkeys(item.field for item in refused))}"
        )
    total = sum(counts.values(), PairedCounts())
    clusters = [counts[task].differences for task in sorted(counts)]
    return Comparison(
        a=a,
        b=b,
        per_task=counts,
        total=total,
        unpaired=unpaired,
        protocol=differences,
        p_value=total.p_value,
        cluster_95=cluster_bootstrap_interval(clusters, seed, repetitions),
        stratified_95=stratified_bootstrap_interval(clusters, seed, repetitions),
        bootstrap={"seed": seed, "repetitions": repetitions},
    )


def _no_pairs_message(a: RecordedRun, b: RecordedRun) -> str:
    lines = ["the runs share no finished episode (paired on suite, perturbation, task, initial state, seed):"]
    for name in ("suite", "perturbation", "task_id", "init_idx", "seed"):
        values = [sorted({getattr(key, name) for key in run.episodes}) for run in (a, b)]
        numeric = name not in ("suite", "perturbation")
        shown = [format_ranges(v) if numeric else one_line(", ".join(v)) for v in values]
        if values[0] != values[1]:
            lines.append(f"  {name}: A {shown[0]}, B {shown[1]}")
    lines += [f"  errors: {run.count('error')} in {name}" for name, run in (("A", a), ("B", b)) if run.count("error")]
    return "\n".join(lines)


def format_ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7; ascending."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def tasks_that_differ(comparison: Comparison) -> list[tuple[str, str, int]]:
    """Tasks whose own exact McNemar p is below 5 % divided by the number of tasks (Bonferroni)."""
    limit = ALPHA / len(comparison.per_task)
    counts = sorted(comparison.per_task.items())
    return [task for task, found in counts if found.p_value < limit]


def verdict(comparison: Comparison) -> str:
    """One or more sentences: can the difference be told from noise?"""
    text = _overall_verdict(comparison)
    differing = tasks_that_differ(comparison) if len(comparison.per_task) > 1 else []
    if differing:
        parts = []
        for task in differing:
            counts = comparison.per_task[task]
            points = 100 * (counts.only_b - counts.only_a) / counts.pairs
            parts.append(f"{_task_name(task)} ({points:+.0f} points)")
        text += f" More than noise on single tasks: {', '.join(parts)}."
    return text


def _overall_verdict(comparison: Comparison) -> str:
    total, points = comparison.total, 100 * comparison.difference
    discordant = total.only_a + total.only_b
    if discordant == 0:
        return f"Both runs have the same outcome in all {total.pairs} pairs: no difference."
    if not comparison.distinguishable:
        text = f"The difference of {points:+.1f} points cannot be told from noise (p = {comparison.p_value:.3g})."
        if mcnemar_exact(0, discordant) >= ALPHA:
            text += f" With fewer than 6 discordant pairs (here {discordant}) p cannot fall below {ALPHA}."
        return text
    better = "B" if points > 0 else "A"
    text = (
        f"{better} succeeds more often, by {abs(points):.1f} points: more than noise on these tasks "
        f"(p = {comparison.p_value:.3g})."
    )
    interval = comparison.cluster_95
    if interval is None:
        return text + " With a single task this says nothing about other tasks."
    if interval[0] <= 0.0 <= interval[1]:
        text += " The tasks disagree: drawn again, they may give no difference (the interval over tasks contains 0)."
    return text


def _points(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"[{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]"


def _task_name(task: tuple[str, str, int]) -> str:
    suite, perturbation, task_id = task
    return markdown_cell(f"{suite}{f' ({perturbation})' if perturbation else ''} task {task_id}")


def run_line(run: RecordedRun) -> str:
    """`38/40 = 0.950 [0.835, 0.986]` with control, errors and missing episodes of a whole run."""
    successes, trials = run.count("success"), run.count("success") + run.count("failure")
    text = f"{one_line(run.name)}: "
    if trials:
        low, high = wilson_interval(successes, trials)
        text += f"{successes}/{trials} = {successes / trials:.3f} [{low:.3f}, {high:.3f}]"
    else:
        text += "no finished episode"
    controls = [one_line(control) for control in run.values("control") if control != "none"]
    text += f", control {', '.join(controls)}" if controls else ""
    if run.count("error"):
        text += f", {run.count('error')} error(s): NOT VALID"
    return text + (f", {run.missing} planned episode(s) missing: NOT COMPLETE" if run.missing else "")


def format_text(comparison: Comparison) -> str:
    """The report as Markdown text."""
    total = comparison.total
    needed, needed_upper = comparison.pairs_needed()
    rates = [(total.both + only) / total.pairs for only in (total.only_a, total.only_b)]
    few = len(comparison.per_task) < FEW_TASKS
    lines = ["# Comparison", "", f"A  {run_line(comparison.a)}", "", f"B  {run_line(comparison.b)}", ""]
    lines += [f"**{verdict(comparison)}**", ""]
    lines += ["| on the paired episodes | |", "|---|---|"]
    lines += [f"| pairs | {total.pairs}, {len(comparison.per_task)} task(s) |"]
    lines += [f"| success rate A, B | {rates[0]:.3f}, {rates[1]:.3f} |"]
    lines += [f"| both, only A, only B, neither | {total.both}, {total.only_a}, {total.only_b}, {total.neither} |"]
    lines += [f"| difference B - A | {100 * comparison.difference:+.1f} points |"]
    lines += [f"| exact McNemar p | {comparison.p_value:.3g} |"]
    lines += [f"| 95 %, these tasks (bootstrap within tasks) | {_points(comparison.stratified_95)} |"]
    note = " (few tasks: too narrow)" if few and comparison.cluster_95 else ""
    lines += [f"| 95 %, other tasks (bootstrap over tasks) | {_points(comparison.cluster_95)}{note} |"]
    lines += [
        f"| pairs needed to see {100 * TARGET_DIFFERENCE:.0f} points | {needed} with {100 * comparison.discordance:.1f}"
        f" % discordant pairs as here; up to {needed_upper} with their upper 95 % limit |",
        "",
        f"p and the first interval take the episodes as independent. Bootstrap: {comparison.bootstrap['repetitions']} "
        f"draws, seed {comparison.bootstrap['seed']}. Pairs needed: Connor 1987, two-sided {ALPHA}, power {POWER}. "
        "Noise means the choice of episodes; trainings with other seeds vary besides.",
        "",
    ]
    return "\n".join(lines + _task_lines(comparison) + _left_out_lines(comparison) + _protocol_lines(comparison)) + "\n"


def _task_lines(comparison: Comparison) -> list[str]:
    lines = ["| task | pairs | A | B | only A | only B |", "|---|---|---|---|---|---|"]
    for task, counts in sorted(comparison.per_task.items()):
        a, b = counts.both + counts.only_a, counts.both + counts.only_b
        lines.append(f"| {_task_name(task)} | {counts.pairs} | {a} | {b} | {counts.only_a} | {counts.only_b} |")
    return [*lines, ""]


def _left_out_lines(comparison: Comparison) -> list[str]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for item in comparison.unpaired:
        groups.setdefault((item.episode.task, item.episode.seed, item.reason), []).append(item.episode.init_idx)
    if not groups:
        return ["Every episode is paired.", ""]
    lines = [f"{len(comparison.unpaired)} episode(s) have no partner and are left out:", ""]
    for (task, seed, reason), states in groups.items():
        lines.append(f"- {_task_name(task)}, seed {seed}, initial states {format_ranges(states)}: {reason}")
    return [*lines, ""]


def _protocol_lines(comparison: Comparison) -> list[str]:
    notes = [*comparison.a.notes, *comparison.b.notes]
    lines = [f"- {one_line(note)}" for note in notes]
    lines += [f"- {'**decisive**, ' if d.decisive else ''}{d}" for d in comparison.protocol]
    return ["Warning, the runs differ in more than the policy:" if lines else "The recorded protocols agree.", *lines]


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain data (keys: docs/evaluation.md)."""
    needed, upper = comparison.pairs_needed()
    return {
        "a": run_line(comparison.a),
        "b": run_line(comparison.b),
        "verdict": verdict(comparison),
        "distinguishable": comparison.distinguishable,
        "pairs": comparison.total.pairs,
        **asdict(comparison.total),
        "difference": comparison.difference,
        "mcnemar_p": comparison.p_value,
        "stratified_bootstrap_95": list(comparison.stratified_95),
        "cluster_bootstrap_95": list(comparison.cluster_95) if comparison.cluster_95 else None,
        "bootstrap": comparison.bootstrap,
        "discordance": comparison.discordance,
        "pairs_for_2_points": needed,
        "pairs_for_2_points_upper": upper,
        "per_task": [
            {"suite": task[0], "perturbation": task[1], "task_id": task[2], **asdict(counts)}
            for task, counts in sorted(comparison.per_task.items())
        ],
        "errors": {"a": comparison.a.count("error"), "b": comparison.b.count("error")},
        "unpaired": [{**item.episode._asdict(), "reason": item.reason} for item in comparison.unpaired],
        "protocol_differences": [asdict(item) for item in comparison.protocol],
        "notes": [*comparison.a.notes, *comparison.b.notes],
    }


def _argument_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="python -m experiments.robot.libero.compare_evals",
        description="Compare two evaluations episode by episode.",
    )
    parser.add_argument("a", metavar="A", help="results folder or episodes.jsonl; several separated by commas")
    parser.add_argument("b", metavar="B", help="the same for the second run")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="also write it: as data for *.json, else as Markdown"
    )
    parser.add_argument("--allow", metavar="FIELD,FIELD", default="", help="decisive protocol fields that may differ")
    parser.add_argument("--seed", type=in_range(int, at_least=0), default=BOOTSTRAP_SEED, help="of the bootstraps")
    parser.add_argument(
        "--repetitions",
        type=in_range(int, at_least=1, at_most=10**7),
        default=BOOTSTRAP_REPETITIONS,
        help="draws of the bootstraps",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    args = _argument_parser().parse_args(arguments)
    try:
        if args.output is not None:
            check_file(args.output, "--output")
        allow = [name.strip() for name in args.allow.split(",") if name.strip()]
        comparison = compare_runs(read_run(args.a), read_run(args.b), allow, args.seed, args.repetitions)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = format_text(comparison)
    print(text, end="")
    if args.output is not None:
        if args.output.suffix == ".json":
            write_json(args.output, to_json(comparison), ensure_ascii=False)
        else:
            write_text(args.output, text)
    return 0


if __name__ == "__main__":
    with bad_input_in_one_line("compare_evals"):
        sys.exit(main())
