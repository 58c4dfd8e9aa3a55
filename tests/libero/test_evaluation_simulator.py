"""The evaluation against the real simulator: a few steps, cheap rendering."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.robot.libero.eval_backend import LiberoBackend
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_plan import plan_tasks
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.video import SaveVideos

pytestmark = [pytest.mark.simulator, pytest.mark.slow]
pytest.importorskip("libero")


class LookingPolicy:
    """Moves depending on what it sees, and remembers it."""

    def __init__(self) -> None:
        self.seen: list[tuple[np.ndarray, np.ndarray]] = []

    def predict(self, image, wrist_image, state, instruction):
        assert image.shape == wrist_image.shape == (64, 64, 3) and instruction.startswith("pick up")
        self.seen.append((image.copy(), state.copy()))
        chunk = np.zeros((8, 7))
        chunk[:, 0] = image.mean() / 255 - 0.5
        chunk[:, 6] = 1.0
        return chunk


class ShortBackend(LiberoBackend):
    """The real simulator with episodes of 16 steps."""

    def __init__(self) -> None:
        self.policy = LookingPolicy()

    def check_policy(self, cfg):
        pass

    def load_policy(self, cfg):
        return self.policy

    def max_steps(self, suite):
        return min(16, super().max_steps(suite))


def config(folder: Path, **changes) -> EvalConfig:
    checkpoint = folder / "chkpt"
    checkpoint.mkdir(parents=True)
    (checkpoint / "x").write_text("x")
    options = {
        "pretrained_checkpoint": str(checkpoint),
        "task_suite_name": "libero_object",
        "task_ids": "0",
        "render_mode": RenderMode.LAZY,
        "reset_mode": ResetMode.SOFT,
        "env_img_res": 64,
        "local_log_dir": str(folder / "logs"),
        "results_dir": str(folder / "results"),
        "save_videos": SaveVideos.NONE,
    }
    return EvalConfig(**{**options, **changes})


def run_both_ways(folder: Path, reset_mode: ResetMode) -> tuple[list, list]:
    """What the policy saw in the episode from initial state 1, after another episode and alone."""
    both, alone = ShortBackend(), ShortBackend()
    results = evaluate(config(folder / "a", num_trials_per_task=2, reset_mode=reset_mode), both)
    evaluate(config(folder / "b", num_trials_per_task=1, initial_state_offset=1, reset_mode=reset_mode), alone)
    assert results["valid"] and results["overall"]["failures"] == 2
    assert len(both.policy.seen) == 4 and len(alone.policy.seen) == 2
    assert not np.array_equal(both.policy.seen[0][1], both.policy.seen[2][1])  # another initial state
    return both.policy.seen[2:], alone.policy.seen


def test_an_episode_is_the_same_alone_and_after_another(tmp_path):
    after, alone = run_both_ways(tmp_path, ResetMode.HARD)
    for (image, state), (image_alone, state_alone) in zip(after, alone, strict=True):
        np.testing.assert_array_equal(state, state_alone)
        np.testing.assert_array_equal(image, image_alone)
    record = json.loads((tmp_path / "a" / "results" / "episodes.jsonl").read_text().splitlines()[0])
    assert record["steps"] == 16 and record["n_queries"] == 2 and record["versions"]["robosuite"] == "1.4.0"


def test_workers_see_what_the_published_protocol_sees(tmp_path):
    """The images and states of all queries: rendered in each step with rebuilt models, and by workers."""
    sequential, shared = ShortBackend(), ShortBackend()
    two = {"num_trials_per_task": 2, "seed": 7}
    published = {"render_mode": RenderMode.EVERY_STEP, "reset_mode": ResetMode.HARD}
    evaluate(config(tmp_path / "a", num_workers=0, **published, **two), sequential)
    results = evaluate(config(tmp_path / "b", num_workers=2, render_mode=RenderMode.PUBLISHED, **two), shared)
    assert results["valid"] and results["gl_renderers"] and len(shared.policy.seen) == 4

    def in_order(policy):
        return sorted((state.tobytes(), image.tobytes()) for image, state in policy.seen)

    assert in_order(sequential.policy) == in_order(shared.policy)


def test_unknown_suite_and_too_many_trials_are_input_errors(tmp_path):
    with pytest.raises(EvalInputError, match="libero_spatial"):
        plan_tasks(config(tmp_path / "a", task_suite_name="libero_spatail"), LiberoBackend())
    with pytest.raises(EvalInputError, match="50 initial states"):
        plan_tasks(config(tmp_path / "b", num_trials_per_task=51), LiberoBackend())
