"""A control step without the forward passes that robosuite repeats."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def shared_kinematics(sim: Any) -> Iterator[None]:
    """Within a control step, compute places, contacts and velocities once per physics sub-step.

    robosuite asks for three forward passes per sub-step: before its controller, inside of it, and as part of MuJoCo's
    step. Nothing moves between them, so the second and third need only what follows the velocities: the forces, solved
    again from the last solution as the start, which the outcome depends on. The states are the same, bit for bit.
    """
    import mujoco

    model, data = sim.model._model, sim.data._data
    current = False  # whether places and velocities are those of the current state

    def forward() -> None:
        nonlocal current
        skipped = mujoco.mjtStage.mjSTAGE_VEL if current else mujoco.mjtStage.mjSTAGE_NONE
        mujoco.mj_forwardSkip(model, data, skipped, 0)
        current = True

    def step(with_udd: bool = True) -> None:
        nonlocal current
        (mujoco.mj_step2 if current else mujoco.mj_step)(model, data)
        current = False

    sim.forward, sim.step = forward, step
    try:
        yield
    finally:
        del sim.forward, sim.step
