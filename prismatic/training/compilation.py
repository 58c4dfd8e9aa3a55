"""`--compile True`: torch.compile of the policy's forward pass."""

from __future__ import annotations

import torch

from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.config import FinetuneConfig


def compile_policy(model: VLAPolicyModel, cfg: FinetuneConfig) -> None:
    """Let `model(batch)` run compiled, in place: names of weights and modules stay as they are.

    Only calls of the module itself are compiled. The passes of a signal's own call other methods and stay eager, so
    that exchanged weights, switched-off adapters and `functional_call` never meet a compiled graph.
    Prompts differ in length between batches: the first change of a size compiles once more, with that size dynamic.

    Raises ValueError for an unknown backend.
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if cfg.compile_backend not in backends:
        raise ValueError(f"--compile_backend is {cfg.compile_backend!r}, expected one of {', '.join(backends)}")
    if cfg.retention.measures_drift:
        # The retention gradient keeps the graph for the action loss, so the backward pass must not reuse its buffers.
        from torch._functorch import config as functorch  # loads the compiler, which other runs do without

        functorch.donated_buffer = False
    model.compile(backend=cfg.compile_backend)
