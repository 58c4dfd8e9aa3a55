"""Conventions of the evaluator that can be checked without a simulator: rotation and gripper."""

from __future__ import annotations

import numpy as np

from experiments.robot.doctor.findings import Check, Status, judge
from experiments.robot.libero import controls, simulator


def convention_checks() -> list[Check]:
    """Quaternion and gripper sign."""
    return [
        Check(
            "quaternion",
            "angle above pi for w < 0: the sign of the quaternion is kept",
            "with folding libero_goal 97 -> 83 %, libero_10 95 -> 56 %",
            _quaternion,
        ),
        Check(
            "gripper sign",
            "policy 1 (open) -> simulator -1, policy 0 (close) -> +1",
            "nothing is ever grasped: 0 %",
            _gripper,
        ),
    ]


def _quaternion() -> tuple[Status, str]:
    """The state that the simulator adapter hands out for a rotation by 4 rad about x, whose w is negative."""
    angle = 4.0
    views = [np.zeros((2, 2, 3), np.uint8) for _ in simulator.CAMERAS]
    raw = {"robot0_eef_pos": np.zeros(3), "robot0_gripper_qpos": np.zeros(2)}
    raw["robot0_eef_quat"] = np.array([np.sin(angle / 2), 0.0, 0.0, np.cos(angle / 2)])
    found = simulator.LiberoEnv._published_observation(raw, views).state[3:6]
    if np.allclose(found, [angle, 0.0, 0.0], atol=1e-6):
        return Status.OK, "a rotation by 4 rad about x is reported as 4 rad"
    folded = np.allclose(found, [angle - 2 * np.pi, 0.0, 0.0], atol=1e-6)
    reason = "the quaternion is folded to w >= 0" if folded else "unknown conversion"
    return Status.FAIL, f"a rotation by 4 rad about x is reported as {np.round(found, 3).tolist()}: {reason}"


def _gripper() -> tuple[Status, str]:
    chunk = np.zeros((2, 7))
    chunk[0, -1] = 1.0
    opened, closed = controls.to_simulator_actions(chunk)[:, -1]
    return judge((opened, closed) == (-1.0, 1.0), f"open -> {opened:+g}, close -> {closed:+g}")
