"""The simulator against measured numbers: physics, gripper, colours."""

from __future__ import annotations

import os
from functools import partial

import numpy as np

from experiments.robot.doctor import render_reference
from experiments.robot.doctor.findings import Check, Status, judge
from experiments.robot.libero import controls, simulator
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.tasks import load_task

BOWL, RAMEKIN = "akita_black_bowl_1", "glazed_rim_porcelain_ramekin_1"
BOWL_OFFSET_M = (0.0145, 0.0351)
"""Horizontal and vertical distance of bowl and ramekin in libero_spatial task 5 after the waiting steps, mujoco 3.3.0
(initial states 0 to 9)."""
BOWL_TOLERANCE_M = 0.001
CLOSING_STEPS = 10


def physics_checks() -> list[Check]:
    """Bowl and gripper, in one scene without a renderer."""
    probe = _PhysicsProbe()
    horizontal, vertical = (1000 * value for value in BOWL_OFFSET_M)
    return [
        Check(
            "physics",
            f"bowl on the ramekin (libero_spatial task 5): {horizontal:.1f} mm aside, {vertical:.1f} mm above, "
            f"within {1000 * BOWL_TOLERANCE_M:g} mm",
            "libero_spatial task 5: 98 -> 12 % (mujoco from 3.4)",
            probe.bowl,
        ),
        Check(
            "gripper motion",
            "the fingers close on policy action 0 and open on 1",
            "nothing is ever grasped: 0 %",
            probe.gripper,
        ),
    ]


class _PhysicsProbe:
    """Builds the environment at the first check that needs it."""

    def __init__(self) -> None:
        self._env: simulator.LiberoEnv | None = None

    def _settled(self) -> simulator.LiberoEnv:
        if self._env is None:
            task = load_task("libero_spatial", 5)
            self._env = simulator.LiberoEnv(task, render=False, render_mode=RenderMode.LAZY, reset_mode=ResetMode.SOFT)
        self._env.reset(self._env.task.init_states[0], seed=0)
        self._env.settle()
        return self._env

    def bowl(self) -> tuple[Status, str]:
        env = self._settled()
        bowl, ramekin = (env.sim.data.body_xpos[env.domain.obj_body_id[name]] for name in (BOWL, RAMEKIN))
        apart = bowl - ramekin
        found = np.array([np.linalg.norm(apart[:2]), apart[2]])
        good = np.abs(found - BOWL_OFFSET_M).max() <= BOWL_TOLERANCE_M
        return judge(bool(good), f"{1000 * found[0]:.1f} mm aside, {1000 * found[1]:.1f} mm above")

    def gripper(self) -> tuple[Status, str]:
        env = self._settled()
        widths = [self._width(env)]
        for command in (0.0, 1.0):
            action = controls.to_simulator_actions(np.append(np.zeros(6), command))
            for _ in range(CLOSING_STEPS):
                env.step(action)
            widths.append(self._width(env))
        text = f"opening {1000 * widths[0]:.0f} mm, after closing {1000 * widths[1]:.0f}, after opening "
        good = widths[1] < widths[0] - 0.01 and widths[2] > widths[1] + 0.01
        return judge(good, f"{text}{1000 * widths[2]:.0f}")

    @staticmethod
    def _width(env: simulator.LiberoEnv) -> float:
        left, right = env.state()[6:8]
        return float(left - right)


def render_checks(mode: RenderMode, suites: tuple[str, ...] = render_reference.SUITES) -> list[Check]:
    """An OpenGL context, and mean colours of each suite in one render mode."""
    context = Check("OpenGL context", "one can be made", "no image, no episode", _context)
    return [context] + [
        Check(
            f"colours of {suite}",
            f"the stored mean colours ({mode.value} mode, both cameras) within the back end's tolerance",
            "a darker floor (mujoco from 3.3.3): libero_object 88 -> 69 %; other suites not measured",
            partial(_colours, suite, mode),
        )
        for suite in suites
    ]


def _context() -> tuple[Status, str]:
    simulator.require(render=True)
    return Status.OK, f"made with {os.environ['MUJOCO_GL']}"


def _colours(suite: str, mode: RenderMode) -> tuple[Status, str]:
    mode = mode if mode in render_reference.MODES else RenderMode.PUBLISHED
    stored = render_reference.load_reference()["modes"][mode.value][suite]
    difference, camera = render_reference.largest_difference(render_reference.mean_colours(suite, mode), stored)
    backend = os.environ.get("MUJOCO_GL", "")
    tolerance = render_reference.TOLERANCE.get(backend, max(render_reference.TOLERANCE.values()))
    found = f"{difference:+.2f} grey levels ({camera}), {tolerance:g} allowed with {backend or 'this back end'}"
    return judge(abs(difference) <= tolerance, found)
