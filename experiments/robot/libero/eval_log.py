"""What an evaluation writes: the published text log, `episodes.jsonl` and `results.json`.

`episodes.jsonl` is the record: one line per finished episode, appended as it happens, the basis of resuming and of all
statistics. The text log repeats the published lines, derived from the same records in (task, episode) order, so that
parsers written for published logs keep working.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from prismatic.evidence.checks import check_episode, parse_object, read_text
from prismatic.evidence.statistics import mean_rate_interval, wilson_interval


class EpisodeStatus(str, Enum):
    """Outcome of an episode. An exception is an error, never a failure of the policy."""

    SUCCESS = "success"
    FAILURE = "failure"
    ERROR = "error"


EpisodeKey = tuple[int, int]  # (task_id, init_idx); everything else is fixed by the run's fingerprint

_ADDED_LATER = {"checkpoint_hash", "perturbation", "gl_renderer", "query_latency_s", "policy_wait_share", "setup_s"}
_ADDED_LATER |= {"language_source", "init_offsets_mm"}


@dataclass(frozen=True)
class EpisodeRecord:
    """One line of `episodes.jsonl`.

    Fields: fingerprint (hash of everything that decides the outcome besides task and initial state); steps (policy
    actions executed, without waiting steps); n_queries (policy calls); attempts (2 after a retry); error (text of the
    exception, of the last attempt when status is error, of the retried one otherwise); wall_s (seconds of the last
    attempt, with reset); video (path or None); versions (package -> version); checkpoint_hash (of the files behind
    `checkpoint`); perturbation (`swap` for libero_goal_swap, "" for a standard suite); gl_renderer (the name OpenGL
    reports, "" without images); query_latency_s (seconds from each question to its answer as the episode sees them, so
    with the policy's work for other episodes); policy_wait_share (their sum as a share of wall_s, None after an error);
    setup_s (the part of wall_s in which the environment was built, 0 when it was kept); language_source (where the
    instruction was read); init_offsets_mm (object -> [dx, dy] of `--init_noise_mm`, None without).
    """

    run_id: str
    fingerprint: str
    checkpoint: str
    suite: str
    control: str
    task_id: int
    task_name: str
    instruction: str
    init_idx: int
    seed: int
    status: EpisodeStatus
    steps: int
    n_queries: int
    wall_s: float
    render_mode: str
    attempts: int = 1
    error: str | None = None
    video: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    language_source: str = "filename"
    init_offsets_mm: dict[str, list[float]] | None = None
    checkpoint_hash: str = ""
    perturbation: str = ""
    gl_renderer: str = ""
    query_latency_s: list[float] = field(default_factory=list)
    policy_wait_share: float | None = None
    setup_s: float = 0.0

    @property
    def key(self) -> EpisodeKey:
        """What makes the line unique within a results folder."""
        return self.task_id, self.init_idx

    @property
    def success(self) -> bool:
        """True for status success only."""
        return self.status is EpisodeStatus.SUCCESS

    def to_json(self) -> str:
        """One line without line end."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, line: str, where: str) -> EpisodeRecord:
        """Parse one line.

        Raises:
            ValueError: not a JSON object, a field is missing, unknown or of another type, or the status is unknown;
                names `where`.
        """
        data = parse_object(line, where)
        known = {item.name for item in fields(cls)}
        required = known - _ADDED_LATER  # files of earlier versions stay readable
        if not required <= set(data) <= known:
            found = sorted((required - set(data)) | (set(data) - known))
            raise ValueError(f"{where}: expected the fields of an episode record, difference: {found}")
        check_episode(data, where)
        if data["status"] not in {status.value for status in EpisodeStatus}:
            raise ValueError(f"{where}: status: found {data['status']!r}, expected success, failure or error")
        return cls(**{**data, "status": EpisodeStatus(data["status"])})


def read_episode_lines(path: Path) -> tuple[list[EpisodeRecord], str]:
    """Records of an `episodes.jsonl`, and what stands behind the last line end: its run was killed while writing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is no record; names file and line.
    """
    # Not `splitlines`: texts may hold separators that it takes for line ends.
    *lines, rest = read_text(path, errors="surrogateescape").split("\n")
    return [EpisodeRecord.from_json(line, f"{path}:{n}") for n, line in enumerate(lines, start=1)], rest


class EpisodeStore:
    """Append-only `episodes.jsonl`.

    A finished episode is never overwritten; an errored one may be superseded by a later line with the same key. An
    unterminated last line (the process was killed while writing) is cut off on opening and reported in `dropped`.

    Args:
        path: the file; created when absent.
        fingerprint: of the run about to write.

    Raises:
        ValueError: a corrupt line, a repeated finished episode, a line of a run with other settings, or a file that
            cannot be written to.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self.dropped: str | None = None
        self.records: dict[EpisodeKey, EpisodeRecord] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            if not os.access(self.path, os.W_OK):  # else the first episode would be run and lost
                raise ValueError(f"{self.path}: cannot be written to; use another --results_dir")
            self._load()

    def _load(self) -> None:
        records, rest = read_episode_lines(self.path)
        if rest:
            self.dropped = rest
            with open(self.path, "r+b") as file:
                file.truncate(self.path.stat().st_size - len(rest.encode("utf-8", "surrogateescape")))
        for number, record in enumerate(records, start=1):
            self._admit(record, f"{self.path}:{number}")

    def _admit(self, record: EpisodeRecord, where: str) -> None:
        if record.fingerprint != self.fingerprint:
            raise ValueError(
                f"{where}: fingerprint: expected {self.fingerprint} (this run), found {record.fingerprint}: the folder "
                "holds episodes of another checkpoint or other settings; use another --results_dir"
            )
        previous = self.records.get(record.key)
        if previous is not None and previous.status is not EpisodeStatus.ERROR:
            raise ValueError(f"{where}: (task_id, init_idx) = {record.key} is recorded twice")
        self.records[record.key] = record

    def append(self, record: EpisodeRecord) -> None:
        """Write one line and flush it to the operating system."""
        self._admit(record, str(self.path))
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(record.to_json() + "\n")

    def finished(self) -> dict[EpisodeKey, EpisodeRecord]:
        """Records that need not be run again: successes and failures."""
        return {key: record for key, record in self.records.items() if record.status is not EpisodeStatus.ERROR}


@dataclass(frozen=True)
class PlannedEpisode:
    """One trial. init_idx: index of the initial state; number: position in the whole run from 1, None when the trial is
    skipped because the expert demonstration behind its initial state failed."""

    init_idx: int
    number: int | None


@dataclass(frozen=True)
class TaskPlan:
    """The trials of one task, in order."""

    task_id: int
    name: str
    instruction: str
    episodes: tuple[PlannedEpisode, ...]


class OrderedTextLog:
    """Emits the published log lines in (task, episode) order, whatever order the records arrive in.

    Args:
        plans: tasks in log order.
        initial_states: `DEFAULT` or the path of the initial-state file.
        sink: receives each line (without line end; some lines are empty).
    """

    def __init__(self, plans: Sequence[TaskPlan], initial_states: str, sink: Callable[[str], object]) -> None:
        self._sink = sink
        self._states_line = (
            "Using default initial states"
            if initial_states == "DEFAULT"
            else f"Using initial states from {initial_states}"
        )
        self._waiting: dict[EpisodeKey, EpisodeRecord] = {}
        self._plans = list(plans)
        self._task = self._episode = 0  # position of the next episode to print
        self.episodes = self.successes = self._task_episodes = self._task_successes = 0
        self._announced = False

    def begin(self, suite: str) -> None:
        """First line, and whatever needs no record."""
        self._sink(f"Task suite: {suite}")
        self._advance()

    def add(self, record: EpisodeRecord) -> None:
        """Accept one record; prints it and those that waited for it."""
        self._waiting[record.key] = record
        self._advance()

    def finish(self) -> None:
        """Final block.

        Raises:
            RuntimeError: episodes are missing.
        """
        if self._task < len(self._plans):
            plan = self._plans[self._task]
            raise RuntimeError(f"text log: no record of task {plan.task_id}, episode index {self._episode}")
        rate = self.successes / self.episodes if self.episodes else 0.0
        self._sink("Final results:")
        self._sink(f"Total episodes: {self.episodes}")
        self._sink(f"Total successes: {self.successes}")
        self._sink(f"Overall success rate: {rate:.4f} ({rate * 100:.1f}%)")

    def _advance(self) -> None:
        while self._task < len(self._plans):
            plan = self._plans[self._task]
            if not self._announced:
                self._sink(self._states_line)
                self._announced = True
            if self._episode == len(plan.episodes):
                self._end_task()
            elif not self._print_next(plan):
                return

    def _print_next(self, plan: TaskPlan) -> bool:
        planned = plan.episodes[self._episode]
        record = self._waiting.pop((plan.task_id, planned.init_idx), None)
        if planned.number is not None and record is None:
            return False
        self._sink("")
        self._sink(f"Task: {_one_line(plan.instruction)}")
        if record is None:
            self._sink(f"Skipping task {plan.task_id} episode {planned.init_idx} due to failed expert demo!")
        else:
            self._print_record(record)
        self._episode += 1
        return True

    def _print_record(self, record: EpisodeRecord) -> None:
        self._sink(f"Starting episode {self._task_episodes + 1}...")
        if record.status is EpisodeStatus.ERROR:
            self._sink(f"Episode error: {_one_line(record.error or '')}")
        if record.video:
            self._sink(f"Saved rollout MP4 at path {record.video}")
        self._task_episodes += 1
        self.episodes += 1
        self._task_successes += record.success
        self.successes += record.success
        self._sink(f"Success: {record.success}")
        self._sink(f"# episodes completed so far: {self.episodes}")
        self._sink(f"# successes: {self.successes} ({self.successes / self.episodes * 100:.1f}%)")

    def _end_task(self) -> None:
        task_rate = self._task_successes / self._task_episodes if self._task_episodes else 0
        total_rate = self.successes / self.episodes if self.episodes else 0
        self._sink(f"Current task success rate: {task_rate}")
        self._sink(f"Current total success rate: {total_rate}")
        self._task += 1
        self._episode = self._task_episodes = self._task_successes = 0
        self._announced = False


def _one_line(text: str) -> str:
    """A text with line ends could pass for other lines of the log."""
    return " ".join(text.split("\n")) if "\n" in text else text


def summarize(records: Iterable[EpisodeRecord]) -> dict[str, Any]:
    """Counts, rate and interval of a group of episodes.

    Returns:
        dict with successes, failures, errors, trials (= successes + failures; errors are no trials), success_rate and
        wilson_95 [low, high] (None without trials), mean_steps, mean_queries, mean_wall_s (over the trials, None
        without).
    """
    records = list(records)
    trials = [record for record in records if record.status is not EpisodeStatus.ERROR]
    successes, count = sum(record.success for record in trials), len(trials)

    def mean(values: Iterable[float]) -> float | None:
        return sum(values) / count if count else None

    return {
        "successes": successes,
        "failures": count - successes,
        "errors": len(records) - count,
        "trials": count,
        "success_rate": successes / count if count else None,
        "wilson_95": list(wilson_interval(successes, count)) if count else None,
        "mean_steps": mean(record.steps for record in trials),
        "mean_queries": mean(record.n_queries for record in trials),
        "mean_wall_s": mean(record.wall_s for record in trials),
    }


def summarize_group(tasks: Sequence[Sequence[EpisodeRecord]]) -> dict[str, Any]:
    """:func:`summarize` of all episodes of several tasks, with the unweighted mean over tasks.

    Args:
        tasks: the episodes of each task; tasks without a trial do not enter the mean.

    Returns:
        The keys of :func:`summarize` (success_rate is the micro mean), macro_success_rate and its interval
        macro_95 [low, high] (see :func:`mean_rate_interval`; None without trials).
    """
    found = [summarize(records) for records in tasks]
    counts = [(task["successes"], task["trials"]) for task in found if task["trials"]]
    summary = summarize(record for records in tasks for record in records)
    summary["macro_success_rate"] = sum(k / n for k, n in counts) / len(counts) if counts else None
    summary["macro_95"] = list(mean_rate_interval(counts)) if counts else None
    return summary


def summarize_run(plans: Sequence[TaskPlan], records: dict[EpisodeKey, EpisodeRecord]) -> dict[str, Any]:
    """`per_task`, `per_suite` and `overall` of results.json, with `complete` (every planned episode has a record) and
    `valid` (complete, and none of them is an error)."""
    per_task, groups, missing = [], [], 0
    suites: dict[str, list[list[EpisodeRecord]]] = {}
    for plan in plans:
        wanted = [(plan.task_id, planned.init_idx) for planned in plan.episodes if planned.number is not None]
        found = [records[key] for key in wanted if key in records]
        missing += len(wanted) - len(found)
        groups.append(found)
        for suite in {record.suite for record in found}:
            suites.setdefault(suite, []).append([record for record in found if record.suite == suite])
        head = {"task_id": plan.task_id, "task_name": plan.name, "instruction": plan.instruction}
        per_task.append(head | summarize(found) | {"skipped": len(plan.episodes) - len(wanted)})
    overall = summarize_group(groups)
    return {
        "valid": missing == 0 and overall["errors"] == 0,
        "complete": missing == 0,
        "missing": missing,
        "per_task": per_task,
        "per_suite": {suite: summarize_group(tasks) for suite, tasks in sorted(suites.items())},
        "overall": overall,
    }
