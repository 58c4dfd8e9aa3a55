"""The whole loop on a laptop CPU: fine-tune plain and with CRaFT, evaluate both in LIBERO, write the report.

Jobs run two at a time, one core each. A job whose result file exists is skipped, so an interrupted demo continues.
With other settings, name other folders as well:
`--max_steps 3000 --work_dir runs/demo_3000 --results_dir results/demo_3000`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

import draccus

ROOT = Path(__file__).resolve().parents[2]
REPORT_SCRIPT = Path(__file__).with_name("make_report.py")


@dataclass
class DemoConfig:
    """Sizes of the demo. The defaults fit in half an hour on two cores."""

    start: str = "pretrained_models/tiny-libero-object"
    data_root_dir: str = "datasets/rlds"
    dataset_name: str = "libero_spatial_scripted_no_noops"
    suite: str = "libero_spatial"
    task_id: int = 9
    start_statistics: str = "libero_object_scripted_no_noops"  # normalisation the start checkpoint was trained with
    retention_suite: str = "libero_object"
    retention_task_id: int = 3
    max_steps: int = 1500
    batch_size: int = 16
    learning_rate: float = 7e-4
    # The original defaults (0.1 and 0.01) are inert at this model's scale: its features drift by a few 1e-3.
    retention_budget: float = 1e-3
    dual_lr: float = 20.0
    craft_every: int = 2  # constrain every second step: about 1.4 instead of 1.9 times the plain step
    trials: int = 20
    first_initial_state: int = 0
    seed: int = 7
    work_dir: str = "runs/demo"
    results_dir: str = "results/demo"


@dataclass
class Job:
    """A command, the file that shows it is done, and the jobs it waits for."""

    name: str
    command: list[str]
    result: Path
    after: list[str] = field(default_factory=list)

    def is_done(self) -> bool:
        """The result is there; an evaluation's must be complete and without errors."""
        if not self.result.exists():
            return False
        if self.result.name != "results.json":
            return True
        outcome = json.loads(self.result.read_text(encoding="utf-8"))
        return bool(outcome["complete"] and outcome["valid"])


def main() -> None:
    """Plan, run, report; exits with an error when a job failed."""
    cfg = draccus.parse(DemoConfig)
    os.chdir(ROOT)
    jobs = plan(cfg)
    run_jobs(jobs, Path(cfg.work_dir) / "logs", slots=2)
    publish(cfg, jobs)
    subprocess.run([sys.executable, str(REPORT_SCRIPT), cfg.results_dir], check=True)


def plan(cfg: DemoConfig) -> list[Job]:
    """All jobs of the demo: two runs, six evaluations, two controls."""
    craft = {
        "use_craft": True,
        "craft_retention_budget": cfg.retention_budget,
        "craft_dual_lr": cfg.dual_lr,
        "craft_every": cfg.craft_every,
    }
    runs = {"plain": [], "craft": as_flags(craft)}
    jobs = [training_job(cfg, name, flags) for name, flags in runs.items()]
    for name in ("start", "plain", "craft"):
        checkpoint = cfg.start if name == "start" else str(final_checkpoint(cfg, name))
        after = [] if name == "start" else [f"train-{name}"]
        for column in ("target", "retention"):
            jobs.append(evaluation_job(cfg, f"{name}-{column}", checkpoint, column, after))
    grey = ["--control", "grey_images"]
    jobs.append(
        evaluation_job(cfg, "grey-target", str(final_checkpoint(cfg, "plain")), "target", ["train-plain"], grey)
    )
    dataset = next(Path(cfg.data_root_dir, cfg.dataset_name).glob("[0-9]*"))
    replay = ["--control", "replay", "--replay_dataset", str(dataset)]
    jobs.append(evaluation_job(cfg, "replay-target", "", "target", [], replay))
    return jobs


def training_job(cfg: DemoConfig, name: str, flags: list[str]) -> Job:
    """Fine-tuning of the start checkpoint on the target task."""
    settings = {
        "config_file_path": cfg.start,
        "data_root_dir": cfg.data_root_dir,
        "dataset_name": cfg.dataset_name,
        "run_root_dir": cfg.work_dir,
        "run_id_override": name,
        "batch_size": cfg.batch_size,
        "learning_rate": cfg.learning_rate,
        "max_steps": cfg.max_steps,
        "save_freq": cfg.max_steps,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "seed": cfg.seed,
    }
    command = [sys.executable, "vla-scripts/finetune.py", *as_flags(settings), *flags]
    return Job(f"train-{name}", command, final_checkpoint(cfg, name) / "craft_checkpoint.json")


