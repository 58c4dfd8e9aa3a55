"""One optimizer step on fake tensors: what it would keep, and what it would compute."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.hooks import RemovableHandle

from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.progress import Progress
from prismatic.training.config import FinetuneConfig, RetentionMethod
from prismatic.training.ema import WeightAverage
from prismatic.training.frozen_weights import narrow_frozen_weights
from prismatic.training.lora import fixed_batch
from prismatic.training.memory.ledger import Ledger
from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.l2sp import L2SP
from prismatic.training.retention.memory import BATCH as BATCH_MEMORY
from prismatic.training.retention.memory import Memory, take_rows
from prismatic.training.retention.protocol import Retention
from prismatic.training.retention.replay import DistilledReplay
from prismatic.training.retention.text import WINDOW, TextReplay
from prismatic.training.step import StepContext, optimizer_step

WEIGHTS, OPTIMIZER, GRADIENTS, KEPT, BATCH = "weights", "optimizer", "gradients", "retention and averages", "batch"
TOWERS, PROJECTOR, LLM, HEAD = "vision towers", "projectors", "language model", "action head"
TEMPORARY = "temporary"
PARTS = (HEAD, LLM, PROJECTOR, TOWERS)
"""In the order of the backward pass."""
KINDS = (WEIGHTS, GRADIENTS, OPTIMIZER, KEPT, BATCH, TOWERS, PROJECTOR, LLM, HEAD, TEMPORARY)
"""What memory is for. The four modules: what their forward passes keep for the backward pass."""
PROMPT_TOKENS = 64
"""Of an instruction in its prompt, when no data says better; LIBERO's have 41 to 61 in the published prompt."""


@dataclass(frozen=True)
class Trace:
    """One step.

    Attributes:
        parameters, trained: numbers.
        peak, by_kind: bytes of all tensors at the peak, and by what they are for.
        kept: bytes that each part of the model keeps at the end of the forward pass.
        gradients: bytes of each part's gradients.
        flops: of matrix products, convolutions and attention.
    """

    parameters: int
    trained: int
    peak: int
    by_kind: dict[str, int]
    kept: dict[str, int]
    gradients: dict[str, int]
    flops: int


class _StandIn(Memory):
    """A memory that only has a size: observations of anything are as large as those of the training batch."""

    def __init__(self, name: str, size: int | None) -> None:
        super().__init__(size)
        self.name = name

    def batch(self, training: dict[str, Any]) -> dict[str, Any]:
        rows = len(training["input_ids"])
        return take_rows(training, [i % rows for i in range(self.size or rows)])


def trace_step(cfg: FinetuneConfig, model: VLAPolicyModel, prompt_tokens: int = PROMPT_TOKENS) -> Trace:
    """Trace a step of the run, as in the middle of it: the optimizer has its state.

    Nothing is allocated. Of several micro-batches two are run: the gradients of the first are alive in the second.

    Args:
        cfg: the run's flags.
        model: its policy after `apply_tuning`, on the meta device; it is given fake tensors in place.
        prompt_tokens: of the longest prompt in a batch.
    """
    with Progress(2, "predicting memory", "steps", note="shapes of the model") as progress:
        narrow(cfg, model)
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialise(model)
            progress.advance(note="traces a training step")
            trace = run_step(cfg, model, prompt_tokens)
        progress.advance()
    return trace


def narrow(cfg: FinetuneConfig, model: VLAPolicyModel) -> None:
    """Hold the frozen weights as a run does."""
    if (dtype := _product_dtype(cfg)) is not None:
        narrow_frozen_weights(model, dtype)


def precision_of(cfg: FinetuneConfig) -> str:
    """Mixed precision of the run on a GPU, which need not be here, unless the flags name the CPU."""
    return cfg.precision(on_cuda=cfg.device != "cpu")


def _product_dtype(cfg: FinetuneConfig) -> torch.dtype | None:
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision_of(cfg))


def materialise(module: nn.Module) -> None:
    """Give the meta tensors of a module a device, in place; shared ones stay shared. Without content in a fake mode."""
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        both: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in done:
                    filled = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        filled = nn.Parameter(filled, requires_grad=tensor.requires_grad)
                    done[id(tensor)] = tensor, filled  # the first is kept so that its id is not used again
                tensors[name] = done[id(tensor)][1]


