"""Runs episodes in this process or in simulator processes that share the policy of this one.

A simulator process holds one environment (and one OpenGL context) and no policy: it sends what the policy should see
and waits for the actions. It gets the next episode the moment one ends, of the task whose environment it has as long as
there is one. A process that dies or hangs costs the episode it was running one of its two attempts; a new process takes
its place.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections import Counter, deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

import numpy as np

from experiments.robot.libero.controls import Control
from experiments.robot.libero.episode import (
    Assignment,
    Backend,
    EpisodeRunner,
    Job,
    RunInfo,
    RunnerSettings,
    limit_threads,
    one_line,
    prepare,
)
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_log import EpisodeRecord
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.video import SaveVideos, VideoBudget

MAX_CRASHES = 2
"""Processes an episode may take down before it counts as an error."""

STARTUP_TIMEOUT_S = 1800.0
"""Patience with a worker that is still importing the simulator."""


class WorkerFailedError(RuntimeError):
    """A worker could not start or not load a task; carries its traceback if there is one."""


class ForwardedError(RuntimeError):
    """An exception of the policy, raised again in the process whose episode asked. forwarded: its type and text."""

    def __init__(self, forwarded: str) -> None:
        super().__init__(forwarded)
        self.forwarded = forwarded


class _ParentGoneError(BaseException):
    """Not an Exception: nothing may take it for the outcome of an episode."""


@dataclass(frozen=True)
class SessionReport:
    """Facts about policy, rendering and versions, once per run."""

    facts: dict[str, Any]


@dataclass(frozen=True)
class CrashReport:
    """An episode that took its process down twice."""

    assignment: Assignment
    reason: str


Report = SessionReport | EpisodeRecord | CrashReport


@dataclass(frozen=True)
class _Ready:
    """First message of a worker."""


@dataclass(frozen=True)
class _Query:
    """Arguments of `predict`."""

    request: tuple[np.ndarray, np.ndarray, np.ndarray, str]


class EpisodeQueue:
    """Open episodes, handed out one at a time.

    Args:
        jobs: in the order in which sequential evaluation runs them.
        videos: which episodes are recorded.
    """

    def __init__(self, jobs: Sequence[Job], videos: SaveVideos = SaveVideos.NONE) -> None:
        self._open = {job.task_id: deque(job.episodes) for job in jobs}
        self._budgets = {job.task_id: VideoBudget(videos, job.video_limit) for job in jobs}

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    def take(self, current: int | None, held: Collection[int] = ()) -> Assignment | None:
        """Next episode for a worker with the environment of task `current`; None when there is none left.

        Its own task comes first (another one costs building an environment), then the first task that no other worker
        holds, then the one with most episodes per worker. held: the tasks of the other workers, with repetition.
        """
        tasks = [task for task, episodes in self._open.items() if episodes]
        if not tasks:
            return None
        holders = Counter(held)
        free = [task for task in tasks if not holders[task]]
        if current in tasks:
            task = current
        elif free:
            task = free[0]
        else:
            task = max(tasks, key=lambda task: len(self._open[task]) / holders[task])
        return Assignment(task, self._open[task].popleft(), self._budgets[task].reserve())

    def put_back(self, assignment: Assignment) -> None:
        """The episode did not end: it is the next of its task."""
        self.without_video(assignment)
        self._open[assignment.task_id].appendleft(assignment.planned)

    def without_video(self, assignment: Assignment) -> None:
        """The episode ended, or did not, and left no video."""
        if assignment.record_video:
            self._budgets[assignment.task_id].give_back()


def run_in_process(jobs: Sequence[Job], cfg: EvalConfig, backend: Backend, run: RunInfo) -> Iterator[Report]:
    """One episode after the other, task by task, with the policy in this process."""
    if not jobs:
        return
    policy, settings, facts = prepare(cfg, backend)
    yield SessionReport(facts)
    queue = EpisodeQueue(jobs, cfg.save_videos)
    runner = EpisodeRunner(cfg, backend, run, settings, policy)
    try:
        task: int | None = None
        while (assignment := queue.take(task)) is not None:
            task = assignment.task_id
            record = runner.run(assignment)
            if record.video is None:
                queue.without_video(assignment)
            yield record
    finally:
        runner.close()


class RemotePolicy:
    """The policy of the parent process, as a worker sees it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def predict(self, image: np.ndarray, wrist_image: np.ndarray, state: np.ndarray, instruction: str) -> np.ndarray:
        """As `VLAPolicy.predict`.  Raises ForwardedError for an exception of the policy."""
        try:
            self._connection.send(_Query((image, wrist_image, state, instruction)))
            answer = self._connection.recv()
        except (EOFError, OSError) as error:
            raise _ParentGoneError from error
        if isinstance(answer, ForwardedError):
            raise answer
        return answer


