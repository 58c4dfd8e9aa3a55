"""Evaluate a policy in the simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from craft_experiments.cells import PRO_SUFFIX, Cell, Evaluation, Kind, Role
from craft_experiments.jobs.base import JobFailed, PolicyJob, as_words, data_root, program
from craft_experiments.jobs.interpolate import interpolation
from craft_experiments.jobs.policies import expected_checkpoint, weights_of
from craft_experiments.preset import Demonstrations, Preset
from craft_experiments.records import CONTENT, contents_of, record_path
from craft_experiments.settings import Settings
from prismatic.evidence.episodes import RecordsError, read_run
from prismatic.evidence.failure_codes import FailureCode

_START_KINDS = (Kind.START_TASKS, Kind.START_TASKS_START_HEAD)
_BENCH_KINDS = (Kind.NEW, Kind.UNSEEN)
_START_HEAD = "--start_head"
_SUFFIX = "suite_suffix"


@dataclass(frozen=True)
class Evaluate(PolicyJob):
    """One evaluation; it continues what is there."""

    evaluation: Evaluation

    kind = "evaluate"
    failure = FailureCode.EVAL_FAILED
    measured = "episodes"

    @property
    def parts(self) -> tuple[str, ...]:
        return self.policy.name, self.evaluation.name

    def commands(self, s: Settings) -> list[list[str]]:
        policy = expected_checkpoint(s, self.policy, self.evaluation.step)
        if self.evaluation.kind is not Kind.START_TASKS_START_HEAD:
            return [self._command(s, policy)]
        assert policy is not None  # a replay has no head
        grafted = s.runs_dir / (self.policy.name + _START_HEAD)
        graft = [] if grafted.is_dir() else [interpolation(s, (Path(s.preset.start), policy), 0.0, "head", grafted)]
        return [*graft, self._command(s, grafted)]

    def _command(self, s: Settings, checkpoint: Path | None) -> list[str]:
        cell, folder, asked = self.policy, self.folder(s), question(s.preset, self.policy, self.evaluation)
        flags = {
            "task_suite_name": asked.suite,
            "num_trials_per_task": asked.trials,
            "use_l1_regression": True,
            "use_proprio": True,
            "num_images_in_input": s.num_images,
            "unnorm_key": asked.dataset,
            "local_log_dir": folder,
            "results_dir": folder,
            "rollout_dir": folder / "videos",
            "resume": True,
            "seed": cell.seed,
            **s.preset.evaluate,
            **asked.flags,
            **cell.method.evaluate,
        }
        if asked.task_ids:
            flags["task_ids"] = asked.task_ids
        if cell.method.role is Role.REPLAY:
            flags |= {"control": "replay", "replay_dataset": dataset_dir(s, replayed(s.preset, self.evaluation))}
        else:
            flags = {"pretrained_checkpoint": checkpoint, **flags}
        script = "experiments/robot/libero/run_libero_eval.py"
        words = program(script, "experiments.robot.libero.run_libero_eval")
        return [s.python, *words, *as_words(flags), *s.extra_eval]

    def folder(self, s: Settings) -> Path:
        """Where it writes its log, episodes.jsonl and results.json."""
        return s.logs_dir / self.policy.name / self.evaluation.name

    def log(self, s: Settings) -> Path:
        return self.folder(s) / "console.log"

    def record(self, s: Settings) -> Path:
        return record_path(s.records_dir, self.policy.name, self.evaluation.name)

    def content(self, s: Settings) -> dict[str, str]:
        """Also of the start, which no training names."""
        flags = self.flags(s)
        of_start = ["pretrained_checkpoint"] if self.policy.method.role is Role.START else []
        return contents_of(flags, [*CONTENT, *of_start])

    def finish(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> None:
        checkpoint = self.flags(s).get("pretrained_checkpoint")
        policy = weights_of(Path(checkpoint)) if checkpoint else None  # a replay has none
        origin = {} if policy is None else {"policy": policy}
        self.keep(s, self.facts(s, spent, content) | origin | _outcome(self.folder(s)))


def _outcome(folder: Path) -> dict[str, Any]:
    """Success rate of results.json, and every episode. PARSE_FAILED when they disagree."""
    try:
        run = read_run(folder)
    except (FileNotFoundError, RecordsError) as error:
        raise JobFailed(FailureCode.PARSE_FAILED, str(error)) from None
    rate = run.facts[0].get("overall", {}).get("success_rate") if run.facts else None
    if rate is None:
        raise JobFailed(FailureCode.PARSE_FAILED, f"{folder / 'results.json'}: found no overall success_rate")
    rows = run.episodes.values()
    episodes = sorted([row["task_id"], row["init_idx"], int(row["status"] == "success"), row["steps"]] for row in rows)
    counted = sum(episode[2] for episode in episodes)
    if abs(counted / len(episodes) - rate) > 1e-9:
        reason = f"{folder}: results.json has rate {rate}, episodes.jsonl {counted} of {len(episodes)}"
        raise JobFailed(FailureCode.PARSE_FAILED, reason)
    versions = run.facts[0].get("versions")
    return ({"versions": versions} if versions else {}) | {"rate": rate, "episodes": episodes}


@dataclass(frozen=True)
class Question:
    """What an evaluation asks: suite as the simulator knows it, tasks ("" all), episodes per task, normalisation."""

    suite: str
    task_ids: str
    trials: int
    dataset: str
    flags: Mapping[str, Any]


def question(p: Preset, cell: Cell, evaluation: Evaluation) -> Question:
    """What `evaluation` asks of the policy of `cell`. The start acts in its own units."""
    is_start, kind, suite = cell.method.role is Role.START, evaluation.kind, evaluation.suite
    perturbed: dict[str, Any] = {}
    if kind in _START_KINDS:
        tasks, dataset, trials = p.start_task_ids, p.start_units(suite), p.start_trials
        perturbed = {k: v for k, v in p.start_perturbed.items() if k != _SUFFIX}
    elif kind in _BENCH_KINDS:
        assert p.bench is not None  # no other table asks so
        new = p.bench.task(suite)
        suite, tasks, dataset = new.suite, new.task_id, p.start_dataset if is_start else new.dataset
        trials = p.num_trials if kind is Kind.NEW else p.pro_trials
        perturbed = {**p.perturbed, **(p.bench.unseen if kind is Kind.UNSEEN else {})}
    else:
        tasks, dataset = p.task_ids[suite], p.start_units(suite) if is_start else p.dataset(suite)
        trials = p.pro_trials if kind in PRO_SUFFIX else p.num_trials
        perturbed = {_SUFFIX: PRO_SUFFIX.get(kind, "")} | dict(p.perturbed if kind is Kind.PERTURBED else {})
    suffix = perturbed.pop(_SUFFIX, "")
    return Question(suite + suffix, tasks, evaluation.trials or trials, dataset, perturbed)


def replayed(preset: Preset, evaluation: Evaluation) -> Demonstrations:
    """What the replay control takes its actions from. Of the start's tasks there are others than it was trained on."""
    if evaluation.kind in _START_KINDS:
        return preset.memory(max(preset.memory_sizes)) if preset.keep else preset.held_out()[0]
    if evaluation.kind in _BENCH_KINDS:
        assert preset.bench is not None  # no other table asks so
        return preset.learned(preset.bench.task(evaluation.suite))
    return preset.demonstrations(evaluation.suite)


def dataset_dir(s: Settings, data: Demonstrations) -> Path:
    """Version folder of a data set, `.../{name}/1.0.0`, also when there is none yet."""
    root = Path(data_root(s, data)) / data.dataset
    versions = sorted(root.glob("[0-9]*"))
    return versions[-1] if versions else root / "1.0.0"
