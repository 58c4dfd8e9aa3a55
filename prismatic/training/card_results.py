"""Evaluations as a table of a model card: counts, rates and intervals, from the records alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prismatic.command_line import UsageError
from prismatic.evidence.cells import markdown_code, table_row
from prismatic.evidence.episodes import RecordedRun, read_run
from prismatic.evidence.statistics import wilson_interval
from prismatic.model_files import read_json
from prismatic.training.checkpoint_folder import LISTING, TRAINING_STATE
from prismatic.training.checkpoint_hash import checkpoint_hash


@dataclass(frozen=True)
class Results:
    """An evaluation of a checkpoint. is_checked: its records are known to be of these weights."""

    run: RecordedRun
    is_checked: bool


def read_results(place: str | os.PathLike[str], checkpoint: Path) -> Results:
    """The evaluation in a results folder.

    Raises FileNotFoundError without records, RecordsError (a ValueError) for damaged ones, UsageError when they are of
    another checkpoint than the folder `checkpoint`.
    """
    run = read_run([place])
    recorded, found = run.values("checkpoint_hash"), checkpoint_hash(checkpoint)
    if recorded == [found]:
        return Results(run, True)
    if not recorded or _lacks_state(checkpoint):
        return Results(run, False)
    raise UsageError(
        f"--results {place}: its episodes are of the checkpoint with the hash {', '.join(recorded)}, expected {found} "
        f"of {checkpoint}: name the evaluation of this folder, or evaluate it as it is now"
    )


def _lacks_state(checkpoint: Path) -> bool:
    """Whether the training state was deleted, which an earlier hash may have counted."""
    listing = checkpoint / LISTING
    names = read_json(listing).get("files") if listing.is_file() else None
    listed = isinstance(names, dict) and any(str(name).startswith(f"{TRAINING_STATE}/") for name in names)
    return listed and not (checkpoint / TRAINING_STATE).exists()


def results_section(results: Sequence[Results]) -> list[str]:
    """Lines of the section: a row per evaluation, suite and control."""
    if not results:
        return ["None is recorded here. `craft-card FOLDER --results RESULTS_DIR` adds what `craft-eval` measured."]
    lines = [
        "| evaluation | suite | tasks | successes | trials | rate | 95 % interval |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for result in results:
        lines += _rows(result.run)
    lines += [
        "",
        "Intervals are 95 % Wilson intervals of the success probability. Success in a simulator is none on a robot.",
    ]
    for result in results:
        lines += [f"\n{markdown_code(Path(result.run.name).name)}: {note}." for note in _notes(result)]
    return lines


def _rows(run: RecordedRun) -> list[str]:
    controls = run.values("control")
    name = markdown_code(Path(run.name).name) + "".join(
        f", control {markdown_code(c)}" for c in controls if c != "none"
    )
    trials: Counter[tuple[str, str]] = Counter()
    successes: Counter[tuple[str, str]] = Counter()
    tasks: dict[tuple[str, str], set[int]] = {}
    for episode, success in run.outcomes.items():
        suite = episode.suite, episode.perturbation
        trials[suite] += 1
        successes[suite] += success
        tasks.setdefault(suite, set()).add(episode.task_id)
    rows = []
    for suite in sorted(trials):
        low, high = wilson_interval(successes[suite], trials[suite])
        counts = len(tasks[suite]), successes[suite], trials[suite]
        rate = f"{100 * successes[suite] / trials[suite]:.1f} %", f"{100 * low:.1f} to {100 * high:.1f} %"
        rows.append(table_row([name, markdown_code(" ".join(filter(None, suite))), *map(str, counts), *rate]))
    return rows


def _notes(result: Results) -> list[str]:
    run, notes = result.run, []
    if errors := run.count("error"):
        notes.append(f"episodes that ended in an error, which are no trials: {errors}")
    if run.missing:
        notes.append(f"planned episodes that are missing: {run.missing}")
    if not result.is_checked:
        notes.append("whether the records are of these weights could not be checked")
    return notes
