"""A small policy with the structure of the real one, and gradients drawn by hypothesis."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from hypothesis import settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from prismatic.craft import AnchorKind, CRaFTConfig, CRaFTConstraint, FeatureSignal, Plan
from prismatic.craft.distances import retention_loss

quick = settings(max_examples=100, deadline=None)

seeds = st.integers(0, 2**31 - 1)
scales = st.floats(-12, 6).map(lambda exponent: 10.0**exponent)
shapes = st.sampled_from([(1,), (5,), (3, 4), (2, 3, 2)])

ANCHORS = [kind for kind in AnchorKind if kind is not AnchorKind.AUTO]
# For each plan, settings that lead to it in the first step.
PLANS = {
    Plan.SEPARATE: {"projection_when": "always", "retention_weight": 0.3},
    Plan.FUSED: {"projection_rule": "off", "retention_weight": 0.3},
    Plan.MEASURE: {"projection_rule": "off", "retention_weight": 0.0},
}


def dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> float:
    """Inner product of two lists of tensors, in fp64."""
    return sum(float((a.detach().double() * b.detach().double()).sum()) for a, b in zip(x, y, strict=True))


def norm(x: Sequence[Tensor]) -> float:
    return math.sqrt(dot(x, x))


@st.composite
def gradient_lists(draw, kinds: tuple[str, ...] = ("full",), max_count: int = 4):
    """(a, r): lists of 1..max_count tensors of any scale, in agreement, in conflict or unrelated.

    `kinds`: what a pair may be: full, zero_a, zero_r, no_a, no_r (missing), bf16 (a only).
    """
    generator = torch.Generator().manual_seed(draw(seeds))
    a, r = [], []
    for _ in range(draw(st.integers(1, max_count))):
        shape, kind = draw(shapes), draw(st.sampled_from(kinds))
        x, y = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
        x, y = draw(scales) * (x + draw(st.sampled_from([-3.0, -0.3, 0.0, 0.3, 3.0])) * y), draw(scales) * y
        x = {"zero_a": torch.zeros(shape), "no_a": None, "bf16": x.bfloat16()}.get(kind, x)
        y = {"zero_r": torch.zeros(shape), "no_r": None}.get(kind, y)
        a.append(x)
        r.append(y)
    return a, r


class Block(nn.Module):
    """Residual layer in which every token sees the mean of all."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h):
        mixed = torch.tanh(self.q_proj(h + h.mean(dim=1, keepdim=True)))
        return h + self.dropout(self.up_proj(mixed))


class Backbone(nn.Module):
    """Tokens and learned queries through two layers; C_R after the first, C_AQ after the second."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.projector = nn.Linear(4, width)
        self.action_queries = nn.Embedding(3, width)
        self.language_model = nn.Module()
        self.language_model.layers = nn.ModuleList([Block(width, dropout), Block(width, dropout)])

    def forward(self, x, interrupt=None):
        tokens = self.projector(x)
        queries = self.action_queries.weight.expand(len(x), -1, -1)
        raw = self.language_model.layers[0](torch.cat([tokens, queries], dim=1))
        if interrupt is not None:
            raise interrupt
        return raw[:, : x.shape[1]], self.language_model.layers[1](raw)[:, x.shape[1] :]


class Policy(nn.Module):
    def __init__(self, width: int = 6, dropout: float = 0.0) -> None:
        super().__init__()
        self.vla = Backbone(width, dropout)
        self.action_head = nn.Linear(width, 2)

    def anchor_features(self, batch):
        return (*self.vla(batch["x"], interrupt=batch.get("interrupt")), None)

    def forward(self, batch):
        raw, aq = self.vla(batch["x"])
        return self.action_head(aq.mean(dim=1)), (raw, aq, None)


def make_policy(seed: int = 0, lora: bool = False, fresh: bool = True, dropout: float = 0.0) -> Policy:
    """`lora`: adapters on the layers, with trained queries and head; not `fresh`: adapters that change the model."""
    torch.manual_seed(seed)
    policy = Policy(dropout=dropout)
    if lora:
        policy.vla.requires_grad_(False)
        queries = policy.vla.action_queries
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=["q_proj", "up_proj"], init_lora_weights="gaussian" if fresh else False
        )
        policy.vla = get_peft_model(policy.vla, config)
        queries.requires_grad_(True)
    return policy


def perturb(module: nn.Module, size: float = 0.1, seed: int = 1) -> None:
    """Move the trainable weights, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator).to(p))


