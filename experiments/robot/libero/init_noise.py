"""Wider initial states: every movable object is displaced in the plane, and nothing falls or collides.

The standard initial states of a task differ by a few centimetres, so a policy may succeed on them by heart. Displacing
the objects by up to some millimetres more shows how much of a success rate is left when that no longer works.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_ROUNDS = 200
"""Redraws before a radius is given up."""

SMALLER_SHARES = (0.5, 0.0)
"""Radii an evaluation goes on with: some initial states have no room, and each must have an outcome."""

SETTLE_SECONDS = 0.5
"""Simulated time after which a displaced object must stand where it was put: that of the ten waiting steps."""

MAX_SHIFT_M = 0.005
MAX_TILT_DEG = 5.0
"""An object that ends this far from where the displacement should have put it has been pushed, has slid or fallen."""


class InitNoiseError(RuntimeError):
    """No displacement of the wanted size was found that leaves every object standing and free."""


@dataclass(frozen=True)
class Settled:
    """Where objects come to rest. positions: name -> (3,) m; up: name -> (3,) the body's z axis in the world; contacts:
    pairs of movable objects, or of a movable object and any other body, that touch."""

    positions: dict[str, np.ndarray]
    up: dict[str, np.ndarray]
    contacts: frozenset[tuple[str, ...]]


def draw_offsets(
    rng: np.random.Generator,
    groups: Sequence[tuple[str, ...]],
    radius_m: float,
    faulty: Callable[[dict[str, np.ndarray]], set[str]],
) -> dict[str, np.ndarray]:
    """One displacement per group, uniform in a disc; groups with a faulty object are drawn again.

    Args:
        rng: source of the draws.
        groups: names of the objects that move together (a bowl and what it stands on).
        radius_m: radius of the disc, m.
        faulty: {name: (2,) m} -> names of the objects that cannot stand there.

    Returns:
        {name: (2,) m}.

    Raises:
        InitNoiseError: MAX_ROUNDS draws were not enough; names the objects.
    """
    offsets: dict[str, np.ndarray] = {}
    redraw = {name for group in groups for name in group}
    for _ in range(MAX_ROUNDS):
        for group in groups:
            if redraw & set(group):
                offset = _in_disc(rng, radius_m)
                offsets.update(dict.fromkeys(group, offset))
        redraw = faulty(offsets)
        if not redraw:
            return offsets
    raise InitNoiseError(
        f"init_noise_mm {1000 * radius_m:g}: no displacement after {MAX_ROUNDS} draws leaves {sorted(redraw)} standing "
        "free; use a smaller radius"
    )


def _in_disc(rng: np.random.Generator, radius: float) -> np.ndarray:
    angle, share = rng.uniform(0.0, 2.0 * np.pi), np.sqrt(rng.uniform())
    return radius * share * np.array([np.cos(angle), np.sin(angle)])


def faulty_objects(offsets: dict[str, np.ndarray], reference: Settled, found: Settled) -> set[str]:
    """Objects that did not just move by their offset.

    Args:
        offsets: {name: (2,) m} applied before settling.
        reference: what the undisplaced scene settles to.
        found: what the displaced scene settles to.

    Returns:
        Names of the objects that were shifted or tilted otherwise, or that touch something they did not touch before.
    """
    faulty = set()
    for name, offset in offsets.items():
        expected = reference.positions[name] + np.append(offset, 0.0)
        cosine = float(np.clip(reference.up[name] @ found.up[name], -1.0, 1.0))
        moved = np.linalg.norm(found.positions[name] - expected) > MAX_SHIFT_M
        if moved or np.degrees(np.arccos(cosine)) > MAX_TILT_DEG:
            faulty.add(name)
    for pair in found.contacts - reference.contacts:
        faulty.update(name for name in pair if name in offsets)
    return faulty


def stacks(names: Sequence[str], contacts: frozenset[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Partition of the movable objects into those that touch each other, in the order of `names`."""
    group = {name: {name} for name in names}
    for first, second in contacts:
        if first in group and second in group and group[first] is not group[second]:
            merged = group[first] | group[second]
            group.update(dict.fromkeys(merged, merged))
    return sorted({tuple(sorted(members, key=names.index)) for members in group.values()}, key=lambda g: g[0])