def evaluation_job(
    cfg: DemoConfig, name: str, checkpoint: str, column: str, after: list[str], flags: list[str] | None = None
) -> Job:
    """Evaluation on initial states that no demonstration used."""
    target = column == "target"
    folder = Path(cfg.work_dir) / "evaluations" / name
    settings = {
        "pretrained_checkpoint": checkpoint,
        "task_suite_name": cfg.suite if target else cfg.retention_suite,
        "task_ids": cfg.task_id if target else cfg.retention_task_id,
        "num_trials_per_task": cfg.trials,
        "initial_state_offset": cfg.first_initial_state,
        # A policy that never saw the target task acts in the units it was trained with.
        "unnorm_key": cfg.dataset_name if target and checkpoint != cfg.start else cfg.start_statistics,
        "reset_mode": "soft",  # keeps the compiled scene between episodes
        "save_videos": "FIRST" if name == "craft-target" else "NONE",
        "rollout_dir": str(Path(cfg.work_dir) / "videos"),
        "local_log_dir": str(folder),
        "results_dir": str(folder),
        "resume": (folder / "episodes.jsonl").exists(),
    }
    settings = {k: v for k, v in settings.items() if v != ""}
    command = [sys.executable, "experiments/robot/libero/run_libero_eval.py", *as_flags(settings), *(flags or [])]
    return Job(f"eval-{name}", command, folder / "results.json", after)


def final_checkpoint(cfg: DemoConfig, run: str) -> Path:
    """Folder of the last checkpoint of a run."""
    return Path(cfg.work_dir) / f"{run}--{cfg.max_steps}_chkpt"


def as_flags(settings: dict) -> list[str]:
    """{"a": 1} -> ["--a", "1"]."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def run_jobs(jobs: list[Job], log_dir: Path, slots: int) -> None:
    """Run every job once its predecessors are done, `slots` at a time; `{log_dir}/{job}.seconds` keeps its duration.

    A failed job stops the demo after the running ones ended; its log's last lines are shown.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    waiting, done, running = list(jobs), set(), {}
    stop = threading.Event()
    with ThreadPoolExecutor(slots) as pool:
        while waiting or running:
            ready = [j for j in waiting if set(j.after) <= done] if not stop.is_set() else []
            for job in ready[: slots - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job, log_dir)] = job
            if not running:
                break
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                job = running.pop(future)
                collect(job, future, done, stop)
    if stop.is_set():
        sys.exit(1)


def collect(job: Job, future: Future, done: set[str], stop: threading.Event) -> None:
    """Note a finished job, or stop the demo when it failed."""
    error = future.exception()
    if error is not None:
        print(f"FAILED {job.name}: {error}", file=sys.stderr)
        stop.set()
        return
    done.add(job.name)


def run_job(job: Job, log_dir: Path) -> None:
    """Run one command with one thread unless it is done already. RuntimeError with the log's tail when it fails."""
    if job.is_done():
        print(f"[{time.strftime('%H:%M:%S')}] {job.name}: already done", flush=True)
        return
    log = log_dir / f"{job.name}.log"
    print(f"[{time.strftime('%H:%M:%S')}] {job.name}: {shlex.join(job.command)}\n    log: {log}", flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.time()
    with log.open("w", encoding="utf-8") as stream:
        code = subprocess.run(job.command, stdout=stream, stderr=subprocess.STDOUT, env=environment).returncode
    if code != 0 or not job.is_done():
        tail = "\n    ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise RuntimeError(f"exit code {code}, see {log}:\n    {tail}")
    seconds = time.time() - started
    (log_dir / f"{job.name}.seconds").write_text(f"{seconds:.1f}\n", encoding="utf-8")
    print(f"[{time.strftime('%H:%M:%S')}] {job.name}: done in {seconds:.0f} s", flush=True)


def publish(cfg: DemoConfig, jobs: list[Job]) -> None:
    """Replace the raw files below `results_dir` by those of this demo, and write the manifest the report is made of.

    Nothing of an earlier demo stays: the repository ships one, and a report must not mix two.
    """
    work, results = Path(cfg.work_dir), Path(cfg.results_dir)
    for name in ("evaluations", "videos", "metrics"):
        shutil.rmtree(results / name, ignore_errors=True)
    for name in ("evaluations", "videos"):
        shutil.copytree(work / name, results / name)
    (results / "metrics").mkdir()
    runs = []
    for name in ("plain", "craft"):
        metrics = results / "metrics" / f"{name}.jsonl"
        metrics.write_bytes((Path(cfg.work_dir) / name / "metrics.jsonl").read_bytes())
        budget = {"retention_budget": cfg.retention_budget} if name == "craft" else {}
        runs.append({"name": name, "metrics": f"metrics/{name}.jsonl", **budget})
    evaluations = []
    for job in jobs:
        if job.name.startswith("eval-"):
            row, column = job.name.removeprefix("eval-").rsplit("-", 1)
            evaluations.append({"row": row, "column": column, "results_dir": f"evaluations/{row}-{column}"})
    durations = {job.name: work / "logs" / f"{job.name}.seconds" for job in jobs}
    manifest = {
        "settings": cfg.__dict__,
        "runs": runs,
        "evaluations": evaluations,
        "seconds": {name: float(file.read_text(encoding="utf-8")) for name, file in durations.items()},
        "commands": {job.name: shlex.join(["python", *job.command[1:]]) for job in jobs},
    }
    temporary = results / "manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    temporary.replace(results / "manifest.json")


if __name__ == "__main__":
    main()
