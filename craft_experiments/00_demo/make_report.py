"""Writes the demo's report from its raw result files: table, comparisons, trainings, figures, commands, versions.

    python craft_experiments/00_demo/make_report.py results/demo

Every number of the report is computed here from the raw files that the manifest names (`demo_results.py`).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from demo_results import COLUMN_LABELS, OLD, TRAINED, DemoResults, load_results, row_label

from craft_experiments.common_utils.plots import COLOURS, DRIFT, plot_drift, plot_success_bars
from craft_experiments.common_utils.report_folder import read_folder
from prismatic.command_line import bad_input_in_one_line
from prismatic.evidence.files import write_text
from prismatic.evidence.pairing import PairedCounts, paired
from prismatic.evidence.results import Evaluation, TrainingMetrics
from prismatic.evidence.statistics import intervals_overlap
from prismatic.progress import duration

COMPARISONS = {
    "target": [("start", "plain"), *(("plain", row) for row in (*TRAINED[1:], "grey", "playback"))],
    **dict.fromkeys(
        OLD,
        [
            *(("start", row) for row in TRAINED),
            *(("plain", row) for row in TRAINED[1:]),
            ("replay", "keep"),
            ("replay", "keep_data"),
        ],
    ),
}
ACTION_LOSS, LAMBDA, OUT_OF_REACH = "VLA Train/Curr Action L1 Loss", "CRaFT/Lambda", "CRaFT/Out Of Reach"
MET = 1.1
"""A budget is met when the drift at the end is at most this multiple of it."""
SMALLEST_TRIALS, SMALLEST_STEPS = 10, 400
"""Below these the figures say that the stages work, and nothing about the methods."""


def column_label(column: str, cells: dict[str, Evaluation]) -> str:
    """Reader's name of a column with the tasks its episodes really come from.

    Raises ValueError when the rows of the column were evaluated on different tasks.
    """
    tasks = {row: evaluation.tasks for row, evaluation in cells.items()}
    first = next(iter(tasks.values()))
    if any(found != first for found in tasks.values()):
        raise ValueError(f"column {column}: the rows were evaluated on different tasks: {tasks}")
    names = ", ".join(f"{suite} task {task_id}" for suite, task_id in first)
    return f"{COLUMN_LABELS.get(column, column)} ({names})"


def format_cell(evaluation: Evaluation | None) -> str:
    """``8/10 = 0.80 [0.49, 0.94]``, with the number of crashed episodes when there are any."""
    if evaluation is None:
        return "-"
    low, high = evaluation.interval
    text = f"{evaluation.successes}/{evaluation.trials} = {evaluation.rate:.2f} [{low:.2f}, {high:.2f}]"
    return text + (f", **{evaluation.errors} errors: not valid**" if evaluation.errors else "")


def success_table(results: DemoResults) -> str:
    """Markdown table: a row per policy, a column per task."""
    rows = list(dict.fromkeys(row for cells in results.table.values() for row in cells))
    heads = [column_label(column, cells) for column, cells in results.table.items()]
    lines = ["| policy | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [format_cell(cells.get(row)) for cells in results.table.values()]
        lines.append(f"| {row_label(row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def comparison_cells(first: str, second: str, cells: dict[str, Evaluation]) -> list[str]:
    """A line of the comparison table: what two rows of a column show about each other."""
    a, b = cells[first], cells[second]
    counts = sum(map(PairedCounts.of, paired(a.outcomes, b.outcomes, lambda key: key[:2]).values()), PairedCounts())
    names = [row_label(second), row_label(first), f"{b.rate - a.rate:+.2f}", verdict(a, b)]
    if not counts.pairs:
        return [*names, "0", "-", "-", "-"]
    p_value = "< 0.001" if counts.p_value < 0.001 else f"{counts.p_value:.3f}"
    return [*names, str(counts.pairs), str(counts.only_b), str(counts.only_a), p_value]


def summary_list(results: DemoResults) -> str:
    """Markdown list: a sentence per trained row, the new task against plain and the old ones against the start."""
    lines = []
    for row in TRAINED:
        parts = []
        for column, cells in results.table.items():
            other = "plain" if column == "target" else "start"
            if row in cells:
                text = f"{COLUMN_LABELS.get(column, column)} {count(cells[row])}"
                if other in cells and other != row:
                    text += f" ({row_label(other)} {count(cells[other])}: {verdict(cells[other], cells[row])})"
                parts.append(text)
        if parts:
            lines.append(f"- **{row_label(row)}**: {', '.join(parts)}.")
    return "\n".join(lines)


def count(evaluation: Evaluation) -> str:
    """``8 of 10``."""
    return f"{evaluation.successes} of {evaluation.trials}"


def verdict(first: Evaluation, second: Evaluation) -> str:
    """What the 95 % intervals of two evaluations show about the second."""
    if intervals_overlap(first.interval, second.interval):
        return "no difference shown"
    return "higher" if second.rate > first.rate else "lower"


def comparison_tables(results: DemoResults) -> str:
    """Markdown: per column a table of the comparisons whose rows exist."""
    heads = ["policy", "against", "difference", "intervals", "common states", "only the policy", "only the other", "p"]
    lines = []
    for column, cells in results.table.items():
        pairs = [pair for pair in COMPARISONS.get(column, []) if pair[0] in cells and pair[1] in cells]
        if pairs:
            lines += ["", f"**{column_label(column, cells)}**", ""]
            lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
            lines += ["| " + " | ".join(comparison_cells(*pair, cells)) + " |" for pair in pairs]
    return "\n".join(lines).strip()


def training_table(results: DemoResults) -> str:
    """Markdown table: a row per run; metrics are means over the last tenth of the logged values."""
    heads = ["run", "steps", "samples", "action L1", "drift", "budget", "unit", "lambda", "out of reach", "wall time"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    plain = results.seconds("train-plain")
    for run in results.runs:
        metrics = run.metrics
        samples, seconds = metrics.series("samples_seen")[1], results.seconds(f"train-{run.row}")
        cells = [
            row_label(run.row),
            str(metrics.rows[-1]["step"]),
            f"{samples[-1]:,.0f}" if samples else "-",
            number(metrics.tail_mean(ACTION_LOSS)),
            number(metrics.tail_mean(DRIFT)),
            number(run.budget),
            "-" if run.budget is None else run.unit,
            number(metrics.tail_mean(LAMBDA)),
            out_of_reach(metrics),
            "-" if seconds is None else duration(seconds) + (f" ({seconds / plain:.2f} x plain)" if plain else ""),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number(value: float | None) -> str:
    """Four digits; ``-`` for None."""
    return "-" if value is None else f"{value:.4g}"


def out_of_reach(metrics: TrainingMetrics) -> str:
    """How often and whether at the end the controller said that its budget is out of reach; ``-`` where none says."""
    _, values = metrics.series(OUT_OF_REACH)
    if not values:
        return "-"
    share = sum(value > 0 for value in values) / len(values)
    at_the_end = "also" if values[-1] > 0 else "not"
    return "never" if share == 0 else f"{share:.0%} of the logged steps, {at_the_end} at the end"


def budget_list(results: DemoResults) -> str:
    """Markdown list: a sentence per constrained run, its drift at the end against its budget."""
    lines = []
    for run in results.runs:
        drift = run.metrics.tail_mean(DRIFT)
        if run.budget and drift is not None:
            state = "meets" if drift <= MET * run.budget else "exceeds"
            lines.append(
                f"- {row_label(run.row)} {state} its budget: drift {drift:.3g}, budget {run.budget:.3g} ({run.unit})."
            )
    return "\n".join(lines)


def evaluation_seconds(results: DemoResults) -> float:
    """Sum of the evaluations' wall times as their results.json state them."""
    return sum(e.facts.get("wall_s", 0.0) for cells in results.table.values() for e in cells.values())


