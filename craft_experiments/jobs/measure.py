"""Measure what training did to the representation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from craft_experiments.jobs.base import PolicyJob, as_words, data_root, program
from craft_experiments.jobs.policies import expected_checkpoint
from craft_experiments.preset import Demonstrations
from craft_experiments.records import RETENTION, record_path
from craft_experiments.settings import Settings
from prismatic.evidence.checks import read_object
from prismatic.evidence.failure_codes import FailureCode


@dataclass(frozen=True)
class Measure(PolicyJob):
    """Drift, similarity, probes and action error of a trained policy on held-out demonstrations."""

    data: Demonstrations

    kind = "measure"
    failure = FailureCode.EVAL_FAILED
    measured = RETENTION

    @property
    def parts(self) -> tuple[str, ...]:
        return self.policy.name, self.data.name

    def commands(self, s: Settings) -> list[list[str]]:
        flags = {
            "checkpoint": expected_checkpoint(s, self.policy),
            "start": s.preset.start,
            "data_root_dir": data_root(s, self.data),
            "dataset_name": self.data.dataset,
            "unnorm_key": s.preset.start_units(self.data.suite),
            "output": self.file(s),
        }
        words = program("vla-scripts/measure_retention.py", "prismatic.programs.measure_retention")
        return [[s.python, *words, *as_words(flags)]]

    def file(self, s: Settings) -> Path:
        """Where `measure_retention.py` writes."""
        return s.work_dir / "measurements" / f"{self.policy.name}--{self.data.dataset}.json"

    def record(self, s: Settings) -> Path:
        return record_path(s.records_dir, self.policy.name, f"{RETENTION}@{self.data.dataset}")

    def begin(self, s: Settings) -> None:
        self.file(s).unlink(missing_ok=True)  # of a run killed before its record was written

    def finish(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> None:
        measured = read_object(self.file(s), finite=False)
        self.keep(s, self.facts(s, spent, content) | {RETENTION: measured})
