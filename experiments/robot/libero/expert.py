"""A scripted pick-and-place expert for LIBERO that reads the simulator's privileged state.

It serves small demonstration sets for machines that cannot hold the published ones.  Behaviour is feedback only: every
action is a function of the current state and the current phase, the grasp of a task is always the same one unless
something is in the way, and no idle action is ever produced, so that behaviour cloning sees one mode and the published
"no no-ops" convention holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from experiments.robot.libero.simulator import LiberoEnv

OPEN, CLOSE = -1.0, 1.0
MAX_ACTION = 0.9375  # largest component in the published data
NOOP_NORM = 1e-4  # actions below this with an unchanged gripper are idle (published filter)
POSITION_SCALE = 0.05  # metres per unit of action (operational-space controller)
ROTATION_SCALE = 0.5  # radians per unit of action
FINGER_OPENING = 0.078  # clear width between opened fingers, m
FINGERS_AT_REST = 0.001  # closing by less than this in a control step, m: they hold something, or are closed


class UnsupportedGoalError(ValueError):
    """The task asks for something other than putting graspable objects on or into something."""


class ExpertFailedError(RuntimeError):
    """The expert could not bring the scene to the goal from this start."""


class GraspKind(str, Enum):
    """TOP: fingers on both sides of the object.  RIM: fingers on both sides of the wall of an open container."""

    TOP = "top"
    RIM = "rim"


@dataclass(frozen=True)
class ExpertSettings:
    """Gains and distances of the expert (metres, radians, control steps)."""

    position_gain: float = 20.0  # action per metre: full speed beyond 4.7 cm
    rotation_gain: float = 3.0
    max_rotation: float = 0.45
    hover: float = 0.09  # height above the grasp at which the gripper arrives from the side
    funnel: float = 3.0  # how many metres of height one metre of sideways error buys while descending
    clearance: float = 0.05  # between the carried object and what it passes over
    release_height: float = 0.015  # above the support when the gripper opens
    rim_depth: float = 0.028  # how far the finger tips go below the rim
    rim_margin: float = 0.012
    close_steps: int = 9  # the fingers need 8 steps from fully open to fully closed
    phase_limit: int = 60
    attempts: int = 1


@dataclass(frozen=True)
class Grasp:
    """Where to grasp: finger-tip position (3,) in metres, wrist yaw relative to the start, kind, top of the object."""

    position: np.ndarray
    yaw: float
    kind: GraspKind
    top: float


@dataclass
class NoiseProcess:
    """First-order autoregressive disturbance of the six arm components (DART: execute it, do not record it).

    n[t] = rho n[t-1] + sqrt(1 - rho^2) std e[t], so that the stationary standard deviation is `std`.
    """

    std: float
    rng: np.random.Generator
    correlation: float = 0.8
    _value: np.ndarray = field(default_factory=lambda: np.zeros(6))

    def disturb(self, action: np.ndarray, scale: float = 1.0) -> np.ndarray:
        """The action (7,) to execute instead of the clean one, clipped to [-1, 1]; the gripper is untouched."""
        drive = np.sqrt(1.0 - self.correlation**2) * self.std
        self._value = self.correlation * self._value + drive * self.rng.standard_normal(6)
        executed = np.array(action, dtype=np.float64)
        executed[:6] = np.clip(executed[:6] + scale * self._value, -1.0, 1.0)
        return executed


@dataclass(frozen=True)
class Command:
    """One step of the expert: the clean action (7,), the phase it belongs to, how much disturbance it tolerates."""

    action: np.ndarray
    phase: str
    noise_scale: float = 1.0


class SceneGeometry:
    """Vertices of the scene's bodies in world coordinates (visual meshes, boxes where a body has no mesh)."""

    def __init__(self, env: LiberoEnv) -> None:
        self._env = env
        self._local: dict[str, list[tuple[int, np.ndarray]]] = {}
        model = env.sim.model._model
        children: dict[int, list[int]] = {}
        for body in range(1, model.nbody):
            children.setdefault(int(model.body_parentid[body]), []).append(body)
        self._children = children
        domain = env.domain
        self.bodies = {
            name: item.root_body
            for name, item in {**domain.objects_dict, **domain.fixtures_dict}.items()
            if self._parts(item.root_body)
        }

    def vertices(self, body: str) -> np.ndarray:
        """(n, 3) float64 world positions; raises KeyError when the body has no shape."""
        parts = self._parts(body)
        if not parts:
            raise KeyError(f"body {body!r} has no mesh and no box geometry")
        data = self._env.sim.data
        return np.concatenate([v @ data.geom_xmat[g].reshape(3, 3).T + data.geom_xpos[g] for g, v in parts])

    def others(self, body: str) -> np.ndarray:
        """(n, 3) vertices of all objects and fixtures except `body`."""
        found = [self.vertices(other) for other in self.bodies.values() if other != body]
        return np.concatenate(found) if found else np.zeros((0, 3))

    def centre(self, body: str) -> np.ndarray:
        """(3,) middle of the bounding box."""
        points = self.vertices(body)
        return (points.min(0) + points.max(0)) / 2

    def _parts(self, body: str) -> list[tuple[int, np.ndarray]]:
        if body not in self._local:
            geoms = self._geoms(self._env.sim.model.body_name2id(body))
            parts = [(g, v) for g in geoms if (v := self._mesh(g)) is not None]
            self._local[body] = parts or [(g, v) for g in geoms if (v := self._box(g)) is not None]
        return self._local[body]

    def _geoms(self, root: int) -> list[int]:
        model = self._env.sim.model._model
        stack, geoms = [root], []
        while stack:
            body = stack.pop()
            start = int(model.body_geomadr[body])
            geoms += range(start, start + int(model.body_geomnum[body])) if start >= 0 else []
            stack += self._children.get(body, [])
        return sorted(geoms)

    def _mesh(self, geom: int) -> np.ndarray | None:
        model = self._env.sim.model._model
        mesh = int(model.geom_dataid[geom])
        if model.geom_type[geom] != 7 or mesh < 0:  # 7: mjGEOM_MESH
            return None
        start, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        points = np.array(model.mesh_vert[start : start + count], dtype=np.float64)
        return points[:: max(1, count // 1500)]

    def _box(self, geom: int) -> np.ndarray | None:
        model = self._env.sim.model._model
        if model.geom_type[geom] != 6:  # 6: mjGEOM_BOX
            return None
        signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=np.float64)
        return signs * model.geom_size[geom]


class GraspPlanner:
    """Chooses one grasp per object, always in the same order of preference."""

    def __init__(self, geometry: SceneGeometry, settings: ExpertSettings) -> None:
        self._geometry = geometry
        self._settings = settings

    def plan(self, body: str, finger_axis: np.ndarray) -> Grasp:
        """Grasp for `body`; finger_axis (2,) is the horizontal direction in which the fingers close at yaw 0."""
        points = self._geometry.vertices(body)
        base = float(np.arctan2(finger_axis[1], finger_axis[0]))
        yaw, width = self._narrowest(points, base)
        if width < FINGER_OPENING - 0.006:
            return self._top(points, base, yaw)
        return self._rim(body, points, base)

    @staticmethod
    def _narrowest(points: np.ndarray, base: float) -> tuple[float, float]:
        """Yaw with the smallest width across the fingers; turning the wrist costs 2 cm per radian, which keeps round
        objects at yaw 0."""
        yaws = np.linspace(-np.pi / 2, np.pi / 2, 37)
        directions = np.stack([np.cos(base + yaws), np.sin(base + yaws)])
        spans = np.ptp(points[:, :2] @ directions, axis=0)
        blocked = np.where(spans < FINGER_OPENING - 0.006, 0.0, 1.0)
        best = int(np.argmin(spans + 0.02 * np.abs(yaws) + blocked))
        return float(yaws[best]), float(spans[best])

    @staticmethod
    def _top(points: np.ndarray, base: float, yaw: float) -> Grasp:
        low, high = points[:, 2].min(), points[:, 2].max()
        across = np.array([np.cos(base + yaw), np.sin(base + yaw)])
        along = np.array([-across[1], across[0]])
        middle = sum((np.ptp(q) / 2 + q.min()) * d for d in (across, along) for q in [points[:, :2] @ d])
        height = max(low + 0.012, high - min(0.035, 0.6 * (high - low)))
        return Grasp(np.array([*middle, height]), yaw, GraspKind.TOP, float(high))

    def _rim(self, body: str, points: np.ndarray, base: float) -> Grasp:
        others = self._geometry.others(body)
        candidates = []
        for turn in (0.0, 0.35, -0.35, 0.7, -0.7, 1.05, -1.05, 1.4, -1.4):
            for side in (0.0, np.pi):
                grasp = self._rim_candidate(points, base + turn + side, turn)
                penetration = self._penetration(grasp, base + turn + side, others)
                if penetration <= 0.0:
                    return grasp
                candidates.append((penetration, len(candidates), grasp))
        return min(candidates, key=lambda item: item[:2])[2]

    def _rim_candidate(self, points: np.ndarray, angle: float, yaw: float) -> Grasp:
        """Grasp of the wall in direction `angle` seen from the object's middle."""
        low, high = points[:, 2].min(), points[:, 2].max()
        rim = points[points[:, 2] > high - 0.15 * (high - low)]
        middle = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
        outward = np.array([np.cos(angle), np.sin(angle)])
        radius = ((rim[:, :2] - middle) @ outward).max()
        spot = middle + outward * (radius - 0.005)
        near = points[np.linalg.norm(points[:, :2] - spot, axis=1) < 0.015]
        rim_height = near[:, 2].max() if len(near) else high
        height = max(rim_height - self._settings.rim_depth, low + 0.01)
        return Grasp(np.array([*spot, height]), yaw, GraspKind.RIM, float(high))

    def _penetration(self, grasp: Grasp, angle: float, others: np.ndarray) -> float:
        """How deep (m) the opened hand would sink into other objects; 0 or less when the grasp is free."""
        if not len(others):
            return 0.0
        outward = np.array([np.cos(angle), np.sin(angle)])
        offset = others[:, :2] - grasp.position[:2]
        across, along = np.abs(offset @ outward), np.abs(offset @ np.array([-outward[1], outward[0]]))
        fingers = others[(across < 0.055) & (along < 0.018), 2]
        palm = others[(across < 0.115) & (along < 0.04), 2]
        deep = [0.0]
        if len(fingers):
            deep.append(fingers.max() - grasp.position[2] + self._settings.rim_margin)
        if len(palm):
            deep.append(palm.max() - grasp.position[2] - 0.035)
        return max(deep)


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


def describe_expert(settings: ExpertSettings | None = None) -> dict[str, Any]:
    """The expert's settings as plain numbers, for the record beside a data set."""
    return dict(vars(settings or ExpertSettings()))
