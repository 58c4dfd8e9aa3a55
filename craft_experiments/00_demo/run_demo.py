"""The whole story on a laptop CPU: fine-tune a policy in five ways, ask in LIBERO what each can do, write the report.

Everything is written below `--work_dir`. A job whose result exists is skipped, so an interrupted demo continues.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a checkout that is not installed

from craft_experiments.common_utils.job_slots import Job, check_commands, run_jobs
from craft_experiments.common_utils.terminal import say
from prismatic.command_line import bad_input_in_one_line, flag, parse
from prismatic.evidence.checks import read_object
from prismatic.evidence.files import write_text
from prismatic.output_folder import check_folder, hold

ROOT = Path(__file__).resolve().parents[2]
REPORT_SCRIPT = Path(__file__).with_name("make_report.py")
COLUMNS = ("target", "memory", "sentence")
START = "start"
# Trained rows and their seconds per step relative to plain, for the first estimate of the time left.
TRAINED = {"plain": 1.0, "replay": 1.0, "keep": 1.3, "keep_data": 1.6, "features": 1.4}
# Flags by which the demo finds its results again.
_OWN_FLAGS = ("--max_steps", "--run_root_dir", "--run_id_override", "--save_freq", "--resume", "--config_file_path")
_REPLACED = ("evaluations", "metrics", "videos")  # folders of a record
_STEP_S, _EPISODE_S, _START_UP_S = 0.4, 3.5, 10.0  # on an idle core of a laptop


@dataclass
class DemoConfig:
    """What the demo compares and how large it is. The defaults are the demo's."""

    start: str = "pretrained_models/tiny-libero-object"
    start_statistics: str = flag(
        "libero_object_scripted_no_noops", "normalisation the start checkpoint was trained with"
    )
    data_root_dir: str = "datasets/rlds"
    dataset_name: str = "libero_spatial_scripted_no_noops"
    old_data: str = flag(
        "datasets/rlds/libero_object_scripted_no_noops", "for replay and memory: a demonstration of task 3"
    )
    suite: str = "libero_spatial"
    task_id: int = flag(9, "the new task", at_least=0)
    old_suite: str = "libero_object"
    memory_task_id: int = flag(3, "an old task that is in memory", at_least=0)
    sentence_task_id: int = flag(7, "an old task of which only the sentence is known", at_least=0)
    old_init_noise_mm: float = flag(
        0.0, "old tasks start with every object displaced by up to this", at_least=0, at_most=1000
    )
    max_steps: int = flag(800, at_least=1)
    batch_size: int = flag(12, at_least=1)
    learning_rate: float = flag(3.5e-4, more_than=0, at_most=1)
    action_budget: float = flag(0.03, "of `keep`: root mean square of normalised actions", more_than=0)
    feature_budget: float = flag(1e-3, "of `features`: mean square", more_than=0)
    trials: int = flag(10, "of the new task and of the old one in memory", at_least=1)
    sentence_trials: int = flag(10, at_least=1)
    first_initial_state: int = flag(0, at_least=0)
    seed: int = flag(7, "of the trainings", at_least=0)
    evaluation_seed: int = flag(7, "of the displacements, the same for all rows", at_least=0)
    rows: str = ",".join([START, *TRAINED])
    train_flags: str = flag("", 'for all trainings: "--image_aug False"')
    row_flags: str = flag("", 'for some: "keep: --craft_every 2; replay: --replay_fraction 0.1"')
    work_dir: str = "runs/demo"
    record_dir: str = flag("", "copy what the report is made of to this folder")

    @property
    def selected(self) -> list[str]:
        """The chosen rows in the table's order. Raises ValueError for an unknown one."""
        known = [START, *TRAINED]
        chosen = [row.strip() for row in self.rows.split(",")]
        unknown = [row for row in chosen if row not in known]
        if unknown:
            raise ValueError(f"--rows: found {unknown}, expected some of {known}")
        return [row for row in known if row in chosen]

    def flags_of(self, row: str) -> list[str]:
        """What was asked for in addition for a trained row.

        Raises ValueError for an entry that is not `row: flags`, an unknown row or a flag that the demo sets itself.
        """
        words = shlex.split(self.train_flags)
        for entry in filter(str.strip, self.row_flags.split(";")):
            name, colon, flags = entry.partition(":")
            if not colon or name.strip() not in TRAINED:
                raise ValueError(f"--row_flags: found {entry.strip()!r}, expected ROW: FLAGS with one of {[*TRAINED]}")
            words += shlex.split(flags) if name.strip() == row else []
        own = [word for word in words if word.partition("=")[0] in _OWN_FLAGS]
        if own:
            raise ValueError(f"--train_flags, --row_flags: found {own}, which the demo sets itself; leave them out")
        return words


