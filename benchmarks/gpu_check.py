"""What a GPU must prove about this code, in one command for whoever has a card: under ten minutes, nothing downloaded.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu --size tiny

The parts, each in a process of its own, so that none takes another one down (`gpu_parts.py` names their files):

- paths: every kind of run ends with finite numbers, all tensors on the device, and in their dtype
- agreement: CPU against device in float32: losses, features, actions
- precision: bf16 against float32 on the device
- memory: step time and peak memory at the published size, against the prediction
- processes: two processes train like one
- latency: time of `predict_action`
- rendering: one LIBERO scene on the GPU, against the stored colours

Writes {output} and {page}. A part that cannot run says why. Exit code: 0 nothing failed, 1 something did.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmark_page import write
from gpu_findings import Check, PartConfig
from gpu_parts import PARTS, run_part

from prismatic.command_line import UsageError, flag, parse_or_exit
from prismatic.progress import over, say

ROOT = Path(__file__).resolve().parents[1]
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
SECONDS = {"paths": 180, "agreement": 100, "precision": 60, "memory": 140, "processes": 60, "latency": 60}
"""After which a part of a run on a card is stopped; together less than ten minutes."""
OTHER_SECONDS, CPU_SECONDS = 40, 3600


@dataclass
class GPUCheckConfig:
    """Flags."""

    device: str = flag("cuda", choices=("cuda", "cpu"))
    size: str = flag(
        "",
        "of the parts precision, memory and latency; empty: full on a card, tiny on a CPU",
        choices=("", "tiny", "full"),
    )
    parts: tuple[str, ...] = flag(tuple(PARTS), "with commas between", choices=tuple(PARTS))
    output: str = flag("", "empty: results/gpu_check/{device}.json")
    page: str = "docs/gpu.md"
    part: str = flag(
        "", "run this part alone, in this process, and append what it finds to --output", choices=("", *PARTS)
    )

    def __post_init__(self) -> None:
        if self.part and not self.output:
            raise UsageError(f"--part {self.part} needs --output FILE")


def main() -> int:
    """Run the parts, write record and page."""
    cfg = parse_or_exit(GPUCheckConfig, __doc__)
    size = cfg.size or ("full" if cfg.device == "cuda" else "tiny")
    if cfg.part:
        run_part(cfg.part, PartConfig(torch.device(cfg.device), size), Path(cfg.output))
        return 0
    record = {"machine": machine(cfg.device), "size": size, "parts": {}}
    output = Path(cfg.output or f"results/gpu_check/{cfg.device}.json")
    for name in over(cfg.parts, "checking", "parts"):
        record["parts"][name] = outcome(name, cfg.device, size)
        say(f"{name}: {record['parts'][name]['status']} ({record['parts'][name]['seconds']:.0f} s)")
        write(output, json.dumps(record, indent=1) + "\n")
    write(Path(cfg.page), page(record))
    failed = [name for name, part in record["parts"].items() if part["status"] == FAILED]
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


def machine(device: str) -> dict:
    """What it was run on."""
    found = {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda" and torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        found |= {"cards": [c.name for c in cards], "GiB": [round(c.total_memory / 2**30, 1) for c in cards]}
        found["cuda"] = torch.version.cuda
    return found


def outcome(name: str, device: str, size: str) -> dict:
    """Status of one part, with its checks: it runs in its own process and is stopped when it takes too long."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"status": NOT_RUN, "why": "this machine has no GPU that PyTorch can use", "seconds": 0.0, "checks": []}
    limit = CPU_SECONDS if device == "cpu" else SECONDS.get(name, OTHER_SECONDS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.jsonl"
        words = [sys.executable, __file__, "--part", name, "--device", device, "--size", size, "--output", str(file)]
        started = time.perf_counter()
        try:
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
            ended = None if done.returncode == 0 else f"exit code {done.returncode}: {_last_line(done.stderr)}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit} s"
        seconds = time.perf_counter() - started
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    checks = [Check(**json.loads(line)) for line in lines]
    return judged(checks, ended) | {"seconds": round(seconds, 1), "checks": [check.__dict__ for check in checks]}


def judged(checks: list[Check], ended: str | None) -> dict:
    """Status and reason. `ended`: how the process ended when it did not finish."""
    if ended is not None:
        return {"status": FAILED, "why": ended}
    failed = [check.what for check in checks if check.passed is False]
    if failed:
        return {"status": FAILED, "why": "; ".join(failed)}
    done = [check for check in checks if check.passed]
    if not done:
        return {"status": NOT_RUN, "why": "; ".join(check.found for check in checks) or "nothing to check"}
    return {"status": PASSED, "why": ""}


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:300] if text.strip() else "no message"


def page(record: dict) -> str:
    """The page for people."""
    cards = record["machine"].get("cards")
    on = f"{', '.join(cards)} (CUDA {record['machine']['cuda']})" if cards else "the CPU: no GPU was available"
    lines = [
        "# The GPU check",
        "",
        "This page is written by `python benchmarks/gpu_check.py`. Do not edit.",
        "",
        f"It was run on {on}, torch {record['machine']['torch']}, Python {record['machine']['python']}, size "
        f"{record['size']}. "
        + ("" if cards else "So it says that the check works, and nothing about a GPU. With a card, run it there: it ")
        + ("" if cards else "takes less than ten minutes, runs more, downloads nothing and writes this page again."),
        "",
        "| part | outcome | s | |",
        "|---|---|---|---|",
    ]
    for name, part in record["parts"].items():
        lines.append(f"| {name} | {part['status']} | {part['seconds']:.0f} | {_cell(part['why'])} |")
    for name, part in record["parts"].items():
        if part["checks"]:
            lines += ["", f"## {name}", "", " ".join(PARTS[name].__doc__.split()), ""]
            lines += ["| | found | expected | |", "|---|---|---|---|"]
            words = {True: "passed", False: "**failed**", None: "not judged"}
            lines += [
                f"| {_cell(c['what'])} | {_cell(c['found'])} | {_cell(c['expected'])} | {words[c['passed']]} |"
                for c in part["checks"]
            ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
