"""Reads LIBERO evaluation logs and result lists, finds checkpoints, writes the Markdown table.

Two shapes of one log are read: the plain text file an evaluation writes, and a console capture in which Rich wrapped
every message at the terminal width, put time, level and source columns around it, and progress bars and escape
sequences were glued in front. Both become the same stream of words once the decoration is removed, so one set of
expressions reads them. Standard library only; runs as a module or as a script::

    python -m craft_experiments.common_utils.log_parser rate EVAL.txt
    python -m craft_experiments.common_utils.log_parser episodes EVAL.txt
    python -m craft_experiments.common_utils.log_parser table table1_results.log --output table1_formatted.md
    python -m craft_experiments.common_utils.log_parser checkpoint runs RUN_ID
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from math import fsum
from pathlib import Path


class FailureCode(str, Enum):
    """Why a suite has no success rate; written in place of the number."""

    TRAINING_FAILED = "TRAINING_FAILED"
    NO_CHECKPOINT = "NO_CHECKPOINT"
    EVAL_FAILED = "EVAL_FAILED"
    PARSE_FAILED = "PARSE_FAILED"


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
    """Everything an evaluation log states. Rates are in [0, 1].

    ``complete`` is False when the final line is absent (the run was cut); the rate is then the rate of the episodes
    finished so far, or None when not one finished.
    """

    path: str
    task_suite: str | None
    complete: bool
    overall_success_rate: float | None
    total_episodes: int
    total_successes: int
    tasks: list[TaskOutcome]
    num_video_lines: int
    num_video_successes: int
    num_episode_errors: int

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


# --- Evaluation logs ----------------------------------------------------------------------------------------------

_ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# Rich's right-hand column, in the middle of a wrapped message. It is only looked for where a word starts: from every
# letter of a long word (a progress bar without blanks) would take quadratic time.
_SOURCE_COLUMN = re.compile(r"(?<!\S)\S+\.py:\d+")
_MAX_DIGITS = 18  # of a count: no evaluation has more episodes, and int() refuses thousands of digits
_NUMBER = r"(\d+(?:\.\d+)?(?:[eE][-+]?\d+)?)"
_EVENTS = re.compile(
    "|".join(
        (
            r"\bTask suite: (?P<suite>\S+)",
            # The name ends at the next message; a date, a level or a bracket opens one.
            r"(?<![\w=])Task: (?P<task>.+?)(?= (?:\d{2,4}[-/]\d\d|\[|INFO\b|Starting episode|Skipping task|#)|$)",
            r"(?P<error>\bEpisode error:|(?<!Episode error: )\bCaught exception:)",
            r"--success=(?P<video>True|False)--task=",
            r"(?<![\w=])Success: (?P<success>True|False)",
            rf"\bCurrent task success rate: (?P<task_rate>{_NUMBER})",
            r"\bTotal episodes: (?P<total_episodes>\d+)",
            r"\bTotal successes: (?P<total_successes>\d+)",
            rf"\b(?:Overall|Total) success rate: (?P<overall>{_NUMBER})",
        )
    )
)


def _undecorated_words(text: str) -> str:
    """The log as one line of words: no escape sequences, no source column, every run of white space one blank."""
    return " ".join(_SOURCE_COLUMN.sub(" ", _ANSI.sub(" ", text)).split())


def _events(text: str) -> Iterator[tuple[str, str]]:
    for match in _EVENTS.finditer(_undecorated_words(text)):
        yield match.lastgroup, match.group(match.lastgroup)


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    # Tee-Object of Windows PowerShell writes UTF-16 with a byte order mark.
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    return data.decode(encoding, errors="replace")


class _LogState:
    """Accumulates the events of one log; one method per kind of event that is more than an assignment."""

    def __init__(self) -> None:
        self.tasks: list[TaskOutcome] = []
        self.pending_task_name = ""
        self.stated: dict[str, str] = {}
        self.videos: list[int] = []
        self.errors = 0

    def feed(self, kind: str, value: str) -> None:
        if kind == "task":
            self.pending_task_name = value
        elif kind == "success":
            self._current_task().outcomes.append(int(value == "True"))
        elif kind == "task_rate":
            self._current_task().success_rate = float(value)
        elif kind == "video":
            self.videos.append(int(value == "True"))
        elif kind == "error":
            self.errors += 1
        else:
            self.stated[kind] = value

    def _current_task(self) -> TaskOutcome:
        # A task ends with its rate line. The "Task:" line does not tell: it repeats before every episode, and other
        # programs' lines can be glued to it.
        if not self.tasks or self.tasks[-1].success_rate is not None:
            self.tasks.append(TaskOutcome(self.pending_task_name))
        return self.tasks[-1]


def parse_eval_log(path: str | os.PathLike) -> EvalLog:
    """Parse an evaluation log, plain or captured from a console of any width that does not break a number.

    Args:
        path: UTF-8 text file, or UTF-16 with a byte order mark. Undecodable bytes become replacement characters:
            progress bars may be cut.

    Returns:
        The log's figures. Without a final line the result is partial and ``complete`` is False.

    Raises:
        FileNotFoundError: no such file.
        LogFormatError: figures of the log that contradict each other, or that are no rates or counts.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"evaluation log not found: {path}")
    state = _LogState()
    for kind, value in _events(_read_text(path)):
        state.feed(kind, value)
    counted = [outcome for task in state.tasks for outcome in task.outcomes]
    stated = state.stated
    complete = "overall" in stated
    partial_rate = sum(counted) / len(counted) if counted else None
    log = EvalLog(
        path=str(path),
        task_suite=stated.get("suite"),
        complete=complete,
        overall_success_rate=float(stated["overall"]) if complete else partial_rate,
        total_episodes=_stated_count(path, stated, "total_episodes", len(counted)),
        total_successes=_stated_count(path, stated, "total_successes", sum(counted)),
        tasks=state.tasks,
        num_video_lines=len(state.videos),
        num_video_successes=sum(state.videos),
        num_episode_errors=state.errors,
    )
    _check_consistency(log, counted)
    return log


