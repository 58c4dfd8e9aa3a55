"""The bench `keep` as a chain: what a policy starts from, what it is trained on, what it may look at again."""

from __future__ import annotations

from dataclasses import replace

from craft_experiments.cells import Cell, Role
from craft_experiments.keep_cells import AGAIN
from craft_experiments.preset import Demonstrations, Preset
from craft_experiments.tables import methods_of


def before(preset: Preset, cell: Cell) -> Cell | None:
    """The cell whose policy the training of `cell` starts from; None: it starts from the preset's start."""
    if not cell.tasks or len(cell.tasks) == 1 or cell.method.role is not Role.TRAINED:
        return None
    method = methods_of(preset)[cell.method.parent or cell.method.key]
    return stage(preset, replace(cell, method=method), cell.tasks[:-1])


def stage(preset: Preset, cell: Cell, tasks: tuple[str, ...]) -> Cell:
    """The cell of the same row and seed after these tasks."""
    assert preset.bench is not None  # it has such cells
    last = preset.start_suite if not tasks or tasks[-1] == AGAIN else preset.bench.task(tasks[-1]).suite
    return replace(cell, suites=(last,), tasks=tasks)


def trained_on(preset: Preset, cell: Cell) -> tuple[Demonstrations, ...]:
    """Data sets of a training."""
    if cell.tasks is None:
        return tuple(preset.demonstrations(suite) for suite in cell.suites)
    assert preset.bench is not None and cell.tasks  # it has such cells, and nothing is trained on nothing
    if cell.tasks[-1] == AGAIN:
        return (preset.old("again", preset.bench.again_collect),)
    return (preset.learned(preset.bench.task(cell.tasks[-1])),)


def remembered(preset: Preset, cell: Cell) -> tuple[Demonstrations, ...]:
    """Data sets of what the training may look at again: the start's tasks, and the new ones before its own."""
    size = cell.method.memory
    if not size:
        return ()
    earlier = [preset.bench.task(name) for name in (cell.tasks or ())[:-1]] if preset.bench is not None else []
    changes = {"episodes_per_task": size}
    new = (replace(preset.learned(task), room=f"memory_{size}", changes=changes) for task in earlier)
    return (preset.memory(size), *new)
