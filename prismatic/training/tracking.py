"""Metrics of a run: a JSONL file always, console lines, Weights & Biases and TensorBoard when asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tqdm import tqdm


class Tracker:
    """Writes one JSON object per logged step to `{run_dir}/metrics.jsonl` and a line to the console.

    A resumed run drops the lines at and after the step it resumes from, so that every step appears once.

    Args:
        run_dir: folder of the run, created when missing.
        start_step: first optimizer step that will be logged.
        wandb_settings: keyword arguments of `wandb.init`, or None for no W&B.
        tensorboard: also write event files to `{run_dir}/tensorboard`.
    """

    def __init__(
        self, run_dir: Path, start_step: int = 0, wandb_settings: dict | None = None, tensorboard: bool = False
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / "metrics.jsonl"
        _truncate_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = None
        if wandb_settings is not None:
            import wandb  # optional dependency, only when asked for

            self._wandb = wandb.init(**wandb_settings)
        self._tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # optional dependency, only when asked for

            self._tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=start_step)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the metrics (plain numbers) of optimizer step `step`."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(metrics, step=step)
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)

    def message(self, text: str) -> None:
        """A line on the console that does not disturb a progress bar."""
        say(text)

    def sync(self) -> None:
        """Flush the metrics to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the W&B run."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def say(text: str) -> None:
    """A line on the console that does not disturb a progress bar."""
    tqdm.write(text)


def _truncate_after(path: Path, start_step: int) -> None:
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    # A killed process can leave half a line; it belongs to a step that will be repeated.
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start_step]
    temporary = path.with_suffix(".jsonl.tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
