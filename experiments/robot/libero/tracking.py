"""What an evaluation tells the services that its flags ask for (`prismatic/training/writers.py`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from experiments.robot.libero.eval_config import EvalConfig
from experiments.robot.libero.eval_fingerprint import plain
from prismatic.training.tracking import Tracker
from prismatic.training.writers import RunFacts, open_writers, services_of


def open_tracker(cfg: EvalConfig, folder: Path, run_id: str) -> Tracker:
    """The services, each with a run of this name. UsageError naming the flag of one that cannot be opened."""
    flags = plain(dataclasses.asdict(cfg))
    facts = RunFacts(folder, run_id, project=cfg.wandb_project, entity=cfg.wandb_entity, flags=flags)
    return Tracker(open_writers(services_of(cfg), facts))


def report_results(tracker: Tracker, results: dict[str, Any], log_path: Path) -> None:
    """Tell them the results once, with the text log where files are kept, and close them."""
    tracker.log(max(1, results["overall"]["trials"]), result_metrics(results))
    tracker.attach(log_path)
    tracker.close()


def result_metrics(results: dict[str, Any]) -> dict[str, float]:
    """Published names `success_rate/<task>`, `num_episodes/<task>`, `.../total`; without trials there is no rate.

    `num_errors/total`: episodes that ended in an error, which make the result invalid.
    """
    groups = {task["instruction"]: task for task in results["per_task"]} | {"total": results["overall"]}
    metrics: dict[str, float] = {"num_errors/total": results["overall"]["errors"]}
    for name, group in groups.items():
        metrics[f"num_episodes/{name}"] = group["trials"]
        if group["success_rate"] is not None:
            metrics[f"success_rate/{name}"] = group["success_rate"]
    return metrics
