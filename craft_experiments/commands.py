"""Command lines of the jobs: collect, train, interpolate, evaluate, measure. Nothing is run here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from craft_experiments.settings import ROOT, Settings
from craft_experiments.tables import PRO_SUFFIX, Cell, Demonstrations, Evaluation, Kind, Preset, Role

_START_KINDS = (Kind.START_TASKS, Kind.START_TASKS_START_HEAD)


def as_words(flags: Mapping[str, object]) -> list[str]:
    """{"a": 1} -> ["--a", "1"]."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def portable(command: Sequence[str]) -> list[str]:
    """The command as anyone would type it in the repository: no interpreter path, no absolute folder inside it."""
    program = "python" if Path(command[0]).name.startswith("python") else Path(command[0]).name
    return [program, *(word.removeprefix(f"{ROOT}{os.sep}") for word in command[1:])]


def collect_command(s: Settings, data: Demonstrations) -> list[str]:
    """Scripted demonstrations."""
    p = s.preset
    flags = {
        "task_suite_name": data.suite,
        "task_ids": data.task_ids or "all",
        "episodes_per_task": p.demos_per_task,
        "output_dir": data_root(s, data),
        "dataset_name": data.dataset,
        "num_workers": max(1, (os.cpu_count() or 1) // s.slots),
        **p.collect,
        **(p.start_collect if data.dataset == p.start_dataset else {}),
        **(p.heldout_collect if data.held_out else {}),
    }
    return [s.python, "-m", "experiments.robot.libero.collect_demos", *as_words(flags)]


def data_root(s: Settings, data: Demonstrations) -> str:
    """Folder that holds the data set. Held-out ones keep the name, by which their normalisation is found."""
    root = s.preset.data_root_dir
    return str(Path(root) / "held_out") if data.held_out else root


def train_command(s: Settings, cell: Cell) -> list[str]:
    """One run of `finetune.py`; it continues from its own newest checkpoint.

    A policy of several suites gets as many steps as the policies of the single suites together.
    """
    p = s.preset
    flags = {
        "config_file_path": p.start,
        "data_root_dir": p.data_root_dir,
        "dataset_name": ",".join(p.dataset(suite) for suite in cell.suites),
        "run_root_dir": s.runs_dir,
        "run_id_override": cell.name,
        "use_proprio": True,
        "num_images_in_input": s.num_images,
        "batch_size": p.batch_size,
        "learning_rate": p.learning_rate,
        "max_steps": p.max_steps * len(cell.suites),
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
    launcher = [s.python]
    if p.num_gpus >= 1:
        launcher = [s.torchrun, "--standalone", "--nnodes", "1", "--nproc-per-node", str(p.num_gpus)]
    return [*launcher, "vla-scripts/finetune.py", *as_words(flags), *s.extra_train]


def interpolate_command(s: Settings, trained: Path, scale: float, parts: str, output: Path) -> list[str]:
    """Weights between the start model and a trained policy; scale 0 of the head is the start's head."""
    flags = {
        "checkpoint": trained,
        "base": s.preset.start,
        "adapter_scale": scale,
        "parts": parts,
        "output": output,
    }
    return [s.python, "vla-scripts/interpolate_weights.py", *as_words(flags)]


def evaluation_command(s: Settings, cell: Cell, evaluation: Evaluation, checkpoint: Path | None) -> list[str]:
    """One evaluation in the simulator, into `evaluation_dir`; it continues what is there."""
    p, folder = s.preset, evaluation_dir(s, cell, evaluation)
    at_start = evaluation.kind in _START_KINDS
    perturbed = dict(p.perturbed if evaluation.kind is Kind.PERTURBED else p.start_perturbed if at_start else {})
    suffix = "" if at_start else perturbed.get("suite_suffix", "") or PRO_SUFFIX.get(evaluation.kind, "")
    perturbed.pop("suite_suffix", None)
    start_units = at_start or cell.method.role is Role.START
    dataset = p.start_units(evaluation.suite) if start_units else p.dataset(evaluation.suite)
    flags = {
        "task_suite_name": evaluation.suite + suffix,
        "num_trials_per_task": p.pro_trials if evaluation.kind in PRO_SUFFIX else p.num_trials,
        "use_l1_regression": True,
        "use_proprio": True,
        "num_images_in_input": s.num_images,
        "unnorm_key": dataset,
        "local_log_dir": folder,
        "results_dir": folder,
        "rollout_dir": folder / "videos",
        "resume": True,
        "seed": cell.seed,
        **p.evaluate,
        **perturbed,
        **cell.method.evaluate,
    }
    if at_start:
        flags["num_trials_per_task"] = p.start_trials
    task_ids = p.start_task_ids if at_start else p.task_ids[evaluation.suite]
    if task_ids:
        flags["task_ids"] = task_ids
    if cell.method.role is Role.REPLAY:
        flags |= {"control": "replay", "replay_dataset": dataset_dir(s, replayed(p, evaluation))}
    else:
        flags = {"pretrained_checkpoint": checkpoint, **flags}
    script = "experiments/robot/libero/run_libero_eval.py"
    return [s.python, script, *as_words(flags), *s.extra_eval]


def measure_command(s: Settings, trained: Path, data: Demonstrations, output: Path) -> list[str]:
    """Drift, similarity, probes and action error of a trained policy on held-out demonstrations."""
    flags = {
        "checkpoint": trained,
        "start": s.preset.start,
        "data_root_dir": data_root(s, data),
        "dataset_name": data.dataset,
        "unnorm_key": s.preset.start_units(data.suite),
        "output": output,
    }
    return [s.python, "vla-scripts/measure_retention.py", *as_words(flags)]


def evaluation_dir(s: Settings, cell: Cell, evaluation: Evaluation) -> Path:
    """Where an evaluation writes its log, episodes.jsonl and results.json."""
    return s.logs_dir / cell.name / evaluation.name


def replayed(preset: Preset, evaluation: Evaluation) -> Demonstrations:
    """What the replay control takes its actions from. The start's tasks have no other demonstrations than held-out
    ones.
    """
    return preset.held_out()[0] if evaluation.kind in _START_KINDS else preset.demonstrations(evaluation.suite)


def dataset_dir(s: Settings, data: Demonstrations) -> Path:
    """Version folder of a data set, `.../{name}/1.0.0`, also when there is none yet."""
    root = Path(data_root(s, data)) / data.dataset
    versions = sorted(root.glob("[0-9]*"))
    return versions[-1] if versions else root / "1.0.0"
