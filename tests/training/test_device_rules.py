"""Without a card: a step makes nothing on the default device and does not wait for the device in each micro-batch.

The model lives on the `meta` device, which stands for a card: what the step makes without naming a device lands on the
CPU, and what it reads back is seen.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from micro import MICRO
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from prismatic.models.presets import PRESETS
from prismatic.training.config import FinetuneConfig
from prismatic.training.ema import WeightAverage
from prismatic.training.memory.start_shape import empty_model
from prismatic.training.memory.trace import retention_of, step_batch
from prismatic.training.retention.memory import to_device
from prismatic.training.setup import apply_tuning
from prismatic.training.step import StepContext, optimizer_step

aten = torch.ops.aten
READ_BACK = aten._local_scalar_dense.default
# Sizes of their results, or their result itself, are known on the host only.
WAITING = {aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, aten._unique2, aten.unique_dim}
KEEP = {"use_craft": True, "craft_preset": "keep", "craft_every": 1, "craft_retention_budget": 0.03}
LORA = {"use_lora": True, "lora_rank": 2}
RUNS = {
    "plain": {},
    "original": {"use_craft": True},
    "budget": {"use_craft": True, "craft_preset": "budget"},
    "bridge": {"use_craft": True, "craft_preset": "budget", "craft_feature_source": "bridge"},
    "keep": KEEP | {"craft_memory": "instructions,data", "craft_memory_data": "x"},
    "keep batch": KEEP | {"craft_memory": "batch"} | LORA,
    "tokens": {"use_craft": True, "craft_preset": "budget", "craft_retention_metric": "token_rel_mse"},
    "prompt": {"use_craft": True, "craft_preset": "budget", "craft_cr_token_mode": "vision_plus_prompt"},
    "adam metric": {"use_craft": True, "craft_projection_metric": "adam"},
    "penalty": {"retention_method": "feature_penalty"},
    "l2sp": {"retention_method": "l2sp"} | LORA,
    "distilled": {"replay_data": "x", "replay_labels": "start"},
    "checkpointed": {"gradient_checkpointing": True} | LORA,
    "frozen towers": {"freeze_vision": True, "max_grad_norm": 1.0} | KEEP,
    "averaged": {"ema_decay": 0.9},
}


class Card(TorchDispatchMode):
    """Watches what happens on the device `meta`, and what is made beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.beside: list[str] = []
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [t for t in tree_flatten((args, kwargs or {}))[0] if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors if t.ndim}
        if func is READ_BACK and tensors[0].is_meta:
            self.waits["a number is read back"] += 1
            return True if args[0].dtype is torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten._to_copy.default and tensors[0].is_meta and (kwargs or {}).get("device") == torch.device("cpu"):
            self.waits["a copy to the CPU"] += 1
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if func.overloadpacket in WAITING and "meta" in devices:
            self.waits[str(func)] += 1
        if func is aten.index.Tensor and any(t is not None and t.dtype is torch.bool for t in args[1]):
            self.waits["a mask is an index"] += 1
        if len(devices) > 1 and func.overloadpacket not in (aten._to_copy, aten.copy_):
            self.beside.append(f"{func} of tensors on {sorted(devices)}")
        out = func(*args, **(kwargs or {}))
        for made in tree_flatten(out)[0]:
            if isinstance(made, torch.Tensor) and made.ndim and made.device.type == "cpu":
                self.beside.append(f"{func} made {tuple(made.shape)} on the CPU")
        return out


def watched_step(name: str, micro_batches: int = 1) -> Card:
    given = {"config_file_path": "tiny", "dataset_name": "libero_spatial_no_noops", "batch_size": 2}
    cfg = FinetuneConfig(**given | RUNS[name])
    model = empty_model(cfg)
    apply_tuning(model, cfg)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    average = None if cfg.ema_decay is None else WeightAverage(model, cfg.ema_decay)
    batch = to_device(step_batch(cfg, model, 12), torch.device("meta"))
    with Card():  # makes the state of optimizer and method
        context = StepContext(model, optimizer, retention_of(cfg, model, nullcontext), cfg.max_grad_norm)
        optimizer_step(context, [batch], 0)
    with Card() as card:
        optimizer_step(context, [batch] * micro_batches, 1)
        if average is not None:
            average.update()
    return card


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", MICRO)
    # `meta` knows no autocast. What autocast's own formulas make is on the device of their arguments (test_memory.py).
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


@pytest.mark.parametrize("name", RUNS)
def test_a_step_stays_on_its_device_and_waits_for_it_once_however_many_micro_batches(name):
    one, three = watched_step(name), watched_step(name, 3)
    assert one.beside == []
    assert one.waits == three.waits
    assert set(one.waits) <= {"a number is read back", "a copy to the CPU"}
    assert one.waits["a number is read back"] > 0


def test_the_watch_sees_what_it_looks_for():
    on_card = torch.ones(3, device="meta")
    with Card() as card:
        made = torch.arange(3)
        with pytest.raises(RuntimeError):  # not every operation looks
            on_card + made
        bool((on_card > 0).any())
        on_card.cpu()
    assert card.beside[0].startswith("aten.arange")
    assert "tensors on" in card.beside[1]
    assert card.waits == {"a number is read back": 1, "a copy to the CPU": 1}
