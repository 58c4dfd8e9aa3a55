"""Make a policy between the start and a trained one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from craft_experiments.jobs.base import PolicyJob, as_words, program
from craft_experiments.jobs.policies import base_of, checkpoint_of, expected_checkpoint, parent_of
from craft_experiments.settings import Settings
from prismatic.evidence.failure_codes import FailureCode


@dataclass(frozen=True)
class Interpolate(PolicyJob):
    """Weights on the way from where the cell's trained parent began to where it ended, at the method's scale."""

    kind = "interpolate"
    failure = FailureCode.NO_CHECKPOINT

    def commands(self, s: Settings) -> list[list[str]]:
        parent, method = parent_of(s, self.policy), self.policy.method
        trained = expected_checkpoint(s, parent)
        assert trained is not None  # only a replay has no checkpoint
        output = s.runs_dir / self.policy.name
        return [interpolation(s, (base_of(s, parent), trained), method.scale, method.parts, output)]

    def has_result(self, s: Settings) -> bool:
        return checkpoint_of(s, self.policy) is not None


def interpolation(s: Settings, ends: tuple[Path, Path], scale: float, parts: str, output: Path) -> list[str]:
    """Weights between two policies, the start of a training and its end; scale 0 of the head is the start's head."""
    base, trained = ends
    flags = {
        "checkpoint": trained,
        "base": base,
        "adapter_scale": scale,
        "parts": parts,
        "output": output,
    }
    words = program("vla-scripts/interpolate_weights.py", "prismatic.programs.interpolate_weights")
    return [s.python, *words, *as_words(flags)]
