"""Suites and tasks of the installed simulator package, with their step limits and initial states."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.libero_package import import_libero, initial_states
from experiments.robot.libero.suite_names import nearest_suite, split_suite
from experiments.robot.libero.surroundings import quiet

SUITE_MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Policy steps after the settling phase before an episode counts as failed (published protocol)."""


class UnknownSuiteError(ValueError):
    """The named LIBERO suite does not exist."""


@dataclass(frozen=True)
class LiberoTask:
    """One task of one suite.

    Fields: suite, task_id (position in the suite), name (file stem), language (instruction as in the published data),
    bddl_file (existing path), init_states (n, d) float64: flattened [time, qpos, qvel] of the standard starts.
    """

    suite: str
    task_id: int
    name: str
    language: str
    bddl_file: Path
    init_states: np.ndarray = field(repr=False, compare=False)


def max_episode_steps(suite: str) -> int:
    """Policy steps allowed per episode of `suite`; perturbed suites (`libero_spatial_swap`) inherit from their base.

    Raises UnknownSuiteError when no base suite matches.
    """
    base, _ = split_suite(suite)
    if base is not None:
        return SUITE_MAX_STEPS[base]
    raise UnknownSuiteError(
        f"no step limit for suite {suite!r}{nearest_suite(suite, SUITE_MAX_STEPS)}; known base suites: "
        f"{', '.join(SUITE_MAX_STEPS)}"
    )


def list_suites() -> list[str]:
    """Names of the suites that have tasks, sorted."""
    import_libero()
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    return sorted(name for name, tasks in libero_task_map.items() if tasks)


def task_count(suite: str) -> int:
    """Number of tasks in `suite`.  Raises UnknownSuiteError."""
    return _benchmark(suite).n_tasks


def load_task(suite: str, task_id: int) -> LiberoTask:
    """Load a task with its standard initial states.

    Raises UnknownSuiteError (listing the suites), ValueError for a task id outside the suite, FileNotFoundError when
    the task's BDDL or initial-state file is not installed.
    """
    benchmark = _benchmark(suite)
    if not 0 <= task_id < benchmark.n_tasks:
        raise ValueError(f"task_id: suite {suite!r} has tasks 0..{benchmark.n_tasks - 1}, found {task_id}")
    task = benchmark.get_task(task_id)
    bddl_file = Path(benchmark.get_task_bddl_file_path(task_id)).resolve()
    if not bddl_file.is_file():
        raise FileNotFoundError(f"task description of {suite} task {task_id} is not installed: {bddl_file}")
    states = initial_states(benchmark, task_id)
    return LiberoTask(suite, task_id, task.name, task.language, bddl_file, states)


def _benchmark(suite: str) -> Any:
    import_libero()
    from libero.libero import benchmark

    known, suites = benchmark.get_benchmark_dict(), list_suites()
    if suite.lower() not in known or suite not in suites:
        raise UnknownSuiteError(f"unknown LIBERO suite {suite!r}{nearest_suite(suite, suites)}")
    with quiet():
        return known[suite.lower()]()