def video_links(results: DemoResults) -> str:
    """Markdown list of the rollout videos below the results folder."""
    found = sorted(path.relative_to(results.folder).as_posix() for path in results.folder.rglob("*.mp4"))
    return "\n".join(f"- [{Path(name).name}]({name})" for name in found) or "No video was recorded."


def versions_table(results: DemoResults) -> str:
    """Markdown table of the package versions the evaluations report; a package with several shows all."""
    versions: dict[str, set[str]] = {}
    for cells in results.table.values():
        for evaluation in cells.values():
            for name, version in evaluation.facts.get("versions", {}).items():
                versions.setdefault(name, set()).add(str(version))
    if not versions:
        return "No versions were recorded."
    lines = [f"| {name} | {', '.join(sorted(found))} |" for name, found in sorted(versions.items())]
    return "\n".join(["| package | version |", "|---|---|", *lines])


def command_list(results: DemoResults) -> str:
    """The command lines as one shell block."""
    lines = [f"# {name}\n{command}" for name, command in results.manifest.get("commands", {}).items()]
    return "```bash\n" + "\n".join(lines) + "\n```" if lines else "No command lines were recorded."


def draw_figures(results: DemoResults) -> list[str]:
    """Write the PNG files; returns their names relative to the results folder."""
    names = []
    colours = dict(zip((row_label(row) for row in ("start", *TRAINED)), COLOURS, strict=True))
    colours |= {row_label("playback"): "0.75", row_label("grey"): "0.55"}  # one colour per row in every figure
    if results.table:
        bars = {
            column_label(column, cells).replace(" (", "\n("): {row_label(row): found for row, found in cells.items()}
            for column, cells in results.table.items()
        }
        plot_success_bars(bars, results.folder / "success_rates.png", colours)
        names.append("success_rates.png")
    constrained = [(run.metrics, run.budget) for run in results.runs if run.budget and run.metrics.series(DRIFT)[0]]
    if constrained:
        plot_drift(constrained, results.folder / "drift.png", colours)
        names.append("drift.png")
    return names


