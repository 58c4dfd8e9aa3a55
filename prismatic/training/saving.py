"""Saving and resuming a run: when files are written, which ones stay, and which folder a run continues from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from prismatic.model_files import CheckpointError, existing
from prismatic.output_folder import release
from prismatic.training.checkpoint_folder import (
    TRAINING_STATE,
    check_files,
    find_checkpoints,
    point_to,
    prune,
    remove_leftovers,
)
from prismatic.training.checkpoints import Snapshot, checkpoint_path, take_snapshot, write_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.run_folder import claim_run_folder
from prismatic.training.training_setup import TrainingSetup
from prismatic.training.training_state import TrainingState, generator_states


class CheckpointSaver:
    """Writes the checkpoints of a run, in this thread or (`--async_save True`) beside the training.

    A context: at its end the last checkpoint is on the disk. Call `save` on every process; the main process writes.

    Args:
        cfg: the flags.
        setup: the run's setup.
        accelerator: the processes.
        say: prints a line.
    """

    def __init__(
        self, cfg: FinetuneConfig, setup: TrainingSetup, accelerator: Accelerator, say: Callable[[str], None]
    ) -> None:
        self._cfg, self._setup, self._accelerator, self._say = cfg, setup, accelerator, say
        self._writing: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint") if cfg.async_save and accelerator.is_main_process else None
        if accelerator.is_main_process:
            claim_run_folder(cfg)
            remove_leftovers(Path(cfg.run_root_dir), cfg.run_id)
        accelerator.wait_for_everyone()

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _traceback: object) -> None:
        try:
            self.wait()
        except Exception as failure:
            if kind is None:
                raise
            self._say(f"The last checkpoint was not written: {failure}")  # the run ends with its own error
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            release(Path(self._cfg.run_root_dir) / self._cfg.run_id)

    def save(self, state: TrainingState) -> None:
        """Write the checkpoint of `state.step`, or start to; first waits for the one before.

        Raises CheckpointWriteError when the disk refuses, now or (asynchronous) for the one before.
        """
        state.generators = gather_object([generator_states()])
        if not self._accelerator.is_main_process:
            return
        self.wait()
        snapshot = take_snapshot(self._cfg, self._setup, state, copy=self._thread is not None)
        if self._thread is None:
            self._write(snapshot)
        else:
            self._writing = self._thread.submit(self._write, snapshot)

    def check(self) -> None:
        """Raise the error of a checkpoint that failed in the meantime; does not wait."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the checkpoint that is being written is complete; raises its error."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, snapshot: Snapshot) -> None:
        cfg = self._cfg
        folder = write_checkpoint(cfg, self._setup, snapshot)
        point_to(self._setup.run_dir, folder)
        self._say(f"Saved checkpoint at step {snapshot.step}: {folder}")
        prune(Path(cfg.run_root_dir), cfg.run_id, folder, cfg.keep_last, cfg.keep_every)


def folder_to_resume(cfg: FinetuneConfig, accelerator: Accelerator, say: Callable[[str], None]) -> Path | None:
    """The checkpoint folder `--resume` continues from, the same on every process; None starts afresh.

    `--resum_vla_path` and `--resume_step` name one folder, `True` the newest: it must be there and undamaged. `auto`
    takes the newest undamaged one and says which it passed over. Raises MissingFileError or FileNotFoundError when
    there is none, CheckpointError when it is damaged.
    """
    if not cfg.resume:
        return None
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = _choose(cfg, say)
        except (CheckpointError, FileNotFoundError) as error:
            answer[1] = error
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    folder: Path | None = answer[0]
    return folder


def _choose(cfg: FinetuneConfig, say: Callable[[str], None]) -> Path | None:
    if cfg.resum_vla_path or cfg.resume_step is not None or cfg.resume is True:
        folder = Path(cfg.resum_vla_path) if cfg.resum_vla_path else checkpoint_path(cfg, cfg.resume_step)
        _check_resumable(folder)
        return folder
    for folder in _candidates(cfg):
        try:
            _check_resumable(folder)
        except CheckpointError as error:
            say(f"WARNING: {folder.name} is passed over, it cannot be resumed from: {error}")
        else:
            return folder
    say(f"No checkpoint of run {cfg.run_id} in {cfg.run_root_dir} to resume from: starting from step 0")
    return None


def _candidates(cfg: FinetuneConfig) -> list[Path]:
    root = Path(cfg.run_root_dir)
    if cfg.save_latest_checkpoint_only:
        folder = root / cfg.run_id
        return [folder] if (folder / TRAINING_STATE).exists() else []
    return [folder for _, folder in reversed(find_checkpoints(root, cfg.run_id))]


def _check_resumable(folder: Path) -> None:
    existing(folder / TRAINING_STATE)
    check_files(folder, training_state=True)
