"""One evaluation episode, and the runner that holds the environment of one process."""

from __future__ import annotations

import os
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np

from experiments.robot.libero.controls import WAIT_ACTION, Actor, Control, PolicyActor, ReplayActor, find_demonstration
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_log import EpisodeRecord, EpisodeStatus, PlannedEpisode
from experiments.robot.libero.init_noise import displace_objects
from experiments.robot.libero.initial_states import read_initial_states
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.policy_facts import (
    check_flags,
    read_policy_facts,
    resolve_image_size,
    resolve_render_mode,
)
from experiments.robot.libero.suite_names import perturbation, with_language
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.video import PUBLISHED_FPS, keeps_video, rollout_path, write_video
from prismatic.model_files import CheckpointError, read_json
from prismatic.training.checkpoint_folder import MANIFEST

ENV_SEED = 0
"""Published protocol: the environment is seeded with 0. Seeded before every episode here, so that an episode does not
depend on the ones before it."""


class Backend(Protocol):
    """Everything an evaluation takes from outside; picklable, because worker processes receive a copy."""

    def check_machine(self, cfg: EvalConfig) -> None:
        """EvalInputError or SimulatorUnavailableError when this machine cannot do what is asked, before anything is
        loaded or written."""

    def check_policy(self, cfg: EvalConfig) -> None:
        """Raise EvalInputError for a checkpoint that cannot be one, before anything is written."""

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
            "checkpoint_hash": self.checkpoint.rpartition("@")[2],
            "perturbation": perturbation(cfg.task_suite_name) or "",
            "suite": cfg.task_suite_name,
            "control": cfg.control.value,
            "seed": cfg.seed,
            "language_source": cfg.resolved_language_source().value,
        }


@dataclass(frozen=True)
class Job:
    """Open episodes of one task. video_limit: None or most videos of them."""

    task_id: int
    episodes: tuple[PlannedEpisode, ...]
    video_limit: int | None = None


@dataclass(frozen=True)
class Assignment:
    """One episode to run, and whether to record its frames."""

    task_id: int
    planned: PlannedEpisode
    record_video: bool = False


@dataclass(frozen=True)
class RunnerSettings:
    """What every process of a run must do alike; decided once, with the policy at hand."""

    render_mode: RenderMode
    image_size: int
    versions: dict[str, str]


@dataclass(frozen=True)
class EpisodeLimits:
    """wait_steps idle steps, at most max_steps policy steps, a video frame every frame_interval steps (0: none)."""

    wait_steps: int
    max_steps: int
    frame_interval: int = 0


@dataclass(frozen=True)
class Rollout:
    """Outcome of `run_episode`. query_s: seconds of each query; frames: rotated agent-view images, empty when not
    recorded."""

    success: bool
    steps: int
    query_s: list[float]
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
    query_s: list[float] = []
    for step in range(limits.max_steps):
        frame_due = limits.frame_interval > 0 and step % limits.frame_interval == 0
        query_due = not queue
        observation: Any = env.observe() if frame_due or (query_due and actor.needs_observation) else None
        if frame_due:
            frames.append(observation.image)
        if query_due:
            asked = time.perf_counter()
            queue.extend(actor.act(observation))
            query_s.append(time.perf_counter() - asked)
        if env.step(queue.popleft()):
            return Rollout(True, step + 1, query_s, frames)
    return Rollout(False, limits.max_steps, query_s, frames)


