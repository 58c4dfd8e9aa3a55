"""The folder of a run: who may write to it, and when a used one is taken over."""

from __future__ import annotations

from pathlib import Path

from prismatic.command_line import UsageError
from prismatic.output_folder import hold, release
from prismatic.training.checkpoint_folder import MANIFEST, PUBLISHED, find_checkpoints, remove_folder
from prismatic.training.config import FinetuneConfig

METRICS = "metrics.jsonl"
FLAGS = "flags.json"
"""The flags of the run, resolved, from its first moment on."""


def claim_run_folder(cfg: FinetuneConfig) -> None:
    """Be the writer of `{run_root_dir}/{run_id}` and of its checkpoints. Nothing is written.

    Raises UsageError when another process writes there, when another run did and is not to be continued, and when
    `--overwrite True` would delete what the run starts from.
    """
    folder = Path(cfg.run_root_dir) / cfg.run_id
    hold(folder, "--run_root_dir/--run_id_override")
    if _continues(cfg):
        return
    found = _what_is_there(cfg)
    if found and not cfg.overwrite:
        release(folder)
        raise UsageError(
            f"run {cfg.run_id} is in {cfg.run_root_dir} already ({found}). Continue it with --resume auto, choose "
            "another --run_id_override or --run_id_note, or replace it with --overwrite True"
        )
    for flag in ("config_file_path", "vlm_path", "base_checkpoint"):
        start = getattr(cfg, flag)
        if found and start and any(Path(start).resolve().is_relative_to(path.resolve()) for path in _folders(cfg)):
            release(folder)
            raise UsageError(f"--overwrite True would delete --{flag} {start}; choose another --run_id_override")


def clear_run_folder(cfg: FinetuneConfig) -> None:
    """Delete what another run left, as `--overwrite True` says: the last thing before the new run writes."""
    if cfg.overwrite:
        for path in _folders(cfg):
            remove_folder(path)


def _continues(cfg: FinetuneConfig) -> bool:
    if not cfg.resume:
        return False
    if not cfg.resum_vla_path:
        return True
    source, run = Path(cfg.resum_vla_path).absolute(), (Path(cfg.run_root_dir) / cfg.run_id).absolute()
    return source == run or source in [path.absolute() for _, path in find_checkpoints(run.parent, run.name)]


def _what_is_there(cfg: FinetuneConfig) -> str:
    """The newest trace of an earlier run, for a message; empty without one."""
    root, folder = Path(cfg.run_root_dir), Path(cfg.run_root_dir) / cfg.run_id
    checkpoints = find_checkpoints(root, cfg.run_id)
    if checkpoints:
        return f"newest checkpoint: {checkpoints[-1][1]}"
    if (folder / MANIFEST).exists():
        return f"checkpoint: {folder}"
    metrics = folder / METRICS
    return f"metrics: {metrics}" if metrics.exists() and metrics.stat().st_size else ""


def _folders(cfg: FinetuneConfig) -> list[Path]:
    """All that a run of this id left."""
    root = Path(cfg.run_root_dir)
    folders = [root / cfg.run_id, *(path for _, path in find_checkpoints(root, cfg.run_id))]
    both = [path for folder in folders for path in (folder, folder.with_name(f"{folder.name}{PUBLISHED}"))]
    return [path for path in both if path.exists()]
