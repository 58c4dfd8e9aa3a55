"""Reads what training and evaluation leave on disk: metric files and evaluation folders. Standard library only."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from prismatic.evidence.checks import (
    check_episode,
    check_fields,
    is_integer,
    parse_object,
    read_object,
    read_text,
)
from prismatic.evidence.statistics import wilson_interval

STATUSES = ("success", "failure", "error")
EpisodeKey = tuple[str, int, int]  # suite, task_id, init_idx


class ResultFormatError(ValueError):
    """A result file with a missing field, an unreadable line or figures that contradict each other."""


def read_jsonl(path: str | os.PathLike[str], finite: bool = True) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, in order.

    Args:
        path: the file.
        finite: refuse NaN and infinities, which a training that diverges may write.

    Raises:
        FileNotFoundError: no such file.
        ResultFormatError: a line that is no JSON object, or out of bounds (`checks.py`); names file and line.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"result file not found: {path}")
    try:
        lines = read_text(path).split("\n")
        lines = lines[:-1] if lines[-1] == "" else lines
        return [parse_object(line, f"{path}: line {n}", finite) for n, line in enumerate(lines, start=1)]
    except ValueError as error:
        raise ResultFormatError(str(error)) from None


@dataclass(frozen=True)
class TrainingMetrics:
    """Metrics of one run, a dict per logged optimizer step; steps ascend. `where` names them in messages."""

    name: str
    rows: list[dict[str, Any]]
    where: str = field(default="metrics", compare=False)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the rows that carry `key`; two empty lists when none does.

        Raises ResultFormatError for a value that is no number.
        """
        found = [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]
        for step, value in found:
            _checked(check_fields, {key: value}, {key: (int, float)}, f"{self.where}: step {step}")
        return [step for step, _ in found], [float(value) for _, value in found]

    def tail_mean(self, key: str, share: float = 0.1) -> float | None:
        """Mean of `key` over the last `share` of its logged values (at least one); None when it was never logged."""
        _, values = self.series(key)
        tail = values[-max(1, round(share * len(values))) :]
        return fmean(tail) if tail else None


def read_metrics(name: str, path: str | os.PathLike[str]) -> TrainingMetrics:
    """Metrics of a run from its JSONL file.

    Raises:
        FileNotFoundError, ResultFormatError: see :func:`read_jsonl`; also an empty file, a row without `step`, or steps
            that do not ascend.
    """
    rows = read_jsonl(path, finite=False)
    if not rows:
        raise ResultFormatError(f"{path}: found no row, expected one per logged step")
    last = -1
    for number, row in enumerate(rows, start=1):
        step = row.get("step")
        if not is_integer(step) or step <= last:
            raise ResultFormatError(f"{path}: line {number}: step: found {step!r}, expected an integer above {last}")
        last = step
    if rows[0]["step"] == 0:  # records made while metrics counted steps from 0; the first step is always logged
        rows = [row | {"step": row["step"] + 1} for row in rows]
    return TrainingMetrics(name, rows, str(path))


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one evaluation folder.

    ``outcomes`` holds every finished episode (success or failure); ``errors`` counts the episodes that crashed, which
    are no trials. ``facts`` is results.json.
    """

    folder: str
    outcomes: dict[EpisodeKey, bool]
    errors: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def trials(self) -> int:
        """Finished episodes."""
        return len(self.outcomes)

    @property
    def successes(self) -> int:
        """Successful episodes."""
        return sum(self.outcomes.values())

    @property
    def rate(self) -> float:
        """Success rate in [0, 1]."""
        return self.successes / self.trials

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        return wilson_interval(self.successes, self.trials)

    @property
    def tasks(self) -> list[tuple[str, int]]:
        """(suite, task_id) of the finished episodes, sorted."""
        return sorted({key[:2] for key in self.outcomes})


def read_evaluation(folder: str | os.PathLike[str]) -> Evaluation:
    """Episodes of `episodes.jsonl`, with `results.json` beside it as a cross-check and for the facts of the run.

    An errored episode that a later line of the same (suite, task_id, init_idx) supersedes does not count.

    Raises:
        FileNotFoundError: no `episodes.jsonl`.
        ResultFormatError: a missing field, an unknown status, a finished episode recorded twice, not one finished
            episode, or counts that differ from those in results.json.
    """
    folder = Path(folder)
    path = folder / "episodes.jsonl"
    statuses: dict[EpisodeKey, str] = {}
    for number, row in enumerate(read_jsonl(path), start=1):
        where = f"{path}: line {number}"
        missing = {"suite", "task_id", "init_idx", "status"} - row.keys()
        if missing:
            raise ResultFormatError(f"{where}: missing fields {sorted(missing)}")
        _checked(check_episode, row, where)
        if row["status"] not in STATUSES:
            raise ResultFormatError(f"{where}: status: found {row['status']!r}, expected one of {STATUSES}")
        key = (row["suite"], row["task_id"], row["init_idx"])
        if statuses.get(key, "error") != "error":
            raise ResultFormatError(f"{where}: (suite, task_id, init_idx) = {key} is recorded twice")
        statuses[key] = row["status"]
    outcomes = {key: status == "success" for key, status in statuses.items() if status != "error"}
    if not outcomes:
        raise ResultFormatError(f"{path}: found no finished episode")
    facts_path = folder / "results.json"
    facts = {}
    if facts_path.is_file():
        facts = _checked(read_object, facts_path)
        kinds = {"overall": dict, "config": (dict, type(None)), "versions": dict, "wall_s": (int, float)}
        _checked(check_fields, facts, kinds, str(facts_path))
    evaluation = Evaluation(str(folder), outcomes, len(statuses) - len(outcomes), facts)
    overall = facts.get("overall", {})
    for name, found in (("successes", evaluation.successes), ("trials", evaluation.trials)):
        if overall.get(name, found) != found:
            raise ResultFormatError(f"{facts_path}: {name}: found {overall[name]}, episodes.jsonl gives {found}")
    return evaluation


def _checked(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's value, its ValueError as ours."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ResultFormatError(str(error)) from None
