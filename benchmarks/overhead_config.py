"""Flags of `craft_overhead.py`."""

from __future__ import annotations

from dataclasses import dataclass

from overhead_rows import ROWS

from prismatic.command_line import UsageError, flag

SIZES = ("tiny", "mid", "full")


@dataclass
class OverheadConfig:
    """Flags."""

    size: str = flag("tiny", "mid has about 60 M parameters, full is the published size", choices=SIZES)
    tuning: str = flag("lora", choices=("lora", "full"))
    rounds: int = flag(20, "0 counts FLOPs and times nothing", at_least=0)
    warmup: int = flag(2, "rounds that are run and not counted", at_least=0)
    batch_size: int = flag(4, at_least=1)
    threads: int = flag(2, at_least=1)
    lora_rank: int = flag(32, at_least=1, at_most=4096)
    seed: int = flag(0, at_least=0)
    rows: tuple[str, ...] = flag((), "with commas between; empty: all", choices=tuple(ROWS))
    memory_rows: tuple[str, ...] = flag(("all",), "with commas between", choices=("all", "none", *ROWS))
    output: str = flag("results/craft_overhead/{size}_{tuning}{only}.json", "only: _flops without rounds, else nothing")
    report: str = "docs/performance.md"
    count_executed: bool = flag(True, "also count the FLOPs each row executes: one more run of every row")
    report_only: bool = False
    variant: str = flag("", "print the peak memory of one row, in GiB", choices=("", *ROWS))

    def __post_init__(self) -> None:
        if unknown := sorted({*self.memory_rows} - {"all", "none", *self.names}):
            raise UsageError(f"--memory_rows {','.join(unknown)}: expected some of --rows")

    @property
    def names(self) -> list[str]:
        """The rows that are measured."""
        return list(self.rows or ROWS)

    @property
    def memory_names(self) -> list[str]:
        """The rows whose memory is measured."""
        if "none" in self.memory_rows:
            return []
        return self.names if "all" in self.memory_rows else list(self.memory_rows)
