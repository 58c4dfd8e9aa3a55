"""Cells and evaluations of the bench `keep`: which rows learn the new tasks, and what they are asked after each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from craft_experiments.cells import Cell, Evaluation, Kind, Method, Request, Role
from craft_experiments.preset import Bench, Preset

BENCH = "keep"
AGAIN = "old"
"""Name of the stage in which the old tasks are learned again."""
_PRIMARY, _SECONDARY, _AGAIN = 0, 1, 2  # the order in which they are run


def keep_rows(preset: Preset, known: Mapping[str, Method]) -> list[str]:
    """Primary rows, secondary ones, those that learn the old tasks again, controls."""
    bench = _bench(preset)
    again = [key for key, method in known.items() if key.startswith("old_after_") and not method.control]
    return [*bench.primary, *bench.secondary, *again, *(key for key, method in known.items() if method.control)]


def keep_requests(preset: Preset, method: Method) -> list[Request]:
    """The cells of a row, stage by stage."""
    bench = _bench(preset)
    if method.role is Role.START:
        return _start(preset, method)
    if method.role is Role.REPLAY:
        asked = (
            _old(preset, _few(preset)),
            *(Evaluation(Kind.NEW, task.name, preset.pro_trials) for task in bench.new_tasks),
        )
        return [Request(Cell(method, (preset.start_suite,), preset.seeds[0], tasks=()), asked)]
    if method.key.startswith("old_after_"):
        return _again(preset, method)
    if method.control:
        return _sequence(preset, method, preset.seeds[:1], _SECONDARY)
    if method.key in bench.primary:
        return _sequence(preset, method, preset.seeds, _PRIMARY)
    return _sequence(preset, method, preset.seeds[: bench.secondary_seeds], _SECONDARY)


def sequence_cell(preset: Preset, method: Method, seed: int, count: int) -> Cell:
    """The cell of a row after `count` new tasks."""
    learned = _bench(preset).new_tasks[:count]
    suite = learned[-1].suite if learned else preset.start_suite
    return Cell(method, (suite,), seed, tasks=tuple(task.name for task in learned))


def curve_steps(preset: Preset) -> tuple[int, ...]:
    """Steps before the last at which the new task is asked."""
    return tuple(range(preset.save_freq, preset.max_steps, preset.save_freq))


def _bench(preset: Preset) -> Bench:
    assert preset.bench is not None  # `table` has looked
    return preset.bench


def _few(preset: Preset) -> int:
    """Episodes per task where an estimate will do: a quarter."""
    return max(1, preset.start_trials // 4)


def _old(preset: Preset, trials: int, step: int | None = None) -> Evaluation:
    return Evaluation(Kind.START_TASKS, preset.start_suite, trials, step)


def _sequence(preset: Preset, method: Method, seeds: tuple[int, ...], rank: int) -> list[Request]:
    count = len(_bench(preset).new_tasks)
    return [
        Request(sequence_cell(preset, method, seed, stage), _asked(preset, method, stage, rank), rank=rank)
        for seed in seeds
        for stage in range(1, count + 1)
    ]


def _asked(preset: Preset, method: Method, stage: int, rank: int) -> tuple[Evaluation, ...]:
    """After a stage: all new tasks, the last one half-way and in a way it was not shown too, and the old tasks.

    Half of the episodes of the old tasks before the last stage, where no hypothesis looks at them.
    """
    tasks, whole = [task.name for task in _bench(preset).new_tasks], rank == _PRIMARY
    few, is_last = _few(preset), stage == len(tasks)
    trials = preset.num_trials if whole else few
    old = (preset.start_trials if is_last else max(1, preset.start_trials // 2)) if whole else few
    found = [Evaluation(Kind.NEW, name, trials) for name in reversed(tasks[:stage])]
    if method.control:
        return tuple(found)
    if method.role is Role.TRAINED:  # an interpolated policy has no half of its training
        found += [Evaluation(Kind.NEW, tasks[stage - 1], few, step) for step in curve_steps(preset)]
    unseen = [Evaluation(Kind.UNSEEN, tasks[stage - 1], preset.pro_trials)] if whole else []
    return (*found, *unseen, _old(preset, old))


def _start(preset: Preset, method: Method) -> list[Request]:
    """Before anything new is learned: the old tasks with each seed, since starts differ by seed; the new ones once."""
    cells = [Cell(method, (preset.start_suite,), seed, tasks=()) for seed in preset.seeds]
    if method.evaluate:  # grey images
        return [Request(cells[0], (_old(preset, _few(preset)),), rank=_SECONDARY)]
    new = tuple(Evaluation(Kind.NEW, task.name, _few(preset)) for task in _bench(preset).new_tasks)
    old = (_old(preset, max(1, preset.start_trials // 2)),)
    return [Request(cell, old + (new if cell.seed == preset.seeds[0] else ())) for cell in cells]


def _again(preset: Preset, method: Method) -> list[Request]:
    """The old tasks learned again, asked on the way."""
    steps, last = (
        _bench(preset).recovery_steps,
        sequence_cell(preset, method, preset.seeds[0], len(_bench(preset).new_tasks)),
    )
    cell = replace(last, suites=(preset.start_suite,), tasks=(*(last.tasks or ()), AGAIN))
    asked = tuple(_old(preset, _few(preset), step) for step in steps[:-1])
    return [Request(cell, (*asked, _old(preset, _few(preset))), rank=_AGAIN)]