def seed_everything(seed: int) -> None:
    """Seed python, numpy and, where loaded, torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - third-party code draws from the global generator
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False


def prepare(cfg: EvalConfig, backend: Backend) -> tuple[Any, RunnerSettings, dict[str, Any]]:
    """Load the policy and decide what follows from it.

    Returns:
        (policy, None for a replay; settings of all runners; facts for results.json).

    Raises:
        EvalInputError: a flag contradicts the checkpoint.
    """
    policy = None if cfg.control is Control.REPLAY else backend.load_policy(cfg)
    facts = read_policy_facts(policy)
    check_flags(cfg, facts)
    settings = RunnerSettings(resolve_render_mode(cfg, facts), resolve_image_size(cfg, facts), backend.versions())
    described = {
        "policy_metadata": dict(getattr(policy, "metadata", None) or {}),
        "render_mode": settings.render_mode.value,
        "env_img_res": settings.image_size,
        "versions": settings.versions,
    }
    return policy, settings, described


def with_policy_protocol(cfg: EvalConfig, backend: Backend) -> EvalConfig:
    """The flags of a replay, rendered as the policy it is compared with.

    Render mode and image size are those of the training data of `--pretrained_checkpoint` where that is given, else
    those of the replayed demonstrations, as far as they are recorded; flags that are given stay.

    Raises:
        EvalInputError: the checkpoint or the data set cannot be read, or names several modes.
    """
    if cfg.pretrained_checkpoint:
        metadata = _manifest(cfg.pretrained_checkpoint)
    else:
        assert cfg.replay_dataset is not None  # the one or the other is given
        demonstrations = backend.open_demonstrations(cfg.replay_dataset)
        metadata = {"datasets": {"replayed": getattr(demonstrations, "metadata", None)}}
    facts = read_policy_facts(SimpleNamespace(metadata=metadata))
    mode = resolve_render_mode(cfg, facts) if facts.render_modes else cfg.render_mode
    size = resolve_image_size(cfg, facts) if facts.image_sizes else cfg.env_img_res
    return replace(cfg, render_mode=mode, env_img_res=size)


def _manifest(folder: str) -> dict[str, Any]:
    """What our checkpoints say about themselves; {} for published ones."""
    path = Path(folder)
    if not path.is_dir():
        raise EvalInputError(f"--pretrained_checkpoint {folder}: expected a checkpoint directory, found none")
    try:
        return read_json(path / MANIFEST) if (path / MANIFEST).exists() else {}
    except CheckpointError as error:
        raise EvalInputError(f"--pretrained_checkpoint: {error}") from error


class EpisodeRunner:
    """Runs one episode after the other; keeps the environment as long as the task stays the same.

    Args:
        cfg, backend, run: as for the whole evaluation.
        settings: from `prepare`.
        policy: object with `predict`; None for a replay.
    """

    def __init__(
        self, cfg: EvalConfig, backend: Backend, run: RunInfo, settings: RunnerSettings, policy: Any = None
    ) -> None:
        self.cfg, self.backend, self.run_info, self.settings, self.policy = cfg, backend, run, settings, policy
        self._demonstrations: Any = None
        self._task: Any = None
        self._states: dict[int, np.ndarray | None] = {}
        self._actor: Actor | None = None
        self._env: Any = None
        self._offsets: dict[str, list[float]] | None = None
        self._setup_s = 0.0

    def run(self, assignment: Assignment) -> EpisodeRecord:
        """Run one episode. An exception is tried once more in a new environment; if it lasts, the status is error.

        Raises SimulatorUnavailableError, which every episode would end in.
        """
        self._take_task(assignment.task_id)
        planned = assignment.planned
        interval = self._frame_interval() if assignment.record_video else 0
        limits = EpisodeLimits(self.cfg.num_steps_wait, self.backend.max_steps(self.cfg.task_suite_name), interval)
        error: str | None = None
        for attempt in (1, 2):
            started = time.monotonic()
            try:
                init_state = self._states[planned.init_idx]
                assert init_state is not None  # trials without one are not assigned
                rollout = self._attempt(init_state, limits, planned.init_idx)
            except SimulatorUnavailableError:
                raise
            except Exception as exception:  # noqa: BLE001 - any exception is an outcome of the episode
                error = one_line(exception)
                self._close_env()  # its state is unknown now
                continue
            outcome = self._outcome(rollout, time.monotonic() - started)
            outcome |= {"attempts": attempt, "error": error, "video": self._save_video(rollout, planned)}
            return self._record(planned, outcome)
        outcome = {"status": EpisodeStatus.ERROR, "steps": 0, "n_queries": 0, "attempts": 2, "error": error}
        return self._record(planned, outcome | {"wall_s": time.monotonic() - started})

    def close(self) -> None:
        """Close the environment."""
        self._close_env()

    def _take_task(self, task_id: int) -> None:
        if self._task is not None and self._task.task_id == task_id:
            return
        self._close_env()
        self._task = self.backend.load_task(self.cfg.task_suite_name, task_id)
        self._states = read_initial_states(self.cfg, self._task)
        self._actor = self._make_actor()  # demonstrations are filed under the instruction of the file name
        self._task = with_language(self._task, self.cfg.resolved_language_source())

    def _make_actor(self) -> Actor:
        if self.cfg.control is not Control.REPLAY:
            return PolicyActor(self.policy, self.cfg.num_open_loop_steps, self.cfg.control)
        if self._demonstrations is None:
            assert self.cfg.replay_dataset is not None  # `--control replay` needs it
            self._demonstrations = self.backend.open_demonstrations(self.cfg.replay_dataset)
        try:
            actions = find_demonstration(self._demonstrations, self._task.language, self.cfg.replay_episode)
            return ReplayActor(actions, self.cfg.num_open_loop_steps)
        except (KeyError, IndexError, ValueError) as error:
            raise EvalInputError(f"--replay_dataset {self.cfg.replay_dataset}: {error.args[0]}") from error

    def _attempt(self, init_state: np.ndarray, limits: EpisodeLimits, init_idx: int) -> Rollout:
        self._setup_s = 0.0
        if self._env is None:
            settings, started = self.settings, time.monotonic()
            self._env = self.backend.make_env(
                self._task,
                EnvSettings(settings.image_size, settings.render_mode, self.cfg.reset_mode, self.cfg.renders()),
            )
            self._setup_s = time.monotonic() - started
        seed_everything(self.cfg.seed)
        assert self._actor is not None  # it comes with the task
        self._actor.reset(self._task.language)
        self._env.reset(init_state=init_state, seed=ENV_SEED)
        self._offsets = None
        if self.cfg.init_noise_mm > 0:
            key = (self.cfg.seed, self._task.task_id, init_idx)
            self._offsets = displace_objects(self._env, self.cfg.init_noise_mm, key, or_less=True)
        return run_episode(self._env, self._actor, limits)

    def _outcome(self, rollout: Rollout, wall_s: float) -> dict[str, Any]:
        renderer = getattr(self._env, "gl_renderer", None)
        return {
            "status": EpisodeStatus.SUCCESS if rollout.success else EpisodeStatus.FAILURE,
            "steps": rollout.steps,
            "n_queries": len(rollout.query_s),
            "wall_s": wall_s,
            "query_latency_s": [round(seconds, 5) for seconds in rollout.query_s],
            "policy_wait_share": sum(rollout.query_s) / wall_s if wall_s > 0 else 0.0,
            "setup_s": self._setup_s,
            "init_offsets_mm": self._offsets,
            "gl_renderer": renderer() if renderer is not None else "",
        }

    def _close_env(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def _frame_interval(self) -> int:
        if self.cfg.video_frame_interval is not None:
            return self.cfg.video_frame_interval
        return 1 if self.settings.render_mode is RenderMode.EVERY_STEP else self.cfg.num_open_loop_steps

    def _save_video(self, rollout: Rollout, planned: PlannedEpisode) -> str | None:
        if not rollout.frames or not keeps_video(self.cfg.save_videos, rollout.success):
            return None
        folder = f"{self.cfg.rollout_dir}/{self.cfg.save_version}"
        started, task = self.run_info.started, self._task.language
        assert planned.number is not None  # skipped trials have no frames
        path = rollout_path(folder, started, planned.number, rollout.success, task)
        # A sparser video keeps its duration.
        return write_video(path, rollout.frames, PUBLISHED_FPS / self._frame_interval())

    def _record(self, planned: PlannedEpisode, outcome: dict[str, Any]) -> EpisodeRecord:
        return EpisodeRecord(
            **self.run_info.record_fields(self.cfg),
            task_id=self._task.task_id,
            task_name=self._task.name,
            instruction=self._task.language,
            init_idx=planned.init_idx,
            render_mode=self.settings.render_mode.value,
            versions=self.settings.versions,
            **outcome,
        )


def limit_threads(threads: int) -> None:
    """CPU threads of this process for numerical libraries and the software renderer; what the user set wins.

    Effective for libraries imported later, so it comes first in a worker process.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ.setdefault("LP_NUM_THREADS", str(threads))


def one_line(exception: BaseException) -> str:
    """`Type: text` without line ends; that of a forwarded exception is its own."""
    forwarded = getattr(exception, "forwarded", None)
    if forwarded is not None:
        return forwarded
    text = " ".join(str(exception).split())
    return f"{type(exception).__name__}: {text}" if text else type(exception).__name__
