"""Gains and distances of the scripted expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ExpertSettings:
    """Gains and distances of the expert (metres, radians, control steps)."""

    position_gain: float = 20.0  # action per metre: full speed beyond 4.7 cm
    rotation_gain: float = 3.0
    max_rotation: float = 0.45
    hover: float = 0.09  # height above the grasp at which the gripper arrives from the side
    funnel: float = 3.0  # how many metres of height one metre of sideways error buys while descending
    clearance: float = 0.05  # between the carried object and what it passes over
    release_height: float = 0.015  # above the support when the gripper opens
    rim_depth: float = 0.028  # how far the finger tips go below the rim
    rim_margin: float = 0.012
    close_steps: int = 9  # the fingers need 8 steps from fully open to fully closed
    phase_limit: int = 60
    attempts: int = 1


def describe_expert(settings: ExpertSettings | None = None) -> dict[str, Any]:
    """The expert's settings as plain numbers, for the record beside a data set."""
    return dict(vars(settings or ExpertSettings()))
