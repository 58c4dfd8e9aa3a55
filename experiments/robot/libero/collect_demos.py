"""Collect scripted LIBERO demonstrations into a data set with the layout of the published ones.

    python -m experiments.robot.libero.collect_demos --task_suite_name libero_object --task_ids 0,3,7,9 \
        --episodes_per_task 40 --output_dir data --dataset_name libero_object_scripted_no_noops

By default every episode starts from a placement *sampled* from the task's regions, so that the 50 standard initial
states used by the evaluation stay unseen.  Only successful episodes are kept.  Every episode is saved as soon as it is
finished (`<output_dir>/.scratch/<dataset_name>/`); starting the same command again continues where it stopped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.robot.libero.collect_scratch import collection_report, finished_episodes, load_episode
from experiments.robot.libero.collect_settings import CollectSettings, standard_states
from experiments.robot.libero.collect_workers import CollectionError, run_processes
from experiments.robot.libero.eval_config import task_numbers
from experiments.robot.libero.simulator import require, simulator_versions
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.tasks import load_task, task_count
from prismatic.command_line import MISTAKES, UsageError, bad_input_in_one_line, faults_in_one_line, flag, parse
from prismatic.evidence.checks import read_object
from prismatic.evidence.files import remove_leftovers, write_json
from prismatic.output_folder import check_folder, held
from prismatic.progress import over
from prismatic.vla.datasets.rlds import write_rlds

REPORT_FILE = "collection_report.json"


def collect(settings: CollectSettings) -> Path:
    """Collect everything that is missing, then write the data set.  Returns the version directory.

    Raises FileExistsError when the data set exists, ValueError when the scratch files come from other settings or a
    task or start is outside the suite, SimulatorUnavailableError, and CollectionError when a process died or a task has
    no episode at all.
    """
    if settings.target.exists():
        raise FileExistsError(f"--dataset_name {settings.dataset_name}: {settings.target} exists already")
    _check_task_ids(settings)
    require(render=True)
    with held(settings.scratch, "--output_dir"), held(settings.target, "--output_dir"):
        for folder in settings.scratch.glob("task_*"):
            remove_leftovers(folder, held=True)
        _check_fingerprint(settings)
        run_processes(settings)
        return _finish(settings)


def _finish(settings: CollectSettings) -> Path:
    """Write the report and the data set from the scratch episodes."""
    report = collection_report(settings)
    write_json(settings.scratch / REPORT_FILE, report)
    empty = [task for task, counts in report.items() if not counts["episodes"]]
    if empty:
        raise CollectionError(f"no episode of task {', '.join(empty)}; see {settings.scratch / REPORT_FILE}")
    metadata = settings.fingerprint() | {"versions": simulator_versions(), "tasks": report}
    finished = over(finished_episodes(settings), "writing the data set", "episodes")
    episodes = (load_episode(path, index) for index, path in enumerate(finished))
    shape = (settings.image_size, settings.image_size, 3)
    write_json(settings.target.parent / REPORT_FILE, report)  # first: with the data set there is nothing left to do
    return write_rlds(settings.target, settings.dataset_name, episodes, image_shape=shape, metadata=metadata)


def _check_task_ids(settings: CollectSettings) -> None:
    count = task_count(settings.task_suite_name)
    wrong = [task for task in settings.task_ids if not 0 <= task < count]
    if wrong or not settings.task_ids:
        raise UsageError(f"--task_ids: {settings.task_suite_name} has tasks 0..{count - 1}, found {settings.task_ids}")
    states = standard_states(settings.initial_states)
    if states is None:
        return
    for task in settings.task_ids:
        found = len(load_task(settings.task_suite_name, task).init_states)
        if states[-1] >= found:
            raise UsageError(
                f"--initial_states {settings.initial_states}: task {task} has {found} standard states (0..{found - 1})"
            )


def _check_fingerprint(settings: CollectSettings) -> None:
    path = settings.scratch / "settings.json"
    wanted = json.loads(json.dumps(settings.fingerprint()))
    if not path.is_file():
        write_json(path, wanted)
        return
    found = read_object(path)
    different = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
    if different:
        raise ValueError(
            f"{settings.scratch} holds episodes collected with other settings ({', '.join(different)}); "
            "use another dataset_name or delete the folder"
        )


@dataclass(frozen=True)
class CollectFlags(CollectSettings):
    """The command line: settings whose tasks are still text."""

    task_suite_name: str = flag("", "LIBERO suite (required)")
    # Another type than the field it replaces: still text, of which `settings` makes numbers.
    task_ids: str = flag("", "comma separated, or 'all' (required)")  # type: ignore[assignment]
    output_dir: str = flag("", "root that holds data sets (required)")
    dataset_name: str = flag("", "name of the data set (required)")

    def __post_init__(self) -> None:
        for name in ("task_suite_name", "task_ids", "output_dir", "dataset_name"):
            if not getattr(self, name):
                raise UsageError(f"--{name}: found none, expected one")
        super().__post_init__()
        check_folder(self.output_dir, "--output_dir")

    def settings(self) -> CollectSettings:
        """The settings. `all` asks the simulator for the number of tasks."""
        numbers = range(task_count(self.task_suite_name)) if self.task_ids == "all" else task_numbers(self.task_ids)
        return CollectSettings(**{**vars(self), "task_ids": tuple(numbers or ())})


def parse_arguments(argv: Sequence[str] | None = None) -> CollectSettings:
    """Command line -> settings.  Raises UsageError."""
    description = "Collect scripted LIBERO demonstrations as an RLDS data set."
    return parse(CollectFlags, argv, description=description).settings()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.  Returns 0; unusable input ends the process with one line and exit code 2, a fault with 1."""
    faults = faults_in_one_line("collect_demos.py", (CollectionError,))
    with faults, bad_input_in_one_line("collect_demos.py", (*MISTAKES, SimulatorUnavailableError)):
        settings = parse_arguments(argv)
        print(f"written: {collect(settings)}")
    for task, counts in collection_report(settings).items():
        kept = f"{counts['episodes']}/{settings.episodes_per_task}"
        print(f"task {task}: {kept} episodes, {counts['attempts']} attempts, steps {counts['steps_min_median_max']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
