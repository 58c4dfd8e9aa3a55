"""Flags of `craft_overhead.py`."""

from __future__ import annotations

from dataclasses import dataclass

SIZES = ("tiny", "mid", "full")


@dataclass
class OverheadConfig:
    """Flags."""

    size: str = "tiny"  # tiny, mid (about 60 M parameters) or full (the published size)
    tuning: str = "lora"  # or full
    rounds: int = 20  # 0 counts FLOPs and times nothing
    warmup: int = 2  # rounds that are run and not counted
    batch_size: int = 4
    threads: int = 2
    lora_rank: int = 32
    seed: int = 0
    rows: str = ""  # names separated by commas; empty: all
    memory_rows: str = "all"  # names separated by commas, all or none
    output: str = "results/craft_overhead/{size}_{tuning}{only}.json"  # only: "_flops" without rounds, else nothing
    report: str = "docs/performance.md"
    count_executed: bool = True  # also count the FLOPs each row executes: one more run of every row
    report_only: bool = False
    variant: str = ""  # print the peak memory of one row, in GiB
