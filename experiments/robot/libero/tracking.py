"""Optional reporting to Weights & Biases with the published metric names."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from experiments.robot.libero.eval_config import EvalConfig


class Tracker(Protocol):
    """Receives the finished results."""

    def finish(self, results: dict[str, Any], log_path: Path) -> None:
        """Report and close."""


class NoTracker:
    """Reports nothing."""

    def finish(self, results: dict[str, Any], log_path: Path) -> None:
        """Nothing to do."""


class WandbTracker:
    """One W&B run; per task and total success rate and number of episodes, and the text log as a file."""

    def __init__(self, entity: str, project: str, run_id: str) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(entity=entity, project=project, name=run_id)

    def finish(self, results: dict[str, Any], log_path: Path) -> None:
        """Log the metrics, upload the file, close the run."""
        self._run.log(wandb_metrics(results))
        self._wandb.save(str(log_path), base_path=str(log_path.parent), policy="now")
        self._run.finish(exit_code=0 if results["valid"] else 1)


def wandb_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Published names `success_rate/<task>`, `num_episodes/<task>`, `.../total`; without trials there is no rate."""
    groups = {task["instruction"]: task for task in results["per_task"]} | {"total": results["overall"]}
    metrics: dict[str, float] = {}
    for name, group in groups.items():
        metrics[f"num_episodes/{name}"] = group["trials"]
        if group["success_rate"] is not None:
            metrics[f"success_rate/{name}"] = group["success_rate"]
    return metrics


def make_tracker(cfg: EvalConfig, run_id: str) -> Tracker:
    """`WandbTracker` with `--use_wandb True`, else `NoTracker`."""
    return WandbTracker(cfg.wandb_entity, cfg.wandb_project, run_id) if cfg.use_wandb else NoTracker()
