"""Does a run end at the drift it was told to? Five budgets, three seeds, both presets, on LIBERO demonstrations.

    python craft_experiments/04_budget/run_budget.py

Every cell is one run of `vla-scripts/finetune.py` on one core; two run at a time. Its measurements go to
{results_dir}/runs/{cell}.json, and a cell whose file exists is skipped. Then `make_report.py` writes the table and the
figure from these files.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import draccus

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {
    "budget": ["--craft_preset", "budget"],
    # The original rule in the same unit as the budget preset, so that one eps means one thing.
    "original": ["--craft_preset", "original", "--craft_retention_metric", "rel_mse"],
    "budget, every 4": ["--craft_preset", "budget", "--craft_every", "4"],
    "budget, every 4, vision frozen": ["--craft_preset", "budget", "--craft_every", "4", "--freeze_vision", "True"],
}
KEPT = ("CRaFT/Retention Loss", "CRaFT/Lambda", "CRaFT/Gate Open", "CRaFT/Conflict Ratio")


@dataclass
class BudgetConfig:
    """Sizes of the experiment."""

    start: str = "pretrained_models/tiny-libero-object"
    data_root_dir: str = "datasets/rlds"
    dataset_name: str = "libero_spatial_scripted_no_noops"
    # Relative squared drift of the features. At the largest, this task no longer needs the drift it is allowed.
    budgets: str = "0.003,0.0045,0.007,0.01,0.015,0.03"
    seeds: str = "0,1,2"
    max_steps: int = 500
    batch_size: int = 8
    learning_rate: float = 5e-4
    slots: int = 2  # runs at the same time, one core each
    work_dir: str = "runs/budget"
    results_dir: str = "results/budget"


@dataclass(frozen=True)
class Cell:
    """One run. `budget` infinite is the run that only measures."""

    variant: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        """File-system name."""
        return f"{self.variant.replace(', ', '_').replace(' ', '_')}--eps_{self.budget}--seed_{self.seed}"


def main() -> None:
    """Run what is missing, then write the report."""
    cfg = draccus.parse(BudgetConfig)
    os.chdir(ROOT)
    missing = [cell for cell in cells(cfg) if not result_file(cfg, cell).exists()]
    print(f"{len(missing)} runs to do", flush=True)
    with ThreadPoolExecutor(cfg.slots) as pool:
        for cell in pool.map(lambda cell: run(cfg, cell), missing):
            print(f"done: {cell.name}", flush=True)
    subprocess.run([sys.executable, str(Path(__file__).with_name("make_report.py")), cfg.results_dir], check=True)


def cells(cfg: BudgetConfig) -> list[Cell]:
    """All runs: every variant, budget and seed, and per seed one run that only measures."""
    budgets, seeds = [float(x) for x in cfg.budgets.split(",")], [int(x) for x in cfg.seeds.split(",")]
    grid = [Cell(variant, budget, seed) for seed in seeds for variant in VARIANTS for budget in budgets]
    return [Cell("budget", float("inf"), seed) for seed in seeds] + grid


def result_file(cfg: BudgetConfig, cell: Cell) -> Path:
    """Where the measurements of a cell go."""
    return Path(cfg.results_dir) / "runs" / f"{cell.name}.json"


def command(cfg: BudgetConfig, cell: Cell) -> list[str]:
    """The training command of a cell, relative to the repository."""
    flags = {
        "config_file_path": cfg.start,
        "data_root_dir": cfg.data_root_dir,
        "dataset_name": cfg.dataset_name,
        "run_root_dir": cfg.work_dir,
        "run_id_override": cell.name,
        "use_craft": True,
        "craft_retention_budget": cell.budget,
        "seed": cell.seed,
        "max_steps": cfg.max_steps,
        "batch_size": cfg.batch_size,
        "learning_rate": cfg.learning_rate,
        "lr_warmup_steps": 20,
        "max_grad_norm": 1.0,
        "image_aug": False,
        "save_freq": cfg.max_steps,
        "save_training_state": False,
        "craft_log_freq": 1,
        "device": "cpu",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["vla-scripts/finetune.py", *words, *VARIANTS[cell.variant]]


def run(cfg: BudgetConfig, cell: Cell) -> Cell:
    """Train one cell and keep its measurements; RuntimeError with the end of its output when it fails."""
    words = command(cfg, cell)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{cell.name}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    lines = (Path(cfg.work_dir) / cell.name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    if len(steps) != cfg.max_steps:
        raise RuntimeError(f"{cell.name}: metrics.jsonl has {len(steps)} steps, expected {cfg.max_steps}")
    record = {
        "variant": cell.variant,
        "budget": None if cell.budget == float("inf") else cell.budget,
        "seed": cell.seed,
        "command": "python " + " ".join(f'"{w}"' if " " in w else w for w in words),
        # Steps between two constrained ones repeat the last measurement: only those that measured are kept.
        "measured_steps": [s["step"] for s in steps if s["CRaFT/Measured Step"] == s["step"]],
        "all_losses": [round(s["VLA Train/Loss"], 6) for s in steps],
    }
    for name in KEPT:
        record[name] = [_rounded(s.get(name)) for s in steps if s["CRaFT/Measured Step"] == s["step"]]
    file = result_file(cfg, cell)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    temporary.replace(file)
    return cell


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


if __name__ == "__main__":
    main()
