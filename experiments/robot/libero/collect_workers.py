"""The processes that collect: each one task at a time, its share of the episodes."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.robot.libero.collect_episode import collect_episode
from experiments.robot.libero.collect_scratch import episode_header, episode_path, is_settled, write_npz
from experiments.robot.libero.collect_settings import CollectSettings
from experiments.robot.libero.collect_starts import episode_start
from experiments.robot.libero.expert import UnsupportedGoalError
from experiments.robot.libero.kernels import kernels_for_children
from experiments.robot.libero.simulator import LiberoEnv
from experiments.robot.libero.tasks import load_task
from prismatic.evidence.files import write_json


class CollectionError(RuntimeError):
    """A collecting process died, or a task yielded no episode."""


@dataclass(frozen=True)
class Share:
    """Episodes of one task that one process collects: `offset`, `offset + stride`, ..."""

    task_id: int
    offset: int
    stride: int


def collect_share(settings: CollectSettings, share: Share) -> None:
    """Collect the missing episodes of one share (runs in its own process)."""
    numbers = range(share.offset, settings.episodes_per_task, share.stride)
    missing = [n for n in numbers if not is_settled(episode_path(settings.scratch, share.task_id, n))]
    if not missing:
        return
    task = load_task(settings.task_suite_name, share.task_id)
    env = LiberoEnv(task, settings.image_size, settings.render_mode, reset_mode=settings.reset_mode)
    for number in missing:
        if _is_orphan():
            return
        begun = time.monotonic()
        outcome = _collect_number(env, settings, number)
        print(f"{task.name} episode {number}: {outcome}, {time.monotonic() - begun:.1f} s", flush=True)
    env.close()


def _collect_number(env: LiberoEnv, settings: CollectSettings, number: int) -> str:
    path = episode_path(settings.scratch, env.task.task_id, number)
    for attempt in range(settings.max_attempts):
        start = episode_start(settings, env.task.task_id, number, attempt)
        try:
            recorder = collect_episode(env, settings, start)
        except UnsupportedGoalError as error:
            write_json(path.with_suffix(".failed.json"), {"attempts": 0, "reason": str(error)}, indent=None)
            return str(error)
        if recorder is not None:
            header = episode_header(env.task, start, attempt + 1)
            write_npz(path, recorder.arrays() | {"header": np.array(json.dumps(header))})
            return f"{len(recorder)} steps, attempt {attempt + 1}"
    write_json(path.with_suffix(".failed.json"), {"attempts": settings.max_attempts}, indent=None)
    return f"failed {settings.max_attempts} times"


def run_shares(settings: CollectSettings) -> list[Share]:
    """Split the work so that `num_workers` processes are busy, one task per process."""
    parts = max(1, -(-settings.num_workers // len(settings.task_ids)))
    return [Share(task, part, parts) for task in settings.task_ids for part in range(parts)]


def run_processes(settings: CollectSettings) -> None:
    """Run all shares, `num_workers` at a time, each in a fresh process (memory is returned only by ending it)."""
    context = multiprocessing.get_context("spawn")
    waiting = run_shares(settings)
    running: list[tuple[Share, Any]] = []
    failures: list[str] = []
    while waiting or running:
        while waiting and len(running) < settings.num_workers:
            share = waiting.pop(0)
            process = context.Process(target=collect_share, args=(settings, share))
            with kernels_for_children():
                process.start()
            running.append((share, process))
        running[0][1].join(timeout=1.0)
        for share, process in [pair for pair in running if not pair[1].is_alive()]:
            running.remove((share, process))
            if process.exitcode != 0:
                failures.append(f"task {share.task_id} (exit code {process.exitcode})")
    if failures:
        raise CollectionError(f"collecting processes died: {'; '.join(failures)}; finished episodes are kept")


def _is_orphan() -> bool:
    """Whether the run that started this worker was killed; its lock is gone then, and another run may have begun."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
