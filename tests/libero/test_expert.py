"""Scripted expert: grasp choice, disturbance process, and closed-loop behaviour in the simulator."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.robot.libero.action_noise import NoiseProcess
from experiments.robot.libero.expert import (
    MAX_ACTION,
    UnsupportedGoalError,
    _pointing_down,
    _rotation_vector,
    _tolerated,
    expert_commands,
    is_noop,
    pick_place_goals,
)
from experiments.robot.libero.expert_settings import ExpertSettings
from experiments.robot.libero.grasps import GraspKind, GraspPlanner

Y_AXIS = np.array([0.0, 1.0])


class FakeGeometry:
    """Point clouds instead of a simulator."""

    def __init__(self, body: np.ndarray, others: np.ndarray | None = None) -> None:
        self._body = body
        self._others = np.zeros((0, 3)) if others is None else others

    def vertices(self, body: str) -> np.ndarray:
        return self._body

    def others(self, body: str) -> np.ndarray:
        return self._others


def box(size, centre=(0.0, 0.0, 0.05), turn=0.0):
    grid = np.stack(np.meshgrid(*[np.linspace(-s / 2, s / 2, 5) for s in size]), -1).reshape(-1, 3)
    cos, sin = np.cos(turn), np.sin(turn)
    return grid @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]).T + centre


def bowl(radius=0.055, height=0.05, centre=(0.1, 0.2)):
    angles = np.linspace(0, 2 * np.pi, 73)[:-1]
    rings = [
        np.stack([r * np.cos(angles), r * np.sin(angles), np.full(72, z)], 1)
        for r, z in ((0.03, 0.0), (radius, height))
    ]
    return np.concatenate(rings) + np.array([*centre, 0.9])


def plan(geometry):
    return GraspPlanner(geometry, ExpertSettings()).plan("object", Y_AXIS)


def test_narrow_objects_are_grasped_over_their_middle():
    grasp = plan(FakeGeometry(box((0.06, 0.04, 0.12), centre=(0.3, -0.1, 0.06))))
    assert grasp.kind is GraspKind.TOP and grasp.yaw == pytest.approx(0.0)
    np.testing.assert_allclose(grasp.position[:2], [0.3, -0.1], atol=1e-9)
    assert 0.08 < grasp.position[2] < 0.12 and grasp.top == pytest.approx(0.12)


def test_the_wrist_turns_only_when_the_object_does_not_fit():
    angles = np.linspace(0, 2 * np.pi, 33)
    can = np.stack([0.03 * np.cos(angles), 0.03 * np.sin(angles), np.linspace(0, 0.1, 33)], axis=1)
    fits = plan(FakeGeometry(can))
    too_wide = plan(FakeGeometry(box((0.05, 0.1, 0.1))))
    assert fits.yaw == pytest.approx(0.0)
    assert abs(too_wide.yaw) == pytest.approx(np.pi / 2, abs=0.1)


def test_turned_boxes_are_grasped_across_their_short_side():
    grasp = plan(FakeGeometry(box((0.15, 0.04, 0.1), turn=0.5)))
    assert grasp.yaw == pytest.approx(0.5, abs=0.09)


def test_wide_containers_are_grasped_at_the_rim_on_the_same_side():
    grasps = [plan(FakeGeometry(bowl(centre=(x, 0.2)))) for x in (0.1, 0.12, 0.05)]
    assert {grasp.kind for grasp in grasps} == {GraspKind.RIM} and {grasp.yaw for grasp in grasps} == {0.0}
    for grasp, x in zip(grasps, (0.1, 0.12, 0.05), strict=True):
        np.testing.assert_allclose(grasp.position[:2], [x, 0.2 + 0.05], atol=1e-6)
        assert 0.9 < grasp.position[2] < 0.95


def test_a_blocked_side_is_avoided():
    wall = box((0.2, 0.02, 0.1), centre=(0.1, 0.29, 0.95))
    grasp = plan(FakeGeometry(bowl(), wall))
    assert grasp.position[1] < 0.2


def test_noise_is_stationary_correlated_and_spares_the_gripper():
    noise = NoiseProcess(0.15, np.random.default_rng(0))
    drawn = np.array([noise.disturb(np.array([0.0] * 6 + [1.0])) for _ in range(8000)])
    assert (drawn[:, 6] == 1.0).all()
    assert drawn[:, :6].std() == pytest.approx(0.15, rel=0.1)
    assert np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1] == pytest.approx(0.8, abs=0.05)


def test_noise_is_clipped_scaled_and_leaves_the_label_alone():
    label = np.full(7, MAX_ACTION)
    executed = NoiseProcess(5.0, np.random.default_rng(1)).disturb(label)
    assert np.abs(executed).max() <= 1.0 and (label == MAX_ACTION).all()
    np.testing.assert_array_equal(NoiseProcess(5.0, np.random.default_rng(1)).disturb(label, scale=0.0), label)


def test_disturbance_shrinks_near_the_goal():
    assert _tolerated(np.array([0.2, 0.0, 0.0])) == 1.0
    assert _tolerated(np.zeros(3)) == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("arm", "gripper", "previous", "idle"),
    [(0.0, 1.0, 1.0, True), (0.0, 1.0, -1.0, False), (0.0, -1.0, None, True), (2e-4, -1.0, -1.0, False)],
)
def test_idle_actions_follow_the_published_rule(arm, gripper, previous, idle):
    assert is_noop(np.array([arm, 0, 0, 0, 0, 0, gripper]), previous) is idle


def test_rotation_vectors_of_axis_rotations():
    cos, sin = np.cos(0.7), np.sin(0.7)
    np.testing.assert_allclose(_rotation_vector(np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])), [0, 0, 0.7])
    np.testing.assert_allclose(_rotation_vector(np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])), [0.7, 0, 0])
    assert (_rotation_vector(np.eye(3)) == 0).all()


def test_pointing_down_keeps_the_heading():
    tilted = np.array([[0.0, 1.0, 0.0], [0.995, 0.0, 0.0998], [0.0998, 0.0, -0.995]])
    upright = _pointing_down(tilted)
    np.testing.assert_allclose(upright @ upright.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(upright) == pytest.approx(1.0)
    np.testing.assert_allclose(upright[:, 2], [0, 0, -1])
    np.testing.assert_allclose(upright[:, 0], [0, 1, 0], atol=1e-12)


def fake_goal_env(*goals):
    domain = SimpleNamespace(parsed_problem={"goal_state": list(goals)}, objects_dict={"bowl_1": None})
    return SimpleNamespace(domain=domain, task=SimpleNamespace(name="some_task"))


def test_goals_are_read_as_pairs():
    assert pick_place_goals(fake_goal_env(["on", "bowl_1", "plate_1"])) == [("bowl_1", "plate_1")]


@pytest.mark.parametrize("goal", [["open", "drawer_1"], ["turnon", "stove_1"], ["on", "cabinet_1", "plate_1"]])
def test_other_goals_are_refused_with_the_task_name(goal):
    with pytest.raises(UnsupportedGoalError, match=f"some_task.*{goal[0]} {goal[1]}"):
        pick_place_goals(fake_goal_env(goal))


@pytest.fixture(scope="module")
def env():
    from experiments.robot.libero.modes import RenderMode, ResetMode
    from experiments.robot.libero.simulator import LiberoEnv
    from experiments.robot.libero.tasks import load_task

    built = LiberoEnv(
        load_task("libero_object", 3), render=False, render_mode=RenderMode.LAZY, reset_mode=ResetMode.SOFT
    )
    yield built
    built.close()


def solve(env, start):
    env.reset(env.task.init_states[start], seed=0)
    env.settle()
    actions, phases, success = [], [], False
    for command in expert_commands(env):
        actions.append(command.action)
        phases.append(command.phase)
        success = env.step(command.action)
        if success or len(actions) == 280:
            break
    return success, np.array(actions), phases


@pytest.mark.simulator
@pytest.mark.slow
def test_expert_solves_a_task_without_idle_steps_and_repeats_itself(env):
    success, actions, phases = solve(env, 0)
    assert success and 60 < len(actions) < 150
    assert np.abs(actions[:, :6]).max() <= MAX_ACTION + 1e-12
    assert set(np.unique(actions[:, 6])) <= {-1.0, 1.0}
    assert np.linalg.norm(actions[:, :6], axis=1).min() >= 1e-4
    assert [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p][:4] == [
        "approach",
        "close",
        "lift",
        "place",
    ]
    assert phases.count("close") < ExpertSettings().close_steps  # it lifts when the fingers hold the bottle
    np.testing.assert_array_equal(solve(env, 0)[1], actions)


@pytest.mark.simulator
@pytest.mark.slow
def test_expert_follows_the_objects(env):
    """Another start needs other actions: the expert is feedback, not a replay."""
    success, actions, _ = solve(env, 5)
    other_success, other, _ = solve(env, 9)
    shared = min(len(actions), len(other))
    assert success and other_success
    assert np.abs(actions[:shared] - other[:shared]).max() > 0.05
