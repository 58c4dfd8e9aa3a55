"""Time of one prediction, plain and compiled."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice

import numpy as np
import torch
from gpu_findings import FORWARD, Check, Checks, PartConfig
from inference import prediction, random_policy


def latency(cfg: PartConfig) -> Checks:
    """Milliseconds from pixels to a chunk of actions, batch 1, as `predict_action` makes it."""
    model = random_policy(cfg.size).to(cfg.device).eval()
    low = cfg.device.type == "cuda"
    with torch.autocast(cfg.device.type, torch.bfloat16) if low else nullcontext():
        plain, median = _timed(lambda: prediction(model))
        yield Check("plain", median)
        model.vla.compile(backend="inductor" if low else "aot_eager")
        compiled, median = _timed(lambda: prediction(model))
    yield Check("compiled", median)
    gap, scale = np.abs(plain - compiled).max(), np.abs(plain).max()
    allowed = 0.05 if low else FORWARD
    found = f"largest difference of an action {gap:.1e}, largest action {scale:.2f}"
    yield Check("compiled against plain", found, f"at most {allowed:g} of the largest", bool(gap <= allowed * scale))


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, str]:
    result, seconds = call(), []
    for _ in islice(iter(int, 1), 20):
        started = time.perf_counter()
        call()
        seconds.append(1000 * (time.perf_counter() - started))
    return result, f"median {np.median(seconds):.1f} ms, slowest of 20 {max(seconds):.1f} ms"
