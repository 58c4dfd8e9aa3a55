"""The parts of `gpu_check.py`, a file each: they yield their checks as they make them, from runs of the product."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gpu_agreement import agreement, precision
from gpu_findings import Checks, PartConfig
from gpu_latency import latency
from gpu_memory import memory
from gpu_paths import paths
from gpu_processes import processes
from gpu_rendering import rendering


def run_part(name: str, cfg: PartConfig, output: Path) -> None:
    """Run a part and append each check to `output` as one line of JSON."""
    with output.open("a", encoding="utf-8") as file:
        for check in PARTS[name](cfg):
            file.write(json.dumps(asdict(check)) + "\n")
            file.flush()


PARTS: dict[str, Callable[[PartConfig], Checks]] = {
    part.__name__: part for part in (paths, agreement, precision, memory, processes, latency, rendering)
}