def _stated_count(path: Path, stated: dict[str, str], name: str, default: int) -> int:
    digits = stated.get(name, str(default))
    if len(digits) > _MAX_DIGITS:
        field_name = name.replace("_", " ").capitalize()
        raise LogFormatError(f"{path}: {field_name}: found a number of {len(digits)} digits, expected a count")
    return int(digits)


def _check_consistency(log: EvalLog, counted: list[int]) -> None:
    """Final block, episode lines and task rates are three statements of one thing; a contradiction is an error."""
    rates = [(f"Current task success rate of task {task.name!r}", task.success_rate) for task in log.tasks]
    for name, rate in [*rates, ("Overall success rate", log.overall_success_rate)]:
        if rate is not None and not 0.0 <= rate <= 1.0:
            raise LogFormatError(f"{log.path}: {name}: found {rate}, expected a rate in [0, 1]")
    checks = []
    if counted and log.complete:
        checks.append(("Total episodes", log.total_episodes, len(counted), 0))
        checks.append(("Total successes", log.total_successes, sum(counted), 0))
    if log.complete and log.total_episodes:
        # Four decimals are written.
        rate = log.total_successes / log.total_episodes
        if counted or log.total_successes:
            checks.append(("Overall success rate", log.overall_success_rate, rate, 5.1e-5))
    for task in log.tasks:
        if task.success_rate is not None and task.episodes:
            rate = task.successes / task.episodes
            checks.append((f"Current task success rate of task {task.name!r}", task.success_rate, rate, 5.1e-5))
    for name, found, expected, tolerance in checks:
        if abs(found - expected) > tolerance:
            raise LogFormatError(f"{log.path}: {name}: found {found}, the episode lines give {expected}")


def extract_success_rate_from_log(path: str | os.PathLike) -> float | None:
    """The overall success rate of a finished evaluation.

    Returns:
        The rate in [0, 1] of the line ``Overall success rate: 0.8500 (85.0%)``; None when the log has no such line
        (cut or crashed run; :func:`parse_eval_log` gives the partial figures, flagged).

    Raises:
        FileNotFoundError, LogFormatError: see :func:`parse_eval_log`.
    """
    log = parse_eval_log(path)
    return log.overall_success_rate if log.complete else None


# --- Checkpoints --------------------------------------------------------------------------------------------------


