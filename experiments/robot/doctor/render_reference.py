"""Mean colours of the cameras, per suite and render mode: measured, stored, compared.

    python -m experiments.robot.doctor.render_reference

measures with the installed simulator and writes `render_reference.json` beside this file. Do that only with the
known-good versions.
"""

from __future__ import annotations

import itertools
import json
import sys
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero import simulator
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.tasks import load_task
from prismatic.command_line import MISTAKES, OneLineParser, bad_input_in_one_line
from prismatic.evidence.checks import read_object
from prismatic.progress import over

_PROGRAM = "python -m experiments.robot.doctor.render_reference"
REFERENCE_FILE = Path(__file__).with_name("render_reference.json")
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
IMAGE_SIZE = 96

TOLERANCE = {"osmesa": 1.0, "egl": 2.0, "glx": 2.0, "glfw": 2.0}
"""Allowed difference of a mean colour channel, grey levels, per GL back end. The reference was rendered with OSMesa."""


MODES = (RenderMode.PUBLISHED, RenderMode.LAZY)  # EVERY_STEP gives the images of PUBLISHED


def mean_colours(suite: str, mode: RenderMode) -> dict[str, list[float]]:
    """Camera field -> mean red, green, blue (grey levels) of task 0 at initial state 0, before any step."""
    task = load_task(suite, 0)
    env = simulator.LiberoEnv(task, IMAGE_SIZE, mode, reset_mode=ResetMode.SOFT)
    try:
        env.reset(task.init_states[0], seed=0)
        seen = env.observe()
    finally:
        env.close()
    views = {"image": seen.image, "wrist_image": seen.wrist_image}
    return {name: np.round(view.mean(axis=(0, 1)), 2).tolist() for name, view in views.items()}


def load_reference() -> dict[str, Any]:
    """Content of the stored file: {"versions", "image_size", "modes": {mode: {suite: {camera: [r, g, b]}}}}."""
    return read_object(REFERENCE_FILE)


def largest_difference(found: dict[str, list[float]], stored: dict[str, list[float]]) -> tuple[float, str]:
    """Largest difference of a channel (grey levels, with sign), and its camera."""
    signed = [
        (value - reference, camera)
        for camera in stored
        for value, reference in zip(found[camera], stored[camera], strict=True)
    ]
    return max(signed, key=lambda pair: abs(pair[0]))


def main() -> int:
    """Measure every suite in every mode and write the file."""
    parser = OneLineParser(prog=_PROGRAM, description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.parse_args()
    with bad_input_in_one_line(_PROGRAM, (*MISTAKES, SimulatorUnavailableError)):
        simulator.require(render=True)
    modes: dict[str, dict[str, Any]] = {mode.value: {} for mode in MODES}
    for mode, suite in over([*itertools.product(MODES, SUITES)], "rendering", "scenes"):
        modes[mode.value][suite] = mean_colours(suite, mode)
    content = {"versions": simulator.simulator_versions(), "image_size": IMAGE_SIZE, "modes": modes}
    REFERENCE_FILE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
