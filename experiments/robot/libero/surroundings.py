"""What the simulator needs around it: an OpenGL back end, and environment variables that agree with it.

mujoco, robosuite and PyOpenGL read the variables when they are imported or make their first context, and answer a wrong
one with a traceback that seldom names it. Here they are checked first, and what fails later is said in one line.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import functools
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

BACKENDS = ("osmesa", "egl", "glx")
"""What MUJOCO_GL may name; `glfw` is `glx` by its other name."""

ROBOSUITE_LOG = Path("/tmp/robosuite.log")
"""robosuite opens this file of all users at import."""

_VARIABLES = ("MUJOCO_GL", "PYOPENGL_PLATFORM", "MUJOCO_EGL_DEVICE_ID", "CUDA_VISIBLE_DEVICES", "DISPLAY")
_UNDECIDED = ("", "enable", "enabled", "on", "true", "1")
_OFF = ("disable", "disabled", "off", "false", "0")
_HINTS = {
    "egl": "MUJOCO_GL=osmesa renders without a GPU; with one, this user needs access to /dev/dri and the driver's EGL",
    "osmesa": "MUJOCO_GL=egl renders with a GPU",
    "glx": "DISPLAY must name a server that answers; MUJOCO_GL=osmesa or egl needs none",
}


class SimulatorUnavailableError(RuntimeError):
    """The simulator or its renderer is not installed or cannot be used here; the message says what to do."""


def choose_gl() -> None:
    """Settle MUJOCO_GL and PYOPENGL_PLATFORM for this process and its children.

    Unset, it becomes EGL on a GPU, else OSMesa, else EGL in software. A display is not used unless asked for: rendering
    to a window system fails on most machines that evaluate.

    Raises:
        SimulatorUnavailableError: naming the variable that does not fit, or the library that is missing.
    """
    chosen = chosen_backend(os.environ)
    problem = gl_problem(chosen, os.environ)
    if problem is not None:
        raise SimulatorUnavailableError(problem)
    os.environ["MUJOCO_GL"] = chosen
    if chosen != "glx" and not os.environ.get("PYOPENGL_PLATFORM"):
        os.environ["PYOPENGL_PLATFORM"] = chosen


def chosen_backend(variables: Mapping[str, str]) -> str:
    """The back end that MUJOCO_GL names, lower case, or the best one here; not checked."""
    named = variables.get("MUJOCO_GL", "").strip().lower()
    if named not in _UNDECIDED:
        return "glx" if named == "glfw" else named
    has_osmesa, has_egl = _has_library("OSMesa"), _has_library("EGL")
    return "egl" if has_egl and (_has_gpu(variables) or not has_osmesa) else "osmesa"


def gl_problem(chosen: str, variables: Mapping[str, str]) -> str | None:
    """Why this back end cannot work with these variables, in one line; None where nothing speaks against it."""
    named = variables.get("MUJOCO_GL")
    if chosen in _OFF:
        return f"MUJOCO_GL={named} switches rendering off: unset it, or set it to one of {', '.join(BACKENDS)}"
    if chosen not in BACKENDS:
        return f"MUJOCO_GL={named!r}: expected one of {', '.join(BACKENDS)}; unset, one is chosen"
    platform = variables.get("PYOPENGL_PLATFORM", "")
    if platform and platform.lower() != chosen:
        way_out = f"unset it, or set MUJOCO_GL={platform.lower()}" if platform.lower() in BACKENDS else "unset it"
        return f"PYOPENGL_PLATFORM={platform} contradicts MUJOCO_GL={named or chosen + ' (chosen)'}: {way_out}"
    return _device_problem(chosen, variables) or _library_problem(chosen, variables)


def _device_problem(chosen: str, variables: Mapping[str, str]) -> str | None:
    """robosuite takes the EGL device from MUJOCO_EGL_DEVICE_ID, else from CUDA_VISIBLE_DEVICES, and checks the former
    against the latter whatever the back end."""
    device, visible = variables.get("MUJOCO_EGL_DEVICE_ID"), variables.get("CUDA_VISIBLE_DEVICES")
    numbers = [] if visible is None else visible.split(",")
    numbered = all(_is_number(word) for word in numbers)
    if device is not None:
        if not _is_number(device):
            return f"MUJOCO_EGL_DEVICE_ID={device!r}: expected the number of a device such as 0, or unset it"
        if visible and device not in (numbers if numbered else visible):
            return f"MUJOCO_EGL_DEVICE_ID={device} is not in CUDA_VISIBLE_DEVICES={visible}: name one of these"
    elif chosen == "egl" and not numbered:
        return (
            f"CUDA_VISIBLE_DEVICES={visible!r}: MUJOCO_GL=egl takes its device from it and expected numbers such as 0; "
            "unset it, give numbers, or set MUJOCO_GL=osmesa"
        )
    return None


def _library_problem(chosen: str, variables: Mapping[str, str]) -> str | None:
    if chosen == "osmesa" and not _has_library("OSMesa"):
        return "MUJOCO_GL=osmesa needs the OSMesa library, which was not found: apt-get install libosmesa6"
    if chosen == "egl" and not _has_library("EGL"):
        return (
            "MUJOCO_GL=egl needs the EGL library, which was not found: apt-get install libegl1, or set MUJOCO_GL=osmesa"
        )
    if chosen == "glx" and not variables.get("DISPLAY"):
        named = variables.get("MUJOCO_GL")
        return f"MUJOCO_GL={named} draws on a display, and DISPLAY is not set: set MUJOCO_GL=egl or osmesa"
    return None


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _has_library(name: str) -> bool:
    return ctypes.util.find_library(name) is not None


def _has_gpu(variables: Mapping[str, str]) -> bool:
    """An empty CUDA_VISIBLE_DEVICES takes the GPU away from this process."""
    hidden = variables.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    return not hidden and (os.path.exists("/dev/nvidia0") or os.path.exists("/dev/dri/renderD128"))


@functools.cache
def require_renderer() -> None:
    """Make an OpenGL context as robosuite does and free it, once per process. robosuite must be importable.

    Raises:
        SimulatorUnavailableError: with the reason and every variable that takes part.
    """
    from robosuite.utils.binding_utils import GLContext

    reason = None
    # A context that was not made complains when it is thrown away; GLFW only warns, and leaves it empty.
    with _no_unraisable(), warnings.catch_warnings(record=True) as warned:
        try:
            context = GLContext(max_width=16, max_height=16, device_id=-1)
            if not getattr(context, "_context", True):
                reason = " ".join(str(warned[0].message).split()) if warned else "none was made"
            else:
                context.make_current()
                context.free()
        except Exception as error:  # noqa: BLE001 - whatever the driver and its bindings raise
            reason = one_line(error)
        context = None
    if reason is not None:
        reason = re.sub(r".*must be an integer between 0 and (\d+).*", r"EGL has devices 0 to \1 and no other", reason)
        said = " ".join(f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ)
        hint = _HINTS.get(os.environ.get("MUJOCO_GL", ""), "")
        raise SimulatorUnavailableError(f"no OpenGL context can be made with {said}: {reason}; {hint}")


@contextlib.contextmanager
def no_robosuite_log() -> Iterator[None]:
    """Within, `/tmp/robosuite.log` is not opened: it belongs to whoever came first, and nobody here reads it."""
    original = logging.FileHandler

    def handler(filename: Any, *args: Any, **kwargs: Any) -> logging.Handler:
        if os.fspath(filename) == str(ROBOSUITE_LOG):
            return logging.NullHandler()
        return original(filename, *args, **kwargs)

    logging.FileHandler = handler  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        logging.FileHandler = original  # type: ignore[misc]


def robosuite_log_problem() -> str | None:
    """What keeps robosuite alone from being imported on this machine; None when nothing does."""
    if ROBOSUITE_LOG.exists() and not (ROBOSUITE_LOG.is_file() and os.access(ROBOSUITE_LOG, os.W_OK)):
        return f"{ROBOSUITE_LOG} belongs to somebody else: the programs here do without, robosuite alone cannot start"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow what libero and robosuite print while they build things (errors are raised, not printed)."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def _no_unraisable() -> Iterator[None]:
    kept, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = kept


def one_line(error: BaseException) -> str:
    """`Type: text` without line ends."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
