"""The same numbers on CPU and device, in float32 and in bf16."""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from gpu_findings import FORWARD, LATER, Check, Checks, PartConfig, tried
from gpu_runs import LORA, METHODS, losses, prepared, trained
from inference import random_policy
from torch import Tensor

from prismatic.models.vla_policy import CraftRequest, VLAPolicyModel
from prismatic.training.lora import fixed_batch
from prismatic.training.retention.memory import to_device

BF16 = 0.05
"""Allowed difference of a loss curve in bf16, relative to its mean."""


def agreement(cfg: PartConfig) -> Checks:
    """The same three steps on CPU and device in float32, from the same weights and samples; then features and actions
    of one batch. Differences are relative to the largest value.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    cpu = PartConfig(torch.device("cpu"), cfg.size)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "CRaFT `keep`") if cfg.is_trial else METHODS:
            flags = METHODS[name] | {"mixed_precision": "no"}
            yield tried(name, lambda name=name, flags=flags: _same_curve(cfg, cpu, folder, name, flags))
        trainer = prepared(cpu, folder, "outputs", mixed_precision="no")
    yield from _same_outputs("tiny", trainer.bare_model, cfg.device)
    if cfg.size == "full":
        yield from _same_outputs("full", random_policy("full"), cfg.device)


def _same_curve(cfg: PartConfig, cpu: PartConfig, folder: str, name: str, flags: dict) -> Check:
    curves = [losses(trained(where, folder, f"{name}{i}", **flags)) for i, where in enumerate((cpu, cfg))]
    gaps = [abs(a - b) / abs(a) for a, b in zip(*curves, strict=True)]
    found = f"relative differences of the loss {', '.join(f'{gap:.1e}' for gap in gaps)}"
    good = gaps[0] <= FORWARD and max(gaps) <= LATER
    return Check(name, found, f"first {FORWARD:g}, later {LATER:g}", good)


def _same_outputs(size: str, model: VLAPolicyModel, device: torch.device) -> Checks:
    model.eval()
    there = _outputs(model, torch.device("cpu"))
    here = _outputs(model.to(device), device)
    for name, a, b in zip(("C_R", "C_AQ", "actions"), there, here, strict=True):
        gap = float((a - b).abs().max() / a.abs().max())
        found = f"largest relative difference {gap:.1e}"
        yield Check(f"{name}, {size}", found, f"at most {FORWARD:g}", gap <= FORWARD)


@torch.no_grad()
def _outputs(model: VLAPolicyModel, device: torch.device) -> list[Tensor]:
    output = model(to_device(fixed_batch(model), device), CraftRequest())
    return [t.float().cpu() for t in (output.raw_latent_features, output.action_query_features, output.actions)]


def precision(cfg: PartConfig) -> Checks:
    """Twenty steps of the shipped start on the same samples, in bf16 and in float32; and one forward pass."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("plain", "CRaFT `original`", "CRaFT `keep`")[2 * cfg.is_trial :]:
            flags = METHODS[name] | LORA | {"max_steps": 3 if cfg.is_trial else 20}
            exact, low = (
                losses(trained(cfg, folder, name + kind, **flags, mixed_precision=kind)) for kind in ("no", "bf16")
            )
            gap = float(np.mean(np.abs(np.subtract(exact, low))) / np.mean(exact))
            found = f"mean difference of the loss {gap:.1%} of the mean loss {np.mean(exact):.4f}"
            yield Check(name, found, f"at most {BF16:.0%}", gap <= BF16)
