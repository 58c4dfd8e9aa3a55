"""One evaluation episode, and the session that runs the episodes of a job in one process."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from experiments.robot.libero.controls import WAIT_ACTION, Actor, Control, PolicyActor, ReplayActor, find_demonstration
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_log import EpisodeRecord, EpisodeStatus, PlannedEpisode
from experiments.robot.libero.init_noise import displace_objects
from experiments.robot.libero.initial_states import read_initial_states
from experiments.robot.libero.policy_facts import (
    check_flags,
    read_policy_facts,
    resolve_image_size,
    resolve_render_mode,
)
from experiments.robot.libero.simulator import RenderMode, ResetMode
from experiments.robot.libero.suites import with_language
from experiments.robot.libero.video import PUBLISHED_FPS, SaveVideos, VideoBudget, rollout_path, write_video

ENV_SEED = 0
"""Published protocol: the environment is seeded with 0. Seeded before every episode here, so that an episode does not
depend on the ones before it."""


class Backend(Protocol):
    """Everything an evaluation takes from outside; picklable, because worker processes receive a copy."""

    def load_policy(self, cfg: EvalConfig) -> Any:
        """Policy object with `predict`, and optionally `metadata`, `image_spec`, `action_spec`."""

    def open_demonstrations(self, path: str) -> Any:
        """Reader for `controls.find_demonstration`."""

    def task_count(self, suite: str) -> int:
        """Number of tasks; ValueError for an unknown suite."""

    def load_task(self, suite: str, task_id: int) -> Any:
        """Task with `name`, `language`, `init_states` (n, d)."""

    def max_steps(self, suite: str) -> int:
        """Policy steps after which an episode has failed."""

    def make_env(self, task: Any, settings: EnvSettings) -> Any:
        """Environment with `reset(init_state, seed)`, `step(action) -> done`, `observe()`, `close()`."""

    def versions(self) -> dict[str, str]:
        """Versions of the packages that decide how an episode ends."""


@dataclass(frozen=True)
class EnvSettings:
    """How an environment is built. render False: nobody will call `observe`."""

    image_size: int
    render_mode: RenderMode
    reset_mode: ResetMode
    render: bool


@dataclass(frozen=True)
class RunInfo:
    """Identity of a run, the same in all its processes. started: `YYYY_MM_DD-HH_MM_SS`."""

    run_id: str
    started: str
    fingerprint: str
    checkpoint: str

    def record_fields(self, cfg: EvalConfig) -> dict[str, Any]:
        """The fields of an episode record that are the same for the whole run."""
        return {
            "run_id": self.run_id,
            "fingerprint": self.fingerprint,
            "checkpoint": self.checkpoint,
            "suite": cfg.task_suite_name,
            "control": cfg.control.value,
            "seed": cfg.seed,
            "language_source": cfg.resolved_language_source().value,
        }


@dataclass(frozen=True)
class Job:
    """Episodes of one task for one process. video_limit: None or most videos of this job."""

    task_id: int
    episodes: tuple[PlannedEpisode, ...]
    video_limit: int | None = None


@dataclass(frozen=True)
class EpisodeLimits:
    """wait_steps idle steps, at most max_steps policy steps, a video frame every frame_interval steps (0: none)."""

    wait_steps: int
    max_steps: int
    frame_interval: int = 0


@dataclass(frozen=True)
class Rollout:
    """Outcome of `run_episode`. frames: rotated agent-view images, empty when not recorded."""

    success: bool
    steps: int
    n_queries: int
    frames: list[np.ndarray]


def run_episode(env: Any, actor: Actor, limits: EpisodeLimits) -> Rollout:
    """Published episode protocol, from a freshly reset environment.

    Idle steps (whose `done` is ignored), then actions from a queue that the actor refills when it is empty; success is
    the first `done`. The environment is observed only when the actor needs it or a video frame is due.

    Args:
        env: environment after `reset`.
        actor: after `reset`.
        limits: numbers of steps.
    """
    for _ in range(limits.wait_steps):
        env.step(WAIT_ACTION.copy())
    queue: deque[np.ndarray] = deque()
    frames: list[np.ndarray] = []
    n_queries = 0
    for step in range(limits.max_steps):
        frame_due = limits.frame_interval > 0 and step % limits.frame_interval == 0
        query_due = not queue
        observation = env.observe() if frame_due or (query_due and actor.needs_observation) else None
        if frame_due:
            frames.append(observation.image)
        if query_due:
            queue.extend(actor.act(observation))
            n_queries += 1
        if env.step(queue.popleft()):
            return Rollout(True, step + 1, n_queries, frames)
    return Rollout(False, limits.max_steps, n_queries, frames)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and, where loaded, torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code draws from the global generator
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


class Session:
    """Loads the policy once and runs jobs with it, one environment at a time.

    Raises:
        EvalInputError: a flag contradicts the checkpoint.
    """

    def __init__(self, cfg: EvalConfig, backend: Backend, run: RunInfo) -> None:
        self.cfg, self.backend, self.run = cfg, backend, run
        self.policy: Any = None
        self.demonstrations: Any = None
        if cfg.control is Control.REPLAY:
            self.demonstrations = backend.open_demonstrations(cfg.replay_dataset)
        else:
            self.policy = backend.load_policy(cfg)
        facts = read_policy_facts(self.policy)
        check_flags(cfg, facts)
        self.render_mode = resolve_render_mode(cfg, facts)
        self.image_size = resolve_image_size(cfg, facts)
        self.versions = backend.versions()
        self._env: Any = None
        self._offsets: dict[str, list[float]] | None = None

    def describe(self) -> dict[str, Any]:
        """Facts known only after loading, for results.json."""
        return {
            "policy_metadata": dict(getattr(self.policy, "metadata", None) or {}),
            "render_mode": self.render_mode.value,
            "env_img_res": self.image_size,
            "versions": self.versions,
        }

    def run_job(self, job: Job) -> Iterator[EpisodeRecord]:
        """Run the episodes of one task and yield a record after each.

        Yields:
            One record per planned episode, in order; an episode whose exception persisted after one retry in a new
            environment has status error.
        """
        task = self.backend.load_task(self.cfg.task_suite_name, job.task_id)
        states = read_initial_states(self.cfg, task)
        actor = self._actor(task)  # demonstrations are filed under the name in the file name
        task = with_language(task, self.cfg.resolved_language_source())
        budget = VideoBudget(self.cfg.save_videos, job.video_limit)
        try:
            for planned in job.episodes:
                yield self._run_planned(task, actor, planned, states[planned.init_idx], budget)
        finally:
            self._close_env()

    def _actor(self, task: Any) -> Actor:
        if self.demonstrations is None:
            return PolicyActor(self.policy, self.cfg.num_open_loop_steps, self.cfg.control)
        try:
            actions = find_demonstration(self.demonstrations, task.language, self.cfg.replay_episode)
        except (KeyError, IndexError, ValueError) as error:
            raise EvalInputError(f"--replay_dataset {self.cfg.replay_dataset}: {error.args[0]}") from error
        return ReplayActor(actions, self.cfg.num_open_loop_steps)

    def _run_planned(
        self, task: Any, actor: Actor, planned: PlannedEpisode, init_state: np.ndarray, budget: VideoBudget
    ) -> EpisodeRecord:
        limits = EpisodeLimits(
            self.cfg.num_steps_wait,
            self.backend.max_steps(self.cfg.task_suite_name),
            self._frame_interval() if budget.should_record() else 0,
        )
        error: str | None = None
        for attempt in (1, 2):
            started = time.monotonic()
            try:
                rollout = self._attempt(task, actor, init_state, limits, planned.init_idx)
            except Exception as exception:  # noqa: BLE001 - any exception is an outcome of the episode
                error = _one_line(exception)
                self._close_env()  # its state is unknown now
                continue
            video = self._save_video(rollout, planned, task.language, budget) if limits.frame_interval else None
            status = EpisodeStatus.SUCCESS if rollout.success else EpisodeStatus.FAILURE
            counts = {"steps": rollout.steps, "n_queries": rollout.n_queries, "attempts": attempt, "video": video}
            counts["init_offsets_mm"] = self._offsets
            return self._record(task, planned, status, counts | {"error": error, "wall_s": time.monotonic() - started})
        counts = {"steps": 0, "n_queries": 0, "attempts": 2, "error": error, "wall_s": time.monotonic() - started}
        return self._record(task, planned, EpisodeStatus.ERROR, counts)

    def _attempt(
        self, task: Any, actor: Actor, init_state: np.ndarray, limits: EpisodeLimits, init_idx: int
    ) -> Rollout:
        if self._env is None:
            render = actor.needs_observation or self.cfg.save_videos is not SaveVideos.NONE
            settings = EnvSettings(self.image_size, self.render_mode, self.cfg.reset_mode, render)
            self._env = self.backend.make_env(task, settings)
        seed_everything(self.cfg.seed)
        actor.reset(task.language)
        self._env.reset(init_state=init_state, seed=ENV_SEED)
        self._offsets = None
        if self.cfg.init_noise_mm > 0:
            key = (self.cfg.seed, task.task_id, init_idx)
            self._offsets = displace_objects(self._env, self.cfg.init_noise_mm, key)
        return run_episode(self._env, actor, limits)

    def _close_env(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def _frame_interval(self) -> int:
        if self.cfg.video_frame_interval is not None:
            return self.cfg.video_frame_interval
        return 1 if self.render_mode is RenderMode.PUBLISHED else self.cfg.num_open_loop_steps

    def _save_video(
        self, rollout: Rollout, planned: PlannedEpisode, instruction: str, budget: VideoBudget
    ) -> str | None:
        if not budget.take(rollout.success):
            return None
        folder = f"{self.cfg.rollout_dir}/{self.cfg.save_version}"
        path = rollout_path(folder, self.run.started, planned.number, rollout.success, instruction)
        # A sparser video keeps its duration.
        write_video(path, rollout.frames, PUBLISHED_FPS / self._frame_interval())
        return path

    def _record(
        self, task: Any, planned: PlannedEpisode, status: EpisodeStatus, outcome: dict[str, Any]
    ) -> EpisodeRecord:
        return EpisodeRecord(
            **self.run.record_fields(self.cfg),
            task_id=task.task_id,
            task_name=task.name,
            instruction=task.language,
            init_idx=planned.init_idx,
            status=status,
            render_mode=self.render_mode.value,
            versions=self.versions,
            **outcome,
        )


def limit_threads(threads: int) -> None:
    """CPU threads of this process for the numerical libraries; an OMP_NUM_THREADS set by the user wins.

    Effective for libraries imported later, so it comes first in a worker process.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def _one_line(exception: BaseException) -> str:
    text = " ".join(str(exception).split())
    return f"{type(exception).__name__}: {text}" if text else type(exception).__name__
