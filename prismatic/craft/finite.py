"""What happens when a retention gradient is NaN or infinite: a plain step, and an end when it stays so."""

from __future__ import annotations


class NonFiniteRetentionError(RuntimeError):
    """The retention gradient was NaN or infinite in many steps in a row."""


def new_statistics() -> dict[str, int]:
    """Counts of a run's constrained steps."""
    return {"constrained_steps": 0, "non_finite_steps": 0, "non_finite_in_a_row": 0}


def count_finite_(statistics: dict[str, int], is_finite: bool, limit: int) -> None:
    """Count a step in place. Raises NonFiniteRetentionError after `limit` that are not finite in a row."""
    if is_finite:
        statistics["non_finite_in_a_row"] = 0
        return
    statistics["non_finite_steps"] += 1
    statistics["non_finite_in_a_row"] += 1
    if statistics["non_finite_in_a_row"] >= limit:
        raise NonFiniteRetentionError(
            f"the retention gradient was not finite in {limit} constrained steps in a row, after "
            f"{statistics['constrained_steps']} steps: the signal overflows, or the anchor is damaged"
        )
