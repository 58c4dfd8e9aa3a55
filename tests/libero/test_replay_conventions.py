"""A scripted demonstration succeeds through the evaluator's action path, and fails with each convention broken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from experiments.robot.doctor.data_checks import replay_env, replay_episode
from experiments.robot.doctor.demonstrations import open_data_set, recorded_starts
from experiments.robot.libero import controls, simulator

pytestmark = [pytest.mark.simulator, pytest.mark.slow]
pytest.importorskip("libero")

DATA = Path(__file__).parents[2] / "datasets" / "rlds" / "libero_object_scripted_no_noops"
UNFOLDED, SIMULATOR_ACTIONS = simulator.quat_to_axis_angle, controls.to_simulator_actions


@pytest.fixture(scope="module")
def replay():
    """Runs the shortest demonstration (108 steps) in one environment: () -> (success, what happened)."""
    data = open_data_set(DATA)
    start = recorded_starts(data)[0]
    env = replay_env(data, start)
    yield lambda: replay_episode(env, data, start)
    env.close()


def folded(quat):
    return UNFOLDED(-np.asarray(quat) if quat[3] < 0 else quat)


def inverted(actions):
    return SIMULATOR_ACTIONS(actions) * np.array([1, 1, 1, 1, 1, 1, -1])


def negated_rotation(actions):
    return SIMULATOR_ACTIONS(actions) * np.array([1, 1, 1, -1, -1, -1, 1])


def test_demonstration_succeeds(replay):
    success, text = replay()
    assert success, text


@pytest.mark.parametrize(
    ("module", "name", "broken", "reason"),
    [
        (simulator, "_rotate180", np.ascontiguousarray, "image differs"),
        (simulator, "_rotate180", lambda image: np.ascontiguousarray(image[::-1]), "image differs"),
        (simulator, "CAMERAS", simulator.CAMERAS[::-1], "wrist_image differs"),
        (simulator, "quat_to_axis_angle", folded, r"state[3] is -3"),
        (controls, "to_simulator_actions", inverted, ""),
        (controls, "to_simulator_actions", negated_rotation, ""),
    ],
    ids=["not rotated", "flipped vertically", "swapped cameras", "folded quaternion", "gripper sign", "rotation sign"],
)
def test_demonstration_fails_with_a_broken_convention(replay, monkeypatch, module, name, broken, reason):
    monkeypatch.setattr(module, name, broken)
    success, text = replay()
    assert not success and reason in text, text
