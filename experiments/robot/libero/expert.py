"""A scripted pick-and-place expert for LIBERO that reads the simulator's privileged state.

It serves small demonstration sets for machines that cannot hold the published ones.  Behaviour is feedback only: every
action is a function of the current state and the current phase, the grasp of a task is always the same one unless
something is in the way, and no idle action is ever produced, so that behaviour cloning sees one mode and the published
"no no-ops" convention holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from experiments.robot.libero.expert_settings import ExpertSettings
from experiments.robot.libero.grasps import Grasp, GraspPlanner
from experiments.robot.libero.scene_geometry import SceneGeometry
from experiments.robot.libero.simulator import LiberoEnv

OPEN, CLOSE = -1.0, 1.0
MAX_ACTION = 0.9375  # largest component in the published data
NOOP_NORM = 1e-4  # actions below this with an unchanged gripper are idle (published filter)
FINGERS_AT_REST = 0.001  # closing by less than this in a control step, m: they hold something, or are closed


class UnsupportedGoalError(ValueError):
    """The task asks for something other than putting graspable objects on or into something."""


class ExpertFailedError(RuntimeError):
    """The expert could not bring the scene to the goal from this start."""


@dataclass(frozen=True)
class Command:
    """One step of the expert: the clean action (7,), the phase it belongs to, how much disturbance it tolerates."""

    action: np.ndarray
    phase: str
    noise_scale: float = 1.0


class PickPlaceExpert:
    """Yields commands that solve the task of `env`; each command must be executed before the next one is requested."""

    def __init__(self, env: LiberoEnv, settings: ExpertSettings | None = None) -> None:
        self._env = env
        self._settings = settings or ExpertSettings()
        self._geometry = SceneGeometry(env)
        self._planner = GraspPlanner(self._geometry, self._settings)
        self._upright = np.eye(3)
        self._gripper = OPEN
        self.goals = pick_place_goals(env)

    def commands(self) -> Iterator[Command]:
        """Run all goals in order.  The iterator ends early when the caller stops asking (success), raises
        ExpertFailedError when an object could not be brought to its target."""
        self._upright = _pointing_down(self._pose()[1])
        for item, target in self.goals:
            yield from self._solve(item, target)
        yield from self._retreat()

    def _solve(self, item: str, target: str) -> Iterator[Command]:
        body = self._env.domain.objects_dict[item].root_body
        for _ in range(self._settings.attempts):
            start = self._geometry.centre(body)[2]
            grasp = self._planner.plan(body, self._upright[:2, 0])
            yield from self._approach(grasp)
            yield from self._close(grasp)
            yield from self._lift(grasp, body, target)
            if self._geometry.centre(body)[2] - start > 0.03:
                yield from self._place(grasp, body, target)
                yield from self._release(grasp)
                return
        raise ExpertFailedError(f"could not lift {item} in {self._settings.attempts} attempts")

    # -- phases -------------------------------------------------------------------------------------------------

    def _approach(self, grasp: Grasp) -> Iterator[Command]:
        """Move above the object and descend inside a funnel: the allowed height shrinks with the sideways error."""
        for _ in range(2 * self._settings.phase_limit):
            goal = grasp.position.copy()
            goal[2] = self._funnel_height(grasp.position, self._settings.hover + grasp.top - grasp.position[2])
            position, rotation = self._pose()
            turned = np.linalg.norm(_rotation_vector(self._target_rotation(grasp.yaw) @ rotation.T)) < 0.12
            error = np.abs(position - grasp.position)
            if np.linalg.norm(error[:2]) < 0.008 and error[2] < 0.006 and turned:
                return
            yield self._toward(goal, grasp.yaw, OPEN, "approach", noise_scale=_tolerated(error))

    def _funnel_height(self, target: np.ndarray, hover: float) -> float:
        sideways = float(np.linalg.norm(self._pose()[0][:2] - target[:2]))
        return float(target[2] + np.clip((sideways - 0.006) * self._settings.funnel, 0.0, hover))

    def _close(self, grasp: Grasp) -> Iterator[Command]:
        """Close the fingers while pressing lightly towards the grasp position, until they have met something.

        Going on pressing would add steps that look alike although some ask for rest and the last one for a lift. A
        policy without memory learns from them to stay.
        """
        goal = grasp.position - np.array([0.0, 0.0, 0.002])
        before = self._opening()
        for step in range(self._settings.close_steps):
            yield self._toward(goal, grasp.yaw, CLOSE, "close", noise_scale=0.3)
            opening = self._opening()
            if step >= 2 and before - opening < FINGERS_AT_REST:
                return
            before = opening

    def _lift(self, grasp: Grasp, body: str, target: str) -> Iterator[Command]:
        """Raise the object above everything it will pass; slow for the first centimetre."""
        start = self._pose()[0].copy()
        bottom = self._geometry.vertices(body)[:, 2].min()
        height = max(self._support_height(target) + self._settings.clearance + start[2] - bottom, start[2] + 0.07)
        for _ in range(self._settings.phase_limit):
            raised = self._pose()[0][2] - start[2]
            lost = raised - (self._geometry.vertices(body)[:, 2].min() - bottom) > 0.04
            if self._pose()[0][2] > height - 0.02 or lost:
                return
            limit = 0.4 if raised < 0.01 else MAX_ACTION
            yield self._toward(np.array([*start[:2], height + 0.02]), grasp.yaw, CLOSE, "lift", limit=limit)

    def _place(self, grasp: Grasp, body: str, target: str) -> Iterator[Command]:
        """Carry the object over its target at the height it was lifted to and lower it inside a funnel."""
        lifted = self._pose()[0][2]
        for _ in range(2 * self._settings.phase_limit):
            points = self._geometry.vertices(body)
            middle = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
            position = self._pose()[0]
            below = position[2] - points[:, 2].min()
            spot = self._target_position(target)
            goal = position.copy()
            goal[:2] += spot[:2] - middle
            goal[2] = spot[2] + below + self._settings.release_height
            final = goal.copy()
            carry = self._support_height(target) + self._settings.clearance + below - goal[2]
            goal[2] = self._funnel_height(goal, max(carry, lifted - goal[2], 0.0))
            if np.linalg.norm(final - position) < 0.010:
                return
            yield self._toward(goal, grasp.yaw, CLOSE, "place", noise_scale=_tolerated(final - position))

    def _release(self, grasp: Grasp) -> Iterator[Command]:
        """Open the fingers, rising slowly so that the steps are not idle."""
        start = self._pose()[0].copy()
        for _ in range(self._settings.close_steps):
            yield self._toward(start + np.array([0.0, 0.0, 0.004]), grasp.yaw, OPEN, "release", noise_scale=0.3)

    def _retreat(self) -> Iterator[Command]:
        for _ in range(25):
            position = self._pose()[0]
            action = np.zeros(7)
            action[2], action[6] = (0.6 if position[2] < 1.3 else 0.1), OPEN
            yield Command(action, "retreat")

    # -- state --------------------------------------------------------------------------------------------------

    def _pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Finger-tip position (3,) and rotation (3, 3) of the grip site; its x axis is the closing direction."""
        data, site = self._env.sim.data, self._env.domain.robots[0].eef_site_id
        return data.site_xpos[site], data.site_xmat[site].reshape(3, 3)

    def _opening(self) -> float:
        """Distance between the fingers, m."""
        return float(np.abs(self._env.state()[6:]).sum())

    def _target_rotation(self, yaw: float) -> np.ndarray:
        cos, sin = np.cos(yaw), np.sin(yaw)
        return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]]) @ self._upright

    def _toward(
        self,
        goal: np.ndarray,
        yaw: float,
        gripper: float,
        phase: str,
        limit: float = MAX_ACTION,
        noise_scale: float = 1.0,
    ) -> Command:
        """Proportional step towards a pose; direction is kept when the step is limited."""
        settings = self._settings
        position, rotation = self._pose()
        action = np.zeros(7)
        move = (goal - position) * settings.position_gain
        action[:3] = move * min(1.0, limit / max(float(np.abs(move).max()), 1e-9))
        turn = _rotation_vector(self._target_rotation(yaw) @ rotation.T) * settings.rotation_gain
        action[3:6] = np.clip(turn, -settings.max_rotation, settings.max_rotation)
        if np.linalg.norm(action[:6]) < 2 * NOOP_NORM:
            action[2] = 0.01  # never idle
        action[6] = gripper
        return Command(action, phase, noise_scale)

    def _target_position(self, target: str) -> np.ndarray:
        """Where the bottom of the object should go: (x, y, height of the support)."""
        domain = self._env.domain
        owner = domain.objects_dict.get(target) or domain.fixtures_dict.get(target)
        if owner is not None:
            points = self._geometry.vertices(owner.root_body)
            middle = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
            return np.array([*middle, points[:, 2].max()])
        spot = np.array(self._env.sim.data.get_site_xpos(target))
        if "contain" in target:
            spot[2] -= 0.5 * float(domain.object_sites_dict[target].size[2])  # half way into the container
        return spot

    def _support_height(self, target: str) -> float:
        """Height the object must clear before it is above its target: the walls of a container, else the support."""
        domain = self._env.domain
        site = domain.object_sites_dict.get(target)
        if site is None or "contain" not in target:
            return float(self._target_position(target)[2])
        parent = domain.objects_dict.get(site.parent_name) or domain.fixtures_dict.get(site.parent_name)
        return float(self._geometry.vertices(parent.root_body)[:, 2].max())


