"""Runs jobs in this process or in a pool of worker processes, and yields what they report.

A worker process loads the policy once and takes one job after the other, with one environment at a time (memory stays
level then: each environment reuses what the one before it held). A process that dies or hangs costs the episode it was
running one of its two attempts; the rest of its job continues in a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from experiments.robot.libero.episode import Backend, Job, RunInfo, Session, limit_threads
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_log import EpisodeRecord, PlannedEpisode

MAX_CRASHES = 2
"""Processes an episode may take down before it counts as an error."""


STARTUP_TIMEOUT_S = 1800.0
"""Patience with a worker that is still loading the policy."""


class WorkerFailedError(RuntimeError):
    """A worker could not start (for instance the checkpoint does not load); carries the worker's traceback if any."""


@dataclass(frozen=True)
class SessionReport:
    """Facts about policy, rendering and versions, once per session."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class CrashReport:
    """An episode that took its process down twice."""

    job: Job
    planned: PlannedEpisode
    reason: str


Report = SessionReport | EpisodeRecord | CrashReport


def split_jobs(jobs: Sequence[Job], num_workers: int) -> list[Job]:
    """Divide tasks into parts of consecutive initial states when there are fewer tasks than workers.

    The video limit of a task is divided among its parts (rounded up).
    """
    parts = -(-num_workers // len(jobs)) if jobs else 1
    result = []
    for job in jobs:
        count = min(parts, len(job.episodes))
        bounds = [len(job.episodes) * part // count for part in range(count + 1)]
        limit = None if job.video_limit is None else -(-job.video_limit // count)
        for low, high in zip(bounds, bounds[1:], strict=False):
            result.append(replace(job, episodes=job.episodes[low:high], video_limit=limit))
    return result


def run_in_process(jobs: Sequence[Job], cfg: EvalConfig, backend: Backend, run: RunInfo) -> Iterator[Report]:
    """All jobs one after the other with one policy, in this process."""
    if not jobs:
        return
    session = Session(cfg, backend, run)
    yield SessionReport(session.describe())
    for job in jobs:
        yield from session.run_job(job)


def _worker_main(connection: Connection, cfg: EvalConfig, backend: Backend, run: RunInfo) -> None:
    """Receives jobs and sends reports; None ends a job in this direction and the process in the other."""
    try:
        limit_threads(max(1, (os.cpu_count() or 1) // cfg.num_workers))
        session = Session(cfg, backend, run)
        connection.send(SessionReport(session.describe()))
        while (job := connection.recv()) is not None:
            for record in session.run_job(job):
                connection.send(record)
            connection.send(None)
    except EvalInputError as error:
        connection.send(error)
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except BaseException:  # noqa: BLE001 - forwarded to the parent, which raises
        connection.send(WorkerFailedError(traceback.format_exc()))
    finally:
        connection.close()


@dataclass
class _Worker:
    process: BaseProcess
    job: Job
    remaining: deque[PlannedEpisode]
    last_report: float = field(default_factory=time.monotonic)
    ready: bool = False  # has loaded the policy
    finished: bool = False

    def assign(self, connection: Connection, job: Job) -> None:
        self.job, self.remaining, self.last_report = job, deque(job.episodes), time.monotonic()
        connection.send(job)


class WorkerPool:
    """At most `cfg.num_workers` processes, started with the `spawn` method (a forked GL context does not work)."""

    def __init__(self, cfg: EvalConfig, backend: Backend, run: RunInfo) -> None:
        self._args = (cfg, backend, run)
        self._cfg = cfg
        self._context = multiprocessing.get_context("spawn")
        self._active: dict[Connection, _Worker] = {}
        self._pending: deque[Job] = deque()
        self._crashes: Counter[tuple[int, int]] = Counter()

    def run(self, jobs: Sequence[Job]) -> Iterator[Report]:
        """Yield reports in the order they arrive.

        Raises:
            EvalInputError, WorkerFailedError: a worker could not do its job; the others are ended.
        """
        self._pending = deque(split_jobs(jobs, self._cfg.num_workers))
        try:
            while self._pending or self._active:
                while self._pending and len(self._active) < self._cfg.num_workers:
                    self._start(self._pending.popleft())
                ready = wait(list(self._active), timeout=1.0)
                for connection in ready:
                    yield from self._receive(connection)
                yield from self._end_silent()
        finally:
            for connection in list(self._active):
                self._stop(connection)

    def _start(self, job: Job) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_worker_main, args=(theirs, *self._args), daemon=True)
        process.start()
        theirs.close()  # so that the worker's death is seen as the end of the stream
        worker = self._active[ours] = _Worker(process, job, deque())
        worker.assign(ours, job)

    def _receive(self, connection: Connection) -> Iterator[Report]:
        worker = self._active[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self._stop(connection)
            yield from self._after_crash(worker, f"worker process ended with exit code {worker.process.exitcode}")
            return
        worker.last_report = time.monotonic()
        if isinstance(message, Exception):
            raise message
        if message is None:
            self._next_job(connection, worker)
            return
        worker.ready = True
        if isinstance(message, EpisodeRecord):
            worker.remaining.popleft()
        yield message

    def _next_job(self, connection: Connection, worker: _Worker) -> None:
        if self._pending:
            worker.assign(connection, self._pending.popleft())
            return
        worker.finished = True
        connection.send(None)
        self._stop(connection)

    def _end_silent(self) -> Iterator[Report]:
        for connection, worker in list(self._active.items()):
            limit = self._cfg.worker_timeout_s if worker.ready else STARTUP_TIMEOUT_S
            if time.monotonic() - worker.last_report >= limit:
                self._stop(connection)
                yield from self._after_crash(worker, f"worker process reported nothing for {limit:g} s")

    def _after_crash(self, worker: _Worker, reason: str) -> Iterator[Report]:
        if not worker.ready:
            raise WorkerFailedError(f"{reason} while loading the policy")
        if worker.remaining:
            planned = worker.remaining[0]
            key = (worker.job.task_id, planned.init_idx)
            self._crashes[key] += 1
            if self._crashes[key] >= MAX_CRASHES:
                worker.remaining.popleft()
                yield CrashReport(worker.job, planned, reason)
        if worker.remaining:
            self._pending.appendleft(replace(worker.job, episodes=tuple(worker.remaining)))

    def _stop(self, connection: Connection) -> None:
        worker = self._active.pop(connection)
        if worker.finished:
            worker.process.join(10.0)  # releasing a GL context may hang; it has delivered everything
        connection.close()
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()
