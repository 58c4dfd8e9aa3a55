"""LIBERO environments: one simulated task, reset, stepped and rendered.

Importing this module is cheap and silent: mujoco, robosuite and libero are imported when the first task is loaded.
One process should hold one environment at a time (1.3 GB without, 1.8 GB with rendering; `close` does not give the
memory back), so long runs use one process per task.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.robot.libero.culling import HIDDEN_GROUP, hidden, outside_view
from experiments.robot.libero.libero_package import control_env_class, package_version
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.scene_sampling import SceneSampler
from experiments.robot.libero.shared_kinematics import shared_kinematics
from experiments.robot.libero.snapshot import SimulationSnapshot
from experiments.robot.libero.surroundings import quiet, require_renderer
from experiments.robot.libero.tasks import LiberoTask

CAMERAS = ("agentview", "robot0_eye_in_hand")
CONTROL_HZ = 20
SETTLE_STEPS = 10
"""Idle steps executed after a reset, before the first observation is used (objects drop onto their supports)."""

START_JOINT_STD = 0.02
"""Spread (rad) of each arm joint over the 50 standard initial states of a task (measured 0.019-0.023)."""


@dataclass(frozen=True)
class Observation:
    """What a policy sees: image and wrist_image (size, size, 3) uint8, already rotated by 180 degrees; state (8,)
    float64 = end-effector position (m), axis-angle (rad, angle in [0, 2 pi]), two finger positions (m)."""

    image: np.ndarray
    wrist_image: np.ndarray
    state: np.ndarray


def quat_to_axis_angle(xyzw: np.ndarray) -> np.ndarray:
    """Quaternion (4,) in x, y, z, w order -> rotation vector (3,) float64 with an angle in [0, 2 pi].

    The quaternion is *not* folded to w >= 0: the published data sets keep angles above pi, and policies trained on
    them lose tens of points when the sign is normalised.  w is clipped to [-1, 1]; the zero vector is returned when
    sin(angle / 2) is exactly zero.  Raises ValueError for a wrong shape.
    """
    quat = np.asarray(xyzw)
    if quat.shape != (4,):
        raise ValueError(f"quaternion: expected shape (4,) in x, y, z, w order, found {quat.shape}")
    w = np.clip(quat[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)  # in the precision of the input, as the published code does
    if sine == 0.0:
        return np.zeros(3)
    return (quat[:3] * 2.0 * math.acos(w) / sine).astype(np.float64)


def require(render: bool) -> None:
    """Import the simulator, and with `render` make sure that images can be made.

    Raises SimulatorUnavailableError, which says what to do.
    """
    control_env_class()
    if render:
        require_renderer()


class LiberoEnv:
    """One simulated task.

    render_mode says how images are made, render=False builds no renderer at all (`observe` then raises), reset_mode
    says whether a reset rebuilds the model.  Actions use the simulator's convention: six end-effector deltas in
    [-1, 1] (1 = 5 cm or 0.5 rad) and the gripper (-1 open, +1 close); 20 actions per simulated second.

    Random placements come from a generator that belongs to this environment (seed 0 after construction, as in the
    published protocol); numpy's global generator is left as it was.
    """

    def __init__(
        self,
        task: LiberoTask,
        image_size: int = 256,
        render_mode: RenderMode = RenderMode.PUBLISHED,
        render: bool = True,
        reset_mode: ResetMode = ResetMode.HARD,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size: expected a positive number of pixels, found {image_size}")
        self.task = task
        self.image_size = image_size
        self.render_mode = RenderMode(render_mode)
        self.reset_mode = ResetMode(reset_mode)
        self._render = render
        self._context: Any = None
        self._sampler: SceneSampler | None = None
        self._kept: tuple[int, SimulationSnapshot] | None = None  # seed of the hard reset, and what it left
        self._last: dict[str, np.ndarray] | None = None
        self._random_state = np.random.RandomState(0).get_state()  # noqa: NPY002 - what robosuite draws from
        self._env = self._build()

    def _build(self) -> Any:
        control_env = control_env_class()
        if self._render:
            require_renderer()
        every_step = self._render and self.render_mode is RenderMode.EVERY_STEP
        sampled = self._render and self.render_mode is RenderMode.PUBLISHED
        with quiet(), self._own_random_state():
            env = control_env(
                bddl_file_name=str(self.task.bddl_file),
                camera_names=list(CAMERAS),
                camera_heights=self.image_size,
                camera_widths=self.image_size,
                has_renderer=False,
                has_offscreen_renderer=every_step or sampled,
                use_camera_obs=every_step,
                control_freq=CONTROL_HZ,
                hard_reset=self.reset_mode is ResetMode.HARD,
                initialization_noise={"magnitude": 0.0, "type": "gaussian"},
                horizon=10_000,  # episodes are bounded by the caller
            )
            env.seed(0)
        if sampled:
            self._sampler = SceneSampler(env.env, CAMERAS, self.image_size)
        elif not every_step:
            # Nobody reads robosuite's observables then; updating them in each of the 25 sub-steps costs a third of
            # the step.
            env.env._update_observables = lambda force=False: None
        if self.reset_mode is ResetMode.SOFT:
            # Built with the random numbers of seed 0, this simulation is the one a hard reset with that seed makes.
            env.sim.forward()
            env.env.visualize(vis_settings=dict.fromkeys(env.env._visualizations, False))
            self._kept = 0, SimulationSnapshot(env.sim)
        return env

    @property
    def domain(self) -> Any:
        """The robosuite environment (objects, fixtures, parsed goal, robot)."""
        return self._env.env

    @property
    def sim(self) -> Any:
        """The robosuite MjSim.  Replaced by a hard reset: do not keep it across resets."""
        return self.domain.sim

    def reset(self, init_state: np.ndarray | None = None, seed: int | None = None) -> None:
        """Start an episode (no settling steps are executed).

        init_state (d,) float64: one row of `LiberoTask.init_states`; None samples a start: object placement from the
        task's regions and arm joints with the spread of the standard starts.  seed: seeds the placement (also of
        fixtures, which initial states do not contain); None continues the environment's own stream.  Raises
        ValueError when init_state has a wrong size.
        """
        if seed is not None:
            self._random_state = np.random.RandomState(seed).get_state()  # noqa: NPY002
        self._set_joint_noise(START_JOINT_STD if init_state is None else 0.0)
        if self.reset_mode is ResetMode.SOFT and init_state is not None and seed is not None:
            self._reset_to_snapshot(seed)
        else:
            self._reset_robosuite(self.reset_mode is ResetMode.HARD)
        gripper = self.domain.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)  # a soft reset would keep the last episode's finger command
        if init_state is None:
            return
        self.set_state(init_state)

    def set_state(self, state: np.ndarray) -> None:
        """Put the simulation into a flattened state (d,) float64: [time, qpos, qvel].

        Raises ValueError when it has a wrong size.
        """
        state = np.asarray(state, dtype=np.float64)
        expected = 1 + self.sim.model.nq + self.sim.model.nv
        if state.shape != (expected,):
            raise ValueError(f"init_state of {self.task.name}: expected shape ({expected},), found {state.shape}")
        self._last = self._env.set_init_state(state)

    def _reset_robosuite(self, hard: bool) -> None:
        if hard:
            self._drop_context()  # its model is about to be rebuilt
            self._kept = None
            # libero fills this list again at every rebuild. Grown, it draws more random numbers, and the fixtures of
            # tasks that begin with something open or switched on (libero_spatial 4) would move from reset to reset.
            self.domain.object_property_initializers.clear()
        self.domain.hard_reset = hard
        with quiet(), self._own_random_state():
            self._last = self._env.reset()

    def _reset_to_snapshot(self, seed: int) -> None:
        """Leave the simulation as a hard reset with this seed does; it is built when there is none to return to."""
        if self._kept is None or self._kept[0] != seed:
            self._reset_robosuite(hard=True)
            self._kept = seed, SimulationSnapshot(self.sim)
            return
        self._reset_robosuite(hard=False)  # robot, controller, clocks
        self._kept[1].restore()

    def _set_joint_noise(self, std: float) -> None:
        """Spread (rad) of the arm joints at the next reset; hard resets rebuild the robot from its configuration."""
        noise = {"magnitude": std, "type": "gaussian"}
        self.domain.robot_configs[0]["initialization_noise"] = dict(noise)
        self.domain.robots[0].initialization_noise = dict(noise)

    def settle(self, steps: int = SETTLE_STEPS) -> None:
        """Execute idle steps with an open gripper, as the published protocol does before the first observation."""
        for _ in range(steps):
            self.step(idle_action())

    def step(self, action: np.ndarray) -> bool:
        """Execute one action (7,) for 50 ms and return whether the task's goal holds now.

        Raises ValueError for a wrong shape or a non-finite value.
        """
        command = np.asarray(action, dtype=np.float64)
        if command.shape != (7,) or not np.isfinite(command).all():
            raise ValueError(f"action: expected 7 finite numbers, found {command.shape} {command}")
        with shared_kinematics(self.sim):
            self._last, _, done, _ = self._env.step(command)
        return bool(done)

    def check_success(self) -> bool:
        """Whether the task's goal holds in the current state."""
        return bool(self._env.check_success())

    def state(self) -> np.ndarray:
        """Proprioception (8,) float64 of the current simulator state, see `Observation`."""
        robot = self.domain.robots[0]
        data = self.sim.data
        position = data.site_xpos[robot.eef_site_id]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes]
        return np.concatenate([position, quat_to_axis_angle(self._hand_quat()), fingers])

    def joint_state(self) -> np.ndarray:
        """The seven arm joint angles (rad), float64."""
        return np.array(self.sim.data.qpos[self.domain.robots[0]._ref_joint_pos_indexes])

    def observe(self) -> Observation:
        """Images and state.  PUBLISHED shows what robosuite samples in the last step, LAZY the end of the step.

        Raises RuntimeError when the environment was built with render=False or was not reset yet.
        """
        if not self._render:
            raise RuntimeError("observe: this environment was built with render=False")
        if self._last is None:
            raise RuntimeError("observe: call reset first")
        if self.render_mode is RenderMode.EVERY_STEP:
            return self._published_observation(self._last, [self._last[f"{name}_image"] for name in CAMERAS])
        if self._sampler is not None:
            return self._published_observation(self._sampler.proprioception, self._sampler.images())
        self._place_bodies()
        images = [self._render_camera(name) for name in CAMERAS]
        return Observation(images[0], images[1], self.state())

    def gl_renderer(self) -> str:
        """Name of the OpenGL renderer behind the images, e.g. `llvmpipe (LLVM 15.0.6, 256 bits)`; "" before the first
        image and without a renderer."""
        context = self._context or getattr(self.sim, "_render_context_offscreen", None)
        if context is None:
            return ""
        from OpenGL.GL import GL_RENDERER, glGetString

        context.gl_ctx.make_current()
        name = glGetString(GL_RENDERER)
        return name.decode(errors="replace") if name else ""

    def close(self) -> None:
        """Free the renderer and the simulation (most of the memory stays with the process)."""
        self._drop_context()
        self._env.close()

    @staticmethod
    def _published_observation(raw: dict[str, np.ndarray], views: list[np.ndarray]) -> Observation:
        state = np.concatenate(
            [raw["robot0_eef_pos"], quat_to_axis_angle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"]]
        )
        images = [_rotate180(view) for view in views]
        return Observation(images[0], images[1], state)

    def _hand_quat(self) -> np.ndarray:
        """Orientation (x, y, z, w) of the hand body, the frame robosuite reports as robot0_eef_quat."""
        wxyz = self.sim.data.get_body_xquat(self.domain.robots[0].robot_model.eef_name)
        return np.array([wxyz[1], wxyz[2], wxyz[3], wxyz[0]])

    def _place_bodies(self) -> None:
        """Compute body, camera and light poses of the current joint positions.

        A step leaves them one physics sub-step behind, and building a renderer brings them up to date: without this
        the first image of an episode would depend on whether an episode came before it.
        """
        import mujoco

        model, data = self.sim.model._model, self.sim.data._data
        for compute in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            compute(model, data)

    def _render_camera(self, name: str) -> np.ndarray:
        import mujoco

        sim = self.sim
        if self._context is None:
            self._context = self._new_context(sim)
        camera = sim.model.camera_name2id(name)
        self._context.gl_ctx.make_current()
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._context.con)
        model = sim.model._model
        with hidden(model, outside_view(model, sim.data._data, camera)):
            self._context.render(self.image_size, self.image_size, camera_id=camera)
        return _rotate180(self._context.read_pixels(self.image_size, self.image_size))

    def _new_context(self, sim: Any) -> Any:
        import mujoco
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        sim.model.vis.quality.offsamples = 0  # read when the context is built
        context = MjRenderContextOffscreen(sim, device_id=-1)
        context.vopt.geomgroup[HIDDEN_GROUP] = 0
        context.vopt.geomgroup[1] = 1
        context.scn.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return context

    def _drop_context(self) -> None:
        """Free the LAZY renderer while it is current; freed later, it would take a newer one's buffers with it."""
        if self._context is None:
            return
        self._context.gl_ctx.make_current()
        self._context.sim._render_context_offscreen = None
        self._context = None

    @contextlib.contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Run robosuite's sampling on this environment's stream instead of the process-wide one."""
        outside = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._random_state)  # noqa: NPY002
        try:
            yield
        finally:
            self._random_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(outside)  # noqa: NPY002


def idle_action() -> np.ndarray:
    """The action (7,) that keeps the arm where it is with an open gripper."""
    return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


def simulator_versions() -> dict[str, str]:
    """Installed versions of the packages that decide how a rollout ends, for records."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("mujoco", "robosuite", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found | package_version() | {"gl": os.environ.get("MUJOCO_GL", "")}


def _rotate180(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image[::-1, ::-1])
