"""What a part of `gpu_check.py` runs on, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

# Largest relative difference of the same thing on two devices in float32. The first loss shows the forward pass; the
# later ones also what AdamW makes of the rounding of small gradients.
FORWARD, LATER = 1e-3, 2e-2


@dataclass(frozen=True)
class PartConfig:
    """What a part runs on, and at which size."""

    device: torch.device
    size: str

    @property
    def is_trial(self) -> bool:
        """Whether it only shows that the check works: on a CPU, with fewer rows."""
        return self.device.type == "cpu"


@dataclass(frozen=True)
class Check:
    """One finding. `passed` is None when nothing was judged: it is a measurement, or says why there is none."""

    what: str
    found: str
    expected: str = ""
    passed: bool | None = None


Checks = Iterator[Check]


def tried(name: str, check: Callable[[], Check]) -> Check:
    """A fault of one path is its outcome, so that the others are still seen."""
    try:
        return check()
    except Exception as error:  # whatever a device does
        return Check(name, f"{type(error).__name__}: {str(error)[:300]}", "a finished run", False)
