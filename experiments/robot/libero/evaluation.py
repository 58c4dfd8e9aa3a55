"""Evaluation of a policy on a LIBERO suite: plan the episodes, run them, write the log and the results."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, TextIO

from experiments.robot.libero.control_results import read_control_results
from experiments.robot.libero.controls import Control
from experiments.robot.libero.episode import Backend, EnvSettings, Job, RunInfo, with_policy_protocol
from experiments.robot.libero.eval_config import DEFAULT_INITIAL_STATES, EvalConfig, EvalInputError
from experiments.robot.libero.eval_log import (
    EpisodeRecord,
    EpisodeStatus,
    EpisodeStore,
    OrderedTextLog,
    PlannedEpisode,
    TaskPlan,
    summarize_run,
)
from experiments.robot.libero.initial_states import read_initial_states
from experiments.robot.libero.scheduler import CrashReport, Report, SessionReport, WorkerPool, run_in_process
from experiments.robot.libero.suite_names import language_warnings, with_language
from experiments.robot.libero.tracking import make_tracker
from prismatic.evidence.checks import check_fields, parse_object, read_text
from prismatic.evidence.files import write_json
from prismatic.evidence.free_names import create_free
from prismatic.evidence.hashes import file_hash, files_hash, folder_hash
from prismatic.model_files import CheckpointError
from prismatic.output_folder import hold, release
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.training.folder_kinds import check_is_checkpoint

PINNED_VERSIONS = {"mujoco": "3.3.0", "robosuite": "1.4.0"}
"""Simulator versions behind the published numbers; others change success rates by up to 86 points on single tasks."""

PLAN_FILE = "plan.json"


class LiberoBackend:
    """The real policy, data sets and simulator. Imports happen where they are needed."""

    def check_machine(self, cfg: EvalConfig) -> None:
        """The device of the policy, and the renderer unless nobody looks."""
        from experiments.robot.libero import simulator

        if cfg.control is not Control.REPLAY:
            usable_device(cfg.device)
        simulator.require(render=cfg.renders())

    def check_policy(self, cfg: EvalConfig) -> None:
        """What can be seen of the checkpoint without loading it. Raises EvalInputError."""
        if cfg.control is Control.REPLAY:
            return
        try:
            check_is_checkpoint(cfg.pretrained_checkpoint)
        except CheckpointError as error:
            raise EvalInputError(f"--pretrained_checkpoint: {error}") from error

    def load_policy(self, cfg: EvalConfig) -> Any:
        """`VLAPolicy` from the checkpoint directory, on `cfg.device` or the best device there is.

        Raises EvalInputError for a checkpoint that cannot be used.
        """
        from experiments.robot.policy import VLAPolicy
        from prismatic.vla.datasets.registry import load_data_set_file

        device = usable_device(cfg.device)
        if cfg.data_set_file is not None:
            load_data_set_file(cfg.data_set_file)
        options = {"num_images": cfg.num_images_in_input, "base": cfg.base_checkpoint, "robot": cfg.robot_platform}
        try:
            return VLAPolicy.from_checkpoint(cfg.pretrained_checkpoint, device, cfg.statistics_key(), **options)
        except KeyError as error:
            raise EvalInputError(f"--unnorm_key: checkpoint {cfg.pretrained_checkpoint}: {error.args[0]}") from error
        except (ValueError, OSError) as error:
            raise EvalInputError(f"--pretrained_checkpoint: {error}") from error

    def open_demonstrations(self, path: str) -> Any:
        """RLDS reader of one data set directory."""
        from prismatic.vla.datasets.rlds import RLDSReader

        try:
            return RLDSReader(path)
        except (OSError, ValueError, KeyError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise EvalInputError(f"--replay_dataset {path}: expected an RLDS data set: {text}") from error

    def task_count(self, suite: str) -> int:
        """Number of tasks of the suite."""
        from experiments.robot.libero import simulator

        return simulator.task_count(suite)

    def load_task(self, suite: str, task_id: int) -> Any:
        """`LiberoTask`."""
        from experiments.robot.libero import simulator

        return simulator.load_task(suite, task_id)

    def max_steps(self, suite: str) -> int:
        """Step limit of the suite, or of the suite it is derived from."""
        from experiments.robot.libero import simulator

        return simulator.max_episode_steps(suite)

    def make_env(self, task: Any, settings: EnvSettings) -> Any:
        """`LiberoEnv`."""
        from experiments.robot.libero.simulator import LiberoEnv

        return LiberoEnv(task, settings.image_size, settings.render_mode, settings.render, settings.reset_mode)

    def versions(self) -> dict[str, str]:
        """Simulator packages, torch, transformers, python and the GL backend."""
        from importlib.metadata import PackageNotFoundError, version

        from experiments.robot.libero.simulator import simulator_versions

        found = dict(simulator_versions())
        for name in ("torch", "transformers"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def usable_device(wanted: str | None) -> str:
    """The device of `--device`; None: cuda when there is one, else cpu.

    Raises:
        EvalInputError: torch knows no such device, or this machine has none.
    """
    import torch

    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=wanted)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvalInputError(f"--device {wanted} cannot be used: {reason}; expected cpu, cuda or cuda:N") from error
    return wanted


def plan_tasks(cfg: EvalConfig, backend: Backend) -> list[TaskPlan]:
    """The trials of the run in log order: tasks, then initial states ascending, numbered from 1 without the skipped.

    Raises:
        EvalInputError: unknown suite, task or initial state.
    """
    try:
        count = backend.task_count(cfg.task_suite_name)
        backend.max_steps(cfg.task_suite_name)  # a suite without a step limit cannot be evaluated
    except ValueError as error:
        raise EvalInputError(f"--task_suite_name: {error}") from error
    source = cfg.resolved_language_source()
    plans, tasks, number = [], [], 0
    for task_id in cfg.task_id_list(count):
        try:
            task = backend.load_task(cfg.task_suite_name, task_id)
        except FileNotFoundError as error:
            raise EvalInputError(f"--task_suite_name {cfg.task_suite_name}: {error}") from error
        tasks.append(task)
        episodes = []
        for init_idx, state in read_initial_states(cfg, task).items():
            number += state is not None
            episodes.append(PlannedEpisode(init_idx, None if state is None else number))
        plans.append(TaskPlan(task_id, task.name, with_language(task, source).language, tuple(episodes)))
    for line in language_warnings(cfg.task_suite_name, source, tasks):
        print(f"warning: {line}", file=sys.stderr)
    return plans


def shard_plans(plans: Iterable[TaskPlan], part: int, parts: int) -> list[TaskPlan]:
    """The episodes of one of several machines: every `parts`-th episode number, so that each gets some of every task.

    Skipped trials, which have no number, stay with the first part; tasks without episodes are left out.
    """
    result = []
    for plan in plans:
        mine = tuple(e for e in plan.episodes if (0 if e.number is None else e.number - 1) % parts == part - 1)
        if mine:
            result.append(dataclasses.replace(plan, episodes=mine))
    return result


def checkpoint_fingerprint(path: str) -> str:
    """Hash of a checkpoint directory's files: names, sizes and contents.

    The instructions that `craft_checkpoint.json` records do not count: they decide nothing that the policy does.

    Raises:
        EvalInputError: the directory does not exist or is empty.
    """
    root = Path(path)
    files = sorted(item for item in root.rglob("*") if item.is_file()) if root.is_dir() else []
    if not files:
        found = "an empty directory" if root.is_dir() else "no such directory"
        raise EvalInputError(f"--pretrained_checkpoint {path}: expected a checkpoint directory, found {found}")
    manifest = root / MANIFEST
    return files_hash(
        root, files, {manifest: _without_instructions(manifest.read_bytes())} if manifest in files else {}
    )


def _without_instructions(manifest: bytes) -> bytes:
    """The file as it was before the entry came: records of those checkpoints stay those of the same policy."""
    try:
        values = json.loads(manifest)
    except ValueError:
        return manifest
    if not isinstance(values, dict) or "instructions" not in values:
        return manifest
    del values["instructions"]
    return (json.dumps(values, indent=2) + "\n").encode()


def run_fingerprint(cfg: EvalConfig) -> tuple[str, str]:
    """(fingerprint of all that decides an episode's outcome besides task and initial state, checkpoint identity).

    Two runs with the same fingerprint may share a results folder. Raises EvalInputError for a missing checkpoint.
    """
    if cfg.control is Control.REPLAY:
        content = folder_hash(cfg.replay_dataset)  # None: opening it says what is wrong
        data = f"{cfg.replay_dataset}@{content}" if content else cfg.replay_dataset
        checkpoint = f"replay:{data}#{'auto' if cfg.replay_episode is None else cfg.replay_episode}"
    else:
        checkpoint = f"{cfg.pretrained_checkpoint}@{checkpoint_fingerprint(cfg.pretrained_checkpoint)}"
    names = ("task_suite_name", "control", "seed", "num_open_loop_steps", "num_steps_wait", "env_img_res")
    names += ("initial_states_path", "render_mode", "reset_mode", "unnorm_key", "init_noise_mm")
    names += ("batch_inference",) if cfg.batch_inference else ()  # as the default, it changes nothing
    names += ("robot_platform",) if cfg.robot_platform is not None else ()  # else the checkpoint says it
    settings = {name: _plain(getattr(cfg, name)) for name in names} | {"checkpoint": checkpoint.rpartition("@")[2]}
    settings["initial_states_path"] = _initial_states(cfg)
    settings["language_source"] = cfg.resolved_language_source().value
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16], checkpoint


def _initial_states(cfg: EvalConfig) -> str:
    """What `--initial_states_path` holds: DEFAULT, or the hash of the file."""
    path = cfg.initial_states_path
    return path if path == DEFAULT_INITIAL_STATES else file_hash(path)


def evaluate(cfg: EvalConfig, backend: Backend | None = None) -> dict[str, Any]:
    """Run the evaluation and write its files.

    Args:
        cfg: command line.
        backend: where policy and simulator come from; None: the real ones.

    Returns:
        The content of results.json. `valid` is False when an episode ended in an error.

    Raises:
        EvalInputError: something in the command line cannot be used; nothing was run.
        WorkerFailedError: a worker process could not load what it needs.
    """
    cfg.validate()
    backend = backend or LiberoBackend()
    backend.check_policy(cfg)
    if cfg.control is Control.REPLAY:
        cfg = with_policy_protocol(cfg, backend)
    fingerprint, checkpoint = run_fingerprint(cfg)
    plans = plan_tasks(cfg, backend)
    backend.check_machine(cfg)
    controls = read_control_results(cfg, checkpoint)
    if cfg.results_dir:
        _check_unused(Path(cfg.results_dir), cfg)
    started = datetime.now().strftime("%Y_%m_%d-%H_%M_%S")
    log_path = Path(cfg.local_log_dir) / f"{run_name(cfg, started)}.txt"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with create_free(log_path) as log:
        run = RunInfo(Path(log.name).stem, started, fingerprint, checkpoint)
        try:
            evaluation = _Evaluation(cfg, backend, run, plans, controls)
        except BaseException:
            os.unlink(log.name)  # it says nothing
            raise
        return evaluation.execute(log)


def run_name(cfg: EvalConfig, started: str) -> str:
    """Name of the run and of its text log, `EVAL-<suite>-<family>-<started>[--shard1of2][--<note>]`."""
    part, parts = cfg.shard_part()
    shard = f"--shard{part}of{parts}" if cfg.shard is not None else ""
    note = f"--{cfg.run_id_note}" if cfg.run_id_note else ""
    return f"EVAL-{cfg.task_suite_name}-{cfg.model_family}-{started}{shard}{note}"


def _check_unused(folder: Path, cfg: EvalConfig) -> None:
    if not cfg.resume and (folder / "episodes.jsonl").exists():
        raise EvalInputError(
            f"--results_dir {folder}: holds the episodes of another run; pass --resume True to continue it, "
            "or name another folder"
        )


class _Evaluation:
    """State of one run: the store, the text log, and the facts reported by the sessions."""

    def __init__(
        self, cfg: EvalConfig, backend: Backend, run: RunInfo, plans: list[TaskPlan], controls: list[dict[str, Any]]
    ) -> None:
        self.cfg, self.backend, self.run, self.controls = cfg, backend, run, controls
        self.initial_states = _initial_states(cfg)
        self.whole_plan, self.plans = plans, shard_plans(plans, *cfg.shard_part())
        folder = Path(cfg.results_dir) if cfg.results_dir else Path(cfg.local_log_dir) / run.run_id
        self.results_path = folder / "results.json"
        hold(folder, "--results_dir")
        _check_unused(folder, cfg)  # now that nobody else writes to it
        try:
            self.store = EpisodeStore(folder / "episodes.jsonl", run.fingerprint)
        except ValueError as error:
            raise EvalInputError(f"--results_dir: {error}") from error
        self.facts: dict[str, Any] = {"versions": backend.versions()}
        self.errors_in_a_row = 0
        self.new_episodes = 0

    def execute(self, log: TextIO) -> dict[str, Any]:
        """Run everything; `log` is the open text log."""
        print(f"Logging to local log file: {log.name}", flush=True)
        _warn_about_versions(self.facts["versions"])
        if self.store.dropped is not None:
            print(f"warning: {self.store.path}: cut off an unfinished last line", file=sys.stderr)
        write_plan(self.results_path.with_name(PLAN_FILE), self.whole_plan)
        started = time.monotonic()
        tracker = make_tracker(self.cfg, self.run.run_id)
        text_log = OrderedTextLog(self.plans, self.cfg.initial_states_path, _Tee(log))
        try:
            self._run_all(text_log)
            text_log.finish()
        finally:
            results = self._write_results(time.monotonic() - started)
            release(self.results_path.parent)
        tracker.finish(results, Path(log.name))
        return results

    def _run_all(self, text_log: OrderedTextLog) -> None:
        done = self.store.finished()
        text_log.begin(self.cfg.task_suite_name)
        for plan in self.plans:
            for planned in plan.episodes:
                if (plan.task_id, planned.init_idx) in done:
                    text_log.add(done[plan.task_id, planned.init_idx])
        jobs = open_jobs(self.plans, done, self.cfg.max_videos)
        for record in self._records(jobs):
            self.store.append(record)
            text_log.add(record)
            self.new_episodes += 1
            self._count_errors(record)

    def _records(self, jobs: list[Job]) -> Iterator[EpisodeRecord]:
        reports: Iterable[Report]
        if self.cfg.num_workers == 0:
            reports = run_in_process(jobs, self.cfg, self.backend, self.run)
        else:
            reports = WorkerPool(self.cfg, self.backend, self.run).run(jobs)
        for report in reports:
            if isinstance(report, SessionReport):
                self.facts.update(report.facts)
            elif isinstance(report, CrashReport):
                yield self._crash_record(report)
            else:
                yield report

    def _crash_record(self, crash: CrashReport) -> EpisodeRecord:
        plan = next(plan for plan in self.plans if plan.task_id == crash.assignment.task_id)
        return EpisodeRecord(
            **self.run.record_fields(self.cfg),
            task_id=plan.task_id,
            task_name=plan.name,
            instruction=plan.instruction,
            init_idx=crash.assignment.planned.init_idx,
            status=EpisodeStatus.ERROR,
            steps=0,
            n_queries=0,
            wall_s=0.0,
            render_mode=self.facts.get("render_mode", "unknown"),
            attempts=2,
            error=crash.reason,
            versions=self.facts["versions"],
        )

    def _count_errors(self, record: EpisodeRecord) -> None:
        self.errors_in_a_row = self.errors_in_a_row + 1 if record.status is EpisodeStatus.ERROR else 0
        if self.errors_in_a_row >= self.cfg.max_consecutive_errors:
            raise RuntimeError(
                f"{self.errors_in_a_row} episodes in a row ended in an error, the last with: {record.error}; "
                f"stopped. Continue with --resume True --results_dir {self.results_path.parent}"
            )

    def _write_results(self, wall_s: float) -> dict[str, Any]:
        head = {"run_id": self.run.run_id, "suite": self.cfg.task_suite_name, "control": self.cfg.control.value}
        head |= {"checkpoint": self.run.checkpoint, "fingerprint": self.run.fingerprint} | self.facts
        summary = summarize_run(self.plans, self.store.records)
        rate = 60.0 * self.new_episodes / wall_s if wall_s > 0 else None
        speed = {"wall_s": wall_s, "episodes_run": self.new_episodes, "episodes_per_minute": rate}
        language = {"language_source": self.cfg.resolved_language_source().value}
        beside = {"controls": self.controls, "init_noise_mm": self.cfg.init_noise_mm} | language
        beside["initial_states"] = self.initial_states
        facts = speed | measured_facts(self.store.records.values()) | beside
        results = head | summary | facts | {"config": _plain(dataclasses.asdict(self.cfg))}
        write_json(self.results_path, results, ensure_ascii=False)
        return results


def write_plan(path: Path, plans: Iterable[TaskPlan]) -> None:
    """Write the trials of a whole run, so that its shards can be joined without a simulator."""
    write_json(path, [dataclasses.asdict(plan) for plan in plans], indent=None, ensure_ascii=False)


def read_plan(path: Path) -> list[TaskPlan]:
    """What `write_plan` wrote.  Raises FileNotFoundError, and ValueError for another content."""
    try:
        tasks = parse_object(f'{{"tasks": {read_text(path)}}}', str(path))["tasks"]
        plans = [
            TaskPlan(**{**task, "episodes": tuple(PlannedEpisode(**episode) for episode in task["episodes"])})
            for task in tasks
        ]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the plan of an evaluation, found something else ({error})") from error
    for plan in plans:
        check_fields(dataclasses.asdict(plan), {"task_id": int, "name": str, "instruction": str}, str(path))
        for episode in plan.episodes:
            check_fields(vars(episode), {"init_idx": int, "number": (int, type(None))}, str(path))
    return plans


def measured_facts(records: Iterable[EpisodeRecord]) -> dict[str, Any]:
    """`gl_renderers` (distinct names) and `policy_wait_share` (time episodes waited for the policy over their whole
    time, None without episodes) of results.json."""
    records = list(records)
    wall_s = sum(record.wall_s for record in records)
    waited_s = sum(sum(record.query_latency_s) for record in records)
    renderers = sorted({record.gl_renderer for record in records if record.gl_renderer})
    return {"gl_renderers": renderers, "policy_wait_share": waited_s / wall_s if wall_s > 0 else None}


def open_jobs(plans: Iterable[TaskPlan], done: Iterable[tuple[int, int]], max_videos: int | None) -> list[Job]:
    """One job per task with the episodes that are neither skipped nor done."""
    done = set(done)
    jobs = []
    for plan in plans:
        left = [e for e in plan.episodes if e.number is not None and (plan.task_id, e.init_idx) not in done]
        if left:
            jobs.append(Job(plan.task_id, tuple(left), max_videos))
    return jobs


class _Tee:
    """Writes a line to the log file and to the console."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __call__(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)


def _warn_about_versions(versions: dict[str, str]) -> None:
    for name, pinned in PINNED_VERSIONS.items():
        found = versions.get(name)
        if found is not None and found != pinned:
            print(
                f"warning: {name} {found} is installed; published success rates were measured with {pinned} "
                "and do not carry over",
                file=sys.stderr,
            )


def _plain(value: Any) -> Any:
    """Enums to their values, recursively through dicts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value
