"""Writes the demo's report from its raw result files: tables, figures, comparisons, commands, versions.

    python craft_experiments/00_demo/make_report.py results/demo

`results/demo/manifest.json` names the files; paths in it are relative to its folder::

    {"runs": [{"name": "plain", "metrics": "metrics/plain.jsonl", "wall_s": 310.2}, ...],
     "evaluations": [{"row": "craft", "column": "target", "results_dir": "evaluations/craft-target"}, ...],
     "settings": {...}, "commands": {"train-plain": "python ..."}, "seconds": {"train-plain": 310.2}}

Only `runs` and `evaluations` are required; `title` replaces the demo's. Every number of the report is computed here
from the raw files.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from craft_experiments.common_utils.log_parser import write_text_atomic
from craft_experiments.common_utils.plots import COLOURS, plot_success_bars, plot_training_curves
from craft_experiments.common_utils.results import (
    Evaluation,
    TrainingMetrics,
    compare_paired,
    read_evaluation,
    read_metrics,
)
from craft_experiments.common_utils.statistics import intervals_overlap

ROW_LABELS = {
    "start": "start checkpoint",
    "plain": "plain fine-tuning",
    "craft": "CRaFT",
    "replay": "control: open-loop replay",
    "grey": "control: grey images",
}
COLUMN_LABELS = {"target": "fine-tuned task", "retention": "retention task"}
COMPARISONS = (("plain", "craft"), ("start", "plain"), ("start", "craft"), ("plain", "grey"), ("plain", "replay"))
TRAINING_COLUMNS = (
    ("VLA Train/Curr Action L1 Loss", "action L1"),
    ("CRaFT/Retention Loss", "retention loss"),
    ("CRaFT/Lambda", "lambda"),
    ("CRaFT/Conflict Ratio", "conflict ratio"),
    ("VLA Train/Gradient Norm", "gradient norm"),
)


@dataclass(frozen=True)
class DemoResults:
    """All inputs of the report. ``table[column][row]`` in manifest order."""

    folder: Path
    manifest: dict[str, Any]
    runs: list[TrainingMetrics]
    table: dict[str, dict[str, Evaluation]]

    def seconds(self, job: str) -> float | None:
        """Wall time of a job of the manifest; None when it is not recorded."""
        value = self.manifest.get("seconds", {}).get(job)
        return None if value is None else float(value)


def load_results(folder: str | os.PathLike) -> DemoResults:
    """Read the manifest and everything it names.

    Raises:
        FileNotFoundError: the manifest or a file it names does not exist.
        KeyError: a required entry of the manifest is missing; names it.
        ValueError: an unreadable result file, or a (row, column) listed twice.
    """
    folder = Path(folder)
    path = folder / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"manifest not found: {path}")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for entries, names in (("runs", ("name", "metrics")), ("evaluations", ("row", "column", "results_dir"))):
        if entries not in manifest:
            raise KeyError(f"{path}: {entries}: missing")
        for index, entry in enumerate(manifest[entries]):
            missing = [name for name in names if name not in entry]
            if missing:
                raise KeyError(f"{path}: {entries}[{index}]: missing {missing}")
    runs = [read_metrics(run_label(e["name"]), folder / e["metrics"]) for e in manifest["runs"]]
    table: dict[str, dict[str, Evaluation]] = {}
    for entry in manifest["evaluations"]:
        cells = table.setdefault(entry["column"], {})
        if entry["row"] in cells:
            raise ValueError(f"{path}: evaluations: ({entry['row']}, {entry['column']}) is listed twice")
        cells[entry["row"]] = read_evaluation(folder / entry["results_dir"])
    return DemoResults(folder, manifest, runs, table)


def row_label(row: str) -> str:
    """Reader's name of a row of the table."""
    return ROW_LABELS.get(row, row)


def run_label(name: str) -> str:
    """Reader's name of a training run."""
    return ROW_LABELS.get(name, name)


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


def describe_comparison(first: str, second: str, cells: dict[str, Evaluation]) -> str:
    """One sentence: what the two rows of a column show about each other."""
    a, b = cells[first], cells[second]
    head = f"{row_label(second)} against {row_label(first)}: {b.rate - a.rate:+.2f}"
    if intervals_overlap(a.interval, b.interval):
        verdict = "no difference shown (the 95 % intervals overlap)"
    else:
        verdict = f"{'higher' if b.rate > a.rate else 'lower'} (the 95 % intervals do not overlap)"
    paired = compare_paired(a, b)
    if paired is None:
        return f"{head}, {verdict}; no common initial states"
    return (
        f"{head}, {verdict}; of {paired.pairs} common initial states {paired.only_second} succeed only with "
        f"{row_label(second)}, {paired.only_first} only with {row_label(first)}, exact McNemar p = {paired.p_value:.3f}"
    )


def comparison_list(results: DemoResults) -> str:
    """Markdown list of the comparisons whose rows exist, per column."""
    lines = []
    for column, cells in results.table.items():
        pairs = [pair for pair in COMPARISONS if pair[0] in cells and pair[1] in cells]
        if pairs:
            lines += ["", f"**{column_label(column, cells)}**", ""]
            lines += [f"- {describe_comparison(first, second, cells)}." for first, second in pairs]
    return "\n".join(lines).strip()