def main() -> None:
    """Plan, run, report; exits with an error when a job failed."""
    with bad_input_in_one_line("run_demo.py"):
        cfg = parse(DemoConfig, description=__doc__)
        os.chdir(ROOT)
        check_record_dir(cfg)
        check_folder(cfg.work_dir, "--work_dir")
        jobs = plan(cfg)
        check_commands(jobs, Path(cfg.work_dir) / "logs")
        if cfg.record_dir:
            hold(Path(cfg.record_dir), "--record_dir")  # until the end: what is known now is cheaper than in an hour
    say(f"{len(jobs)} jobs, two at a time; everything is written below {cfg.work_dir}")
    work = Path(cfg.work_dir)
    run_jobs(jobs, work / "logs", slots=2)
    write_manifest(cfg, jobs)
    if code := subprocess.run([sys.executable, str(REPORT_SCRIPT), cfg.work_dir], check=False).returncode:
        sys.exit(code)  # it has said why
    if cfg.record_dir:
        copy_record(work, Path(cfg.record_dir))


def check_record_dir(cfg: DemoConfig) -> None:
    """Raise ValueError when the record would replace the results themselves, or folders of something else."""
    if not cfg.record_dir:
        return
    check_folder(cfg.record_dir, "--record_dir")
    record, work = Path(cfg.record_dir).resolve(), Path(cfg.work_dir).resolve()
    if work.is_relative_to(record):
        raise ValueError(f"--record_dir {cfg.record_dir}: holds --work_dir {cfg.work_dir}; name another folder")
    others = [name for name in _REPLACED if (record / name).exists()]
    if others and not (record / "manifest.json").is_file():
        raise ValueError(f"--record_dir {cfg.record_dir}: found {', '.join(others)} and no manifest.json of a record")


def plan(cfg: DemoConfig) -> list[Job]:
    """All jobs, trainings first: they are the longest. The controls come with the plain row."""
    rows = cfg.selected
    trained = [row for row in rows if row != START]
    jobs = [training_job(cfg, row) for row in trained]
    jobs += [evaluation_job(cfg, row, column) for row in rows for column in COLUMNS]
    if "plain" in rows:
        jobs.append(evaluation_job(cfg, "grey", "target", ["--control", "grey_images"]))
        dataset = next(iter(sorted(Path(cfg.data_root_dir, cfg.dataset_name).glob("[0-9]*"))), None)
        if dataset is None:
            raise ValueError(f"--data_root_dir: no data set in {cfg.data_root_dir}/{cfg.dataset_name}")
        playback = ["--control", "replay", "--replay_dataset", str(dataset)]
        jobs.append(evaluation_job(cfg, "playback", "target", playback))
    return jobs


def method_flags(cfg: DemoConfig, row: str) -> list[str]:
    """The flags that make a trained row."""
    keep = as_flags({"use_craft": True, "craft_preset": "keep", "craft_retention_budget": cfg.action_budget})
    # The original default budget and dual rate (0.1 and 0.01) are inert here: these features drift by a few 1e-3.
    features = {"use_craft": True, "craft_retention_budget": cfg.feature_budget, "craft_dual_lr": 20, "craft_every": 2}
    return {
        "plain": [],
        "replay": as_flags({"replay_data": cfg.old_data, "replay_fraction": 0.2}),
        "keep": keep,
        "keep_data": [*keep, "--craft_memory_data", cfg.old_data],
        "features": as_flags(features),
    }[row]


def training_job(cfg: DemoConfig, row: str) -> Job:
    """Fine-tuning of the start checkpoint on the new task."""
    settings = {
        "config_file_path": cfg.start,
        "data_root_dir": cfg.data_root_dir,
        "dataset_name": cfg.dataset_name,
        "run_root_dir": cfg.work_dir,
        "run_id_override": row,
        "batch_size": cfg.batch_size,
        "learning_rate": cfg.learning_rate,
        "max_steps": cfg.max_steps,
        "save_freq": cfg.max_steps,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "seed": cfg.seed,
    }
    flags = [*as_flags(settings), *method_flags(cfg, row), *cfg.flags_of(row)]
    return Job(
        f"train-{row}",
        [sys.executable, "vla-scripts/finetune.py", *flags],
        final_checkpoint(cfg, row) / "craft_checkpoint.json",
        progress=Path(cfg.work_dir) / row / "metrics.jsonl",
        units=cfg.max_steps,
        unit="steps",
        start_up_s=_START_UP_S,
        unit_s=_STEP_S * TRAINED[row] * cfg.batch_size / 16,
        resume=["--resume", "auto"],
    )


