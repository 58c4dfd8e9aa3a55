"""Step time and peak memory against the prediction."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager

import numpy as np
import torch
from gpu_findings import Check, Checks, PartConfig
from gpu_runs import ROOT
from memory_table import BATCH, ROWS, published

from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.config import FinetuneConfig
from prismatic.training.memory.report import GIB, peak_at
from prismatic.training.memory.start_shape import empty_model
from prismatic.training.memory.trace import Trace, materialise, narrow, retention_of, run_step, step_batch, trace_step
from prismatic.training.retention.memory import to_device
from prismatic.training.setup import apply_tuning
from prismatic.training.step import StepContext, optimizer_step

MEASURED = (
    "plain",
    "CRaFT `original`",
    "CRaFT `budget`",
    "plain, gradient checkpointing",
    "CRaFT `keep`, no old data",
)
BETWEEN = 0.05
"""Allowed error of the predicted peak memory."""


def memory(cfg: PartConfig) -> Checks:
    """Time of a step and peak memory with random weights, LoRA 32, two images, bf16, from batch 1 to what fits. The
    prediction is that of `memory_table.py`: tensors alone, so that it is compared with what was allocated.
    """
    for name in MEASURED[-2:] if cfg.is_trial else MEASURED:
        yield from _measured_steps(cfg, name, ROWS[name])


def _measured_steps(cfg: PartConfig, name: str, flags: dict) -> Checks:
    small = cfg.size != "full"
    tight = {"craft_retention_budget": 1e-6} if flags.get("use_craft") else {}  # so that the constraint acts
    run = published(flags | tight | ({"config_file_path": "tiny", "image_aug": False} if small else {}))
    run.device = cfg.device.type
    if cfg.is_trial:
        run.mixed_precision = "bf16"
        yield _counted(name, run)
        return
    trace = _predicted(name, run, small)
    for batch in (1, 2, 4) if small else (1, 2, 4, 8, 16, 32):
        run.batch_size = batch
        try:
            seconds, peak = _steps(cfg.device, run)
        except torch.cuda.OutOfMemoryError:
            yield Check(f"{name}, batch {batch}", "does not fit", f"{peak_at(trace, BATCH, batch) / GIB:.2f} GiB")
            return
        predicted = peak_at(trace, BATCH, batch)
        found = f"{1000 * seconds:.0f} ms a step, peak {peak / GIB:.2f} GiB"
        # Where single layers decide, a small batch is an extrapolation; the published one is judged.
        good = abs(predicted - peak) <= BETWEEN * peak if batch in (BATCH, 2 * BATCH) and not small else None
        yield Check(f"{name}, batch {batch}", found, f"{predicted / GIB:.2f} GiB", good)


def _counted(name: str, run: FinetuneConfig) -> Check:
    """A real step, whose tensors are counted: a CPU has no account of its own."""
    run.batch_size = 2
    predicted = trace_step(run, _empty(run)).peak
    real = run_step(run, _random(run, torch.device("cpu"))).peak
    good = abs(predicted - real) <= 4 * BETWEEN * real  # the first step of a constraint has no gradient yet
    return Check(f"{name}, batch 2", f"peak {real / 2**20:.1f} MiB", f"{predicted / 2**20:.1f} MiB", good)


def _predicted(name: str, run: FinetuneConfig, small: bool) -> Trace:
    file = ROOT / "results" / "memory" / "predicted.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() and not small else {}
    if name in record:
        return Trace(**record[name])
    run.batch_size = BATCH
    return trace_step(run, _empty(run))


def _empty(run: FinetuneConfig) -> VLAPolicyModel:
    model = empty_model(run)
    apply_tuning(model, run)
    return model


def _random(run: FinetuneConfig, device: torch.device) -> VLAPolicyModel:
    """The policy of a run with random weights, made on the device."""
    model = _empty(run)
    narrow(run, model)
    with torch.device(device):
        materialise(model)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.02)
        for buffer in model.buffers():
            buffer.zero_()
    return model


def _steps(device: torch.device, run: FinetuneConfig) -> tuple[float, int]:
    """Median seconds of a step, and the peak of tensors in bytes."""
    model = _random(run, device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def autocast() -> AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16)

    context = StepContext(model, optimizer, retention_of(run, model, autocast), autocast=autocast)
    batch = to_device(step_batch(run, model, prompt_tokens=64), device)
    seconds = []
    for step in range(6):
        if step == 2:  # the optimizer has its state, the method its buffers
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        optimizer_step(context, [batch], step)  # reads its metrics back, so it ends when the device has ended
        seconds.append(time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated()
    del context, optimizer, model, batch
    torch.cuda.empty_cache()
    return float(np.median(seconds[2:])), peak
