"""Episodes per hour of the LIBERO evaluation: as published, and with simulator workers, on the same episodes.

    python benchmarks/eval_throughput.py

`sequential` is the published protocol: both cameras rendered in every control step, the model rebuilt for every
episode, one process. The other rows render only what the policy looks at and keep the environment. Every image, robot
state and action of every query is hashed: the rows must agree in all of them, `sequential` in the first episodes, as it
is slow. Each row runs in a process of its own.

Writes results/eval_throughput/<row>-<round>.json and a section of docs/performance.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_page import write_section

ROOT = Path(__file__).parents[1]
OUT = ROOT / "results" / "eval_throughput"
sys.path.insert(0, str(ROOT))

from experiments.robot.libero.eval_backend import LiberoBackend  # noqa: E402
from experiments.robot.libero.eval_config import EvalConfig, task_numbers  # noqa: E402
from experiments.robot.libero.evaluation import evaluate  # noqa: E402
from experiments.robot.libero.modes import RenderMode, ResetMode  # noqa: E402
from experiments.robot.libero.surroundings import SimulatorUnavailableError  # noqa: E402
from experiments.robot.libero.video import SaveVideos  # noqa: E402
from prismatic.command_line import UsageError, bad_input_in_one_line, flag, parse  # noqa: E402
from prismatic.progress import over, say  # noqa: E402

ROWS = {
    "sequential": (0, RenderMode.EVERY_STEP, ResetMode.HARD),
    "in_process": (0, RenderMode.PUBLISHED, ResetMode.SOFT),
    "workers_1": (1, RenderMode.PUBLISHED, ResetMode.SOFT),
    "workers_2": (2, RenderMode.PUBLISHED, ResetMode.SOFT),
    "workers_4": (4, RenderMode.PUBLISHED, ResetMode.SOFT),
}
"""Simulator workers, rendering, resets."""


@dataclass
class ThroughputConfig:
    """Flags."""

    checkpoint: str = str(ROOT / "pretrained_models" / "tiny-libero-object")
    task_ids: str = flag("0", "of libero_object, with commas between")
    trials: int = flag(12, "initial states per task", at_least=1)
    sequential_trials: int = flag(3, "initial states per task of `sequential`", at_least=1)
    rounds: int = flag(1, at_least=1)
    row: str | None = flag(None, "measure this row only, and write no page", choices=tuple(ROWS))
    out: str | None = flag(None, "file of --row")

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).is_dir():
            raise UsageError(f"--checkpoint {self.checkpoint}: expected a checkpoint folder, found none")
        task_numbers(self.task_ids)
        if self.out is not None and self.row is None:
            raise UsageError(f"--out {self.out} has no effect: it needs --row NAME")


class HashingPolicy:
    """The policy, and a hash of every question with its answer."""

    def __init__(self, policy: Any) -> None:
        self._policy = policy
        self.hashes: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def predict(self, image: np.ndarray, wrist_image: np.ndarray, state: np.ndarray, instruction: str) -> np.ndarray:
        """As `VLAPolicy.predict`."""
        actions = self._policy.predict(image, wrist_image, state, instruction)
        digest = hashlib.sha256(instruction.encode())
        for array in (image, wrist_image, state, actions):
            digest.update(np.ascontiguousarray(array).tobytes())
        self.hashes.append(digest.hexdigest()[:16])
        return actions


class HashingBackend(LiberoBackend):
    """The real simulator and a `HashingPolicy`."""

    def load_policy(self, cfg: EvalConfig) -> HashingPolicy:
        """Policy of the checkpoint."""
        self.policy = HashingPolicy(super().load_policy(cfg))
        return self.policy

    def __getstate__(self) -> dict:
        return {}  # workers need no policy


class Watch(threading.Thread):
    """Looks twice a second at the children's peak memory (MB) and at when episodes are written (s since the start)."""

    def __init__(self, records: Path) -> None:
        super().__init__(daemon=True)
        self._records, self._begin = records, time.monotonic()
        self.peaks: dict[int, float] = {}
        self.finished_s: list[float] = []

    def run(self) -> None:
        """Until the process ends."""
        while True:
            self.look()
            time.sleep(0.5)

    def look(self) -> None:
        """Once."""
        for pid in _children():
            self.peaks[pid] = max(_peak_mb(pid), self.peaks.get(pid, 0.0))
        count = self._records.read_bytes().count(b"\n") if self._records.exists() else 0
        new = count - len(self.finished_s)
        self.finished_s += [round(time.monotonic() - self._begin, 2)] * new

    def workers(self) -> list[float]:
        """Peaks of the processes above 200 MB (helpers of multiprocessing are far below), largest first."""
        return sorted((round(peak) for peak in self.peaks.values() if peak > 200), reverse=True)


