"""Does one run with the controller find what a sweep of fixed multipliers would find?

    python craft_experiments/05_controller/run_controller.py

Two controllers on three budgets, and six fixed multipliers that serve all budgets, on three seeds: 36 runs, each
about ten minutes on an idle core. Every cell is one run of `vla-scripts/finetune.py`; its measurements go to
{results_dir}/runs/{cell}.json, and a cell whose file exists is skipped. Then `make_report.py` writes the page and the
figure from these files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from craft_experiments.common_utils.drift_runs import (
    DRIFT,
    LAMBDA,
    OUT_OF_REACH,
    Cell,
    DriftConfig,
    run_experiment,
)
from prismatic.command_line import flag, flag_like, parse_or_exit

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path(__file__).with_name("make_report.py")
COMMON = ("--lr_schedule", "cosine", "--craft_preset", "budget")
CONTROLLERS = {"share": ("--craft_dual", "share", "--craft_projection_rule", "off"), "pi": ()}
KEPT = (DRIFT, LAMBDA, OUT_OF_REACH)


@dataclass
class ControllerConfig(DriftConfig):
    """Sizes of the experiment."""

    start: str = "pretrained_models/tiny-libero-displaced"
    work_dir: str = "runs/controller"
    results_dir: str = "results/controller"
    max_steps: int = flag_like(DriftConfig, "max_steps", 800)
    learning_rate: float = flag_like(DriftConfig, "learning_rate", 7e-4)
    lr_warmup_steps: float = flag_like(DriftConfig, "lr_warmup_steps", 0.05)
    budgets: tuple[float, ...] = flag((0.01, 0.003, 0.001), "relative squared drift of the features", more_than=0)
    lambdas: tuple[float, ...] = flag((0, 1, 3, 10, 30, 100), "fixed multipliers; 0 only measures", at_least=0)


def main() -> None:
    """Run what is missing, then write the report."""
    cfg = parse_or_exit(ControllerConfig, __doc__)
    os.chdir(ROOT)
    run_experiment(cfg, cells, KEPT, REPORT, compact=True)


def cells(cfg: ControllerConfig) -> list[Cell]:
    """All runs in the order in which they begin: the first seed of everything before the second."""
    return [cell for seed in cfg.seeds for cell in [*_controlled(cfg, seed), *_fixed(cfg, seed)]]


def _controlled(cfg: ControllerConfig, seed: int) -> list[Cell]:
    return [
        Cell(name, budget, seed, (*COMMON, *flags)) for name, flags in CONTROLLERS.items() for budget in cfg.budgets
    ]


def _fixed(cfg: ControllerConfig, seed: int) -> list[Cell]:
    """A multiplier that nothing moves knows no budget: one run serves them all."""
    still = ("--craft_enable_dual", "False", "--craft_enable_projection", "False")
    constant = (*COMMON, *still, "--craft_fixed_lambda")
    return [Cell(f"fixed {value:g}", float("inf"), seed, (*constant, f"{value:g}")) for value in cfg.lambdas]


if __name__ == "__main__":
    main()
