"""The jobs behind a table, what each waits for, and which of them are done."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from craft_experiments.commands import (
    collect_command,
    data_root,
    evaluation_command,
    interpolate_command,
    measure_command,
    portable,
    replayed,
    train_command,
)
from craft_experiments.common_utils.log_parser import extract_checkpoint_path
from craft_experiments.records import RETENTION, TRAINING, check_settings, read_record, record_path
from craft_experiments.settings import Settings
from craft_experiments.tables import Cell, Demonstrations, Evaluation, Kind, Request, Role, Table, methods_of, table

_START_HEAD = "--start_head"


class Stage(str, Enum):
    """Kinds of jobs, in the order a cell goes through them."""

    COLLECT = "collect"
    TRAIN = "train"
    INTERPOLATE = "interpolate"
    EVALUATE = "evaluate"
    MEASURE = "measure"


@dataclass(frozen=True)
class Job:
    """One job. cell: of all but COLLECT. evaluation: of EVALUATE. data: of COLLECT and MEASURE. after: job names."""

    stage: Stage
    cell: Cell | None = None
    evaluation: Evaluation | None = None
    data: Demonstrations | None = None
    after: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """`evaluate/plain--spatial--seed0/standard@libero_spatial`."""
        parts = [part.name for part in (self.cell, self.evaluation, self.data) if part is not None]
        return "/".join([self.stage.value, *parts])


def wanted_table(s: Settings, name: str) -> Table:
    """A table with the chosen methods, with the controls or without.

    Raises:
        ValueError: see `tables.table`.
    """
    found = table(name, s.preset, s.methods)
    if not all(request.cell.suites for request in found.requests):
        raise ValueError(f"--suites: found {' '.join(s.preset.suites)}, {name} has no policy of these alone")
    if s.controls:
        return found
    requests = tuple(r for r in found.requests if not r.cell.method.control)
    return Table(found.name, found.title, tuple(m for m in found.methods if not m.control), requests)


def plan(s: Settings, wanted: Table) -> dict[str, Job]:
    """All jobs of a table by name, predecessors first, the first seed of everything before the second."""
    jobs: dict[str, Job] = {}
    for request in sorted(wanted.requests, key=lambda r: r.cell.seed):
        _add_request(s, jobs, request)
    return jobs


def _add_request(s: Settings, jobs: dict[str, Job], request: Request) -> None:
    cell = request.cell
    before = _add_policy(s, jobs, cell)
    for evaluation in request.evaluations:
        is_replay = cell.method.role is Role.REPLAY
        after = _add_data(s, jobs, replayed(s.preset, evaluation)) if is_replay else before
        _add(jobs, Job(Stage.EVALUATE, cell=cell, evaluation=evaluation, after=after))
    for data in request.measured:
        _add(jobs, Job(Stage.MEASURE, cell=cell, data=data, after=before + _add_data(s, jobs, data)))


def _add_policy(s: Settings, jobs: dict[str, Job], cell: Cell) -> tuple[str, ...]:
    """The job that makes the policy of a cell, with its predecessors; what an evaluation of it has to wait for."""
    role = cell.method.role
    if role in (Role.START, Role.REPLAY):
        return ()
    if role is Role.INTERPOLATED:
        parent = parent_of(s, cell)
        return _add(jobs, Job(Stage.INTERPOLATE, cell=cell, after=_add_policy(s, jobs, parent)))
    data = tuple(name for suite in cell.suites for name in _add_data(s, jobs, s.preset.demonstrations(suite)))
    return _add(jobs, Job(Stage.TRAIN, cell=cell, after=data))


def parent_of(s: Settings, cell: Cell) -> Cell:
    """The trained policy an interpolated one lies on the way to."""
    return Cell(methods_of(s.preset)[cell.method.parent], cell.suites, cell.seed, cell.shots)


def _add_data(s: Settings, jobs: dict[str, Job], data: Demonstrations) -> tuple[str, ...]:
    return () if s.preset.collect is None else _add(jobs, Job(Stage.COLLECT, data=data))


def _add(jobs: dict[str, Job], job: Job) -> tuple[str, ...]:
    jobs.setdefault(job.name, job)
    return (job.name,)


def checkpoint_of(s: Settings, cell: Cell) -> Path | None:
    """The policy of a cell; None while there is none (and for a replay)."""
    match cell.method.role:
        case Role.START:
            return Path(s.preset.start)
        case Role.TRAINED:
            return extract_checkpoint_path(s.runs_dir, cell.name) if s.runs_dir.is_dir() else None
        case Role.INTERPOLATED:
            folder = s.runs_dir / cell.name
            return folder if folder.is_dir() else None
    return None


def commands_of(s: Settings, job: Job) -> list[list[str]]:
    """What a job runs, one after the other. For a dry run, files that do not exist yet are named as they will be."""
    cell = job.cell
    if job.stage is Stage.COLLECT:
        return [collect_command(s, job.data)]
    if job.stage is Stage.TRAIN:
        return [train_command(s, cell)]
    if job.stage is Stage.INTERPOLATE:
        trained = _expected_checkpoint(s, parent_of(s, cell))
        return [interpolate_command(s, trained, cell.method.scale, "all", s.runs_dir / cell.name)]
    policy = _expected_checkpoint(s, cell)
    if job.stage is Stage.MEASURE:
        return [measure_command(s, policy, job.data, measurement_file(s, job))]
    if job.evaluation.kind is not Kind.START_TASKS_START_HEAD:
        return [evaluation_command(s, cell, job.evaluation, policy)]
    grafted = s.runs_dir / (cell.name + _START_HEAD)
    graft = [] if grafted.is_dir() else [interpolate_command(s, policy, 0.0, "head", grafted)]
    return [*graft, evaluation_command(s, cell, job.evaluation, grafted)]


def _expected_checkpoint(s: Settings, cell: Cell) -> Path | None:
    if cell.method.role is Role.REPLAY:
        return None
    found = checkpoint_of(s, cell)
    if found is not None:
        return found
    step = f"--{s.preset.max_steps * len(cell.suites)}_chkpt" if cell.method.role is Role.TRAINED else ""
    return s.runs_dir / (cell.name + step)


def measurement_file(s: Settings, job: Job) -> Path:
    """Where `measure_retention.py` writes."""
    return s.work_dir / "measurements" / f"{job.cell.name}--{job.data.dataset}.json"


def record_of(s: Settings, job: Job) -> Path | None:
    """The record a job writes; None when what it makes is no measurement."""
    if job.stage is Stage.TRAIN:
        return record_path(s.records_dir, job.cell.name, TRAINING)
    if job.stage is Stage.EVALUATE:
        return record_path(s.records_dir, job.cell.name, job.evaluation.name)
    if job.stage is Stage.MEASURE:
        return record_path(s.records_dir, job.cell.name, f"{RETENTION}@{job.data.dataset}")
    return None


def is_trained(s: Settings, cell: Cell) -> bool:
    """Whether the newest checkpoint is that of the last step. A training that is asked to stop saves and ends well."""
    found = checkpoint_of(s, cell)
    step = re.search(r"--(\d+)_chkpt$", found.name) if found is not None else None
    return found is not None and (step is None or int(step[1]) >= planned_steps(train_command(s, cell)))


def planned_steps(command: list[str]) -> int:
    """The last `--max_steps` of a training: `--extra_train_args` may repeat it."""
    return int([value for flag, value in zip(command, command[1:], strict=False) if flag == "--max_steps"][-1])


def has_result(s: Settings, job: Job) -> bool:
    """Whether what the job is run for is there.

    Raises:
        RecordError: the record was made with other settings.
    """
    if job.stage is Stage.COLLECT:
        return any(Path(data_root(s, job.data), job.data.dataset).glob("[0-9]*/dataset_info.json"))
    if job.stage is Stage.INTERPOLATE:
        return checkpoint_of(s, job.cell) is not None
    path = record_of(s, job)
    if not path.exists():
        return False
    check_settings(path, read_record(path), portable(commands_of(s, job)[-1]))
    return True


def is_done(s: Settings, job: Job) -> bool:
    """As `has_result`; a training also needs its last checkpoint, which may have been deleted since."""
    return has_result(s, job) and (job.stage is not Stage.TRAIN or is_trained(s, job.cell))


def missing(s: Settings, jobs: dict[str, Job]) -> dict[str, Job]:
    """Jobs to run: those without a result, and of their predecessors those that must be repeated for them.

    Demonstrations and checkpoints are needed only while something that uses them is missing.
    """
    measured = (Stage.TRAIN, Stage.EVALUATE, Stage.MEASURE)
    wanted = {name for name, job in jobs.items() if job.stage in measured and not has_result(s, job)}
    for name, job in reversed(jobs.items()):
        if name in wanted:
            wanted.update(before for before in job.after if not is_done(s, jobs[before]))
    return {name: job for name, job in jobs.items() if name in wanted}


def with_followers(jobs: dict[str, Job], name: str) -> list[Job]:
    """A job and all that wait for it, directly or not."""
    found = {name}
    for other, job in jobs.items():  # predecessors come first
        if found & set(job.after):
            found.add(other)
    return [job for other, job in jobs.items() if other in found]


def cells_of(jobs: Iterable[Job]) -> dict[str, Cell]:
    """Cells that have a job, by name."""
    return {job.cell.name: job.cell for job in jobs if job.cell is not None}
