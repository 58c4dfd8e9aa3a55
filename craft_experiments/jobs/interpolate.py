"""Make a policy between the start and a trained one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from craft_experiments.jobs.base import PolicyJob, as_words, program
from craft_experiments.jobs.policies import checkpoint_of, expected_checkpoint, parent_of
from craft_experiments.settings import Settings
from prismatic.evidence.failure_codes import FailureCode


@dataclass(frozen=True)
class Interpolate(PolicyJob):
    """All weights on the way from the start to the cell's trained parent, at the method's scale."""

    kind = "interpolate"
    failure = FailureCode.NO_CHECKPOINT

    def commands(self, s: Settings) -> list[list[str]]:
        trained = expected_checkpoint(s, parent_of(s, self.policy))
        assert trained is not None  # only a replay has no checkpoint
        return [interpolation(s, trained, self.policy.method.scale, "all", s.runs_dir / self.policy.name)]

    def has_result(self, s: Settings) -> bool:
        return checkpoint_of(s, self.policy) is not None


def interpolation(s: Settings, trained: Path, scale: float, parts: str, output: Path) -> list[str]:
    """Weights between the start model and a trained policy; scale 0 of the head is the start's head."""
    flags = {
        "checkpoint": trained,
        "base": s.preset.start,
        "adapter_scale": scale,
        "parts": parts,
        "output": output,
    }
    words = program("vla-scripts/interpolate_weights.py", "prismatic.programs.interpolate_weights")
    return [s.python, *words, *as_words(flags)]
