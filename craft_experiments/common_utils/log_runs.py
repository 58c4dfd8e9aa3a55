"""The runs that an evaluation log holds, read from plain lines. Standard library only.

A line with a number is read with its unit. Episode lines, counters, task rates and the final block state one thing
several times; a contradiction is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from craft_experiments.common_utils.log_figures import Rate, read_count, read_rate


class LogFormatError(ValueError):
    """A log or result list that contradicts itself or has an unreadable line; names the file and the field."""


@dataclass
class TaskOutcome:
    """Outcome of one task of a suite, in the order of the log.

    ``success_rate`` is the log's own figure in [0, 1]; None while the task was still running when the log ended.
    """

    name: str
    outcomes: list[int] = field(default_factory=list)
    success_rate: float | None = None

    @property
    def episodes(self) -> int:
        """Number of finished episodes."""
        return len(self.outcomes)

    @property
    def successes(self) -> int:
        """Number of successful episodes."""
        return sum(self.outcomes)


@dataclass
class EvalLog:
    """Everything one run of an evaluation log states. Rates are in [0, 1].

    ``complete``: the run has its final line behind its last task, or every task of its standard suite has ended; else
    the rate is that of the episodes finished so far, or None when not one finished. ``ended_evenly``: every task that
    began has ended, with equally many episodes, and no crash follows: all that a log without a final line can say.
    ``episodes_before``: episodes that the run counts and the log does not show, since its beginning is missing.
    ``notes``: what was odd.
    """

    path: str
    task_suite: str | None = None
    complete: bool = False
    overall_success_rate: float | None = None
    total_episodes: int = 0
    total_successes: int = 0
    tasks: list[TaskOutcome] = field(default_factory=list)
    num_video_lines: int = 0
    num_video_successes: int = 0
    num_episode_errors: int = 0
    has_final_line: bool = False
    ended_evenly: bool = False
    episodes_before: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def success_sequence(self) -> list[int]:
        """1 or 0 per finished episode, in log order."""
        return [outcome for task in self.tasks for outcome in task.outcomes]

    def to_dict(self) -> dict:
        """JSON-ready form, with the sequence as a string of 0 and 1."""
        tasks = [asdict(t) | {"episodes": t.episodes, "successes": t.successes} for t in self.tasks]
        for task in tasks:
            task["outcomes"] = "".join(map(str, task["outcomes"]))
        return asdict(self) | {"tasks": tasks, "success_sequence": "".join(map(str, self.success_sequence))}


def parse_runs(path: Path, text: str) -> list[EvalLog]:
    """The runs of a log, in the order of the file; none when no line is one of an evaluation.

    Args:
        path: named in errors.
        text: plain text, one message a line.

    Raises:
        LogFormatError: a number that cannot be read, or figures of a run that contradict each other.
    """
    events, doubled = _without_doubles(list(_events(path, text)))
    parts = _split(events)
    logs: list[EvalLog] = []
    suite = None
    for number, part in enumerate(parts, start=1):
        run = _Run(str(path) if len(parts) == 1 else f"{path}: run {number} of {len(parts)}")
        for event in part:
            run.feed(event)
        suite = run.suite = run.suite or suite
        end = parts[number][0].start if number < len(parts) else len(text)
        logs.append(run.finish(path, crashed=_crashed(text[part[-1].end : end])))
        logs[-1].notes += ["every line stands twice; one of each was read"] if doubled else []
    return logs


# --- Events -------------------------------------------------------------------------------------------------------


class _Event(NamedTuple):
    """A statement of the log. start, end: where it stands in the text."""

    kind: str
    value: Any  # as the kind says: text, a count (int) or a Rate
    start: int
    end: int


# Words may be glued together where a console broke the line.
_PATTERNS = (
    r"\bTask\s*suite\s*:\s*(?P<suite>[^\s,;'\"]+)",
    # The name ends with its line, or at a message glued to it; a date, a level or a bracket opens one.
    r"(?<![\w=])Task\s*:\s*(?P<task>[^\n]+?)"
    r"(?= (?:\d{2,4}[-/]\d\d|\[|INFO\b|Starting episode|Skipping task|#)|\n|\Z)",
    r"\bStarting\s*episode\s*(?P<start>[0-9]{1,18})\b",
    r"(?P<skipped>\bSkipping\s*task\s*[0-9]+\s*episode)",
    # With the rest of its line: the text of an exception states nothing.
    r"(?P<error>\b(?:Episode error|Caught exception):)[^\n]*",
    r"--success=(?P<video>True|False)--task=",
    r"(?<![\w=])Success\s*:\s*(?P<success>True|False)\b",
    r"(?P<counter>#\s*episodes\s*completed\s*so\s*far\s*:)",
    r"(?P<counter_successes>#\s*successes\s*:)",
    r"(?i:\b(?:(?P<task_rate>current\s*task)|(?P<running_rate>current\s*total)|(?P<overall>overall|total))\s*success"
    r"\s*rate(?P<unit>\s*[(\[][^)\]\n]{0,40}[)\]])?\s*[:=])",
    r"(?i:\btotal\s*(?:(?P<total_episodes>episodes)|(?P<total_successes>successes))\s*:)",
)
_EVENTS = re.compile("|".join(_PATTERNS))
_RATES = {
    "task_rate": "Current task success rate",
    "running_rate": "Current total success rate",
    "overall": "Overall success rate",
}
_COUNTS = {
    "counter": "# episodes completed so far",
    "counter_successes": "# successes",
    "total_episodes": "Total episodes",
    "total_successes": "Total successes",
}
_NAMES = _RATES | _COUNTS
_VALUE = re.compile(r"\s*([^\n]{0,200})")


def _events(path: Path, text: str) -> Iterator[_Event]:
    for match in _EVENTS.finditer(text):
        last = match.lastgroup
        assert last is not None  # every pattern names what it finds
        kind = next(name for name in (*_NAMES, last) if name == last or match[name])
        if kind not in _NAMES:
            yield _Event(kind, match[kind], *match.span())
            continue
        behind = _VALUE.match(text, match.end())
        assert behind is not None  # it matches the empty text, too
        value = behind[1]
        if not value:
            return  # the file ends behind the name
        try:
            number = read_rate(value, "%" in (match["unit"] or "")) if kind in _RATES else read_count(value)
        except ValueError as error:
            raise LogFormatError(f"{path}: {_NAMES[kind]}: {error}") from None
        yield _Event(kind, number, *match.span())


def _without_doubles(events: list[_Event]) -> tuple[list[_Event], bool]:
    """One of each two equal events, when all come so: two handlers wrote to one console.

    The counters tell it from two episodes with one outcome. Video lines are prints, which no handler repeats.
    """
    logged = [event for event in events if event.kind != "video"]
    videos = [event for event in events if event.kind == "video"]
    if not _in_pairs(logged) or not any(event.kind in ("counter", "start", "suite") for event in logged):
        return events, False
    videos = videos[::2] if _in_pairs(videos) else videos
    return sorted([*logged[::2], *videos], key=lambda event: event.start), True


def _in_pairs(events: list[_Event]) -> bool:
    pairs = zip(events[::2], events[1::2], strict=False)
    return len(events) % 2 == 0 and all(first[:2] == second[:2] for first, second in pairs)


_OF_AN_EPISODE = {"task", "start", "skipped", "error", "video", "success"}


def _split(events: list[_Event]) -> list[list[_Event]]:
    """The events of each run.

    A run begins at its "Task suite:" line, unless the counter goes on behind it, and with the episode at which the
    counter is 1 again.
    """
    next_count = _counter_behind(events)
    starts, suite, counted, episode_start = [0], None, 0, 0
    for place, event in enumerate(events):
        if event.kind == "suite":
            if event.value != suite or not counted or next_count[place] != counted + 1:
                starts.append(place)
                counted = 0
            suite = event.value
        elif event.kind == "counter":
            if event.value == 1 and counted:
                starts.append(episode_start)
            counted = event.value
        if event.kind not in _OF_AN_EPISODE:
            episode_start = place + 1
    runs = [events[a:b] for a, b in zip(starts, [*starts[1:], len(events)], strict=True)]
    return [run for run in runs if any(event.kind not in ("task", "start", "error", "video") for event in run)]


def _counter_behind(events: list[_Event]) -> list[int | None]:
    """For each event the next counter before another "Task suite:" line."""
    found: list[int | None] = []
    upcoming: int | None = None
    for event in reversed(events):
        found.append(upcoming)
        if event.kind in ("counter", "suite"):
            upcoming = event.value if event.kind == "counter" else None
    return found[::-1]


_KILLED = re.compile(r"^(?:slurmstepd: error|Killed|Terminated|Aborted|Segmentation fault)", re.MULTILINE)


def _crashed(text: str) -> bool:
    """Whether the text behind a run tells of its end. Exceptions of destructors, which Python ignores, do not."""
    lines = text.split("\n")
    tracebacks = [i for i, line in enumerate(lines) if "Traceback (most recent call last)" in line]
    return bool(_KILLED.search(text)) or any("Exception ignored" not in lines[max(0, i - 1)] for i in tracebacks)


# --- Runs ---------------------------------------------------------------------------------------------------------

_TASKS_OF = {"libero_spatial": 10, "libero_object": 10, "libero_goal": 10, "libero_10": 10, "libero_90": 90}


class _Run:
    """Accumulates the events of one run."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.suite: str | None = None
        self.tasks: list[TaskOutcome] = []
        self.pending_task_name = ""
        self.stated: dict[str, Any] = {}  # a count or a Rate, as the name says
        self.videos: list[int] = []
        self.errors = self.skipped = 0
        self.before = self.successes_before = 0  # of episodes that are counted and not shown
        self.counts = False
        self.overall_is_running = False  # the overall rate is written again and again, so it ends nothing

    @property
    def outcomes(self) -> list[int]:
        """Of the episodes shown."""
        return [outcome for task in self.tasks for outcome in task.outcomes]

    def feed(self, event: _Event) -> None:
        """Take the next event."""
        kind, value = event.kind, event.value
        if kind == "suite":
            self.suite = value
        elif kind == "task":
            self.pending_task_name = value.strip()
        elif kind == "success":
            self._current_task().outcomes.append(int(value == "True"))
            self.overall_is_running |= self.stated.pop("overall", None) is not None
        elif kind == "video":
            self.videos.append(int(value == "True"))
        elif kind in ("error", "skipped"):
            self.errors += kind == "error"
            self.skipped += kind == "skipped"
        elif kind in _NAMES:
            self._take_number(kind, value)

    def _current_task(self) -> TaskOutcome:
        # A task ends with its rate line. The "Task:" line does not tell: it repeats before every episode, and other
        # programs' lines can be glued to it.
        if not self.tasks or self.tasks[-1].success_rate is not None:
            self.tasks.append(TaskOutcome(self.pending_task_name))
        return self.tasks[-1]

    def _take_number(self, kind: str, value: Any) -> None:
        shown = self.outcomes
        if kind == "counter":
            if not self.counts:
                self.counts, self.before = True, max(0, value - len(shown))
            self._compare(kind, value, len(shown) + self.before)
        elif kind == "counter_successes":
            if len(shown) == 1 and self.before:
                self.successes_before = min(max(0, value - sum(shown)), self.before)
            self._compare(kind, value, sum(shown) + self.successes_before)
        elif kind == "task_rate":
            task = self._current_task()
            task.success_rate = value.value
            if task.episodes and not (self.before and len(self.tasks) == 1):
                self._compare_rate(f"{_NAMES[kind]} of task {task.name!r}", value, task.successes, task.episodes)
        elif kind == "running_rate":
            if shown:
                done = sum(shown) + self.successes_before, len(shown) + self.before
                self._compare_rate(_NAMES[kind], value, *done)
        elif self.stated.setdefault(kind, value) != value:
            raise LogFormatError(f"{self.where}: {_NAMES[kind]}: stated twice, with two values")

    def _compare(self, kind: str, found: int, expected: int) -> None:
        if found != expected:
            raise LogFormatError(f"{self.where}: {_NAMES[kind]}: found {found}, the episode lines give {expected}")

    def _compare_rate(self, name: str, found: Rate, successes: int, episodes: int) -> None:
        expected = successes / episodes
        if not found.agrees(Rate(expected)):
            raise LogFormatError(f"{self.where}: {name}: found {found.value}, the episode lines give {expected}")

    def finish(self, path: Path, crashed: bool) -> EvalLog:
        """The figures of the run; crashed: the text behind it says so."""
        shown, overall = self.outcomes, self.stated.get("overall")
        episodes, successes = len(shown) + self.before, sum(shown) + self.successes_before
        for kind, expected in (("total_episodes", episodes), ("total_successes", successes)):
            if shown and kind in self.stated:
                self._compare(kind, self.stated[kind], expected)
        episodes = self.stated.get("total_episodes", episodes)
        successes = self.stated.get("total_successes", successes)
        if overall is not None and episodes and (shown or "total_successes" in self.stated):
            self._compare_rate(_NAMES["overall"], overall, successes, episodes)
        is_final = overall is not None and self._last_task_ended()
        if self.overall_is_running and "total_episodes" not in self.stated:
            is_final = False
        even = not crashed and self._ended_evenly()
        known = next((n for suite, n in _TASKS_OF.items() if f"{self.suite}_".startswith(f"{suite}_")), None)
        rate = successes / episodes if episodes else None
        return EvalLog(
            path=str(path),
            task_suite=self.suite,
            complete=is_final or (even and len(self.tasks) == known),
            overall_success_rate=overall.value if is_final and overall is not None else rate,
            total_episodes=episodes,
            total_successes=successes,
            tasks=self.tasks,
            num_video_lines=len(self.videos),
            num_video_successes=sum(self.videos),
            num_episode_errors=self.errors,
            has_final_line=is_final,
            ended_evenly=even,
            episodes_before=self.before,
            notes=self._notes(is_final, even, known),
        )

    def _last_task_ended(self) -> bool:
        """False when the other tasks have a rate line and the last has none: the run was cut, whatever it printed."""
        return len(self.tasks) < 2 or self.tasks[-1].success_rate is not None or self.tasks[0].success_rate is None

    def _ended_evenly(self) -> bool:
        if not self.tasks or self.before or any(task.success_rate is None for task in self.tasks):
            return False
        most = max(task.episodes for task in self.tasks)
        return most > 0 and most * len(self.tasks) == len(self.outcomes) + self.skipped

    def _notes(self, is_final: bool, even: bool, known: int | None) -> list[str]:
        notes = [f"the first {self.before} episodes are not in the file"] if self.before else []
        if "overall" in self.stated and not self._last_task_ended():
            notes.append("the last task did not end, though the overall rate is stated")
        if even and not is_final:
            counted = f"no final line; counted {len(self.outcomes)} episodes of {len(self.tasks)} tasks, all ended"
            notes.append(counted + (f" ({self.suite} has {known})" if known not in (None, len(self.tasks)) else ""))
        return notes


def select_runs(runs: Sequence[EvalLog]) -> list[EvalLog]:
    """One run per suite, in the order of the file: the last complete one, else the last that ended evenly, else the
    last. With several runs of a suite its notes say which was taken."""
    named = {run.task_suite for run in runs} - {None}
    groups: dict[str | None, list[tuple[int, EvalLog]]] = {}
    for number, run in enumerate(runs, start=1):
        suite = next(iter(named)) if run.task_suite is None and len(named) == 1 else run.task_suite
        groups.setdefault(suite, []).append((number, run))
    chosen = []
    for suite, members in groups.items():
        number, run = max(members, key=lambda item: (item[1].complete, item[1].ended_evenly, item[0]))
        run.task_suite = suite
        if len(members) > 1:
            kind = "last complete" if run.complete else "last that ended" if run.ended_evenly else "last (incomplete)"
            done = f"{run.total_successes} of {run.total_episodes} episodes succeeded"
            run.notes.insert(0, f"{len(members)} runs in the file; the {kind} one: run {number}, {done}")
        chosen.append(run)
    return chosen
