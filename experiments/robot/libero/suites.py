"""List the suites of the installed simulator package.

python -m experiments.robot.libero.suites
"""

from __future__ import annotations

import dataclasses
import sys

from experiments.robot.libero.simulator import require
from experiments.robot.libero.suite_names import bddl_language, split_suite
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.tasks import SUITE_MAX_STEPS, list_suites, load_task, task_count
from prismatic.command_line import MISTAKES, OneLineParser, bad_input_in_one_line

_PROGRAM = "python -m experiments.robot.libero.suites"


@dataclasses.dataclass(frozen=True)
class SuiteRow:
    """One line of the listing. init_states: per task, as "50" or "10-50"; language_differs: tasks whose file name and
    BDDL line differ; installed: tasks whose files are there."""

    name: str
    base: str | None
    perturbation: str | None
    tasks: int
    installed: int
    init_states: str
    step_limit: int | None
    language_differs: int


def describe_suite(name: str) -> SuiteRow:
    """Facts about one suite of the installed simulator package. Raises UnknownSuiteError."""
    base, changed = split_suite(name)
    count, states, differs = task_count(name), [], 0
    for task_id in range(count):
        try:
            task = load_task(name, task_id)
        except FileNotFoundError:
            continue
        states.append(len(task.init_states))
        differs += task.language.lower() != bddl_language(task.bddl_file).lower()
    span = sorted(set(states))
    text = "-" if not span else str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}"
    limit = None if base is None else SUITE_MAX_STEPS.get(base)
    return SuiteRow(name, base, changed, count, len(states), text, limit, differs)


def main() -> int:
    """Print one line per suite that the package registers, base suites and their perturbations together."""
    OneLineParser(prog=_PROGRAM, description="List the LIBERO suites of the installed simulator package.").parse_args()
    with bad_input_in_one_line(_PROGRAM, (*MISTAKES, SimulatorUnavailableError)):
        require(render=False)
    print(f"{'suite':40} {'base':15} {'perturbation':25} tasks installed states steps  other language in BDDL")
    names = sorted(list_suites(), key=lambda name: (split_suite(name)[0] or "~", name))
    for row in map(describe_suite, names):
        print(
            f"{row.name:40} {row.base or '-':15} {row.perturbation or '-':25} {row.tasks:5} {row.installed:9} "
            f"{row.init_states:>6} {row.step_limit or '-':>5}  {row.language_differs}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