def evaluation_job(cfg: DemoConfig, row: str, column: str, control: list[str] | None = None) -> Job:
    """Evaluation on initial states that no demonstration used; the control with grey images is of the plain policy."""
    folder = Path(cfg.work_dir) / "evaluations" / f"{row}-{column}"
    policy = "plain" if row == "grey" else row
    is_new = column == "target"
    trials = cfg.sentence_trials if column == "sentence" else cfg.trials
    settings = {
        "task_suite_name": cfg.suite if is_new else cfg.old_suite,
        "task_ids": {"target": cfg.task_id, "memory": cfg.memory_task_id, "sentence": cfg.sentence_task_id}[column],
        "num_trials_per_task": trials,
        "initial_state_offset": cfg.first_initial_state,
        "init_noise_mm": 0.0 if is_new else cfg.old_init_noise_mm,
        "seed": cfg.evaluation_seed,
        # A policy that never saw the new task acts in the units it was trained with.
        "unnorm_key": cfg.dataset_name if is_new and row != START else cfg.start_statistics,
        "save_videos": "FIRST" if (row, column) == ("keep", "memory") else "NONE",
        "rollout_dir": str(Path(cfg.work_dir) / "videos"),
        "local_log_dir": str(folder),
        "results_dir": str(folder),
    }
    if row != "playback":
        settings["pretrained_checkpoint"] = cfg.start if row == START else str(final_checkpoint(cfg, policy))
    return Job(
        f"eval-{row}-{column}",
        [sys.executable, "experiments/robot/libero/run_libero_eval.py", *as_flags(settings), *(control or [])],
        folder / "results.json",
        [f"train-{policy}"] if policy in TRAINED else [],
        progress=folder / "episodes.jsonl",
        units=trials,
        unit="episodes",
        start_up_s=_START_UP_S,
        unit_s=_EPISODE_S,
        resume=["--resume", "True"],
    )


def final_checkpoint(cfg: DemoConfig, row: str) -> Path:
    """Folder of the last checkpoint of a training."""
    return Path(cfg.work_dir) / f"{row}--{cfg.max_steps}_chkpt"


def as_flags(settings: dict) -> list[str]:
    """{"a": 1} -> ["--a", "1"]."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def write_manifest(cfg: DemoConfig, jobs: list[Job]) -> None:
    """Put what the report is made of below {work_dir}: the trainings' metrics and settings, and the manifest."""
    work = Path(cfg.work_dir)
    runs, evaluations = [], []
    for job in jobs:
        if job.kind == "train":
            row = job.name.removeprefix("train-")
            entry = {"name": row, "metrics": f"metrics/{row}.jsonl", "checkpoint": f"metrics/{row}.json"}
            assert job.progress is not None  # every training logs its steps
            write_text(work / entry["metrics"], job.progress.read_text(encoding="utf-8"))
            write_text(work / entry["checkpoint"], job.result.read_text(encoding="utf-8"))
            runs.append(entry)
        else:
            row, column = job.name.removeprefix("eval-").rsplit("-", 1)
            evaluations.append({"row": row, "column": column, "results_dir": f"evaluations/{row}-{column}"})
    times = {name: work / "logs" / f"{name}.seconds" for name in [*(job.name for job in jobs), "all"]}
    manifest = {
        "settings": asdict(cfg),
        "runs": runs,
        "evaluations": evaluations,
        "seconds": {name: float(file.read_text(encoding="utf-8")) for name, file in times.items() if file.exists()},
        "commands": {job.name: job.portable_command for job in jobs},
    }
    write_text(work / "manifest.json", json.dumps(manifest, indent=2) + "\n")


def copy_record(work: Path, record: Path) -> None:
    """Replace the record by this demo's: manifest, metrics, episodes, results, report, figures, at most one video.

    Of an earlier record nothing stays, or a report could mix two; other files of the folder are left alone. Paths in it
    are relative to the repository, wherever it lies.
    """
    for name in _REPLACED:
        shutil.rmtree(record / name, ignore_errors=True)
    for old in record.glob("*.png"):
        old.unlink()
    manifest = read_object(work / "manifest.json")
    names = ["manifest.json", "report.md", *(path.name for path in sorted(work.glob("*.png")))]
    names += [run[key] for run in manifest["runs"] for key in ("metrics", "checkpoint")]
    for entry in manifest["evaluations"]:
        names += [f"{entry['results_dir']}/{name}" for name in ("episodes.jsonl", "results.json")]
    names += [path.relative_to(work).as_posix() for path in sorted(work.glob("videos/**/*.mp4"))[:1]]
    for name in names:
        (record / name).parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".json"):
            write_text(record / name, (work / name).read_text(encoding="utf-8").replace(f"{ROOT}{os.sep}", ""))
        else:
            shutil.copyfile(work / name, record / name)
    say(f"the record is in {record}")


if __name__ == "__main__":
    main()
