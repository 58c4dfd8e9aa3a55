"""Collect scripted demonstrations."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from craft_experiments.jobs.base import Job, as_words, data_root
from craft_experiments.preset import Demonstrations
from craft_experiments.settings import Settings
from prismatic.evidence.failure_codes import FailureCode


@dataclass(frozen=True)
class Collect(Job):
    """Demonstrations of one suite."""

    data: Demonstrations

    kind = "collect"
    failure = FailureCode.TRAINING_FAILED

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.data.name,)

    def commands(self, s: Settings) -> list[list[str]]:
        p, data = s.preset, self.data
        assert p.collect is not None  # the plan has no such job then
        flags = {
            "task_suite_name": data.suite,
            "task_ids": data.task_ids or "all",
            "episodes_per_task": p.demos_per_task,
            "output_dir": data_root(s, data),
            "dataset_name": data.dataset,
            "num_workers": max(1, (os.cpu_count() or 1) // s.slots),
            **p.collect,
            **data.changes,
        }
        return [[s.python, "-m", "experiments.robot.libero.collect_demos", *as_words(flags)]]

    def has_result(self, s: Settings) -> bool:
        return any(Path(data_root(s, self.data), self.data.dataset).glob("[0-9]*/dataset_info.json"))