def extract_checkpoint_path(run_root_dir: str | os.PathLike, run_id: str) -> Path | None:
    """Newest checkpoint folder of a run, by step number and not by file time (a copy changes times).

    Looks for ``{run_root_dir}/{run_id}--{step}_chkpt``; when there is none, for ``{run_root_dir}/{run_id}`` holding a
    ``*latest_checkpoint*`` file (the layout of ``--save_latest_checkpoint_only True``).

    Returns:
        The folder, or None when the run wrote no checkpoint.

    Raises:
        FileNotFoundError: run_root_dir does not exist.
    """
    root = Path(run_root_dir)
    if not root.is_dir():
        raise FileNotFoundError(f"run_root_dir not found: {root}")
    pattern = re.compile(re.escape(run_id) + r"--(\d+)_chkpt")
    steps = [(int(m.group(1)), p) for p in root.iterdir() if p.is_dir() and (m := pattern.fullmatch(p.name))]
    if steps:
        return max(steps)[1]
    latest = root / run_id
    return latest if latest.is_dir() and any(latest.glob("*latest_checkpoint*")) else None


# --- Result lists and tables --------------------------------------------------------------------------------------

_RESULT_LINE = re.compile(r"(?P<suite>[\w.-]+): (?P<value>\S+)")


def parse_all_results(path: str | os.PathLike) -> dict[str, float | FailureCode]:
    """Read a result list: one line ``libero_spatial: 0.8500`` or ``libero_goal: EVAL_FAILED`` per suite.

    Empty lines and lines starting with ``#`` are skipped.

    Returns:
        suite -> rate in [0, 1] or failure code, in file order.

    Raises:
        FileNotFoundError: no such file.
        LogFormatError: no UTF-8 text, a line of another shape, a rate outside [0, 1], an unknown code, or a suite
            listed twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"result list not found: {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LogFormatError(f"{path}: not UTF-8 text: {error}") from error
    results: dict[str, float | FailureCode] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{path}: line {number}"
        match = _RESULT_LINE.fullmatch(line)
        if match is None:
            raise LogFormatError(f"{where}: found {line!r}, expected '<suite>: <rate or failure code>'")
        if match["suite"] in results:
            raise LogFormatError(f"{where}: suite {match['suite']!r} is listed twice")
        results[match["suite"]] = _result_value(match["value"], where)
    return results


def _result_value(value: str, where: str) -> float | FailureCode:
    if value in FailureCode.__members__:
        return FailureCode(value)
    codes = ", ".join(FailureCode.__members__)
    try:
        rate = float(value)
    except ValueError:
        raise LogFormatError(f"{where}: found {value!r}, expected a rate in [0, 1] or one of {codes}") from None
    if not 0.0 <= rate <= 1.0:
        raise LogFormatError(f"{where}: found rate {rate}, expected a rate in [0, 1]")
    return rate


def format_rate(value: float | FailureCode) -> str:
    """``0.8500 (85.0%)`` or the failure code."""
    return value.value if isinstance(value, FailureCode) else f"{value:.4f} ({value * 100:.1f}%)"


def average_rate(results: dict[str, float | FailureCode]) -> float | None:
    """Mean over the suites that have a number; None when no suite has one."""
    rates = [value for value in results.values() if not isinstance(value, FailureCode)]
    return fsum(rates) / len(rates) if rates else None


def format_results_table(
    results: dict[str, float | FailureCode], title: str = "Table 1: Main results on LIBERO (CRaFT)"
) -> str:
    """Markdown table: title, a row per suite sorted by name, the average; failures stay visible as rows.

    Args:
        results: suite -> rate in [0, 1] or failure code.
        title: heading of the table.

    Returns:
        Markdown text ending in a newline. With failed suites a line after the table says over how many suites the
        average was taken and which failed.

    Raises:
        ValueError: no result at all.
    """
    if not results:
        raise ValueError("results: found none, expected at least one suite")
    lines = [f"# {title}", "", "| Task Suite | Success Rate |", "|---|---|"]
    lines += [f"| {suite} | {format_rate(results[suite])} |" for suite in sorted(results)]
    average = average_rate(results)
    lines.append(f"| **Average** | **{'n/a' if average is None else format_rate(average)}** |")
    failed = {suite: value for suite, value in sorted(results.items()) if isinstance(value, FailureCode)}
    if failed:
        names = ", ".join(f"{suite} ({code.value})" for suite, code in failed.items())
        lines += ["", f"Average over {len(results) - len(failed)} of {len(results)} suites; failed: {names}."]
    return "\n".join(lines) + "\n"


def format_comparison_table(columns: dict[str, dict[str, float | FailureCode]], title: str) -> str:
    """Markdown table with a row per suite and a column per method.

    Args:
        columns: method -> results as of :func:`parse_all_results`. A suite a method did not run is shown as ``-``.
        title: heading.

    Returns:
        Markdown text ending in a newline. The averages are taken over the suites for which every method has a number,
        so that the columns can be compared; a line says which suites those are when some are left out.

    Raises:
        ValueError: no column, or no suite.
    """
    suites = sorted({suite for results in columns.values() for suite in results})
    if not suites:
        raise ValueError("columns: found no results, expected at least one method with one suite")
    lines = [f"# {title}", "", "| Task Suite | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for suite in suites:
        cells = [format_rate(results[suite]) if suite in results else "-" for results in columns.values()]
        lines.append(f"| {suite} | " + " | ".join(cells) + " |")
    common = [s for s in suites if all(isinstance(r.get(s), float) for r in columns.values())]
    averages = [average_rate({s: results[s] for s in common}) for results in columns.values()]
    cells = ["n/a" if average is None else format_rate(average) for average in averages]
    lines.append("| **Average** | " + " | ".join(f"**{cell}**" for cell in cells) + " |")
    if len(common) < len(suites):
        named = ", ".join(common) or "none"
        lines += ["", f"Average over the {len(common)} of {len(suites)} suites with a number in every column: {named}."]
    return "\n".join(lines) + "\n"


def write_text_atomic(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text under a temporary name, then rename: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8", newline="\n")
    os.replace(temporary, path)


# --- Command line -------------------------------------------------------------------------------------------------


def _command_rate(args: argparse.Namespace) -> int:
    log = parse_eval_log(args.log)
    if log.num_episode_errors:
        print(f"{args.log}: {log.num_episode_errors} episodes ended in an error and count as failures", file=sys.stderr)
    if log.complete:
        print(f"{log.overall_success_rate:.4f}")
        return 0
    done = f"{log.total_successes} of {log.total_episodes} episodes so far"
    print(f"{args.log}: incomplete: no 'Overall success rate' line ({done})", file=sys.stderr)
    return 3


def _command_episodes(args: argparse.Namespace) -> int:
    print(json.dumps(parse_eval_log(args.log).to_dict(), indent=1))
    return 0


def _command_table(args: argparse.Namespace) -> int:
    keywords = {} if args.title is None else {"title": args.title}
    return _deliver(format_results_table(parse_all_results(args.results), **keywords), args.output)


def _command_compare(args: argparse.Namespace) -> int:
    columns = {}
    for pair in args.columns:
        name, separator, path = pair.partition("=")
        if not separator or name in columns:
            raise ValueError(f"compare: found {pair!r}, expected NAME=FILE with each name once")
        columns[name] = parse_all_results(path)
    return _deliver(format_comparison_table(columns, args.title), args.output)


def _deliver(text: str, output: str | None) -> int:
    if output is None:
        print(text, end="")
    else:
        write_text_atomic(output, text)
    return 0


def _command_checkpoint(args: argparse.Namespace) -> int:
    found = extract_checkpoint_path(args.run_root_dir, args.run_id)
    if found is None:
        print(f"no checkpoint {args.run_id}--<step>_chkpt in {args.run_root_dir}", file=sys.stderr)
        return 3
    print(found)
    return 0


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Read evaluation logs, find checkpoints, write result tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    rate = commands.add_parser("rate", help="print the overall success rate; exit 3 when the log has no final line")
    rate.set_defaults(run=_command_rate)
    episodes = commands.add_parser("episodes", help="print everything the log states as JSON")
    episodes.set_defaults(run=_command_episodes)
    for sub in (rate, episodes):
        sub.add_argument("log")
    table = commands.add_parser("table", help="result list -> Markdown table")
    table.add_argument("results")
    table.add_argument("--output", help="file to write; standard output when absent")
    table.add_argument("--title")
    table.set_defaults(run=_command_table)
    compare = commands.add_parser("compare", help="result lists of several methods -> one Markdown table")
    compare.add_argument("columns", nargs="+", metavar="NAME=FILE")
    compare.add_argument("--output", help="file to write; standard output when absent")
    compare.add_argument("--title", default="Table 1: Main results on LIBERO")
    compare.set_defaults(run=_command_compare)
    checkpoint = commands.add_parser("checkpoint", help="newest checkpoint folder by step number; exit 3 when none")
    checkpoint.add_argument("run_root_dir")
    checkpoint.add_argument("run_id")
    checkpoint.set_defaults(run=_command_checkpoint)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Command line entry. Returns 0, 2 for unreadable input, 3 for 'nothing to report' (incomplete, no checkpoint)."""
    args = _argument_parser().parse_args(argv)
    try:
        return args.run(args)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