def too_small(results: DemoResults) -> str | None:
    """One line when the demo was too small to judge a method by; None otherwise."""
    trials = min((e.trials for cells in results.table.values() for e in cells.values()), default=0)
    steps = min((run.metrics.rows[-1]["step"] for run in results.runs), default=SMALLEST_STEPS)
    if trials >= SMALLEST_TRIALS and steps >= SMALLEST_STEPS:
        return None
    return (
        f"Too small to judge the methods by: {steps} training steps, {_trials(trials)} in the smallest cell, expected "
        f"at least {SMALLEST_STEPS} and {SMALLEST_TRIALS}. It shows that every stage works."
    )


def _trials(count: int) -> str:
    return f"{count} trial" + "s" * (count != 1)


def conditions(results: DemoResults) -> str:
    """How large the comparison is, and what its intervals do not cover."""
    counts = sorted({e.trials for cells in results.table.values() for e in cells.values()})
    trials = f"{counts[0]} to {_trials(counts[-1])}" if len(counts) > 1 else _trials(*counts) if counts else "No trials"
    noise = results.manifest.get("settings", {}).get("old_init_noise_mm")
    displaced = f" In the old tasks every object is displaced by up to {noise:g} mm." if noise else ""
    return (
        f"{trials} per cell and one training seed per method: the intervals cover the choice of initial "
        "states, not the variation between trainings. The p values are not corrected for the number of comparisons."
        f"{displaced}"
    )


def compose_report(results: DemoResults, figures: list[str]) -> str:
    """The report's Markdown text."""
    warning = too_small(results)
    total = results.seconds("all")
    sections = [
        f"# {results.manifest.get('title', 'Demo: what fine-tuning forgets, and what keeps it')}",
        *([f"**{warning}**"] if warning else []),
        success_table(results) if results.table else "No evaluation was recorded.",
        "Each cell: successes/trials = rate [95 % Wilson interval]. The controls do not see the scene; where they "
        "succeed as often as a policy, its rate says nothing about seeing. Replay mixes old demonstrations into the "
        "batches; playback repeats a recorded one, open loop.",
        "## What it shows",
        summary_list(results),
        "Higher and lower: the 95 % intervals do not overlap. Below, in pairs: how many of the initial states that "
        "both rows were given only one of them solves, with the exact two-sided McNemar p.",
        comparison_tables(results) or "There are no two rows to compare.",
        conditions(results),
        "## Training",
        training_table(results) if results.runs else "No run was recorded.",
        "Metrics: mean over the last tenth of the logged steps.",
        budget_list(results),
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures),
        "## Videos",
        video_links(results),
        "## How it was made",
        *([f"From the first job to the last: {duration(total)}."] if total is not None else []),
        f"Wall time of all evaluations together: {duration(evaluation_seconds(results))}.",
        command_list(results),
        versions_table(results),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def make_report(folder: str | os.PathLike) -> DemoResults:
    """Write `report.md` and its figures into the results folder; returns what it was made of.

    Raises the errors of :func:`load_results`.
    """
    results = load_results(folder)
    figures = draw_figures(results)
    write_text(results.folder / "report.md", compose_report(results, figures))
    return results


def main() -> None:
    """Write the report of a folder, print its table and where the rest is."""
    results = make_report(read_folder(__doc__, "runs/demo"))
    print(success_table(results), f"report: {results.folder / 'report.md'}", sep="\n\n")
    print(too_small(results) or "")


if __name__ == "__main__":
    with bad_input_in_one_line("make_report.py"):
        main()
