"""Learning-rate schedules: pure functions of the optimizer step, so that a resumed run needs no schedule state.

Every function returns a factor of the base learning rate. Steps are 0-based.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class LRSchedule(str, Enum):
    """Learning rate after warm-up."""

    STEP = "step"  # x lr_decay_factor once, after num_steps_before_decay: the published rule with 0.1
    MULTISTEP = "multistep"  # x lr_decay_factor at each of lr_decay_steps
    COSINE = "cosine"  # to lr_min_ratio at max_steps
    CONSTANT = "constant"


def warm_up_factor(step: int, warm_up: int) -> float:
    """Linear rise over `warm_up` steps from 10 % (step -1) to 1 (step warm_up - 1), then 1; 1 without warm-up."""
    return min(1.0, 0.1 + 0.9 * (step + 1) / warm_up) if warm_up else 1.0


def decay_factor(step: int, boundaries: Sequence[int], factor: float) -> float:
    """`factor` to the power of the boundaries that `step` has reached."""
    return factor ** sum(step >= boundary for boundary in boundaries)


def cosine_factor(step: int, start: int, end: int, minimum: float = 0.0) -> float:
    """1 until step `start`, then half a cosine down to `minimum` at step `end`, which stays."""
    if step < start:
        return 1.0
    progress = min(1.0, (step - start) / max(1, end - start))
    return minimum + (1 - minimum) * (0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class ScheduleSettings:
    """A schedule with its numbers.

    warm_up: steps; below 1 a share of `max_steps`. boundaries: steps at which the rate is multiplied by `factor`.
    min_ratio: where cosine ends, as a share of the base rate.
    Raises ValueError naming the flag that is out of range.
    """

    kind: LRSchedule
    max_steps: int
    warm_up: float = 0
    boundaries: tuple[int, ...] = ()
    factor: float = 0.1
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.warm_up) and self.warm_up >= 0):
            raise ValueError(f"--lr_warmup_steps is {self.warm_up}, expected 0 or more")
        if not 0 < self.factor <= 1:
            raise ValueError(f"--lr_decay_factor is {self.factor}, expected more than 0 and at most 1")
        if not 0 <= self.min_ratio < 1:
            raise ValueError(f"--lr_min_ratio is {self.min_ratio}, expected at least 0 and less than 1")

    @property
    def warm_up_steps(self) -> int:
        """Warm-up in steps."""
        return round(self.warm_up * self.max_steps) if self.warm_up < 1 else int(self.warm_up)

    def factor_at(self, step: int) -> float:
        """Factor of the base learning rate at optimizer step `step` (0-based)."""
        factor = warm_up_factor(step, self.warm_up_steps)
        if self.kind is LRSchedule.COSINE:
            return factor * cosine_factor(step, self.warm_up_steps, self.max_steps, self.min_ratio)
        return factor * decay_factor(step, self.boundaries, self.factor)


def parse_boundaries(text: str) -> tuple[int, ...]:
    """Steps of `--lr_decay_steps`, e.g. "100000,150000"; ValueError unless positive and rising."""
    try:
        steps = tuple(int(part) for part in text.split(","))
    except ValueError:
        steps = ()
    if not steps or steps[0] < 1 or any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        raise ValueError(
            f"--lr_decay_steps is {text!r}, expected positive rising step numbers separated by commas"
        ) from None
    return steps
