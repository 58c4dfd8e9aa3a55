"""The processes that collect: each one task at a time, its share of the episodes."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import cast

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
from prismatic.progress import Progress, say


class CollectionError(RuntimeError):
    """A collecting process died, or a task yielded no episode."""


@dataclass(frozen=True)
class Share:
    """Episodes of one task that one process collects: `offset`, `offset + stride`, ..."""

    task_id: int
    offset: int
    stride: int


def collect_share(settings: CollectSettings, share: Share, tell: Callable[[str], object] = say) -> None:
    """Collect the missing episodes of one share (runs in its own process). `tell` gets a line of each."""
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
        with suppress(OSError):  # the run that started this one was killed
            tell(f"{task.name} episode {number}: {outcome}, {time.monotonic() - begun:.1f} s")
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
    waiting = run_shares(settings)
    running: dict[Connection, tuple[Share, BaseProcess]] = {}
    failures: list[str] = []
    numbers = [(task, n) for task in settings.task_ids for n in range(settings.episodes_per_task)]
    settled = sum(is_settled(episode_path(settings.scratch, task, n)) for task, n in numbers)
    with Progress(len(numbers), "collecting", "episodes", done=settled) as progress:
        while waiting or running:
            while waiting and len(running) < settings.num_workers:
                share = waiting.pop(0)
                ours, process = _start(settings, share)
                running[ours] = share, process
            # cast: `wait` gives back some of what it got, which its annotation does not say.
            for ours in cast("list[Connection]", wait(list(running))):
                try:
                    say(ours.recv())
                    progress.advance()
                except (EOFError, OSError):  # it has ended
                    share, process = running.pop(ours)
                    process.join()
                    if process.exitcode != 0:
                        failures.append(f"task {share.task_id} (exit code {process.exitcode})")
    if failures:
        raise CollectionError(f"collecting processes died: {'; '.join(failures)}; finished episodes are kept")


def _start(settings: CollectSettings, share: Share) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=collect_share, args=(settings, share, theirs.send))
    with kernels_for_children():
        process.start()
    theirs.close()  # so that the end of the process is the end of what it tells
    return ours, process


def _is_orphan() -> bool:
    """Whether the run that started this worker was killed; its lock is gone then, and another run may have begun."""
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
