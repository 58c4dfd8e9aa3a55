"""The trials of an evaluation: planned, divided between machines, kept beside the results."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from experiments.robot.libero.episode import Backend, Job
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_log import PlannedEpisode, TaskPlan
from experiments.robot.libero.initial_states import read_initial_states
from experiments.robot.libero.suite_names import language_warnings, with_language
from prismatic.evidence.checks import check_fields, parse_object, read_text
from prismatic.evidence.files import write_json

PLAN_FILE = "plan.json"


def plan_tasks(cfg: EvalConfig, backend: Backend) -> list[TaskPlan]:
    """The trials of the run in log order: tasks, then initial states ascending, numbered from 1 without the skipped.

    Raises:
        EvalInputError: unknown suite, task or initial state.
    """
    try:
        count = backend.task_count(cfg.task_suite_name)
        backend.max_steps(cfg.task_suite_name)  # a suite without a step limit cannot be evaluated
    except ValueError as error:
        raise EvalInputError(f"--task_suite_name: {error}") from error
    source = cfg.resolved_language_source()
    plans, tasks, number = [], [], 0
    for task_id in cfg.task_id_list(count):
        try:
            task = backend.load_task(cfg.task_suite_name, task_id)
        except FileNotFoundError as error:
            raise EvalInputError(f"--task_suite_name {cfg.task_suite_name}: {error}") from error
        tasks.append(task)
        episodes = []
        for init_idx, state in read_initial_states(cfg, task).items():
            number += state is not None
            episodes.append(PlannedEpisode(init_idx, None if state is None else number))
        plans.append(TaskPlan(task_id, task.name, with_language(task, source).language, tuple(episodes)))
    for line in language_warnings(cfg.task_suite_name, source, tasks):
        print(f"warning: {line}", file=sys.stderr)
    return plans


def shard_plans(plans: Iterable[TaskPlan], part: int, parts: int) -> list[TaskPlan]:
    """The episodes of one of several machines: every `parts`-th episode number, so that each gets some of every task.

    Skipped trials, which have no number, stay with the first part; tasks without episodes are left out.
    """
    result = []
    for plan in plans:
        mine = tuple(e for e in plan.episodes if (0 if e.number is None else e.number - 1) % parts == part - 1)
        if mine:
            result.append(dataclasses.replace(plan, episodes=mine))
    return result


def write_plan(path: Path, plans: Iterable[TaskPlan]) -> None:
    """Write the trials of a whole run, so that its shards can be joined without a simulator."""
    write_json(path, [dataclasses.asdict(plan) for plan in plans], indent=None, ensure_ascii=False)


def read_plan(path: Path) -> list[TaskPlan]:
    """What `write_plan` wrote.  Raises FileNotFoundError, and ValueError for another content."""
    try:
        tasks = parse_object(f'{{"tasks": {read_text(path)}}}', str(path))["tasks"]
        plans = [
            TaskPlan(**{**task, "episodes": tuple(PlannedEpisode(**episode) for episode in task["episodes"])})
            for task in tasks
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the plan of an evaluation, found something else ({error})") from error
    for plan in plans:
        check_fields(dataclasses.asdict(plan), {"task_id": int, "name": str, "instruction": str}, str(path))
        for episode in plan.episodes:
            check_fields(vars(episode), {"init_idx": int, "number": (int, type(None))}, str(path))
    return plans


def open_jobs(plans: Iterable[TaskPlan], done: Iterable[tuple[int, int]], max_videos: int | None) -> list[Job]:
    """One job per task with the episodes that are neither skipped nor done."""
    done = set(done)
    jobs = []
    for plan in plans:
        left = [e for e in plan.episodes if e.number is not None and (plan.task_id, e.init_idx) not in done]
        if left:
            jobs.append(Job(plan.task_id, tuple(left), max_videos))
    return jobs
