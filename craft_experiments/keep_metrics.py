"""Numbers of a policy that learns tasks one after the other, after LIBERO (arXiv 2306.03310).

LIBERO: c_ij is the success in task j after task i was learned, c_kke that in task k at checkpoint e of its own stage.
The forward transfer of k is the mean of c_kke over e. Its negative backward transfer is the mean of c_kk - c_ik over
the later stages i. Its area under the success curve is the mean of its forward transfer and of the c_ik. Each is then
averaged over the tasks. Here the start has learned several tasks at once, as stage 0, for which no curve is known:
their c_kk takes the place of forward transfer. c_kk is the success at the end of a stage, with which the sequence
goes on; LIBERO takes the best checkpoint. The backward transfer is averaged over tasks that a stage follows: the last
has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import fsum

Rates = Mapping[str, float]


@dataclass(frozen=True)
class Course:
    """What one policy could do along its sequence; rates in [0, 1].

    Attributes:
        learned: task -> stage in which it was learned, 0 for those of the start; stages have no gaps.
        success: one mapping per stage, task -> rate. A rate that was not measured is left out.
        curve: task -> rates at checkpoints of its stage, the last one that of its end; of the start's tasks none.
    """

    learned: Mapping[str, int]
    success: tuple[Rates, ...]
    curve: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The last stage."""
        return max(self.learned.values())


def final_success(course: Course) -> float | None:
    """Mean over all tasks at the end; higher is better. None: a rate is missing, here and below."""
    return _mean([_rate(course, course.last, task) for task in course.learned])


def forward_transfer(course: Course) -> float | None:
    """Mean over the new tasks of the mean along their curves, in [0, 1]; higher is better: learned early and well."""
    return _mean([_mean(list(course.curve.get(task, ()))) for task in _new(course)])


def backward_transfer(course: Course) -> float | None:
    """Negative backward transfer in [-1, 1]: what was lost, so lower is better and below 0 is gain."""
    found = []
    for task, stage in course.learned.items():
        if stage < course.last:
            own, later = _rate(course, stage, task), _later(course, task, stage)
            found.append(None if own is None or later is None else own - fsum(later) / len(later))
    return _mean(found)


def area_under_curve(course: Course) -> float | None:
    """Mean over all tasks of the mean of learning and keeping, in [0, 1]; higher is better."""
    found: list[float | None] = []
    for task, stage in course.learned.items():
        first = _mean(list(course.curve.get(task, ()))) if stage else _rate(course, stage, task)
        later = _later(course, task, stage)
        found.append(None if first is None or later is None else fsum((first, *later)) / (1 + len(later)))
    return _mean(found)


def steps_to_recover(rates: Mapping[int, float], goal: float) -> int | None:
    """The first number of steps at which the rate is at least `goal`; None: at none that was looked at."""
    return next((steps for steps in sorted(rates) if rates[steps] >= goal), None)


def _new(course: Course) -> list[str]:
    return [task for task, stage in course.learned.items() if stage]


def _rate(course: Course, stage: int, task: str) -> float | None:
    return course.success[stage].get(task) if stage < len(course.success) else None


def _later(course: Course, task: str, stage: int) -> list[float] | None:
    """Rates of a task after each later stage; None when one is missing."""
    found = [_rate(course, later, task) for later in range(stage + 1, course.last + 1)]
    known = [rate for rate in found if rate is not None]
    return known if len(known) == len(found) else None


def _mean(values: list[float | None] | list[float]) -> float | None:
    known = [value for value in values if value is not None]
    return fsum(known) / len(known) if values and len(known) == len(values) else None
