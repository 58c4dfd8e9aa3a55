"""Simulator access: rotation convention, quiet and private import, resets, rendering, and the pinned physics."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.robot.libero import simulator
from experiments.robot.libero.culling import outside_view
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.simulator import LiberoEnv, idle_action, quat_to_axis_angle
from experiments.robot.libero.tasks import SUITE_MAX_STEPS, UnknownSuiteError, load_task, max_episode_steps

ROOT = Path(__file__).parents[2]
CAMERA_FIELDS = ("image", "wrist_image")


# -- without the simulator ------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.floats(20, 120), st.floats(0.01, 2))
def test_what_a_camera_can_see_is_never_outside_its_view(seed, degrees, radius):
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    centre, position = rng.normal(size=(2, 3))
    model = SimpleNamespace(geom_rbound=np.array([radius, 0.0]), cam_fovy=np.array([degrees]))
    data = SimpleNamespace(
        geom_xpos=np.stack([centre, centre]), cam_xpos=position[None], cam_xmat=rotation.reshape(1, 9)
    )
    sphere, plane = outside_view(model, data, 0)
    directions = rng.normal(size=(2000, 3))
    points = centre + radius * rng.random((2000, 1)) * directions / np.linalg.norm(directions, axis=1, keepdims=True)
    x, y, depth = ((points - position) @ rotation * [1, 1, -1]).T
    reach = depth * np.tan(np.deg2rad(degrees) / 2)
    can_be_seen = ((depth > 0) & (np.abs(x) <= reach) & (np.abs(y) <= reach)).any()
    assert not plane and not (sphere and can_be_seen)
    behind = ((centre - position) @ rotation)[2] > 1.1 * radius + 0.01
    assert sphere or not behind


def test_axis_angle_is_not_folded_to_the_upper_hemisphere():
    quat = np.array([0.6, 0.0, 0.0, -0.8])
    assert np.linalg.norm(quat_to_axis_angle(quat)) > np.pi
    assert not np.allclose(quat_to_axis_angle(quat), quat_to_axis_angle(-quat))


@pytest.mark.parametrize("w", [1.0, -1.0, 1.0 + 1e-9])
def test_axis_angle_is_zero_where_the_sine_is_zero(w):
    assert (quat_to_axis_angle(np.array([0.0, 0.0, 0.0, w])) == 0).all()


def test_axis_angle_names_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(4,\).*\(3,\)"):
        quat_to_axis_angle(np.zeros(3))


def test_step_limits_of_published_and_perturbed_suites():
    assert SUITE_MAX_STEPS["libero_spatial"] == 220 and SUITE_MAX_STEPS["libero_10"] == 520
    assert max_episode_steps("libero_object_swap") == SUITE_MAX_STEPS["libero_object"]
    assert max_episode_steps("libero_10_task") == SUITE_MAX_STEPS["libero_10"]
    with pytest.raises(UnknownSuiteError, match="libero_goal"):
        max_episode_steps("libero_100")


def test_importing_is_light_and_silent():
    heavy = "('mujoco', 'robosuite', 'libero')"
    code = f"import sys, experiments.robot.libero.simulator; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=_environment())
    assert (done.stdout, done.stderr) == ("[]\n", "")


# -- with the simulator ---------------------------------------------------------------------------------------------


def _environment(**changes: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("LIBERO_CONFIG_PATH", "MUJOCO_GL")}
    return kept | {"PYTHONPATH": str(ROOT)} | changes


def _positions(env: LiberoEnv) -> dict[str, np.ndarray]:
    return {name: env.sim.data.body_xpos[body].copy() for name, body in env.domain.obj_body_id.items()}


@pytest.fixture(scope="module")
def spatial_task():
    return load_task("libero_spatial", 5)


@pytest.fixture(scope="module")
def spatial_env(spatial_task):
    """Soft resets, no renderer."""
    env = LiberoEnv(spatial_task, render=False, render_mode=RenderMode.LAZY, reset_mode=ResetMode.SOFT)
    yield env
    env.close()


@pytest.fixture(scope="module")
def object_rollouts():
    """The same four motions in both render modes: {mode: (observations, states)}; states has the start in front."""
    task = load_task("libero_object", 0)
    return {mode: _rollout(task, mode) for mode in RenderMode}


def _rollout(task, mode):
    env = LiberoEnv(task, image_size=96, render_mode=mode, reset_mode=ResetMode.SOFT)
    env.reset(task.init_states[0], seed=0)
    env.settle(1)
    states, seen = [env.state()], [env.observe()]
    raw = env.sim.render(96, 96, camera_name="agentview") if mode is RenderMode.PUBLISHED else None
    for _ in range(4):
        env.step(np.array([0.6, -0.4, -0.5, 0.0, 0.05, 0.1, -1.0]))
        states.append(env.state())  # before the image: a lazy one brings the body poses up to date first
        seen.append(env.observe())
    env.close()
    return seen, np.array(states), raw


@pytest.mark.simulator
@pytest.mark.slow
def test_loading_writes_nothing_and_prints_nothing(tmp_path):
    code = (
        "import os; from experiments.robot.libero.tasks import load_task\n"
        "task = load_task('libero_spatial', 0)\n"
        "assert task.init_states.shape == (50, 92), task.init_states.shape\n"
        "open(os.environ['OUT'], 'w').write(os.environ['LIBERO_CONFIG_PATH'])"
    )
    home, out = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    environment = _environment(HOME=str(home), OUT=str(out), MUJOCO_GL="osmesa")
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and "[info]" not in done.stderr
    assert not any(path.is_file() for path in home.rglob("*"))
    assert not Path(out.read_text()).exists(), "the private configuration folder must not stay behind"


@pytest.mark.simulator
def test_unknown_suite_names_the_nearest_one():
    with pytest.raises(UnknownSuiteError, match="did you mean libero_spatial. python -m .*suites lists all"):
        load_task("libero_spatail", 0)
    with pytest.raises(UnknownSuiteError):
        load_task("libero_100", 0)  # registered upstream, but without tasks


@pytest.mark.simulator
def test_task_id_outside_the_suite():
    with pytest.raises(ValueError, match=r"0\.\.9.*found 10"):
        load_task("libero_spatial", 10)


@pytest.mark.simulator
def test_task_description(spatial_task):
    assert spatial_task.language == "pick up the black bowl on the ramekin and place it on the plate"
    assert spatial_task.bddl_file.is_file()
    assert spatial_task.init_states.dtype == np.float64 and len(spatial_task.init_states) == 50


@pytest.mark.simulator
def test_bowl_rests_on_the_ramekin_with_the_pinned_physics(spatial_env, spatial_task):
    """Numbers of mujoco 3.3.0.  From 3.4 on the bowl slides off and published policies fail this task."""
    spatial_env.reset(spatial_task.init_states[3], seed=0)
    spatial_env.settle()
    places = _positions(spatial_env)
    offset = places["akita_black_bowl_1"] - places["glazed_rim_porcelain_ramekin_1"]
    assert np.linalg.norm(offset[:2]) == pytest.approx(0.0145, abs=5e-4)
    assert offset[2] == pytest.approx(0.0351, abs=5e-4)


@pytest.mark.simulator
def test_initial_state_is_restored_and_checked(spatial_env, spatial_task):
    spatial_env.reset(spatial_task.init_states[7], seed=0)
    np.testing.assert_array_equal(spatial_env.joint_state(), spatial_task.init_states[7, 1:8])
    with pytest.raises(ValueError, match=r"expected shape \(92,\), found \(91,\)"):
        spatial_env.reset(spatial_task.init_states[7, :-1])


@pytest.mark.simulator
def test_sampled_starts_depend_on_the_seed_only(spatial_env):
    def start(seed):
        spatial_env.reset(seed=seed)
        return np.concatenate([spatial_env.sim.data.qpos, *_positions(spatial_env).values()])

    outside = np.random.get_state()[1].copy()  # noqa: NPY002
    first, other, again = start(11), start(12), start(11)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(np.random.get_state()[1], outside)  # noqa: NPY002


@pytest.mark.simulator
def test_sampled_joints_have_the_spread_of_the_standard_starts(spatial_env, spatial_task):
    joints = []
    for seed in range(30):
        spatial_env.reset(seed=seed)
        joints.append(spatial_env.joint_state())
    standard = spatial_task.init_states[:, 1:8]
    assert 0.012 < np.std(joints, axis=0).mean() < 0.028
    assert np.abs(np.mean(joints, 0) - standard.mean(0)).max() < 0.015


@pytest.mark.simulator
def test_soft_reset_carries_nothing_over(spatial_env, spatial_task):
    def episode(number):
        spatial_env.reset(spatial_task.init_states[number], seed=0)
        for _ in range(6):
            spatial_env.step(np.array([0.3, 0.1, -0.2, 0.0, 0.0, 0.1, 1.0]))
        return spatial_env.sim.data.qpos.copy()

    alone = episode(1)
    episode(0)
    np.testing.assert_array_equal(episode(1), alone)


@pytest.mark.simulator
def test_shared_kinematics_change_no_bit_of_the_movement(spatial_env, spatial_task):
    """The arm goes down and pushes objects, so that contacts, and the solver's starting points, matter."""

    def episode(step):
        spatial_env.reset(spatial_task.init_states[0], seed=0)
        states = []
        for number in range(30):
            step(
                np.array([0.7 * np.cos(number), 0.5, -0.8 if number < 20 else 0.5, 0.2, 0, 0, (-1.0) ** (number // 4)])
            )
            states.append(spatial_env.sim.get_state().flatten())
        assert spatial_env.sim.data.ncon > 0
        return np.array(states)

    robosuite_alone = episode(spatial_env._env.step)
    np.testing.assert_array_equal(episode(spatial_env.step), robosuite_alone)


@pytest.mark.simulator
@pytest.mark.slow
def test_soft_and_hard_resets_give_the_same_movement(spatial_env, spatial_task):
    def episode(env):
        env.reset(spatial_task.init_states[2], seed=5)
        for _ in range(6):
            env.step(np.array([0.3, 0.1, -0.2, 0.0, 0.0, 0.1, 1.0]))
        return np.concatenate([env.sim.data.qpos, *_positions(env).values()])

    hard_env = LiberoEnv(spatial_task, render=False, reset_mode=ResetMode.HARD)
    hard = episode(hard_env)
    hard_env.close()
    np.testing.assert_array_equal(episode(spatial_env), hard)


@pytest.mark.simulator
@pytest.mark.parametrize("action", [np.zeros(6), np.full(7, np.nan)])
def test_bad_actions_are_refused(spatial_env, action):
    with pytest.raises(ValueError, match="7 finite numbers"):
        spatial_env.step(action)


@pytest.mark.simulator
def test_observing_without_a_renderer_is_refused(spatial_env):
    with pytest.raises(RuntimeError, match="render=False"):
        spatial_env.observe()


@pytest.mark.simulator
def test_gripper_convention(spatial_env, spatial_task):
    spatial_env.reset(spatial_task.init_states[0], seed=0)
    spatial_env.settle(10)
    opened = spatial_env.state()[6] - spatial_env.state()[7]
    for _ in range(10):
        spatial_env.step(-idle_action())
    assert opened > 0.07 and spatial_env.state()[6] - spatial_env.state()[7] < 0.01


@pytest.mark.simulator
@pytest.mark.slow
def test_observations_are_rotated_images_and_the_proprioception(object_rollouts):
    seen, states, raw = object_rollouts[RenderMode.PUBLISHED]
    turned = {(up, left): _difference(seen[0].image, raw[::up, ::left]) for up in (1, -1) for left in (1, -1)}
    assert min(turned, key=turned.get) == (-1, -1) and turned[-1, -1] < 2.0
    for mode in RenderMode:
        for observation in object_rollouts[mode][0]:
            for camera in CAMERA_FIELDS:
                image = getattr(observation, camera)
                assert image.shape == (96, 96, 3) and image.dtype == np.uint8 and image.std() > 10
            assert observation.state.shape == (8,) and observation.state.dtype == np.float64
    lazy = object_rollouts[RenderMode.LAZY][0][-1].state
    assert 0 < np.abs(lazy - states[-1]).max() < 2e-3, "one physics sub-step later than what the step left behind"


@pytest.mark.simulator
@pytest.mark.slow
def test_render_modes_show_the_same_moment_of_the_same_physics(object_rollouts):
    published, states, _ = object_rollouts[RenderMode.PUBLISHED]
    lazy, lazy_states, _ = object_rollouts[RenderMode.LAZY]
    np.testing.assert_array_equal(states[1:], lazy_states[1:])
    reported = np.array([observation.state for observation in published])
    steps = np.linalg.norm(np.diff(states[:, :3], axis=0), axis=1)
    assert np.linalg.norm(reported[1:, :3] - states[1:, :3], axis=1).max() < 0.1 * steps.max()
    for camera in CAMERA_FIELDS:
        same_moment = _difference(getattr(published[-1], camera), getattr(lazy[-1], camera))
        one_earlier = _difference(getattr(published[-1], camera), getattr(lazy[-2], camera))
        assert 0.0 < same_moment < 6.0, "smoothing and reflections only"
        assert same_moment < one_earlier


@pytest.mark.simulator
@pytest.mark.slow
def test_images_made_on_request_are_those_made_in_every_step(object_rollouts):
    every, every_states, _ = object_rollouts[RenderMode.EVERY_STEP]
    asked, asked_states, _ = object_rollouts[RenderMode.PUBLISHED]
    np.testing.assert_array_equal(every_states, asked_states)
    for reference, observation in zip(every, asked, strict=True):
        for name in (*CAMERA_FIELDS, "state"):
            np.testing.assert_array_equal(getattr(reference, name), getattr(observation, name))


def _look_and_move(env: LiberoEnv, init_state: np.ndarray) -> list[np.ndarray]:
    """What an episode's beginning shows: images, state, and where everything is later."""
    env.reset(init_state, seed=0)
    start = np.concatenate([env.sim.data.qpos, env.sim.data.qvel, env.sim.data.qacc_warmstart])
    env.settle(3)
    seen = env.observe()
    for number in range(8):
        env.step(np.array([0.8, -0.5, -0.9, 0.1, 0.3, -0.2, 1.0 if number % 4 < 2 else -1.0]))
    after = env.observe()
    end = np.concatenate([env.sim.data.qpos, env.sim.data.qvel])
    return [start, seen.image, seen.wrist_image, seen.state, after.image, after.wrist_image, after.state, end]


@pytest.mark.simulator
@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task_id"), [("libero_spatial", 4), ("libero_goal", 7)])
def test_a_soft_reset_starts_what_a_hard_reset_starts(suite, task_id):
    task = load_task(suite, task_id)
    hard = LiberoEnv(task, 48, RenderMode.PUBLISHED, reset_mode=ResetMode.HARD)
    expected = [_look_and_move(hard, task.init_states[number]) for number in (3, 7)]
    hard.close()
    soft = LiberoEnv(task, 48, RenderMode.PUBLISHED, reset_mode=ResetMode.SOFT)
    _look_and_move(soft, task.init_states[9])
    found = [_look_and_move(soft, task.init_states[number]) for number in (3, 7)]
    renderer = soft.gl_renderer()
    soft.close()
    for want, have in zip(expected, found, strict=True):
        for first, second in zip(want, have, strict=True):
            np.testing.assert_array_equal(first, second)
    assert renderer


def _difference(first: np.ndarray, second: np.ndarray) -> float:
    """Mean absolute difference in grey levels."""
    return float(np.abs(first.astype(int) - second).mean())


def _nothing_is_outside(model, data, camera):
    return np.zeros(model.ngeom, dtype=bool)


@pytest.mark.simulator
@pytest.mark.slow
def test_a_second_environment_renders_like_the_first_also_when_it_draws_what_lies_outside_the_view(monkeypatch):
    task = load_task("libero_object", 0)
    seen, left_out = [], 0
    for rule in (outside_view, _nothing_is_outside):
        monkeypatch.setattr(simulator, "outside_view", rule)
        env = LiberoEnv(task, image_size=48, render_mode=RenderMode.LAZY, reset_mode=ResetMode.SOFT)
        env.reset(task.init_states[0], seed=0)
        images = []
        for direction in (0.0, 0.9, -0.9):
            for _ in range(12):
                env.step(np.array([direction, -direction, -direction, direction, 0.5, direction, 1.0]))
            observation = env.observe()
            images += [observation.image, observation.wrist_image]
            model, data = env.sim.model._model, env.sim.data._data
            left_out += rule(model, data, env.sim.model.camera_name2id("robot0_eye_in_hand")).sum()
        groups = env.sim.model._model.geom_group.copy()
        env.close()
        seen.append([*images, groups])
    assert left_out > 0
    for first, second in zip(*seen, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.simulator
@pytest.mark.slow
def test_the_first_image_does_not_depend_on_the_episode_before(spatial_task):
    env = LiberoEnv(spatial_task, image_size=96, render_mode=RenderMode.LAZY, reset_mode=ResetMode.SOFT)

    def first_observation(number):
        env.reset(spatial_task.init_states[number], seed=0)
        env.settle()
        return env.observe()

    fresh = first_observation(3)  # builds the renderer
    first_observation(7)
    again = first_observation(3)
    env.close()
    np.testing.assert_array_equal(fresh.image, again.image)
    np.testing.assert_array_equal(fresh.wrist_image, again.wrist_image)
    np.testing.assert_array_equal(fresh.state, again.state)
