"""What a plan costs before it is run: hours of this machine for a preset whose pace is known, else work and memory.

The memory of the full size comes from results/memory (`benchmarks/memory_table.py`, which traces a step on tensors
without content). Hours cannot be known there, since no GPU has been timed: work is stated, and hours at a throughput.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from craft_experiments.cells import Method, Role
from craft_experiments.jobs.base import Job
from craft_experiments.jobs.collect import Collect
from craft_experiments.jobs.evaluate import Evaluate, question
from craft_experiments.jobs.policies import steps_of
from craft_experiments.jobs.train import Train
from craft_experiments.preset import Pace
from craft_experiments.settings import ROOT, Settings
from prismatic.evidence.checks import read_object

LIMITS = {"libero_spatial": 220, "libero_object": 280, "libero_goal": 300, "libero_10": 520}
"""Control steps after which an episode has failed."""
TRACES = "results/memory/predicted.json"
THROUGHPUT = 50e12
"""FLOP/s that hours of the full size are stated at: a sixth of an A100's bf16 peak, an assumption."""
_GIB = 2**30
_CARDS = (10, 12, 16, 24, 32, 48, 80)
_TRACED_BATCH = 8


def relative_work(method: Method) -> float | None:
    """Products of an optimizer step as a multiple of plain fine-tuning's with full tuning (docs/IDEA.md, section 7).

    None where that section has no formula: a frozen VLM, and rows that are not trained.
    """
    flags = method.train
    if method.role is not Role.TRAINED or flags.get("retention_method") == "frozen":
        return None
    if flags.get("use_craft"):
        return 1 + 4 * 0.25 / 2 / 3 if flags.get("craft_preset") == "keep" else 2.0
    if flags.get("retention_method") == "feature_penalty":
        return 1 + 1 / 3
    if flags.get("replay_labels") == "start":
        return 1 + float(str(flags["replay_fraction"])) / 3
    return 1.0


def estimate(s: Settings, jobs: Mapping[str, Job]) -> list[str]:
    """Lines for people about what the jobs cost."""
    if s.preset.pace is not None:
        return _hours(s, jobs, s.preset.pace)
    return _full_size(s, jobs)


# --- Hours --------------------------------------------------------------------------------------------------------


def _hours(s: Settings, jobs: Mapping[str, Job], pace: Pace) -> list[str]:
    kinds: dict[str, list[float]] = {}
    for job in jobs.values():
        kinds.setdefault(job.kind, []).append(job_seconds(s, job, pace))
    lines = [f"{kind}: {len(found)} jobs, {sum(found) / 3600:.1f} hours of one core" for kind, found in kinds.items()]
    total = sum(map(sum, kinds.values())) / 3600
    return [*lines, f"in all {total:.1f} hours of one core, {total / 2:.1f} hours of two; what is done counts too"]


def job_seconds(s: Settings, job: Job, pace: Pace) -> float:
    """Seconds of one core that a job is expected to take."""
    p = s.preset
    if isinstance(job, Train):
        work = relative_work(job.policy.method) or 0.5
        samples = p.batch_size * steps_of(s, job.policy)
        return pace.program + samples * pace.sample * work
    if isinstance(job, Evaluate):
        asked = question(p, job.policy, job.evaluation)
        base = next(suite for suite in LIMITS if asked.suite.startswith(suite))
        tasks = len(asked.task_ids.split(",")) if asked.task_ids else 10
        return pace.program + tasks * asked.trials * LIMITS[base] * pace.control_step
    if isinstance(job, Collect):
        assert p.collect is not None  # there are no such jobs else
        each = {"episodes_per_task": p.demos_per_task, **p.collect, **job.data.changes}["episodes_per_task"]
        tasks = len(job.data.task_ids.split(",")) if job.data.task_ids else 10
        return pace.program + tasks * int(str(each)) * pace.demonstration
    return pace.program


# --- Full size ----------------------------------------------------------------------------------------------------


def _full_size(s: Settings, jobs: Mapping[str, Job]) -> list[str]:
    """Per row: work, memory and card of its training; then the number of programs and hours at a stated throughput."""
    try:
        traces = read_object(Path(ROOT, TRACES))
    except FileNotFoundError:
        return [f"{TRACES} is not here: work and memory cannot be said (it is in the repository)"]
    rows: dict[str, tuple[Method, int]] = {}
    for job in jobs.values():
        if isinstance(job, Train):
            key = job.policy.method.key
            rows[key] = job.policy.method, rows.get(key, (None, 0))[1] + steps_of(s, job.policy)
    lines, total = (
        [f"work and memory of a training step at batch size {_TRACED_BATCH} (LoRA 32, two images, bf16):"],
        0.0,
    )
    for key, (method, steps) in rows.items():
        trace = traces[_traced(method)]
        flops = float(trace["flops"]) * s.preset.batch_size / _TRACED_BATCH
        need = float(trace["peak"]) * 1.03 + 0.75 * _GIB
        card = next((card for card in _CARDS if need <= card * _GIB), None)
        total += flops * steps
        lines.append(
            f"{key}: {flops / 1e12:.1f} TFLOP a step, {steps} steps, {need / _GIB:.1f} GiB, "
            + (f"a card of {card} GB" if card else f"no card of {_CARDS[-1]} GB")
        )
    episodes = sum(_episodes(s, job) for job in jobs.values() if isinstance(job, Evaluate))
    return [
        *lines,
        f"in all {total / 1e18:.2f} EFLOP of training: {total / THROUGHPUT / 3600:.0f} hours at "
        f"{THROUGHPUT / 1e12:.0f} TFLOP/s, an assumption: no GPU has been timed",
        "rows without a trace of their own take the next larger one",
        f"{episodes} episodes; how long they take is not known: docs/performance.md has what was timed",
    ]


def _episodes(s: Settings, job: Evaluate) -> int:
    asked = question(s.preset, job.policy, job.evaluation)
    return asked.trials * (len(asked.task_ids.split(",")) if asked.task_ids else 10)


def _traced(method: Method) -> str:
    """Row of results/memory whose step is that of a method, or the next larger one."""
    flags: Mapping[str, Any] = method.train
    if flags.get("use_craft"):
        return "CRaFT `keep`, no old data" if flags.get("craft_preset") == "keep" else "CRaFT `original`"
    if flags.get("retention_method") == "feature_penalty":
        return "CRaFT `budget`"
    if flags.get("replay_labels") == "start":
        return "CRaFT `keep`, no old data"
    return "plain"
