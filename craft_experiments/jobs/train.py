"""Train one policy with `finetune.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_experiments.cells import Role
from craft_experiments.common_utils.terminal import say
from craft_experiments.jobs.base import JobFailed, PolicyJob, as_words, data_root, program
from craft_experiments.jobs.policies import base_of, checkpoint_of, steps_of, weights_of
from craft_experiments.records import (
    MEMORY,
    METRICS,
    TRAINING,
    State,
    contents_of,
    flags_in,
    read_record,
    record_path,
    set_states,
    write_record,
)
from craft_experiments.sequence import before, remembered, trained_on
from craft_experiments.settings import Settings
from prismatic.evidence.checks import read_object
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.results import read_jsonl


@dataclass(frozen=True)
class Train(PolicyJob):
    """One run; it continues from its own newest checkpoint.

    A policy of several suites gets as many steps as the policies of the single suites together.
    """

    kind = "train"
    failure = FailureCode.TRAINING_FAILED
    measured = "metrics"

    def commands(self, s: Settings) -> list[list[str]]:
        p, cell = s.preset, self.policy
        data = trained_on(p, cell)
        flags = {
            "config_file_path": base_of(s, cell),
            "data_root_dir": data_root(s, data[0]),
            "dataset_name": ",".join(found.dataset for found in data),
            "run_root_dir": s.runs_dir,
            "run_id_override": cell.name,
            "use_proprio": True,
            "num_images_in_input": s.num_images,
            "batch_size": p.batch_size,
            "learning_rate": p.learning_rate,
            "max_steps": steps_of(s, cell),
            "save_freq": p.save_freq * len(cell.suites),
            "seed": cell.seed,
            "resume": "auto",
            "use_craft": False,
            **p.train,
        }
        if cell.shots is not None:
            flags |= {"n_shot_episodes": cell.shots, "subset_seed": cell.seed}
        if s.vlm_path:
            flags["vlm_path"] = s.vlm_path
        flags |= cell.method.train
        if old := remembered(p, cell):
            flags[cell.method.memory_flag] = ",".join(str(Path(data_root(s, found), found.dataset)) for found in old)
        launcher = [s.python]
        if p.num_gpus >= 1:
            launcher = [s.torchrun, "--standalone", "--nnodes", "1", "--nproc-per-node", str(p.num_gpus)]
        return [
            [
                *launcher,
                *program("vla-scripts/finetune.py", "prismatic.programs.finetune"),
                *as_words(flags),
                *s.extra_train,
            ]
        ]

    def flags(self, s: Settings) -> dict[str, str]:
        """What the plan makes itself, policies and demonstrations, is known by its name: it may be made again."""
        p, cell, found = s.preset, self.policy, super().flags(s)
        if (earlier := before(p, cell)) is not None:
            # Not the newest checkpoint there is: while the earlier policy is trained again, that is of another step.
            is_trained = earlier.method.role is Role.TRAINED
            steps = f"--{Train(earlier).flags(s)['max_steps']}_chkpt" if is_trained else ""
            found["config_file_path"] = earlier.name + steps
        if old := remembered(p, cell):
            found[cell.method.memory_flag] = ",".join(data.name for data in old)
        return found

    def record(self, s: Settings) -> Path:
        return record_path(s.records_dir, self.policy.name, TRAINING)

    def is_done(self, s: Settings) -> bool:
        return self.has_result(s) and self.is_trained(s)

    def is_trained(self, s: Settings) -> bool:
        """Whether the newest checkpoint is that of the last step. A training that is asked to stop saves and ends well.

        `--extra_train_args` may repeat `--max_steps`: the last one counts.
        """
        found = checkpoint_of(s, self.policy)
        step = re.search(r"--(\d+)_chkpt$", found.name) if found is not None else None
        return found is not None and (step is None or int(step[1]) >= int(self.flags(s)["max_steps"]))

    def begin(self, s: Settings) -> None:
        set_states(s.records_dir, {self.policy.name: State.TRAINING})

    def finish(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> None:
        cell = self.policy
        if checkpoint_of(s, cell) is None:
            raise JobFailed(FailureCode.NO_CHECKPOINT, f"no {cell.name}--<step>_chkpt in {s.runs_dir}")
        if not self.is_trained(s):
            reason = f"stopped before its last step, at {checkpoint_of(s, cell)}; the same command continues it"
            raise JobFailed(FailureCode.TRAINING_FAILED, reason)
        metrics = _metrics(s.runs_dir / cell.name / "metrics.jsonl")
        self.keep(s, self.facts(s, spent, content) | self._origin(s) | {"metrics": metrics})
        set_states(s.records_dir, {cell.name: State.TRAINED})

    def _origin(self, s: Settings) -> dict[str, Any]:
        """Hashes of the policy, of the one it started from, and of the data: plans know these by name alone."""
        manifest = s.runs_dir / self.policy.name / "data_manifest.json"
        trained = read_object(manifest) if manifest.is_file() else {}
        data = {name: str(facts["fingerprint"]) for name, facts in trained.items()}
        memory = contents_of(flags_in(self.commands(s)[0]), filter(None, [self.policy.method.memory_flag]))
        found = {
            "policy": weights_of(checkpoint_of(s, self.policy)),
            "start": weights_of(base_of(s, self.policy)),
            "data": data | memory,
        }
        return {name: value for name, value in found.items() if value}

    def keep(self, s: Settings, record: Mapping[str, Any]) -> None:
        """Write the record. One that is there stays, for evaluations of its policy are there as well.

        The same flags give another policy from other demonstrations, or on another kind of processor.
        """
        path = self.record(s)
        if not path.exists():
            write_record(path, record)
        elif _learned(read_record(path)) != _learned(record):
            say(
                f"{self.name}: trained again, and not as in {path}, which stays (demonstrations or processor are not "
                f"the same). To measure everything on the new policy delete {path.parent}"
            )


def _learned(record: Mapping[str, Any]) -> dict[str, Any]:
    """What two equal trainings have in common."""
    return {name: values for name, values in record["metrics"].items() if name != MEMORY}


def _metrics(path: Path) -> dict[str, list]:
    """{"step": [...], metric: [...]}; None where a step has no value. Empty when the run kept no metrics."""
    rows = read_jsonl(path, finite=False) if path.is_file() else []
    found = {"step": [row["step"] for row in rows]}
    for name in METRICS:
        values = [row.get(name) for row in rows]
        if any(value is not None for value in values):
            found[name] = [None if value is None else float(f"{value:.6g}") for value in values]
    return found
