"""Reads LIBERO evaluation logs and result lists, finds checkpoints, writes the Markdown table.

A log may be a text file or the capture of a console of any width (`log_text.py`), its rates may have units
(`log_figures.py`), and it may hold several runs (`log_runs.py`). Standard library only; runs as a module or a script::

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
from math import fsum
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from craft_experiments.common_utils.log_figures import read_rate
from craft_experiments.common_utils.log_runs import EvalLog, LogFormatError, TaskOutcome, parse_runs, select_runs
from craft_experiments.common_utils.log_text import decode_text, message_lines, read_log_bytes, unwrapped
from prismatic.command_line import OneLineParser, bad_input_in_one_line
from prismatic.evidence.cells import markdown_cell, one_line
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.files import write_text
from prismatic.output_folder import check_file

__all__ = ["EvalLog", "FailureCode", "LogFormatError", "TaskOutcome"]


# --- Evaluation logs ----------------------------------------------------------------------------------------------


def parse_eval_runs(path: str | os.PathLike) -> list[EvalLog]:
    """Parse the runs of an evaluation log, plain or captured from a console.

    Args:
        path: UTF-8 or UTF-16 text. Undecodable bytes become replacement characters: progress bars may be cut.

    Returns:
        One run per suite, in the order of the file: of several the last complete one, which its notes say.

    Raises:
        FileNotFoundError: no such file.
        LogFormatError: no evaluation log, figures that contradict each other, or numbers that are no rates or counts.
    """
    logs = _parse(Path(path))
    if not logs:
        raise LogFormatError(
            f"{path}: found no line of an evaluation log such as 'Task suite: libero_goal', 'Success: True' or "
            "'Overall success rate: 0.8500'"
        )
    return logs


def _parse(path: Path) -> list[EvalLog]:
    try:
        data = read_log_bytes(path, "evaluation log")
    except ValueError as error:
        raise LogFormatError(str(error)) from None
    text = message_lines(decode_text(data))
    try:
        runs = select_runs(parse_runs(path, text))
    except LogFormatError:
        if (rejoined := _of_a_narrow_terminal(path, text)) is None:
            raise
        return rejoined
    return runs if all(run.complete for run in runs) else _of_a_narrow_terminal(path, text) or runs


def _of_a_narrow_terminal(path: Path, text: str) -> list[EvalLog] | None:
    """Runs of text that a terminal broke at its last column; None unless all figures then agree."""
    joined = unwrapped(text)
    try:
        runs = select_runs(parse_runs(path, joined)) if joined else []
    except LogFormatError:
        return None
    return runs if runs and all(run.has_final_line and run.tasks for run in runs) else None


def parse_eval_log(path: str | os.PathLike) -> EvalLog:
    """Parse a log of one suite, which may have been cut before its first line.

    Raises:
        FileNotFoundError, LogFormatError: see :func:`parse_eval_runs`; also runs of several suites.
    """
    logs = _parse(Path(path)) or [EvalLog(str(path))]
    if len(logs) > 1:
        suites = ", ".join(str(log.task_suite) for log in logs)
        raise LogFormatError(f"{path}: found runs of {len(logs)} suites ({suites}), expected one; `rate` lists them")
    return logs[0]


def extract_success_rate_from_log(path: str | os.PathLike) -> float | None:
    """The overall success rate of a finished evaluation.

    Returns:
        The rate in [0, 1] of the line ``Overall success rate: 0.8500 (85.0%)``; None when the log has no such line
        (cut or crashed run; :func:`parse_eval_log` gives the partial figures, flagged).

    Raises:
        FileNotFoundError, LogFormatError: see :func:`parse_eval_log`.
    """
    log = parse_eval_log(path)
    return log.overall_success_rate if log.has_final_line else None


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

_RESULT_LINE = re.compile(r"(?P<suite>[\w.-]+): (?P<value>\S.*)")


def parse_all_results(path: str | os.PathLike) -> dict[str, float | FailureCode]:
    """Read a result list: one line ``libero_spatial: 0.8500`` or ``libero_goal: EVAL_FAILED`` per suite.

    Rates may have units: ``85.0%``, ``17/20``. Empty lines and lines starting with ``#`` are skipped.

    Returns:
        suite -> rate in [0, 1] or failure code, in file order.

    Raises:
        FileNotFoundError: no such file.
        LogFormatError: no UTF-8 text, a line of another shape, a rate outside [0, 1], an unknown code, or a suite
            listed twice.
    """
    path = Path(path)
    try:
        text = decode_text(read_log_bytes(path, "result list"), errors="strict")
    except UnicodeDecodeError as error:
        raise LogFormatError(f"{path}: not UTF-8 text: {error}") from error
    except ValueError as error:
        raise LogFormatError(str(error)) from None
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
    try:
        return read_rate(value).value
    except ValueError as error:
        raise LogFormatError(f"{where}: {error}, or one of {', '.join(FailureCode.__members__)}") from None


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
    lines = [f"# {one_line(title)}", "", "| Task Suite | Success Rate |", "|---|---|"]
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
    names = map(markdown_cell, columns)
    lines = [
        f"# {one_line(title)}",
        "",
        "| Task Suite | " + " | ".join(names) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
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


# --- Command line -------------------------------------------------------------------------------------------------


def _command_rate(args: argparse.Namespace) -> int:
    logs = parse_eval_runs(args.log)
    found = [log for log in logs if log.complete or log.ended_evenly]
    for log in logs:
        for note in log.notes:
            _remark(args.log, log, note)
        if log.num_episode_errors:
            _remark(args.log, log, f"{log.num_episode_errors} episodes ended in an error and count as failures")
        if log in found:
            name = f"{log.task_suite}: " if len(logs) > 1 else ""
            print(f"{name}{log.overall_success_rate:.4f}")
        else:
            done = f"{log.total_successes} of {log.total_episodes} episodes succeeded so far"
            _remark(args.log, log, f"incomplete: no 'Overall success rate' line behind the last task ({done})")
    return 0 if len(found) == len(logs) else 3


def _remark(path: str, log: EvalLog, text: str) -> None:
    print(f"{path}: {log.task_suite or 'no suite named'}: {text}", file=sys.stderr)


def _command_episodes(args: argparse.Namespace) -> int:
    logs = [log.to_dict() for log in parse_eval_runs(args.log)]
    print(json.dumps(logs[0] if len(logs) == 1 else logs, indent=1))
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
        check_file(output, "--output")
        write_text(output, text)
    return 0


def _command_checkpoint(args: argparse.Namespace) -> int:
    found = extract_checkpoint_path(args.run_root_dir, args.run_id)
    if found is None:
        print(f"no checkpoint {args.run_id}--<step>_chkpt in {args.run_root_dir}", file=sys.stderr)
        return 3
    print(found)
    return 0


def _argument_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Read evaluation logs, find checkpoints, write result tables.")
    commands = parser.add_subparsers(dest="command", required=True)
    rate = commands.add_parser("rate", help="print the success rate of each suite; exit 3 when a run is incomplete")
    rate.set_defaults(run=_command_rate)
    episodes = commands.add_parser("episodes", help="print everything the log states as JSON; several suites: a list")
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
    """Command line entry. Returns 0, or 3 for 'nothing to report' (incomplete, no checkpoint).

    Input that cannot be read ends the process with one line and exit code 2.
    """
    args = _argument_parser().parse_args(argv)
    with bad_input_in_one_line("log_parser.py"):
        return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
