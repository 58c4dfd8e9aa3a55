"""The jobs of a table, what each waits for, and which of them are to be run."""

from __future__ import annotations

from collections.abc import Iterable

from craft_experiments.cells import Cell, Request, Role
from craft_experiments.jobs.base import Job
from craft_experiments.jobs.collect import Collect
from craft_experiments.jobs.evaluate import Evaluate, replayed
from craft_experiments.jobs.interpolate import Interpolate
from craft_experiments.jobs.measure import Measure
from craft_experiments.jobs.policies import parent_of
from craft_experiments.jobs.train import Train
from craft_experiments.preset import Demonstrations
from craft_experiments.sequence import before, remembered, trained_on
from craft_experiments.settings import Settings
from craft_experiments.tables import Table, table


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
    """All jobs of a table by name, predecessors first, the first seed of everything of a rank before the second."""
    jobs: dict[str, Job] = {}
    for request in sorted(wanted.requests, key=lambda r: (r.rank, r.cell.seed)):
        _add_request(s, jobs, request)
    return jobs


def _add_request(s: Settings, jobs: dict[str, Job], request: Request) -> None:
    cell = request.cell
    before = _add_policy(s, jobs, cell)
    for evaluation in request.evaluations:
        is_replay = cell.method.role is Role.REPLAY
        after = _add_data(s, jobs, replayed(s.preset, evaluation)) if is_replay else before
        _add(jobs, Evaluate(cell, evaluation, after=after))
    for data in request.measured:
        _add(jobs, Measure(cell, data, after=before + _add_data(s, jobs, data)))


def _add_policy(s: Settings, jobs: dict[str, Job], cell: Cell) -> tuple[str, ...]:
    """The job that makes the policy of a cell, with its predecessors; what an evaluation of it has to wait for."""
    role = cell.method.role
    if role in (Role.START, Role.REPLAY):
        return ()
    if role is Role.INTERPOLATED:
        return _add(jobs, Interpolate(cell, after=_add_policy(s, jobs, parent_of(s, cell))))
    read = (*trained_on(s.preset, cell), *remembered(s.preset, cell))
    data = tuple(name for found in read for name in _add_data(s, jobs, found))
    earlier = before(s.preset, cell)
    return _add(jobs, Train(cell, after=data + (() if earlier is None else _add_policy(s, jobs, earlier))))


def _add_data(s: Settings, jobs: dict[str, Job], data: Demonstrations) -> tuple[str, ...]:
    return () if s.preset.collect is None else _add(jobs, Collect(data))


def _add(jobs: dict[str, Job], job: Job) -> tuple[str, ...]:
    jobs.setdefault(job.name, job)
    return (job.name,)


def missing(s: Settings, jobs: dict[str, Job]) -> dict[str, Job]:
    """Jobs to run: those without a result, and of their predecessors those that must be repeated for them.

    Demonstrations and checkpoints are needed only while something that uses them is missing.
    """
    wanted = {name for name, job in jobs.items() if job.measured and not job.has_result(s)}
    for name, job in reversed(jobs.items()):
        if name in wanted:
            wanted.update(before for before in job.after if not jobs[before].is_done(s))
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
