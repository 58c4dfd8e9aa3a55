"""One demonstration: settle, run the expert, record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.robot.libero.action_noise import NoiseProcess
from experiments.robot.libero.collect_settings import CollectSettings
from experiments.robot.libero.collect_starts import Start
from experiments.robot.libero.expert import Command, ExpertFailedError, expert_commands, is_noop
from experiments.robot.libero.init_noise import InitNoiseError, displace_objects
from experiments.robot.libero.simulator import LiberoEnv
from experiments.robot.libero.tasks import max_episode_steps
from prismatic.vla.images import encode_jpeg

MAX_SETTLING_SHIFT = 0.02  # metres


@dataclass(frozen=True)
class ExpertLimits:
    """Length of a demonstration: at most max_steps until the goal holds, then after_success more."""

    max_steps: int
    after_success: int


class EpisodeRecorder:
    """Collects the frames of one episode; images are compressed at once."""

    def __init__(self, jpeg_quality: int) -> None:
        self._quality = jpeg_quality
        self._rows: dict[str, list[Any]] = {k: [] for k in ("actions", "state", "joint_state", "image", "wrist_image")}

    def add(self, env: LiberoEnv, action: np.ndarray) -> None:
        """Record what the environment shows now and the clean action (7,) chosen for it."""
        seen = env.observe()
        rows = self._rows
        rows["image"].append(encode_jpeg(seen.image, self._quality))
        rows["wrist_image"].append(encode_jpeg(seen.wrist_image, self._quality))
        rows["state"].append(seen.state)
        rows["joint_state"].append(env.joint_state())
        rows["actions"].append(action)

    def __len__(self) -> int:
        return len(self._rows["actions"])

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays for an npz file: float32 (T, 7), (T, 8), (T, 7) and per camera the joined JPEG bytes and lengths."""
        found = {k: np.asarray(self._rows[k], dtype=np.float32) for k in ("actions", "state", "joint_state")}
        for camera in ("image", "wrist_image"):
            strings = self._rows[camera]
            found[camera] = np.frombuffer(b"".join(strings), dtype=np.uint8)
            found[camera + "_lengths"] = np.array([len(s) for s in strings], dtype=np.int64)
        return found


def run_expert(
    env: LiberoEnv, commands: Iterator[Command], noise: NoiseProcess | None, record: Any, limits: ExpertLimits
) -> bool:
    """Execute the expert until the goal has held for `limits.after_success` more steps, it gives up, or the step limit.

    record(env, action) is called before every executed action (None: nothing is recorded).  Idle actions are neither
    executed nor recorded.  Returns whether the goal was reached and holds at the end.
    """
    previous: float | None = None
    executed, last, success = 0, limits.max_steps, False
    try:
        for command in commands:
            if is_noop(command.action, previous):
                continue
            if executed == last:
                break
            if record is not None:
                record(env, command.action)
            previous = command.action[6]
            action = command.action if noise is None else noise.disturb(command.action, command.noise_scale)
            executed += 1
            holds = env.step(action)
            if holds and not success:
                last = executed + limits.after_success
            success = holds
    except ExpertFailedError:
        return False
    return success


def settles(env: LiberoEnv) -> bool:
    """Run the settling steps; whether the start is usable afterwards.

    Sampled placements occasionally overlap, and the objects then fly apart.  Such a start (an object moved sideways
    by more than 2 cm), and one that already fulfils the goal, is not used.
    """
    bodies = [env.sim.model.body_name2id(item.root_body) for item in env.domain.objects_dict.values()]
    before = np.array(env.sim.data.body_xpos[bodies][:, :2])
    env.settle()
    moved = np.linalg.norm(env.sim.data.body_xpos[bodies][:, :2] - before, axis=1)
    return bool(moved.max(initial=0.0) < MAX_SETTLING_SHIFT) and not env.check_success()


def collect_episode(env: LiberoEnv, settings: CollectSettings, start: Start) -> EpisodeRecorder | None:
    """One attempt: reset, displace, settle, run the expert.  Returns the record of a success, else None."""
    states = env.task.init_states
    env.reset(None if start.standard_state is None else states[start.standard_state], seed=start.seed)
    if settings.init_noise_mm > 0:
        try:
            displace_objects(env, settings.init_noise_mm, (start.seed, env.task.task_id, start.standard_state or 0))
        except InitNoiseError:
            return None
    if not settles(env):
        return None
    noise = NoiseProcess(start.noise_std, np.random.default_rng(start.seed)) if start.noise_std > 0 else None
    recorder = EpisodeRecorder(settings.jpeg_quality)
    limits = ExpertLimits(max_episode_steps(settings.task_suite_name), settings.steps_after_success)
    return recorder if run_expert(env, expert_commands(env), noise, recorder.add, limits) else None
