"""Step time of plain and CRaFT fine-tuning, interleaved in one process so that both see the same machine.

    python benchmarks/craft_step.py --config_file_path pretrained_models/tiny-libero-object --use_lora False

Prints a Markdown table: median, minimum and maximum milliseconds per optimizer step, ratio to plain, peak memory.
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from dataclasses import dataclass

import draccus
import torch
from accelerate import Accelerator

from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.setup import build_setup
from prismatic.training.step import optimizer_step


@dataclass
class BenchmarkConfig:
    """What is timed."""

    config_file_path: str = "tiny"
    data_root_dir: str = "datasets/rlds"
    dataset_name: str = "libero_spatial_scripted_no_noops"
    use_lora: bool = False
    batch_size: int = 16
    rounds: int = 20
    threads: int = 2


def main() -> None:
    """Build both trainers, alternate their steps on the same batches, print the table."""
    cfg = draccus.parse(BenchmarkConfig)
    torch.set_num_threads(cfg.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: build(cfg, name, folder) for name in ("plain", "craft")}
        batches = trainers["plain"].batches()
        times: dict[str, list[float]] = {name: [] for name in trainers}
        for round_ in range(cfg.rounds + 2):
            batch = next(batches)
            for name, trainer in trainers.items():
                started = time.perf_counter()
                optimizer_step(trainer.step_context(), [batch], round_)
                if round_ >= 2:  # the first rounds allocate memory and optimizer state
                    times[name].append(time.perf_counter() - started)
    print(table(cfg, times))


def build(cfg: BenchmarkConfig, name: str, folder: str) -> Trainer:
    """A trainer from the same start weights."""
    flags = FinetuneConfig(
        config_file_path=cfg.config_file_path,
        data_root_dir=cfg.data_root_dir,
        dataset_name=cfg.dataset_name,
        run_root_dir=folder,
        run_id_override=name,
        batch_size=cfg.batch_size,
        use_lora=cfg.use_lora,
        use_craft=name == "craft",
        device="cpu",
    )
    seed_everything(flags.seed)
    return Trainer(flags, build_setup(flags), Accelerator(cpu=True))


def table(cfg: BenchmarkConfig, times: dict[str, list[float]]) -> str:
    """Markdown."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines = [
        f"{cfg.config_file_path}, {'LoRA' if cfg.use_lora else 'full'} tuning, batch {cfg.batch_size}, "
        f"{cfg.threads} threads, {cfg.rounds} interleaved rounds; peak memory of the process {peak:.2f} GiB",
        "",
        "| method | median ms | min | max | steps/s | ratio to plain |",
        "|---|---|---|---|---|---|",
    ]
    plain = statistics.median(times["plain"])
    for name, values in times.items():
        median = statistics.median(values)
        cells = [f"{1000 * v:.0f}" for v in (median, min(values), max(values))]
        lines.append(f"| {name} | {' | '.join(cells)} | {1 / median:.2f} | {median / plain:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
