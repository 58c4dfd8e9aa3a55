"""A toy world with the simulator's interface, so that the evaluation protocol is tested without a simulator.

The robot moves along a line: `x += action[0]`. A task is solved once x reaches 1 with the gripper closed. It lives in a
module of its own because worker processes import it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from experiments.robot.libero.eval_config import EvalConfig

CHUNK = 8
LANGUAGES = ("push the Red.Block", "open the drawer", "stack the bowls")


@dataclass
class FakeTask:
    task_id: int
    language: str
    init_states: np.ndarray
    suite: str = "toy_suite"

    @property
    def name(self) -> str:
        return self.language.replace(" ", "_")


class FakeEnv:
    """Records every action and observation; `mishap(x0)` may raise, hang or end the process at policy step 3."""

    def __init__(self, task: FakeTask, settings, mishap=None, wait_done: bool = False) -> None:
        self.task, self.settings, self.mishap, self.wait_done = task, settings, mishap, wait_done
        self.log: list = []
        self.actions: list[np.ndarray] = []
        self.observations = 0
        self.closed = False

    def reset(self, init_state=None, seed=None) -> None:
        self.log.append(("reset", float(init_state[0]), seed))
        self.start = self.x = float(init_state[0])
        self.actions, self.observations = [], 0
        self.noise = np.random.standard_normal()  # noqa: NPY002 - shows whether the episode seeded the global generator

    def step(self, action) -> bool:
        self.actions.append(np.asarray(action))
        if self.mishap is not None and len(self.actions) == 13:
            self.mishap(self.task, self.start)
        if len(self.actions) <= 10 and self.wait_done:
            return True
        self.x += float(action[0])
        return self.x >= 1.0 and action[6] > 0

    def observe(self):
        assert self.settings.render, "observe() without a renderer"
        self.observations += 1
        image = np.full((16, 16, 3), min(255, int(abs(self.x) * 100)), np.uint8)
        return SimpleNamespace(image=image, wrist_image=image + 1, state=np.r_[self.x, np.zeros(6), self.noise])

    def close(self) -> None:
        self.closed = True


class FakePolicy:
    """Moves right by `speed` per step with the gripper closing (0 = closed in the policy's convention)."""

    def __init__(self, speed: float = 0.05, metadata: dict | None = None, center_crop: bool | None = True) -> None:
        self.speed, self.metadata = speed, metadata or {}
        self.image_spec = SimpleNamespace(center_crop=center_crop)
        self.action_spec = SimpleNamespace(chunk_len=CHUNK)
        self.seen: list = []

    def predict(self, image, wrist_image, state, instruction):
        self.seen.append((image, wrist_image, state, instruction))
        chunk = np.zeros((CHUNK, 7))
        chunk[:, 0] = self.speed
        chunk[:, 1] = state[-1]
        return chunk


class RaiseAt:
    """Raises at the given starts: always, or only the first time (remembered in a file, as processes come and go)."""

    def __init__(self, starts, once_file: str | None = None, action: str = "raise", hangs: str = "") -> None:
        """hangs: file that gets a dot whenever a process hangs."""
        self.starts, self.once_file, self.action, self.hangs = tuple(starts), once_file, action, hangs

    def __call__(self, task, start: float) -> None:
        if not any(abs(start - s) < 1e-9 for s in self.starts):
            return
        if self.once_file is not None:
            if Path(self.once_file).exists():
                return
            Path(self.once_file).write_text("happened")
        if self.action == "exit":
            os._exit(9)
        if self.action == "hang":
            with open(self.hangs, "a") as hangs:
                hangs.write(".")
            time.sleep(36_000)
        raise RuntimeError("the renderer\nis gone")


@dataclass
class FakeBackend:
    """Tasks whose initial state i is (-i / 20, task_id)."""

    mishap: object = None
    metadata: dict = field(default_factory=dict)
    center_crop: bool | None = True
    speed: float = 0.05
    limit: int = 40
    num_states: int = 6
    wait_done: bool = False
    load_error: str | None = None
    demos: object = None

    def __post_init__(self) -> None:
        self.envs: list[FakeEnv] = []
        self.policies: list[FakePolicy] = []

    def check_machine(self, cfg):
        pass

    def check_policy(self, cfg):
        pass

    def load_policy(self, cfg):
        if self.load_error and self.load_error != "exit":
            raise OSError(self.load_error)
        self.policies.append(FakePolicy(self.speed, self.metadata, self.center_crop))
        return self.policies[-1]

    def open_demonstrations(self, path):
        return self.demos

    def task_count(self, suite):
        if self.load_error == "exit" and multiprocessing.parent_process() is not None:
            os._exit(9)
        return len(LANGUAGES)

    def load_task(self, suite, task_id):
        states = np.stack([-np.arange(self.num_states) / 20, np.full(self.num_states, float(task_id))], axis=1)
        return FakeTask(task_id, LANGUAGES[task_id], states)

    def max_steps(self, suite):
        return self.limit

    def make_env(self, task, settings):
        self.envs.append(FakeEnv(task, settings, self.mishap, self.wait_done))
        return self.envs[-1]

    def versions(self):
        return {"mujoco": "3.3.0", "numpy": np.__version__}


def lines_of(cfg: EvalConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(cfg.results_dir) / "episodes.jsonl").read_text().splitlines()]


def comparable(cfg: EvalConfig) -> dict:
    """Records without what may differ between two equal runs."""
    free = ("run_id", "wall_s", "video", "query_latency_s", "policy_wait_share", "setup_s")
    return {(r["task_id"], r["init_idx"]): {k: v for k, v in r.items() if k not in free} for r in lines_of(cfg)}


def text_log(cfg: EvalConfig) -> str:
    (path,) = Path(cfg.local_log_dir).glob("EVAL-*.txt")
    assert re.fullmatch(r"EVAL-toy_suite-openvla-\d{4}(_\d\d){2}-\d\d(_\d\d){2}\.txt", path.name)
    return path.read_text()
