"""Evaluation of a policy on a LIBERO suite: run its episodes, write the log and the results."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from experiments.robot.libero.control_results import read_control_results
from experiments.robot.libero.controls import Control
from experiments.robot.libero.episode import Backend, Job, RunInfo, with_policy_protocol
from experiments.robot.libero.eval_backend import LiberoBackend
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_fingerprint import contents, plain, run_fingerprint
from experiments.robot.libero.eval_log import (
    EpisodeRecord,
    EpisodeStatus,
    EpisodeStore,
    OrderedTextLog,
    TaskPlan,
    summarize_run,
)
from experiments.robot.libero.eval_plan import PLAN_FILE, open_jobs, plan_tasks, shard_plans, write_plan
from experiments.robot.libero.scheduler import CrashReport, Report, SessionReport, WorkerPool, run_in_process
from experiments.robot.libero.tracking import open_tracker, report_results
from prismatic.evidence.files import remove_leftovers, write_json
from prismatic.evidence.free_names import create_free
from prismatic.output_folder import hold, release
from prismatic.progress import Progress, say
from prismatic.vla.datasets.registry import load_data_set_file

PINNED_VERSIONS = {"mujoco": "3.3.0", "robosuite": "1.4.0"}
"""Simulator versions behind the published numbers; others change success rates by up to 86 points on single tasks."""


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
    if cfg.data_set_file is not None:
        try:
            load_data_set_file(cfg.data_set_file)
        except (ValueError, OSError) as error:
            raise EvalInputError(str(error)) from error
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
        self.contents = contents(cfg)
        self.whole_plan, self.plans = plans, shard_plans(plans, *cfg.shard_part())
        folder = Path(cfg.results_dir) if cfg.results_dir else Path(cfg.local_log_dir) / run.run_id
        self.results_path = folder / "results.json"
        hold(folder, "--results_dir")
        for date in Path(cfg.rollout_dir, cfg.save_version).glob("*"):
            remove_leftovers(date)
        _check_unused(folder, cfg)  # now that nobody else writes to it
        try:
            self.store = EpisodeStore(folder / "episodes.jsonl", run.fingerprint)
        except ValueError as error:
            raise EvalInputError(f"--results_dir: {error}") from error
        self.facts: dict[str, Any] = {"versions": backend.versions()}
        self.errors_in_a_row = 0
        self.new_episodes = 0
        self.tracker = open_tracker(cfg, folder, run.run_id)

    def execute(self, log: TextIO) -> dict[str, Any]:
        """Run everything; `log` is the open text log."""
        print(f"Logging to local log file: {log.name}", flush=True)
        _warn_about_versions(self.facts["versions"])
        if self.store.dropped is not None:
            print(f"warning: {self.store.path}: cut off an unfinished last line", file=sys.stderr)
        write_plan(self.results_path.with_name(PLAN_FILE), self.whole_plan)
        started = time.monotonic()
        text_log = OrderedTextLog(self.plans, self.cfg.initial_states_path, _Tee(log))
        try:
            self._run_all(text_log)
            text_log.finish()
        finally:
            results = self._write_results(time.monotonic() - started)
            release(self.results_path.parent)
            report_results(self.tracker, results, Path(log.name))
        return results

    def _run_all(self, text_log: OrderedTextLog) -> None:
        done = self.store.finished()
        text_log.begin(self.cfg.task_suite_name)
        for plan in self.plans:
            for planned in plan.episodes:
                if (plan.task_id, planned.init_idx) in done:
                    text_log.add(done[plan.task_id, planned.init_idx])
        jobs = open_jobs(self.plans, done, self.cfg.max_videos)
        total = sum(e.number is not None for plan in self.plans for e in plan.episodes)
        settled = total - sum(len(job.episodes) for job in jobs)
        with Progress(total, "evaluating", "episodes", done=settled, note="starts") as progress:
            for record in self._records(jobs):
                self.store.append(record)
                text_log.add(record)
                self.new_episodes += 1
                progress.advance(note="")
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
        beside = {"controls": self.controls, "init_noise_mm": self.cfg.init_noise_mm} | language | self.contents
        facts = speed | measured_facts(self.store.records.values()) | beside
        results = head | summary | facts | {"config": plain(dataclasses.asdict(self.cfg))}
        write_json(self.results_path, results, ensure_ascii=False)
        return results


def measured_facts(records: Iterable[EpisodeRecord]) -> dict[str, Any]:
    """`gl_renderers` (distinct names) and `policy_wait_share` (time episodes waited for the policy over their whole
    time, None without episodes) of results.json."""
    records = list(records)
    wall_s = sum(record.wall_s for record in records)
    waited_s = sum(sum(record.query_latency_s) for record in records)
    renderers = sorted({record.gl_renderer for record in records if record.gl_renderer})
    return {"gl_renderers": renderers, "policy_wait_share": waited_s / wall_s if wall_s > 0 else None}


class _Tee:
    """Writes a line to the log file and to the console."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __call__(self, line: str) -> None:
        self.file.write(line + "\n")
        self.file.flush()
        say(line)


def _warn_about_versions(versions: dict[str, str]) -> None:
    for name, pinned in PINNED_VERSIONS.items():
        found = versions.get(name)
        if found is not None and found != pinned:
            print(
                f"warning: {name} {found} is installed; published success rates were measured with {pinned} "
                "and do not carry over",
                file=sys.stderr,
            )
