"""Tables 1 to 4, the retention protocol and the bench keep: `python -m craft_experiments run table1 --preset tiny`.

    run TABLE      run what is missing, then write the tables; --dry-run prints each command instead, and what they cost
    report TABLE   write tables and figures from the records that are there
    list TABLE     every job and whether it is done
    job TABLE JOB  run one job whose predecessors are done (for a workflow engine)
    graph TABLE FILE.png   draw the jobs and what waits for what

Flags: `craft_experiments/settings.py`. Exit code: 0 when every cell has its result, 1 when one failed, 2 for settings
that cannot be used.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from craft_experiments.common_utils.terminal import say
from craft_experiments.jobs import plan as planning
from craft_experiments.jobs.base import JobFailed, portable
from craft_experiments.keep_cells import BENCH
from craft_experiments.keep_costs import estimate
from craft_experiments.keep_reports import write_keep_reports
from craft_experiments.records import State, read_manifest, set_states
from craft_experiments.result_list import failed_cells, write_result_lists
from craft_experiments.runner import run_job, run_table
from craft_experiments.settings import FOLDERS, ROOT, RunConfig, Settings, resolve
from craft_experiments.table_reports import write_table_reports
from craft_experiments.tables import Table
from prismatic.command_line import UsageError, bad_input_in_one_line, parse
from prismatic.output_folder import check_folder

COMMANDS = {"run": 1, "report": 1, "list": 1, "job": 2, "graph": 2}
"""Command -> the words that follow it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module. Settings that cannot be used end the process with one line and code 2."""
    words = ["--dry_run=True" if w == "--dry-run" else w for w in (sys.argv[1:] if argv is None else argv)]
    try:
        with bad_input_in_one_line("python -m craft_experiments", (ValueError, OSError)):
            return _main(words)
    except KeyboardInterrupt:
        say("interrupted; the same command continues")
        return 130


def _main(words: list[str]) -> int:
    count = 1 + COMMANDS.get(words[0], 0) if words else 0
    if {"-h", "--help"} & set(words):
        parse(RunConfig, ["--help"], description=f"{__doc__}\nTABLE: {', '.join(FOLDERS)}")
    if count < 2 or len(words) < count:
        raise UsageError(
            f"found {' '.join(words) or 'nothing'!r}, expected {' or '.join(COMMANDS)}, then the table "
            f"({', '.join(FOLDERS)}); job takes its name and graph a file as well"
        )
    command, name, *rest = words[:count]
    cfg = parse(RunConfig, words[count:])
    os.chdir(ROOT)
    settings = resolve(cfg, name)
    wanted = planning.wanted_table(settings, name)
    return _COMMANDS[command](settings, wanted, *rest)


def _run(s: Settings, wanted: Table) -> int:
    plan = planning.plan(s, wanted)
    if s.dry_run:
        for job in plan.values():
            for command in job.commands(s):
                print(shlex.join(portable(command)))
        for line in estimate(s, plan):
            print(f"# {line}")
        return 0
    _check_folders(s)
    run_table(s, plan)
    return _report(s, wanted)


def _check_folders(s: Settings) -> None:
    """UsageError before anything is run unless all that comes of it can be kept."""
    check_folder(s.work_dir, "--work_dir")
    check_folder(s.records_dir, "--records_dir")
    check_folder(s.results_dir, "--results_dir")


def _report(s: Settings, wanted: Table) -> int:
    check_folder(s.results_dir, "--results_dir")
    if wanted.name == BENCH:
        written = write_keep_reports(s, wanted)
    else:
        written = [*write_result_lists(s.records_dir, s.results_dir, wanted), *write_table_reports(s, wanted)]
    for path in written:
        say(f"written: {path}")
    failed = failed_cells(read_manifest(s.records_dir), wanted)
    for name, code in failed.items():
        say(f"{name}: {code}")
    if failed:
        say(f"{len(failed)} cells failed; their logs are in {s.logs_dir}. The same command tries them again")
    return 1 if failed else 0


def _list(s: Settings, wanted: Table) -> int:
    for name, job in planning.plan(s, wanted).items():
        print(f"{'done' if job.is_done(s) else 'missing':8} {name}")
    return 0


def _job(s: Settings, wanted: Table, name: str) -> int:
    plan = planning.plan(s, wanted)
    if name not in plan:
        raise ValueError(f"job: found {name!r}, expected one of `list {wanted.name}`")
    job = plan[name]
    _check_folders(s)
    set_states(s.records_dir, dict.fromkeys(planning.cells_of(plan.values()), State.PENDING), only_new=True)
    try:
        run_job(s, job)
    except JobFailed as error:
        say(f"{name}: {error.code.value}: {error}")
        failed = planning.cells_of(planning.with_followers(plan, name))
        set_states(s.records_dir, dict.fromkeys(failed, error.code))
        return 1
    of_cell = [other for other in plan.values() if job.cell is not None and other.cell == job.cell]
    if of_cell and all(other.has_result(s) for other in of_cell):
        assert job.cell is not None  # or `of_cell` would be empty
        set_states(s.records_dir, {job.cell.name: State.EVALUATED})
    return 0


def _graph(s: Settings, wanted: Table, file: str) -> int:
    from craft_experiments.graph import draw_jobs

    plan = planning.plan(s, wanted)
    title = (
        f"{wanted.title}: {len(plan)} jobs ({', '.join(s.preset.suites)}; seeds {', '.join(map(str, s.preset.seeds))})"
    )
    say(f"written: {draw_jobs(plan, title, Path(file))}")
    return 0


_COMMANDS: dict[str, Callable[..., int]] = {"run": _run, "report": _report, "list": _list, "job": _job, "graph": _graph}

if __name__ == "__main__":
    sys.exit(main())
