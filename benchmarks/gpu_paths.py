"""Every kind of run ends as it should."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from gpu_findings import Check, Checks, PartConfig, tried
from gpu_runs import KEEP, LORA, METHODS, NEW, TRIED, WAYS, losses, trained
from torch import Tensor, nn

from prismatic.training.loop import Trainer


def misplaced(trainer: Trainer, device: torch.device, precision: torch.dtype | None) -> list[str]:
    """What is on another device or in another dtype than it should be: weights, buffers, optimizer, snapshot."""
    model = trainer.bare_model
    wrong = [f"{n} on {t.device}" for n, t in _tensors(trainer) if t.device.type != device.type]
    for name, p in model.named_parameters():
        frozen_product = not p.requires_grad and p.ndim > 1 and isinstance(_owner(model, name), PRODUCTS)
        expected = precision if precision is not None and frozen_product else torch.float32
        if p.dtype is not expected:
            wrong.append(f"{name} in {p.dtype}")
    return wrong


PRODUCTS = (nn.Linear, nn.Conv2d, nn.Embedding)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _tensors(trainer: Trainer) -> Iterator[tuple[str, Tensor]]:
    yield from trainer.bare_model.named_parameters()
    yield from trainer.bare_model.named_buffers()
    for state in trainer.optimizer.state.values():
        yield from ((f"optimizer's {n}", t) for n, t in state.items() if isinstance(t, Tensor) and t.ndim)


def paths(cfg: PartConfig) -> Checks:
    """Three steps of each kind of run of the shipped start, in the precision that is the default there; then resume,
    merge and evaluation. Everything must be finite, on the device and in its dtype.
    """
    if cfg.is_trial:
        runs = {name: (METHODS | WAYS)[name] for name in TRIED} | {"bf16": {"mixed_precision": "bf16"} | LORA}
    else:
        runs = METHODS | WAYS | {"fp16": {"mixed_precision": "fp16"}, "float32": {"mixed_precision": "no"}}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in runs.items():
            yield tried(name, lambda name=name, flags=flags: _path(cfg, folder, name, flags))
        yield tried("resume", lambda: _resumed(cfg, folder))
        yield from _merged_and_evaluated(cfg, folder)


def _path(cfg: PartConfig, folder: str, name: str, flags: dict) -> Check:
    if flags.get("compile") and cfg.device.type == "cpu":
        flags = flags | {"compile_backend": "aot_eager"}  # a CPU may have no compiler
    trainer = trained(cfg, folder, name, **flags)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    wrong, curve = misplaced(trainer, cfg.device, precision), losses(trainer)
    found = f"{len(curve)} losses, last {curve[-1]:.4f}; misplaced: {', '.join(wrong[:3]) or 'nothing'}"
    good = not wrong and len(curve) == 3 and all(map(math.isfinite, curve))
    return Check(name, found, "3 finite losses, nothing misplaced", good)


def _resumed(cfg: PartConfig, folder: str) -> Check:
    flags = LORA | KEEP | {"save_freq": 2, "max_steps": 4}
    straight = losses(trained(cfg, folder, "straight", **flags))
    trained(cfg, folder, "halved", **flags | {"max_steps": 2})
    again = losses(trained(cfg, folder, "halved", **flags | {"resume": True}))
    gap = max(abs(a - b) / a for a, b in zip(straight, again, strict=True))
    return Check("resume", f"largest relative difference of a loss {gap:.1e}", "at most 1e-4", gap <= 1e-4)


def _merged_and_evaluated(cfg: PartConfig, folder: str) -> Checks:
    from experiments.robot.policy import VLAPolicy

    flags = LORA | {"merge_lora_during_training": True, "lora_dropout": 0.0}
    trainer = trained(cfg, folder, "merged", **flags)
    checkpoint = trainer.setup.run_dir.with_name(f"{trainer.cfg.run_id}--{trainer.step}_chkpt")
    manifest = json.loads((checkpoint / "craft_checkpoint.json").read_text(encoding="utf-8"))
    gap, allowed = manifest["merge"]["max_difference"], manifest["merge"]["tolerance"]
    yield Check("merge", f"largest difference of an action {gap:.1e}", f"at most {allowed:g}", gap <= allowed)
    rng = np.random.default_rng(0)
    image, state = rng.integers(0, 255, (96, 96, 3), dtype=np.uint8), rng.normal(size=8)
    here, there = (
        VLAPolicy.from_checkpoint(checkpoint, device, unnorm_key=NEW).predict(image, image, state, "pick up the bowl")
        for device in (cfg.device.type, "cpu")
    )
    gap = float(np.abs(here - there).max())
    yield Check("evaluation", f"largest difference of an action from the CPU's {gap:.1e}", "at most 1e-3", gap <= 1e-3)
