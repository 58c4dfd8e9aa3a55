"""What CRaFT costs: step time, FLOPs and peak memory of each setting beside plain fine-tuning, interleaved in one run.

    python benchmarks/craft_overhead.py --size tiny --tuning lora
    python benchmarks/craft_overhead.py --report_only True

Random weights and one random batch. Writes raw times to results/craft_overhead/{size}_{tuning}.json (with `--rounds 0`
FLOPs alone, to {size}_{tuning}_flops.json), and from all files there report.md beside them and a section of
docs/performance.md. All rows share one model and one optimizer; a row sets which weights are trained and runs its
steps. The order of the rows is shuffled in each round, and a row is compared with the plain step of the same round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import random
import resource
from pathlib import Path

import torch
from benchmark_page import write, write_section
from overhead_bench import Bench
from overhead_config import SIZES, OverheadConfig
from overhead_flops import count_flops
from overhead_page import report, summary
from overhead_rows import ROWS

from prismatic.command_line import UsageError, bad_input_in_one_line, parse_or_exit
from prismatic.progress import over

GIB = 2**30


def measure_times(bench: Bench, cfg: OverheadConfig, names: list[str]) -> dict[str, list[list[float]]]:
    """Seconds per row, round and step; rounds of warm-up are run and left out."""
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    shuffler = random.Random(cfg.seed)
    for round_ in over(range(cfg.warmup + cfg.rounds if cfg.rounds else 0), "timing", "rounds"):
        order = list(names)
        shuffler.shuffle(order)
        for name in order:
            seconds = bench.run(name)
            if round_ >= cfg.warmup:
                times[name].append(seconds)
    return times


def measure_memory(cfg: OverheadConfig, name: str) -> dict[str, float]:
    """GiB of this process: before the first step, and the peak over the steps of one row."""
    torch.set_num_threads(cfg.threads)
    bench = Bench(cfg, [name])
    before = resident()
    for _ in range(3):
        bench.run(name, check=False)
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def memory_in_child(cfg: OverheadConfig, name: str) -> dict[str, float]:
    """`measure_memory` in a process of its own, which starts before this one has used torch's threads."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure_memory, (cfg, name))


def resident() -> float:
    """Resident size of the process now, GiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / GIB


def run_all(cfg: OverheadConfig) -> dict:
    """All measurements of one size and tuning."""
    names = cfg.names
    memory = {name: memory_in_child(cfg, name) for name in over(cfg.memory_names, "measuring memory", "rows")}
    torch.set_num_threads(cfg.threads)
    # The FLOP count takes features of these two or four whatever is timed.
    needed = {("frozen_" if ROWS[n].frozen else "") + ("raw_open" if ROWS[n].raw_only else "open") for n in names}
    bench = Bench(cfg, [*names, *(needed - set(names))])
    bench.take_step("plain", None)  # away from theta_0, where L_ret is zero
    for name in names:
        bench.prime(name)
    flops = count_flops(bench, names, cfg.count_executed)
    times = measure_times(bench, cfg, names)
    trained = sum(p.numel() for p in bench.optimizer.param_groups[0]["params"])
    return {
        "size": cfg.size,
        "tuning": cfg.tuning,
        "batch_size": cfg.batch_size,
        "rounds": cfg.rounds,
        "warmup": cfg.warmup,
        "lora_rank": cfg.lora_rank if cfg.tuning == "lora" else None,
        "parameters": {"total": sum(p.numel() for p in bench.model.parameters()), "trained": trained},
        "machine": {"threads": cfg.threads, "python": platform.python_version(), "torch": torch.__version__},
        "seconds": times,
        "flops": flops,
        "memory_gib": memory,
    }


def read_results(folder: Path) -> list[dict]:
    """All results, small sizes first."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return sorted(results, key=lambda r: (SIZES.index(r["size"]), r["tuning"]))


def main() -> None:
    """Measure unless `--report_only`, then write the page."""
    cfg = parse_or_exit(OverheadConfig, __doc__)
    if cfg.variant:
        print(json.dumps(measure_memory(cfg, cfg.variant)))
        return
    output = Path(cfg.output.format(size=cfg.size, tuning=cfg.tuning, only="_flops" * (cfg.rounds == 0)))
    if not cfg.report_only:
        with bad_input_in_one_line("craft_overhead.py", (UsageError,)):
            write(output, json.dumps(run_all(cfg), indent=1) + "\n")
    results, details = read_results(output.parent), output.with_name("report.md")
    write(details, report(results))
    page = Path(cfg.report)
    link = Path(os.path.relpath(details, page.parent)).as_posix()
    write_section(page, "craft_overhead", summary(results, link))


if __name__ == "__main__":
    main()
