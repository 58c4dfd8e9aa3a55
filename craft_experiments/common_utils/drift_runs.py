"""Training runs whose drift is recorded in every step: how an experiment commands, records and reads them.

One run is one process of `vla-scripts/finetune.py` on one core. Its record is {results_dir}/runs/{cell}.json; a cell
whose record exists is not run again.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

from craft_experiments.jobs.base import Job
from craft_experiments.runner import run_table
from craft_experiments.settings import RunConfig, Settings, resolve
from prismatic.command_line import bad_input_in_one_line, faults_in_one_line, flag, flag_like
from prismatic.evidence.checks import check_fields, is_count, is_number, read_object, read_text
from prismatic.evidence.failure_codes import FailureCode
from prismatic.evidence.files import write_text
from prismatic.evidence.results import read_jsonl
from prismatic.output_folder import held
from prismatic.training.config import FinetuneConfig

DRIFT, LAMBDA, OUT_OF_REACH = "CRaFT/Retention Loss", "CRaFT/Lambda", "CRaFT/Out Of Reach"
TAIL = 0.25
"""Share of the run, at its end, over which drift and action loss are averaged."""
MAX_STEPS = 10_000_000
# A run without a record has ended, or cannot be had to overwrite: its folder has one writer.
_AGAIN = ("--overwrite", "True")
HEAD, GROUP, DIGITS = 100, 4, 4
"""A compact record holds the first 100 steps as they are, then means of 4 steps, all with 4 significant digits."""


@dataclass
class DriftConfig:
    """What the runs of one experiment share. Sizes of a run have the ranges of `finetune.py`, which is given them."""

    start: str
    work_dir: str
    results_dir: str
    max_steps: int = flag_like(FinetuneConfig, "max_steps", 500)
    learning_rate: float = flag_like(FinetuneConfig, "learning_rate", 5e-4)
    lr_warmup_steps: float = flag_like(FinetuneConfig, "lr_warmup_steps", 20)
    batch_size: int = flag_like(FinetuneConfig, "batch_size", 8)
    data_root_dir: str = "datasets/rlds"
    dataset_name: str = "libero_spatial_scripted_no_noops"
    seeds: tuple[int, ...] = flag((0, 1, 2), "of the trainings, with commas between", at_least=0)
    slots: int = flag(2, "runs at the same time, one core each", at_least=1, at_most=1024)


@dataclass(frozen=True)
class Cell:
    """One run. `budget` infinite is a run without one; `flags` are those that make its variant."""

    variant: str
    budget: float
    seed: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """File-system name."""
        return f"{self.variant.replace(', ', '_').replace(' ', '_')}--eps_{self.budget}--seed_{self.seed}"


class RunFailed(Exception):
    """Training runs that did not end well; the message holds the end of what they said."""


def record_file(cfg: DriftConfig, cell: Cell) -> Path:
    """Where the measurements of a cell go."""
    return Path(cfg.results_dir) / "runs" / f"{cell.name}.json"


def command(cfg: DriftConfig, cell: Cell) -> list[str]:
    """The training command of a cell, without the interpreter, relative to the repository."""
    flags = {
        "config_file_path": cfg.start,
        "data_root_dir": cfg.data_root_dir,
        "dataset_name": cfg.dataset_name,
        "run_root_dir": cfg.work_dir,
        "run_id_override": cell.name,
        "use_craft": True,
        "craft_retention_budget": cell.budget,
        "seed": cell.seed,
        "max_steps": cfg.max_steps,
        "batch_size": cfg.batch_size,
        "learning_rate": cfg.learning_rate,
        "lr_warmup_steps": f"{cfg.lr_warmup_steps:g}",
        "max_grad_norm": 1.0,
        "image_aug": False,
        "save_freq": cfg.max_steps,
        "save_training_state": False,
        "craft_log_freq": 1,
        "device": "cpu",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["vla-scripts/finetune.py", *words, *cell.flags]


class Folders(Protocol):
    """Flags of a program with records."""

    results_dir: str
    work_dir: str


AnyConfig = TypeVar("AnyConfig", bound=DriftConfig)
AnyFolders = TypeVar("AnyFolders", bound=Folders)
Plan = TypeVar("Plan")


def run_experiment(
    cfg: AnyConfig,
    cells_of: Callable[[AnyConfig], list[Cell]],
    kept: tuple[str, ...],
    report: Path,
    compact: bool = False,
) -> None:
    """`run_missing` for a program, then the script `report` on the records; as `experiment`."""
    experiment(cfg, cells_of, lambda cells: run_missing(cfg, cells, kept, compact), report)


def experiment(cfg: AnyFolders, plan: Callable[[AnyFolders], Plan], run: Callable[[Plan], None], report: Path) -> None:
    """A program that plans, runs and then calls the script `report` on the records.

    The program is the only writer of both folders; what fails is said in one piece, and ends it.
    """
    program = os.path.basename(sys.argv[0])
    with bad_input_in_one_line(program):
        planned = plan(cfg)
        with ExitStack() as folders:
            folders.enter_context(held(Path(cfg.results_dir), "--results_dir"))
            folders.enter_context(held(Path(cfg.work_dir), "--work_dir"))
            with faults_in_one_line(program, (RunFailed,)):
                run(planned)
    if code := subprocess.run([sys.executable, str(report), cfg.results_dir], check=False).returncode:
        sys.exit(code)  # it has said why


def run_missing(cfg: DriftConfig, cells: list[Cell], kept: tuple[str, ...], compact: bool = False) -> None:
    """Run the cells without a record on the runner of the tables, and record the metrics `kept` of measured steps.

    The checkpoint of a run is deleted once its record is written: the weights are not judged here.

    Raises:
        RunFailed: runs that failed, with the end of their output; the others are finished and recorded first.
    """
    jobs: dict[str, Job] = {job.name: job for job in (DriftRun(cfg, cell, kept, compact) for cell in cells)}
    settings = _settings(cfg)
    if failures := run_table(settings, jobs):
        ends = [f"{jobs[name].name}: {code.value}\n{_end(jobs[name], settings)}" for name, code in failures.items()]
        raise RunFailed("\n".join(ends))


def _settings(cfg: DriftConfig) -> Settings:
    """What the runner reads: folders and slots."""
    work, records = Path(cfg.work_dir), Path(cfg.results_dir) / "runs"
    base = resolve(RunConfig(slots=cfg.slots), "retention")
    return replace(base, work_dir=work, records_dir=records, results_dir=Path(cfg.results_dir))


def _end(job: Job, settings: Settings) -> str:
    log = job.log(settings)
    return read_text(log, "replace")[-2000:].strip() if log.exists() else "nothing was started"


@dataclass(frozen=True)
class DriftRun(Job):
    """One training on one core, and its record. It begins anew when it was broken off."""

    cfg: DriftConfig
    run: Cell
    kept: tuple[str, ...]
    compact: bool

    kind = "drift"
    failure = FailureCode.TRAINING_FAILED
    measured = "drift"
    environment: ClassVar[Mapping[str, str]] = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.run.name,)

    def commands(self, s: Settings) -> list[list[str]]:
        return [[s.python, *command(self.cfg, self.run), *_AGAIN]]

    def content(self, s: Settings) -> dict[str, str]:
        return {}

    def record(self, s: Settings) -> Path:
        return record_file(self.cfg, self.run)

    def has_result(self, s: Settings) -> bool:
        return self.record(s).exists()

    def log(self, s: Settings) -> Path:
        return s.work_dir / "logs" / f"{self.run.name}.log"

    def finish(self, s: Settings, spent: Mapping[str, float], content: Mapping[str, str]) -> None:
        steps = read_jsonl(s.work_dir / self.run.name / "metrics.jsonl", finite=False)
        if len(steps) != self.cfg.max_steps:
            raise ValueError(f"metrics.jsonl has {len(steps)} steps, expected {self.cfg.max_steps}")
        record = _record(self.run, command(self.cfg, self.run), steps, self.kept)
        write_text(self.record(s), json.dumps(compacted(record) if self.compact else record) + "\n")
        shutil.rmtree(s.work_dir / f"{self.run.name}--{self.cfg.max_steps}_chkpt", ignore_errors=True)


def _record(cell: Cell, words: list[str], steps: list[dict], kept: tuple[str, ...]) -> dict:
    # Steps between two constrained ones repeat the last measurement: only those that measured are kept.
    measured = [s for s in steps if s["CRaFT/Measured Step"] == s["step"]]
    record = {
        "variant": cell.variant,
        "budget": None if math.isinf(cell.budget) else cell.budget,
        "seed": cell.seed,
        "command": shlex.join(["python", *words]),
        "measured_steps": [s["step"] for s in measured],
        "all_losses": [round(s["VLA Train/Loss"], 6) for s in steps],
    }
    return record | {name: [_rounded(s.get(name)) for s in measured] for name in kept}


def _rounded(value: float | None, digits: int = 5) -> float | None:
    return None if value is None else float(f"{value:.{digits}g}")


def compacted(record: dict) -> dict:
    """The record with fewer values and digits (see `HEAD`); every step must have measured. `expanded` reads it.

    Raises ValueError for a record of steps without a measurement.
    """
    steps = len(record["all_losses"])
    if len(record["measured_steps"]) != steps:
        found = len(record["measured_steps"])
        raise ValueError(f"a compact record needs a measurement in every step, found {found} in {steps} steps")
    series = {name: _grouped(v) for name, v in record.items() if isinstance(v, list) and name != "measured_steps"}
    rest = {name: value for name, value in record.items() if not isinstance(value, list)}
    return rest | {"steps": steps, "averaged": {"after": HEAD, "over": GROUP}} | series


def _grouped(values: list[float | None]) -> list[float | None]:
    groups = [[value] for value in values[:HEAD]]
    groups += [values[i : i + GROUP] for i in range(HEAD, len(values), GROUP)]
    known = [[value for value in group if value is not None] for group in groups]
    means = zip(groups, known, strict=True)
    return [None if None in group else _rounded(statistics.fmean(values), DIGITS) for group, values in means]


def expanded(record: dict) -> dict:
    """A compact record with one value per step again, a mean standing for each of its steps; others as they are."""
    if "averaged" not in record:
        return record
    steps, after, over = record["steps"], record["averaged"]["after"], record["averaged"]["over"]
    places = [step if step < after else after + (step - after) // over for step in range(steps)]
    series = {name: [values[i] for i in places] for name, values in record.items() if isinstance(values, list)}
    return record | series | {"measured_steps": list(range(steps))}


def read_runs(folder: Path, needed: tuple[str, ...] = ()) -> list[dict]:
    """Records of all runs in name order, with `achieved` (drift) and `loss`, the means of their last quarter, added.

    needed: series that each must have, as it has drift and loss: a number for every step that measured.

    Raises FileNotFoundError when there is none, and ValueError, which names the file, for another content.
    """
    files = sorted((folder / "runs").glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder / 'runs'}: no run has been recorded")
    runs = [expanded(_checked(file, (DRIFT, "all_losses", *needed))) for file in files]
    for run in runs:
        run["achieved"] = tail_mean(run[DRIFT])
        run["loss"] = tail_mean(run["all_losses"])
    return runs


def _checked(file: Path, needed: tuple[str, ...]) -> dict:
    record = read_object(file)
    _check_setting(record, str(file))
    steps, averaged = record.get("steps", 1), record.get("averaged", {"after": 1, "over": 1})
    if not is_count(steps) or not 1 <= steps <= MAX_STEPS or not isinstance(averaged, dict):
        raise ValueError(f"{file}: steps: found {steps!r}, expected 1 to {MAX_STEPS}")
    after, over = averaged.get("after"), averaged.get("over")
    if not (is_count(after) and is_count(over) and over):
        raise ValueError(f"{file}: averaged: found {averaged!r}, expected whole numbers as after and over")
    groups = min(steps, after) + -(-max(0, steps - after) // over)
    series = {name: values for name, values in record.items() if isinstance(values, list)}
    if "averaged" not in record:
        needed, groups = (*needed, "measured_steps"), len(series.get(DRIFT, ()))
    for name in dict.fromkeys((*needed, *series)):
        values = series.get(name)
        if not values or not all(is_number(value) or (value is None and name not in needed) for value in values):
            raise ValueError(f"{file}: {name}: expected a list of finite numbers")
        if len(values) != groups and ("averaged" in record or name != "all_losses"):  # which has every step
            raise ValueError(f"{file}: {name}: found {len(values)} values, expected {groups}")
    return record


def _check_setting(record: dict, where: str) -> None:
    check_fields(record, {"variant": str, "seed": int, "budget": (int, float, type(None))}, where)
    if missing := sorted({"variant", "seed", "budget"} - record.keys()):
        raise ValueError(f"{where}: found no {', '.join(missing)}")
    if record["budget"] is not None and not record["budget"] > 0:
        raise ValueError(f"{where}: budget: found {record['budget']}, expected a number above 0")
    if ("steps" in record) != ("averaged" in record):
        raise ValueError(f"{where}: expected steps and averaged together")


def tail_mean(values: list[float], share: float = TAIL) -> float:
    """Mean of the last `share` of the values, at least one."""
    return statistics.fmean(values[-max(1, round(share * len(values))) :])


def spread(values: list[float], digits: int = 3) -> str:
    """Median and range, with this many significant digits."""
    if not values:
        return "not run"
    median, low, high = (f"{value:.{digits}g}" for value in (statistics.median(values), min(values), max(values)))
    return f"{median} ({low} to {high})"
