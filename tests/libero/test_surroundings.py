"""The simulator's surroundings: which back end is chosen, what speaks against it, and that each is said in one line."""

from __future__ import annotations

import ctypes.util
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.robot.doctor import installation
from experiments.robot.doctor.findings import Status
from experiments.robot.libero import surroundings
from experiments.robot.libero.surroundings import (
    SimulatorUnavailableError,
    choose_gl,
    gl_problem,
    no_robosuite_log,
    robosuite_log_problem,
)

ROOT = Path(__file__).parents[2]
VARIABLES = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES", "DISPLAY")


@pytest.fixture
def machine(monkeypatch):
    """`machine(libraries, gpu, VARIABLE=value, ...)`: only these libraries and variables are there."""

    def build(libraries=("OSMesa", "EGL"), gpu=False, **variables):
        for name in VARIABLES:
            monkeypatch.setenv(name, "")  # so that what the test writes is undone
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ctypes.util, "find_library", lambda name: f"lib{name}.so" if name in libraries else None)
        monkeypatch.setattr(os.path, "exists", lambda path: gpu and path == "/dev/nvidia0")

    return build


@pytest.mark.parametrize(
    ("gpu", "libraries", "variables", "chosen"),
    [
        (True, ("EGL", "OSMesa"), {}, "egl"),
        (True, ("OSMesa",), {}, "osmesa"),
        (False, ("EGL", "OSMesa"), {}, "osmesa"),
        (False, ("EGL",), {}, "egl"),
        (True, ("EGL", "OSMesa"), {"CUDA_VISIBLE_DEVICES": ""}, "osmesa"),  # the GPU is hidden
        (False, ("EGL", "OSMesa"), {"MUJOCO_GL": "egl"}, "egl"),  # what is set stays
        (True, ("EGL", "OSMesa"), {"MUJOCO_GL": " OSMesa "}, "osmesa"),  # robosuite compares lower case
        (True, ("EGL", "OSMesa"), {"MUJOCO_GL": ""}, "egl"),
        (False, (), {"MUJOCO_GL": "glfw", "DISPLAY": ":0"}, "glx"),
    ],
)
def test_the_back_end_that_is_settled_on(machine, gpu, libraries, variables, chosen):
    machine(libraries, gpu, **variables)
    choose_gl()
    assert os.environ["MUJOCO_GL"] == chosen
    assert os.environ.get("PYOPENGL_PLATFORM") == (chosen if chosen != "glx" else None)
    choose_gl()  # what it wrote, a child finds good


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"MUJOCO_GL": "vulkan"}, "MUJOCO_GL='vulkan'.*osmesa, egl, glx"),
        ({"MUJOCO_GL": "disable"}, "MUJOCO_GL=disable switches rendering off: unset it"),
        ({"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "osmesa"}, "PYOPENGL_PLATFORM=osmesa.*MUJOCO_GL=egl.*unset it"),
        ({"PYOPENGL_PLATFORM": "egl"}, "PYOPENGL_PLATFORM=egl.*set MUJOCO_GL=egl"),
        ({"MUJOCO_GL": "glx", "DISPLAY": ":0", "PYOPENGL_PLATFORM": "egl"}, "PYOPENGL_PLATFORM=egl"),
        ({"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "first"}, "MUJOCO_EGL_DEVICE_ID='first'.*number"),
        ({"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": ""}, "MUJOCO_EGL_DEVICE_ID=''.*unset it"),
        ({"MUJOCO_EGL_DEVICE_ID": "3", "CUDA_VISIBLE_DEVICES": "0,1"}, "DEVICE_ID=3.*CUDA_VISIBLE_DEVICES=0,1"),
        ({"MUJOCO_EGL_DEVICE_ID": "1", "CUDA_VISIBLE_DEVICES": "10"}, "DEVICE_ID=1.*CUDA_VISIBLE_DEVICES=10"),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES=''.*MUJOCO_GL=osmesa"),
        ({"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "MIG-7"}, "CUDA_VISIBLE_DEVICES='MIG-7'.*MUJOCO_GL=osmesa"),
        ({"MUJOCO_GL": "glfw"}, "MUJOCO_GL=glfw.*DISPLAY is not set"),
        ({"MUJOCO_GL": "glx", "DISPLAY": ""}, "MUJOCO_GL=glx.*DISPLAY is not set"),
    ],
)
def test_a_variable_that_does_not_fit_is_named_with_the_way_out(machine, variables, said):
    machine(**variables)
    with pytest.raises(SimulatorUnavailableError, match=said) as caught:
        choose_gl()
    assert "\n" not in str(caught.value)
    status, found = installation.renderer_variables()
    assert status is Status.FAIL and found == str(caught.value)


@pytest.mark.parametrize(("named", "package"), [("osmesa", "libosmesa6"), ("egl", "libegl1")])
def test_a_missing_library_says_what_to_install(machine, named, package):
    machine(libraries=(), MUJOCO_GL=named)
    with pytest.raises(SimulatorUnavailableError, match=f"apt-get install {package}"):
        choose_gl()


def test_devices_by_another_name_than_a_number_are_left_to_robosuite():
    variables = {"MUJOCO_EGL_DEVICE_ID": "0", "CUDA_VISIBLE_DEVICES": "GPU-10f0"}
    assert gl_problem("osmesa", variables) is None or "OSMesa" in gl_problem("osmesa", variables)


NO_DEVICE = """
import os, sys, warnings
from experiments.robot.libero.surroundings import SimulatorUnavailableError, require_renderer
class Context:
    def __init__(self, **size):
        CODE
    def make_current(self):
        pass
    free = make_current
    def __del__(self):
        self.never_made
sys.modules["robosuite"] = sys.modules["robosuite.utils"] = type(sys)("robosuite")
binding = sys.modules["robosuite.utils.binding_utils"] = type(sys)("binding_utils")
binding.GLContext = Context
try:
    require_renderer()
except SimulatorUnavailableError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("code", "variables", "said"),
    [
        (
            "raise ImportError('Cannot initialize\\n a device')",
            {"MUJOCO_GL": "egl", "MUJOCO_EGL_DEVICE_ID": "7"},
            "MUJOCO_GL=egl MUJOCO_EGL_DEVICE_ID=7: ImportError: Cannot initialize a device; MUJOCO_GL=osmesa",
        ),
        (
            "raise RuntimeError('MUJOCO_EGL_DEVICE_ID must be an integer between 0 and 1 (inclusive), got 5.')",
            {"MUJOCO_GL": "egl", "CUDA_VISIBLE_DEVICES": "5"},
            "CUDA_VISIBLE_DEVICES=5: EGL has devices 0 to 1 and no other; ",
        ),
        (
            "self._context = warnings.warn('cannot open\\n display')",
            {"MUJOCO_GL": "glx", "DISPLAY": ":7"},
            "DISPLAY=:7: cannot open display; DISPLAY must name a server that answers",
        ),
    ],
)
def test_a_context_that_cannot_be_made_is_one_line_with_the_variables(code, variables, said):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)} | variables
    program = NO_DEVICE.replace("CODE", code)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stderr == "" and done.stdout.count("\n") == 1 and said in done.stdout, done.stdout + done.stderr


def test_the_log_file_of_another_user_is_not_opened(tmp_path, monkeypatch):
    log = tmp_path / "robosuite.log"
    monkeypatch.setattr(surroundings, "ROBOSUITE_LOG", log)
    assert robosuite_log_problem() is None
    assert installation.robosuite_log()[0] is Status.OK
    log.mkdir()  # cannot be opened for writing, by root neither
    with no_robosuite_log():
        assert isinstance(logging.FileHandler(str(log)), logging.NullHandler)
        other = logging.FileHandler(str(tmp_path / "other.log"))
        other.close()
    assert (tmp_path / "other.log").exists()
    with pytest.raises(OSError):
        logging.FileHandler(str(log))
    assert str(log) in robosuite_log_problem()
    status, found = installation.robosuite_log()
    assert status is Status.WARN and str(log) in found