class SceneProbe:
    """Settles displaced objects in a private copy of the simulation; the environment itself is not touched.

    Args:
        env: `LiberoEnv` right after a reset.
    """

    def __init__(self, env: Any) -> None:
        import mujoco

        self._mujoco = mujoco
        self._model = env.sim.model._model
        self._start = copy.copy(env.sim.data._data)
        robot = env.domain.robots[0]
        self._arm = list(robot._ref_joint_vel_indexes)
        self._motors = list(robot._ref_joint_actuator_indexes)
        self.objects: dict[str, tuple[int, int]] = {}  # name -> (address of x in qpos, body)
        for name, item in sorted(env.domain.objects_dict.items()):
            address = env.sim.model.get_joint_qpos_addr(item.joints[0])
            if isinstance(address, tuple):  # a free joint: the object can be moved
                self.objects[name] = (address[0], env.sim.model.body_name2id(item.root_body))

    def settle(self, offsets: dict[str, np.ndarray]) -> Settled:
        """Displace, simulate SETTLE_SECONDS with the arm held still, and look. offsets: {name: (2,) m}."""
        mujoco, model = self._mujoco, self._model
        data = copy.copy(self._start)
        for name, offset in offsets.items():
            address = self.objects[name][0]
            data.qpos[address : address + 2] += offset
        data.ctrl[self._motors] = 0.0
        mujoco.mj_forward(model, data)
        for _ in range(round(SETTLE_SECONDS / model.opt.timestep)):
            data.qfrc_applied[self._arm] = data.qfrc_bias[self._arm]  # gravity compensation
            mujoco.mj_step(model, data)
        positions = {name: data.xpos[body].copy() for name, (_, body) in self.objects.items()}
        up = {name: data.xmat[body].reshape(3, 3)[:, 2].copy() for name, (_, body) in self.objects.items()}
        return Settled(positions, up, self._contacts(data))

    def displaced_state(self, offsets: dict[str, np.ndarray]) -> np.ndarray:
        """Flattened [time, qpos, qvel] (d,) float64 of the start with the objects displaced."""
        qpos = self._start.qpos.copy()
        for name, offset in offsets.items():
            address = self.objects[name][0]
            qpos[address : address + 2] += offset
        return np.concatenate([[self._start.time], qpos, self._start.qvel])

    def _contacts(self, data: Any) -> frozenset[tuple[str, ...]]:
        names = {body: name for name, (_, body) in self.objects.items()}
        geoms = data.contact.geom
        roots = self._model.body_rootid[self._model.geom_bodyid[geoms]] if len(geoms) else np.empty((0, 2), int)
        pairs = {tuple(sorted(names.get(int(body), f"body {body}") for body in pair)) for pair in roots}
        return frozenset(pair for pair in pairs if pair[0] != pair[1] and set(pair) & set(self.objects))


def displace_objects(
    env: Any, radius_mm: float, key: tuple[int, int, int], or_less: bool = False
) -> dict[str, list[float]]:
    """Move every movable object of a freshly reset environment by a random offset in the plane.

    Objects that touch each other move together. A draw after which an object falls, tilts, is pushed away or touches
    something new is rejected and drawn again.

    Args:
        env: `LiberoEnv` right after `reset`.
        radius_mm: largest displacement of an object, mm, > 0.
        key: (seed, task id, index of the initial state): the same key gives the same displacements.
        or_less: where there is no room, displace by half of it, or not at all.

    Returns:
        {object: [dx, dy]} in mm, world axes, as applied.

    Raises:
        InitNoiseError: there is no room (for `or_less`: the scene does not even stand still as it is).
    """
    probe = SceneProbe(env)
    reference = probe.settle({})
    groups = stacks(list(probe.objects), reference.contacts)
    rng = np.random.default_rng(key)
    shares = (1.0, *SMALLER_SHARES) if or_less else (1.0,)
    for share in shares:
        try:
            radius = share * radius_mm / 1000.0
            offsets = draw_offsets(rng, groups, radius, lambda o: faulty_objects(o, reference, probe.settle(o)))
            break
        except InitNoiseError:
            if share == shares[-1]:
                raise
    env.set_state(probe.displaced_state(offsets))
    return {name: [float(1000.0 * value) for value in offset] for name, offset in offsets.items()}
