"""Where the policy of a cell is, before and after it is made."""

from __future__ import annotations

from pathlib import Path

from craft_experiments.cells import Cell, Role
from craft_experiments.common_utils.log_parser import extract_checkpoint_path
from craft_experiments.settings import Settings
from craft_experiments.tables import methods_of


def parent_of(s: Settings, cell: Cell) -> Cell:
    """The trained policy an interpolated one lies on the way to."""
    return Cell(methods_of(s.preset)[cell.method.parent], cell.suites, cell.seed, cell.shots)


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


def expected_checkpoint(s: Settings, cell: Cell) -> Path | None:
    """The policy of a cell, or where it will be; None for a replay."""
    if cell.method.role is Role.REPLAY:
        return None
    found = checkpoint_of(s, cell)
    if found is not None:
        return found
    step = f"--{s.preset.max_steps * len(cell.suites)}_chkpt" if cell.method.role is Role.TRAINED else ""
    return s.runs_dir / (cell.name + step)