def pick_place_goals(env: LiberoEnv) -> list[tuple[str, str]]:
    """(object, target) pairs of the task's goal.  Raises UnsupportedGoalError for drawers, knobs and the like."""
    pairs = []
    for goal in env.domain.parsed_problem["goal_state"]:
        if len(goal) != 3 or goal[0].lower() not in ("on", "in") or goal[1] not in env.domain.objects_dict:
            raise UnsupportedGoalError(f"{env.task.name}: the scripted expert cannot do {' '.join(goal)}")
        pairs.append((goal[1], goal[2]))
    return pairs


def is_noop(action: np.ndarray, previous_gripper: float | None) -> bool:
    """Whether the published filter drops this action: arm norm below 1e-4 and the gripper as before."""
    unchanged = previous_gripper is None or action[6] == previous_gripper
    return bool(np.linalg.norm(action[:6]) < NOOP_NORM and unchanged)


def _tolerated(error: np.ndarray) -> float:
    """How much disturbance a motion stands: all of it far away, three tenths within 1.5 cm of the goal, so that a
    disturbed hand still meets the tolerances instead of hovering over the object."""
    return float(np.clip(np.linalg.norm(error) / 0.05, 0.3, 1.0))


def _pointing_down(rotation: np.ndarray) -> np.ndarray:
    """The rotation (3, 3) with its z axis turned to straight down, heading kept."""
    down = np.array([0.0, 0.0, -1.0])
    x_axis = rotation[:, 0] - (rotation[:, 0] @ down) * down
    x_axis /= np.linalg.norm(x_axis)
    return np.stack([x_axis, np.cross(down, x_axis), down], axis=1)


def _rotation_vector(matrix: np.ndarray) -> np.ndarray:
    """Rotation vector (3,) of a rotation matrix (3, 3), angle in [0, pi)."""
    cosine = np.clip((np.trace(matrix) - 1.0) / 2.0, -1.0, 1.0)
    angle = float(np.arccos(cosine))
    axis = np.array([matrix[2, 1] - matrix[1, 2], matrix[0, 2] - matrix[2, 0], matrix[1, 0] - matrix[0, 1]])
    if angle < 1e-6:
        return axis / 2.0
    return axis * angle / (2.0 * np.sin(angle))


def expert_commands(env: LiberoEnv, settings: ExpertSettings | None = None) -> Iterator[Command]:
    """Commands of a fresh expert for the current episode of `env` (call after reset and settling)."""
    return PickPlaceExpert(env, settings).commands()