def make_batch(seed: int = 2, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(size, 5, 4, generator=generator), "y": torch.randn(size, 2, generator=generator)}


def split(batch: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    pieces = {name: value.chunk(count) for name, value in batch.items()}
    return [{name: piece[i] for name, piece in pieces.items()} for i in range(count)]


def on_backbone(name: str) -> bool:
    return name.startswith("vla.")


def make_constraint(module: nn.Module, config: CRaFTConfig | None = None, reaches=on_backbone, **kwargs):
    """A constraint on the features of a `Policy`; `kwargs`: settings, when no config is given."""
    config = config or CRaFTConfig(**kwargs)
    signal = FeatureSignal(config, lambda bare, batch: bare.anchor_features(batch))
    return CRaFTConstraint(module, config, signal, reaches)


def make_trained(lora: bool = False, preset: str = "original", **kwargs) -> tuple[Policy, CRaFTConstraint]:
    """A policy that has drifted from its anchor, and its constraint.

    Part of the drift serves the action loss of `make_batch()`, so that with this batch many gradients are in conflict.
    """
    policy = make_policy(lora=lora)
    constraint = make_constraint(policy, CRaFTConfig.from_preset(preset, **kwargs))
    perturb(policy, 0.02)
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], lr=0.01)
    for _ in range(4):
        action_loss(policy(make_batch())[0], make_batch()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy, constraint


def action_loss(actions: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (actions.float() - batch["y"]).square().mean()


def constrained_backward(
    policy, constraint, micro_batches, loss_scale: float = 1.0, weight: float = 1.0, autocast: Callable = nullcontext
) -> None:
    """The backward passes of one step, as `step.py` does them; `weight` scales the action loss."""
    share = 1 / len(micro_batches)
    for batch in micro_batches:
        # Contexts of their own: autocast keeps its copies of the weights until it ends.
        with autocast():
            anchor = constraint.reference(batch)
        with constraint.live_graph():
            with autocast():
                actions, parts = policy(batch)
            loss = weight * action_loss(actions, batch)
            loss = loss + constraint.accumulate(constraint.signal.extractor.parts(*parts), anchor, share, loss_scale)
            (loss * (share * loss_scale)).backward()


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def reference(policy, constraint, batch, weight: float = 1.0) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """a and r by name, and L_ret, from plain autograd. r of what does not reach the features is left out."""
    # theta_0 through a copy that none of the anchors' code has touched.
    start = copy.deepcopy(policy).eval()
    initial = constraint.weights.state_dict()
    with torch.no_grad():
        for name, p in start.named_parameters():
            if name in initial:
                p.copy_(initial[name])
            elif "lora_B" in name:  # not in the snapshot of disable_adapter, which starts at zero
                p.zero_()
        anchor = constraint.signal.extractor.parts(*start.anchor_features(batch))
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    actions, parts = policy(batch)
    act = torch.autograd.grad(
        weight * action_loss(actions, batch), list(named.values()), retain_graph=True, allow_unused=True
    )
    loss = retention_loss(constraint.signal.extractor.parts(*parts), anchor, constraint.config)
    ret = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    pairs = zip(named, act, ret, strict=True)
    a, r = {}, {}
    for name, x, y in pairs:
        if x is not None:
            a[name] = x
        if y is not None:
            r[name] = y
    return a, r, loss.detach()
