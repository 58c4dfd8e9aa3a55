"""One LIBERO scene against the stored colours."""

from __future__ import annotations

import os

from gpu_findings import Check, Checks, PartConfig


def rendering(cfg: PartConfig) -> Checks:
    """One LIBERO scene with EGL (on a CPU with OSMesa), against the stored mean colours."""
    os.environ["MUJOCO_GL"] = "egl" if cfg.device.type == "cuda" else "osmesa"
    try:
        from experiments.robot.doctor import render_reference
        from experiments.robot.libero import simulator
        from experiments.robot.libero.surroundings import SimulatorUnavailableError
    except ImportError as error:
        yield Check("colours", f"the simulator is not installed: {error}")
        return
    try:
        simulator.require(render=True)
    except SimulatorUnavailableError as error:
        yield Check("colours", str(error))
        return
    mode = render_reference.RenderMode.PUBLISHED
    stored = render_reference.load_reference()["modes"][mode.value]["libero_spatial"]
    found = render_reference.mean_colours("libero_spatial", mode)
    difference, camera = render_reference.largest_difference(found, stored)
    allowed = render_reference.TOLERANCE[os.environ["MUJOCO_GL"]]
    good = bool(abs(difference) <= allowed)
    yield Check("colours", f"{difference:+.2f} grey levels ({camera})", f"at most {allowed:g}", good)
