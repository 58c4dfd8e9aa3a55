"""Where the policy of a cell is, before and after it is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from craft_experiments.cells import Cell, Role
from craft_experiments.common_utils.log_parser import extract_checkpoint_path
from craft_experiments.sequence import before
from craft_experiments.settings import Settings
from craft_experiments.tables import after_key, methods_of
from prismatic.evidence.hashes import files_hash
from prismatic.training.checkpoint_folder import TRAINING_STATE


def parent_of(s: Settings, cell: Cell) -> Cell:
    """The trained policy an interpolated one lies on the way to: in a sequence it began where the last one ended."""
    later = len(cell.tasks or ()) > 1
    key = after_key(cell.method.parent, cell.method.key) if later else cell.method.parent
    return replace(cell, method=methods_of(s.preset)[key])


def base_of(s: Settings, cell: Cell) -> Path:
    """The policy that the training of a cell starts from, or where it will be."""
    earlier = before(s.preset, cell)
    found = Path(s.preset.start) if earlier is None else expected_checkpoint(s, earlier)
    assert found is not None  # only a replay has no checkpoint, and nothing is trained from one
    return found


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


def weights_of(folder: Path | None) -> str | None:
    """Hash of a policy's weights, the same wherever and whenever it was trained; None where there are none."""
    if folder is None or not folder.is_dir():
        return None
    found = sorted(folder.rglob("*.safetensors"))
    files = [file for file in found if TRAINING_STATE not in file.relative_to(folder).parts]
    return files_hash(folder, files) if files else None


def steps_of(s: Settings, cell: Cell) -> int:
    """Optimizer steps of a training. Of several suites as many as the policies of the single suites together."""
    return int(str(cell.method.train.get("max_steps", s.preset.max_steps * len(cell.suites))))


def expected_checkpoint(s: Settings, cell: Cell, step: int | None = None) -> Path | None:
    """The policy of a cell, or where it will be; None for a replay. step: of an earlier checkpoint."""
    if cell.method.role is Role.REPLAY:
        return None
    if step is not None:
        return s.runs_dir / f"{cell.name}--{step}_chkpt"
    found = checkpoint_of(s, cell)
    if found is not None:
        return found
    ending = f"--{steps_of(s, cell)}_chkpt" if cell.method.role is Role.TRAINED else ""
    return s.runs_dir / (cell.name + ending)
