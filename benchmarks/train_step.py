"""Where the time of an optimizer step goes: plain fine-tuning and the CRaFT presets, interleaved in one run.

    python benchmarks/train_step.py --tuning full
    python benchmarks/train_step.py --report_only True

The tiny preset with random weights on a small real data set. Writes raw times to results/train_step/{tuning}.json and
its section of docs/performance.md, made from all files there. All rows share one model, one optimizer and one loader;
the order of the rows is shuffled in each round.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from benchmark_page import write, write_section
from overhead_bench import require_plan
from overhead_memory import memory_of
from overhead_rows import ROWS
from paired_times import paired_ratio
from torch.utils.data import DataLoader

from prismatic.command_line import UsageError, bad_input_in_one_line, flag, parse_or_exit
from prismatic.progress import over
from prismatic.training.config import FinetuneConfig
from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.memory import to_device
from prismatic.training.setup import TrainingSetup, apply_tuning, build_setup
from prismatic.training.step import StepContext, optimizer_step
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.sampler import EpochSampler

NAMES = ("plain", "original", "open", "priced", "closed", "keep_quarter")
PARTS = (
    "data wait",
    "host to device",
    "vision",
    "language model",
    "action head",
    "backward",
    "optimizer",
    "CRaFT: anchor pass",
    "CRaFT: memory pass",
    "CRaFT: drift and its gradient",
    "CRaFT: combination",
    "other",
)


@dataclass
class StepTimesConfig:
    """Flags."""

    tuning: str = flag("full", choices=("full", "lora"))
    rounds: int = flag(20, at_least=1)
    warmup: int = flag(2, "rounds that are run and not counted", at_least=0)
    batch_size: int = flag(4, at_least=1)
    micro_batches: int = flag(2, at_least=1)
    threads: int = flag(2, at_least=1)
    lora_rank: int = flag(32, at_least=1, at_most=4096)
    seed: int = flag(0, at_least=0)
    device: str = flag("cpu", choices=("cpu", "cuda"))
    data_root_dir: str = "tests/golden/rlds_mini"
    dataset_name: str = "libero_mini_no_noops"
    output: str = "results/train_step/{tuning}.json"
    report: str = "docs/performance.md"
    report_only: bool = False


class Stopwatch:
    """Seconds per part of a step. Parts inside a part belong to the outer one.

    Args:
        synchronize: waits for the device, so that its work is counted where it was asked for.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize, self._is_running = synchronize, False
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time of the body."""
        if self._is_running:
            yield
            return
        self._synchronize()
        started, self._is_running = time.perf_counter(), True
        try:
            yield
        finally:
            self._synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self._is_running = False

    def watch(self, owner: object, method: str, name: str) -> None:
        """Count every call of a method of an object or class as a part."""
        call = getattr(owner, method)

        def timed(*args, **kwargs):
            with self.part(name):
                return call(*args, **kwargs)

        setattr(owner, method, timed)


class Bench:
    """One model, optimizer and loader for all rows, with every part under the stopwatch.

    Args:
        cfg: flags. theta_0 of every constraint is the weights at this moment.
    """

    def __init__(self, cfg: StepTimesConfig) -> None:
        self.cfg, self.device = cfg, torch.device(cfg.device)
        on_cuda = self.device.type == "cuda"
        self.stopwatch = Stopwatch(torch.cuda.synchronize if on_cuda else lambda: None)
        setup = build_setup(self._flags())
        self.model = setup.model.to(self.device).train()
        if cfg.tuning == "lora":
            apply_tuning(self.model, FinetuneConfig(use_lora=True, lora_rank=cfg.lora_rank))
        self._collate = VLACollator.of_policy(setup.processor, setup.model)
        self._batches = self._load(setup)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        self.crafts = {name: self._craft(name) for name in NAMES if ROWS[name].method == "craft"}
        self._watch()

    def _craft(self, name: str) -> CRaFT:
        row = ROWS[name]
        return CRaFT(
            self.model, row.config, [memory_of(row, self.cfg.batch_size, self._collate)], Accelerator(cpu=True)
        )

    def _flags(self) -> FinetuneConfig:
        cfg = self.cfg
        return FinetuneConfig(
            config_file_path="tiny", data_root_dir=cfg.data_root_dir, dataset_name=cfg.dataset_name, seed=cfg.seed
        )

    def _load(self, setup: TrainingSetup) -> Iterator[dict]:
        return iter(
            DataLoader(
                setup.dataset,
                batch_size=self.cfg.batch_size,
                sampler=EpochSampler(len(setup.dataset), self.cfg.seed),
                collate_fn=self._collate,
            )
        )

    def _watch(self) -> None:
        watch = self.stopwatch.watch
        vla = self.model.vla.get_base_model() if self.cfg.tuning == "lora" else self.model.vla
        for module, name in (
            (vla.vision_backbone, "vision"),
            (vla.projector, "vision"),
            (vla.language_model.model, "language model"),
            (self.model.proprio_projector, "action head"),
            (self.model.action_head, "action head"),
        ):
            watch(module, "forward", name)
        watch(self.optimizer, "step", "optimizer")
        watch(self.optimizer, "zero_grad", "optimizer")
        for craft in self.crafts.values():
            watch(craft.constraint, "reference", "CRaFT: anchor pass")
            watch(craft.constraint, "current", "CRaFT: memory pass")
            watch(craft.constraint, "accumulate", "CRaFT: drift and its gradient")
            watch(craft.constraint.gradient, "add", "CRaFT: drift and its gradient")
            watch(craft.constraint, "combine_", "CRaFT: combination")

    def prime(self, name: str) -> None:
        """Run steps until the row's plan is in place: the gate opens after the first measurement."""
        for _ in range(3):
            if name in self.crafts and self.crafts[name].constraint.plan is not ROWS[name].plan:
                self.run(name)

    def run(self, name: str) -> dict[str, float]:
        """Seconds of one optimizer step of a row, by part; they add up to the step."""
        watch, backward = self.stopwatch, torch.Tensor.backward
        watch.seconds = {}
        watch.watch(torch.Tensor, "backward", "backward")
        try:
            started = time.perf_counter()
            with watch.part("data wait"):
                batches = list(islice(self._batches, self.cfg.micro_batches))
            with watch.part("host to device"):
                batches = [to_device(batch, self.device) for batch in batches]
            optimizer_step(StepContext(self.model, self.optimizer, self.crafts.get(name)), batches, 0)
            total = time.perf_counter() - started
        finally:
            torch.Tensor.backward = backward
        return watch.seconds | {"other": total - sum(watch.seconds.values())}