def training_table(results: DemoResults) -> str:
    """Markdown table: a row per run; metrics are means over the last tenth of the logged values."""
    heads = ["run", "steps", "samples", *(label for _, label in TRAINING_COLUMNS), "wall time"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for entry, run in zip(results.manifest["runs"], results.runs, strict=True):
        last = run.rows[-1]
        seconds = entry.get("wall_s", results.seconds(f"train-{entry['name']}"))
        cells = [run.name, str(last["step"] + 1), f"{last['samples_seen']:,}" if "samples_seen" in last else "-"]
        for key, _ in TRAINING_COLUMNS:
            value = run.tail_mean(key)
            cells.append("-" if value is None else f"{value:.4g}")
        lines.append("| " + " | ".join([*cells, format_seconds(seconds)]) + " |")
    return "\n".join(lines)


def format_seconds(seconds: float | None) -> str:
    """``5 min 10 s``; ``-`` for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def evaluation_seconds(results: DemoResults) -> float | None:
    """Sum of the evaluations' wall times as their results.json state them; None when none does."""
    times = [e.facts["wall_s"] for cells in results.table.values() for e in cells.values() if "wall_s" in e.facts]
    return sum(times) if times else None


def video_links(results: DemoResults) -> str:
    """Markdown list of the rollout videos below the results folder, and of `video` in the manifest."""
    found = sorted(path.relative_to(results.folder).as_posix() for path in results.folder.rglob("*.mp4"))
    named = results.manifest.get("video")
    if named is not None and named not in found:
        found.insert(0, named)
    return "\n".join(f"- [{Path(name).name}]({name})" for name in found) or "No video was recorded."


def versions_table(results: DemoResults) -> str:
    """Markdown table of the package versions the evaluations report; a package with several shows all."""
    versions: dict[str, set[str]] = {k: {str(v)} for k, v in results.manifest.get("versions", {}).items()}
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
    commands = results.manifest.get("commands", {})
    if isinstance(commands, list):
        commands = {str(index): command for index, command in enumerate(commands, start=1)}
    lines = [f"# {name}\n{command}" for name, command in commands.items()]
    return "```bash\n" + "\n".join(lines) + "\n```" if lines else "No command lines were recorded."


def retention_budget(results: DemoResults) -> float | None:
    """eps of the CRaFT run where the manifest records it."""
    found = [entry["retention_budget"] for entry in results.manifest["runs"] if "retention_budget" in entry]
    return float(found[0]) if found else None


def draw_figures(results: DemoResults) -> list[str]:
    """Write the PNG files; returns their names relative to the results folder."""
    names = []
    colours = dict(zip(ROW_LABELS.values(), COLOURS, strict=False))  # one colour per policy in every figure
    if results.runs:
        plot_training_curves(results.runs, results.folder / "training_curves.png", retention_budget(results), colours)
        names.append("training_curves.png")
    if results.table:
        bars = {
            column_label(column, cells): {row_label(row): evaluation for row, evaluation in cells.items()}
            for column, cells in results.table.items()
        }
        plot_success_bars(bars, results.folder / "success_rates.png", colours)
        names.append("success_rates.png")
    return names


def compose_report(results: DemoResults, figures: list[str]) -> str:
    """The report's Markdown text."""
    trials = sorted({e.trials for cells in results.table.values() for e in cells.values()})
    per_cell = " to ".join(str(n) for n in dict.fromkeys((trials[0], trials[-1]))) if trials else "no"
    sections = [
        f"# {results.manifest.get('title', 'Demo: plain fine-tuning and CRaFT')}",
        "Each cell: successes/trials = rate [95 % Wilson interval]. The controls do not see the scene; where they "
        "succeed as often as a policy, its rate says nothing about seeing.",
        success_table(results) if results.table else "No evaluation was recorded.",
        "## What it shows",
        comparison_list(results) or "There are no two rows to compare.",
        f"{per_cell} trials per cell and one training seed per method: the intervals cover the choice of initial "
        "states, not the variation between trainings. The p values are not corrected for the number of comparisons.",
        "## Training",
        training_table(results) if results.runs else "No run was recorded.",
        "Metrics: mean over the last tenth of the logged steps.",
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in figures),
        "## Videos",
        video_links(results),
        "## How it was made",
        f"Wall time of all evaluations together: {format_seconds(evaluation_seconds(results))}.",
        command_list(results),
        versions_table(results),
    ]
    return "\n\n".join(sections) + "\n"


def make_report(folder: str | os.PathLike) -> Path:
    """Write `report.md` and its figures into the results folder; returns the report's path.

    Raises the errors of :func:`load_results`.
    """
    results = load_results(folder)
    figures = draw_figures(results)
    write_text_atomic(results.folder / "report.md", compose_report(results, figures))
    return results.folder / "report.md"


if __name__ == "__main__":
    if len(sys.argv) > 2 or sys.argv[1:2] in (["-h"], ["--help"]):
        sys.exit("usage: make_report.py [RESULTS_DIR]   (default: results/demo)")
    print(make_report(sys.argv[1] if len(sys.argv) == 2 else "results/demo"))