def _children() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(word) for word in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def _peak_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def run_row(name: str, args: ThroughputConfig, path: Path) -> None:
    """Evaluate in this process and write the row's figures."""
    workers, render_mode, reset_mode = ROWS[name]
    backend = HashingBackend()
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder) / "episodes.jsonl")
        watch.start()
        cfg = EvalConfig(
            pretrained_checkpoint=args.checkpoint,
            task_suite_name="libero_object",
            task_ids=args.task_ids,
            num_trials_per_task=args.trials,
            unnorm_key="libero_object_scripted_no_noops",
            num_workers=workers,
            render_mode=render_mode,
            reset_mode=reset_mode,
            save_videos=SaveVideos.NONE,
            local_log_dir=folder,
            results_dir=folder,
        )
        started = time.monotonic()
        results = evaluate(cfg, backend)
        wall_s = time.monotonic() - started
        watch.look()
        lines = (Path(folder) / "episodes.jsonl").read_text(encoding="utf-8").splitlines()
    episodes = sorted((json.loads(line) for line in lines), key=lambda record: (record["task_id"], record["init_idx"]))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    row = {
        "row": name,
        "wall_s": wall_s,
        "cpu_s": sum(part.ru_utime + part.ru_stime for part in usage),
        "policy_wait_share": results["policy_wait_share"],
        "process_mb": _peak_mb(os.getpid()),
        "worker_mb": watch.workers(),
        "outcomes": [[r["task_id"], r["init_idx"], r["status"], r["steps"], r["n_queries"]] for r in episodes],
        "queries": sorted(backend.policy.hashes),
        "finished_s": watch.finished_s,
        "episodes": [{k: r[k] for k in ("task_id", "init_idx", "wall_s", "setup_s")} for r in episodes],
        "load_average": os.getloadavg()[0],
        "versions": results["versions"],
        "gl_renderers": results["gl_renderers"],
    }
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def rates(row: dict) -> tuple[float, float]:
    """(episodes per hour of the whole run with everything it loads, of the time after the first episodes).

    The first episodes, one per worker, build the environments. The end, when workers run out of episodes, counts.
    """
    first = max(1, ROWS[row["row"]][0])
    left_s = row["finished_s"][-1] - row["finished_s"][first - 1]
    steady = 3600 * (len(row["finished_s"]) - first) / left_s if left_s > 0 else float("nan")
    return 3600 * len(row["episodes"]) / row["wall_s"], steady


def agree(rows: list[dict]) -> bool:
    """Whether all rows saw and did the same: equal queries and outcomes, in those a row has fewer of, too."""
    largest = max(rows, key=lambda row: len(row["outcomes"]))
    queries = Counter(largest["queries"])
    for row in rows:
        if any(outcome not in largest["outcomes"] for outcome in row["outcomes"]):
            return False
        if Counter(row["queries"]) - queries or len(row["queries"]) != sum(o[4] for o in row["outcomes"]):
            return False
    return True


def page(rows: list[dict]) -> str:
    """Section of docs/performance.md. rows: all rounds."""
    first = max(rows, key=lambda row: len(row["outcomes"]))
    verdict = (
        "Every image, state and action of every query is bit-identical in all rows."
        if agree(rows)
        else "**The rows differ.**"
    )
    count, succeeded = len(first["outcomes"]), sum(outcome[2] == "success" for outcome in first["outcomes"])
    loads = [row["load_average"] for row in rows]
    lines = [
        "## Evaluation throughput",
        "",
        f"`benchmarks/eval_throughput.py`: tiny-libero-object, libero_object, {count} episodes ({succeeded} succeed), "
        f"{os.cpu_count()} cores shared with other work (load average {min(loads):.0f}-{max(loads):.0f}), "
        f"{', '.join(first['gl_renderers'])}. {verdict}",
        "",
        "`sequential`: cameras rendered in every step, model rebuilt for every episode, one process, as published; it "
        f"runs the first {len(rows_of(rows, 'sequential')[0]['outcomes'])} episodes. `whole run` includes loading "
        "and building; `standing` begins when each worker has ended its first episode, and is what a full evaluation "
        "consists of. CPU time counts everything and does not depend on other work.",
        "",
        "| row | episodes/h, whole run | episodes/h, standing | x sequential | CPU s per episode "
        "| waits for the policy | MB per worker |",
        "|---|---|---|---|---|---|---|",
    ]
    measured = {name: rows_of(rows, name) for name in ROWS}
    base = np.median([rates(row)[1] for row in measured["sequential"]])
    for name, mine in measured.items():
        whole, steady = np.median([rates(row) for row in mine], axis=0)
        cpu = np.median([row["cpu_s"] / len(row["outcomes"]) for row in mine])
        wait = np.median([row["policy_wait_share"] for row in mine])
        memory = [peak for row in mine for peak in row["worker_mb"]]
        peak = f"{max(memory):.0f}" if memory else f"{max(row['process_mb'] for row in mine):.0f} (with policy)"
        lines.append(
            f"| {name} | {whole:.0f} | {steady:.0f} | {steady / base:.1f} | {cpu:.1f} | {100 * wait:.0f} % | {peak} |"
        )
    return "\n".join(lines)


def rows_of(rows: list[dict], name: str) -> list[dict]:
    """The rounds of one row."""
    return [row for row in rows if row["row"] == name]


def main() -> None:
    """Run all rows, interleaved over the rounds, or one of them."""
    with bad_input_in_one_line("eval_throughput.py", (UsageError, SimulatorUnavailableError)):
        args = parse(ThroughputConfig, description=__doc__)
        if args.row is not None:
            run_row(args.row, args, Path(args.out or OUT / f"{args.row}-0.json"))
            return
    OUT.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in over(range(args.rounds), "measuring", "rounds"):
        for name in list(ROWS) if number % 2 == 0 else list(ROWS)[::-1]:
            path = OUT / f"{name}-{number}.json"
            command = [sys.executable, __file__, "--row", name, "--out", str(path), "--checkpoint", args.checkpoint]
            command += ["--task_ids", args.task_ids, "--trials"]
            command.append(str(args.sequential_trials if name == "sequential" else args.trials))
            if code := subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
                sys.exit(code)  # it has said why
            rows.append(json.loads(path.read_text(encoding="utf-8")))
            say(f"{name} {number} {[round(rate) for rate in rates(rows[-1])]}")
    write_section(ROOT / "docs" / "performance.md", "eval_throughput", page(rows))


if __name__ == "__main__":
    main()