def run_all(cfg: StepTimesConfig) -> dict:
    """All measurements of one tuning.

    Raises RuntimeError when a step would not follow its row's plan.
    """
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    bench, shuffler = Bench(cfg), random.Random(cfg.seed)
    bench.run("plain")  # away from theta_0, where the drift is zero
    for name in NAMES:
        bench.prime(name)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for number in over(range(cfg.warmup + cfg.rounds), "timing", "rounds"):
        for name in shuffler.sample(NAMES, len(NAMES)):
            if name in bench.crafts:
                require_plan(name, bench.crafts[name])
            seconds = bench.run(name)
            if number >= cfg.warmup:
                rounds[name].append(seconds)
    flags = ("tuning", "rounds", "warmup", "batch_size", "micro_batches", "threads", "seed", "device")
    return {
        "flags": {name: getattr(cfg, name) for name in flags},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "seconds": rounds,
    }


# --------------------------------------------------------------------------------------------------------- the page


def shares(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Median over rounds of each part's share of its step, by part; parts that never ran are missing."""
    present = [part for part in PARTS if any(part in seconds for seconds in rounds)]
    return {
        part: statistics.median(seconds.get(part, 0.0) / sum(seconds.values()) for seconds in rounds)
        for part in present
    }


def table(result: dict) -> list[str]:
    """Markdown lines: one column per row of the run, one line per part."""
    names = list(result["seconds"])
    columns = {name: shares(rounds) for name, rounds in result["seconds"].items()}
    totals = {name: [sum(s.values()) for s in rounds] for name, rounds in result["seconds"].items()}
    lines = [f"| part | {' | '.join(ROWS[name].label for name in names)} |", "|---" * (len(names) + 1) + "|"]
    for part in (part for part in PARTS if any(part in column for column in columns.values())):
        cells = [f"{columns[name][part]:.1%}" if part in columns[name] else "" for name in names]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    ratios = [paired_ratio(totals[name], totals["plain"]) for name in names]
    cells = [f"{median:.2f} ({low:.2f}-{high:.2f})" for median, low, high in ratios]
    return [*lines, f"| whole step, ratio to plain (95 %) | {' | '.join(cells)} |"]


HEAD = """## Where the time of an optimizer step goes

This section is written by `python benchmarks/train_step.py` from the files in `results/train_step/`. Do not edit.

The tiny preset on a small real data set, loaded in the training process, so that `data wait` is all of the decoding and
augmentation; with `--num_data_workers` most of it overlaps with training. A share is the median over rounds of the
part's share of its step; medians need not add up to one. `backward` is that of the action loss, with lambda > 0 and a
closed gate that of both losses. `memory pass` is the forward pass on a memory that is not the batch; its backward pass
is in `drift and its gradient`. `other` is mostly the glue between the parts and the gradient norm.
"""


def report(results: list[dict]) -> str:
    """The section."""
    lines = HEAD.splitlines() + [""]
    for result in results:
        flags = result["flags"]
        command = "python benchmarks/train_step.py " + " ".join(f"--{name} {value}" for name, value in flags.items())
        versions = f"torch {result['versions']['torch']}, Python {result['versions']['python']}"
        lines += [f"### {flags['tuning']} tuning", "", f"    {command}", "", f"{versions}.", "", *table(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure unless `--report_only`, then write the section."""
    cfg = parse_or_exit(StepTimesConfig, __doc__)
    output = Path(cfg.output.format(tuning=cfg.tuning))
    if not cfg.report_only:
        with bad_input_in_one_line("train_step.py", (UsageError, FileNotFoundError)):
            write(output, json.dumps(run_all(cfg), indent=1) + "\n")
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(output.parent.glob("*.json"))]
    write_section(Path(cfg.report), "train_step", report(results))


if __name__ == "__main__":
    main()
