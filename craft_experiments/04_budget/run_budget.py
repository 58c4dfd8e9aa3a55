"""Does a run end at the drift it was told to? Five budgets, three seeds, both presets, on LIBERO demonstrations.

    python craft_experiments/04_budget/run_budget.py

Every cell is one run of `vla-scripts/finetune.py` on one core; two run at a time. Its measurements go to
{results_dir}/runs/{cell}.json, and a cell whose file exists is skipped. Then `make_report.py` writes the table and the
figure from these files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from craft_experiments.common_utils.drift_runs import (
    DRIFT,
    LAMBDA,
    Cell,
    DriftConfig,
    run_experiment,
)
from prismatic.command_line import flag, parse_or_exit

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path(__file__).with_name("make_report.py")
VARIANTS = {
    "budget": ("--craft_preset", "budget"),
    # The original rule in the same unit as the budget preset, so that one eps means one thing.
    "original": ("--craft_preset", "original", "--craft_retention_metric", "rel_mse"),
    "budget, every 4": ("--craft_preset", "budget", "--craft_every", "4"),
    "budget, every 4, vision frozen": ("--craft_preset", "budget", "--craft_every", "4", "--freeze_vision", "True"),
}
KEPT = (DRIFT, LAMBDA, "CRaFT/Gate Open", "CRaFT/Conflict Ratio")


@dataclass
class BudgetConfig(DriftConfig):
    """Sizes of the experiment."""

    start: str = "pretrained_models/tiny-libero-object"
    work_dir: str = "runs/budget"
    results_dir: str = "results/budget"
    # At the largest, this task no longer needs the drift it is allowed.
    budgets: tuple[float, ...] = flag(
        (0.003, 0.0045, 0.007, 0.01, 0.015, 0.03), "relative squared drift of the features", more_than=0
    )


def main() -> None:
    """Run what is missing, then write the report."""
    cfg = parse_or_exit(BudgetConfig, __doc__)
    os.chdir(ROOT)
    run_experiment(cfg, cells, KEPT, REPORT)


def cells(cfg: BudgetConfig) -> list[Cell]:
    """All runs: every variant, budget and seed, and per seed one run that only measures."""
    grid = [(variant, budget, seed) for seed in cfg.seeds for variant in VARIANTS for budget in cfg.budgets]
    measuring = [("budget", float("inf"), seed) for seed in cfg.seeds]
    return [Cell(variant, budget, seed, VARIANTS[variant]) for variant, budget, seed in measuring + grid]


if __name__ == "__main__":
    main()