def run_step(cfg: FinetuneConfig, model: VLAPolicyModel, prompt_tokens: int = PROMPT_TOKENS) -> Trace:
    """Account for one step of a prepared model on the CPU, with real or with fake tensors."""
    model.train()
    ledger, dtype = Ledger(), _product_dtype(cfg)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.learning_rate, weight_decay=cfg.weight_decay, fused=True)

    def autocast() -> AbstractContextManager[Any]:
        return nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype)

    with ledger:
        with ledger.of_kind(WEIGHTS):
            for tensor in (*model.parameters(), *model.buffers()):
                ledger.enter(tensor)
        with ledger.of_kind(OPTIMIZER):
            _fill_state(optimizer, trained)
        with ledger.of_kind(BATCH):
            batch = step_batch(cfg, model, prompt_tokens)
        with ledger.of_kind(KEPT):
            retention = retention_of(cfg, model, autocast)
            average = None if cfg.ema_decay is None else WeightAverage(model, cfg.ema_decay)
        handles, kept = _follow(ledger, model, trained), {}
        look = lambda *_: kept.update({part: ledger.by_kind[part] for part in PARTS})  # noqa: E731
        handles.append(model.register_forward_hook(look))
        ledger.restart_peak()
        context = StepContext(model, optimizer, retention, cfg.max_grad_norm, autocast=autocast)
        with ledger.of_kind(TEMPORARY):
            optimizer_step(context, [batch] * min(2, cfg.grad_accumulation_steps), 0)
            if average is not None:
                average.update()
    for handle in handles:
        handle.remove()
    by_kind = {kind: ledger.peak_by_kind[kind] for kind in KINDS}
    if isinstance(retention, CRaFT) and (r := retention.constraint.gradient.flat) is not None:
        # Its first step makes this buffer, which then stays.
        by_kind[TEMPORARY] -= r.nbytes
        by_kind[KEPT] += r.nbytes
    counts = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in trained)
    return Trace(*counts, ledger.peak, by_kind, kept, _gradients(model), ledger.flops)


def _gradients(model: VLAPolicyModel) -> dict[str, int]:
    """Bytes of the gradients by part; the action queries count as the language model's."""
    found = dict.fromkeys(PARTS, 0)
    for name, p in model.named_parameters():
        part = LLM
        for word, of in (("action_head", HEAD), ("projector", PROJECTOR), ("vision_backbone", TOWERS)):
            part = of if word in name else part
        found[part] += p.nbytes if p.requires_grad else 0
    return found


def _fill_state(optimizer: torch.optim.Optimizer, trained: list[nn.Parameter]) -> None:
    """Let the optimizer make its state, by a step without gradients."""
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def step_batch(cfg: FinetuneConfig, model: VLAPolicyModel, prompt_tokens: int) -> dict[str, Any]:
    """A collated batch of the run's size."""
    batch = fixed_batch(model, cfg.batch_size, prompt_tokens)
    geometry = model.action_head.geometry
    actions = torch.zeros(cfg.batch_size, geometry.chunk_len, geometry.action_dim)
    replayed = max(1, round(cfg.batch_size * cfg.replay_fraction)) if cfg.replay_data is not None else 0
    return batch | {
        "actions": actions,
        "trusted_masks": True,
        "is_replay": [row < replayed for row in range(cfg.batch_size)],
        "sample_ids": [(0, row) for row in range(cfg.batch_size)],
        "dataset_names": [""] * cfg.batch_size,
    }


def retention_of(
    cfg: FinetuneConfig, model: VLAPolicyModel, autocast: Callable[[], AbstractContextManager[Any]]
) -> Retention | None:
    """The method of the run with memories that only have a size, as in its most expensive step."""
    if cfg.retention is RetentionMethod.L2SP:
        return L2SP(model, cfg.l2sp_weight)
    if cfg.replay_data is not None and cfg.replay_labels == "start":
        return DistilledReplay(model, autocast)
    if cfg.replay_text is not None:
        return TextReplay(model, torch.zeros(WINDOW + 1, dtype=torch.int64), cfg.replay_text_weight, autocast)
    if not cfg.retention.measures_drift:
        return None
    size = cfg.craft_memory_batch_size
    memories = [Memory(size) if name == BATCH_MEMORY else _StandIn(name, size) for name in cfg.memories]
    assert cfg.craft_every is not None  # resolved with the preset
    return CRaFT(model, cfg.craft_config(), memories, SimpleNamespace(autocast=autocast), cfg.craft_every)


def _follow(ledger: Ledger, model: VLAPolicyModel, trained: list[nn.Parameter]) -> list[RemovableHandle]:
    vla = model.vla.get_base_model() if isinstance(model.vla, PeftModel) else model.vla
    parts = [(vla.vision_backbone, TOWERS), (vla.projector, PROJECTOR), (vla.language_model.model, LLM)]
    parts += [(model.action_head, HEAD)] + [(p, PROJECTOR) for p in [model.proprio_projector] if p is not None]
    handles = [handle for part, kind in parts for handle in ledger.follow(part, kind)]

    def name_it(p: nn.Parameter) -> None:  # it began as a temporary of the backward pass
        assert p.grad is not None  # it was just accumulated
        ledger.reclassify([p.grad], GRADIENTS)

    return handles + [p.register_post_accumulate_grad_hook(name_it) for p in trained]