def _worker_main(
    connection: Connection, cfg: EvalConfig, backend: Backend, run: RunInfo, settings: RunnerSettings
) -> None:
    """Receives assignments and sends `_Ready`, queries and records; None ends the process."""
    try:
        limit_threads(max(1, (os.cpu_count() or 1) // cfg.num_workers))
        backend.task_count(cfg.task_suite_name)  # imports the simulator
        policy = None if cfg.control is Control.REPLAY else RemotePolicy(connection)
        runner = EpisodeRunner(cfg, backend, run, settings, policy)
        connection.send(_Ready())
        while (assignment := connection.recv()) is not None:
            connection.send(runner.run(assignment))
    except (EvalInputError, SimulatorUnavailableError) as error:
        connection.send(error)
    except (_ParentGoneError, EOFError, BrokenPipeError):
        pass  # nobody is left to report to
    except BaseException:  # noqa: BLE001 - forwarded to the parent, which raises
        connection.send(WorkerFailedError(traceback.format_exc()))
    finally:
        connection.close()


@dataclass
class _Worker:
    process: BaseProcess
    assignment: Assignment | None = None
    task_id: int | None = None  # whose environment it has
    last_report: float = field(default_factory=lambda: time.monotonic())
    ready: bool = False


class WorkerPool:
    """At most `cfg.num_workers` processes, started with the `spawn` method (a forked GL context does not work)."""

    def __init__(self, cfg: EvalConfig, backend: Backend, run: RunInfo) -> None:
        self._cfg, self._backend, self._run = cfg, backend, run
        self._context = multiprocessing.get_context("spawn")
        self._active: dict[Connection, _Worker] = {}
        self._leaving: list[tuple[Connection, _Worker]] = []
        self._queue = EpisodeQueue([])
        self._crashes: Counter[tuple[int, int]] = Counter()
        self._policy: Any = None
        self._settings: RunnerSettings | None = None

    def run(self, jobs: Sequence[Job]) -> Iterator[Report]:
        """Yield reports in the order they arrive.

        Raises:
            EvalInputError, SimulatorUnavailableError, WorkerFailedError: a worker could not do its job; the others are
                ended.
        """
        if not jobs:
            return
        self._policy, self._settings, facts = prepare(self._cfg, self._backend)
        if hasattr(self._policy, "reset"):
            raise EvalInputError(
                f"--num_workers {self._cfg.num_workers}: this policy remembers the episode it is in (it has `reset`) "
                "and cannot serve several; use --num_workers 0"
            )
        yield SessionReport(facts)
        self._queue = EpisodeQueue(jobs, self._cfg.save_videos)
        try:
            while self._fill():
                yield from self._round()
        finally:
            for connection in list(self._active):
                self._stop(connection)
            deadline = time.monotonic() + 10.0  # releasing a GL context may hang; they have delivered everything
            for connection, worker in self._leaving:
                worker.process.join(max(0.0, deadline - time.monotonic()))
                _end(connection, worker)

    def _fill(self) -> bool:
        """Start workers while there are episodes for them. False when everything is done."""
        waiting = sum(worker.assignment is None for worker in self._active.values())
        for _ in range(min(self._cfg.num_workers - len(self._active), len(self._queue) - waiting)):
            self._start()
        return bool(self._active)

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        arguments = (theirs, self._cfg, self._backend, self._run, self._settings)
        process = self._context.Process(target=_worker_main, args=arguments, daemon=True)
        process.start()
        theirs.close()  # so that the worker's death is seen as the end of the stream
        self._active[ours] = _Worker(process)

    def _round(self) -> list[Report]:
        """Wait for messages; answer the queries among them first, as their episodes stand still."""
        reports: list[Report] = []
        queries: list[tuple[Connection, _Query]] = []
        # cast: `wait` gives back some of what it got, which its annotation does not say.
        for connection in cast("list[Connection]", wait(list(self._active), timeout=1.0)):
            message = self._receive(connection, reports)
            if isinstance(message, _Query):
                queries.append((connection, message))
        self._answer(queries)
        self._end_silent(reports)
        return reports

    def _receive(self, connection: Connection, reports: list[Report]) -> Any:
        worker = self._active[connection]
        try:
            message = connection.recv()
        except (EOFError, OSError):
            self._stop(connection)
            self._after_crash(worker, f"worker process ended with exit code {worker.process.exitcode}", reports)
            return None
        worker.last_report = time.monotonic()
        if isinstance(message, Exception):
            raise message
        if isinstance(message, EpisodeRecord):
            if message.video is None:
                assert worker.assignment is not None  # what the record is of
                self._queue.without_video(worker.assignment)
            reports.append(message)
        if isinstance(message, EpisodeRecord | _Ready):
            worker.ready = True
            self._assign(connection, worker)
        return message

    def _assign(self, connection: Connection, worker: _Worker) -> None:
        held = [other.task_id for other in self._active.values() if other is not worker and other.task_id is not None]
        worker.assignment = self._queue.take(worker.task_id, held)
        _send(connection, worker.assignment)
        if worker.assignment is not None:
            worker.task_id = worker.assignment.task_id
        else:
            self._leaving.append((connection, self._active.pop(connection)))

    def _answer(self, queries: list[tuple[Connection, _Query]]) -> None:
        """Run the policy for those who wait: in one batch when asked to, else one by one, as alone."""
        size = max(1, len(queries)) if self._cfg.batch_inference and hasattr(self._policy, "predict_batch") else 1
        for start in range(0, len(queries), size):
            group = queries[start : start + size]
            for (connection, _), answer in zip(
                group, self._predict([query.request for _, query in group]), strict=True
            ):
                _send(connection, answer)
                self._active[connection].last_report = time.monotonic()

    def _predict(self, requests: list[tuple]) -> list[Any]:
        try:
            if len(requests) > 1:
                return list(self._policy.predict_batch(requests))
            return [self._policy.predict(*requests[0])]
        except Exception as error:  # noqa: BLE001 - an outcome of the episodes that asked
            return [ForwardedError(one_line(error))] * len(requests)

    def _end_silent(self, reports: list[Report]) -> None:
        for connection, worker in list(self._active.items()):
            limit = self._cfg.worker_timeout_s if worker.ready else STARTUP_TIMEOUT_S
            if time.monotonic() - worker.last_report >= limit and not connection.poll():
                self._stop(connection)
                self._after_crash(worker, f"worker process reported nothing for {limit:g} s", reports)

    def _after_crash(self, worker: _Worker, reason: str, reports: list[Report]) -> None:
        if not worker.ready:
            raise WorkerFailedError(f"{reason} while starting")
        assignment = worker.assignment
        if assignment is None:
            return
        key = (assignment.task_id, assignment.planned.init_idx)
        self._crashes[key] += 1
        if self._crashes[key] < MAX_CRASHES:
            self._queue.put_back(assignment)
        else:
            self._queue.without_video(assignment)
            reports.append(CrashReport(assignment, reason))

    def _stop(self, connection: Connection) -> None:
        _end(connection, self._active.pop(connection))


def _end(connection: Connection, worker: _Worker) -> None:
    connection.close()
    if worker.process.is_alive():
        worker.process.kill()
    worker.process.join()


def _send(connection: Connection, message: Any) -> None:
    """Send to a worker that may have died; its death is seen at the next `recv`."""
    with contextlib.suppress(OSError):
        connection.send(message)
