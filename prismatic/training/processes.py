"""The processes of a run: how they meet and how they part."""

from __future__ import annotations

import gc
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from prismatic.training.config import FinetuneConfig


def build_accelerator(cfg: FinetuneConfig) -> Accelerator:
    """Device, processes, their timeout and precision."""
    use_cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier run of this process left its device there
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=cfg.ddp_timeout))
    return Accelerator(cpu=not use_cuda, mixed_precision=cfg.precision(use_cuda), kwargs_handlers=[timeout])


def product_dtype_of(accelerator: Accelerator) -> torch.dtype | None:
    """dtype of matrix products under the run's autocast; None without mixed precision."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)


def end_processes(accelerator: Accelerator) -> None:
    """Leave the process group. Nothing else may refer to DDP's wrapper any more.

    A thread of the group that outlives Python aborts the process. The wrapper goes first: as the group's last owner it
    would join these threads while it holds the GIL, for which they may wait.
    """
    accelerator.free_memory()
    gc.collect()
    accelerator.end_training()
