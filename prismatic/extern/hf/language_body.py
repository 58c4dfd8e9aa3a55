"""The LLM body: which kinds there are, and how one is run: without a mask where that is the same, as deep as needed."""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING

import torch
from torch import nn

from prismatic.models.activations import gated, product_dtype, rms_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BODIES = ("llama", "qwen2")
"""Values of `text_config.model_type` that the model is built for; prompt and special tokens follow from them."""


def require_body(model_type: str, where: str = "config") -> None:
    """ValueError naming `where` it was found, unless the LLM body is one of `BODIES`."""
    if model_type not in BODIES:
        raise ValueError(f"{where}: text_config.model_type is {model_type!r}, expected {' or '.join(BODIES)}")


class _LeanNorm(nn.Module):
    """The library's root-mean-square norm; under autocast it keeps its input as it is and nothing else."""

    weight: torch.Tensor
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if product_dtype(hidden_states) is None or torch.compiler.is_compiling():
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class _LeanMLP(nn.Module):
    """The library's gated MLP; under autocast it keeps its two products and nothing else."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


def keep_less(body: nn.Module) -> None:
    """Let the norms and gated MLPs of an LLM body keep less under autocast, in place. Values stay what they are."""
    for module in body.modules():
        kind: type = type(module)
        if hasattr(module, "variance_epsilon"):
            module.__class__ = _derived(_LeanNorm, kind)
        elif hasattr(module, "gate_proj") and isinstance(module.act_fn, nn.SiLU):
            module.__class__ = _derived(_LeanMLP, kind)


@functools.cache
def _derived(change: type, base: type) -> type:
    return type(base.__name__, (change, base), {})


def hide_right_padding(mask: torch.Tensor | None) -> torch.Tensor | None:
    """All ones when every row of the mask (B, S) is ones then zeros, else the mask itself.

    Under causal attention real tokens never see what is on their right, so the result at real positions is the same;
    with all ones the library picks the causal kernels instead of materialising (B, 1, S, S) masks.
    """
    if mask is None:
        return None
    mask = mask.bool()
    return mask if bool((mask[:, 1:] & ~mask[:, :-1]).any()) else torch.ones_like(mask)


def plain_causal_mask(body: PreTrainedModel, mask: torch.Tensor | None) -> dict[str, None] | torch.Tensor | None:
    """What makes the body causal without a look at the mask, whose padding must be on the right.

    The library would read an all-ones mask back to see that it is one. A prepared entry per layer type skips that; its
    fused kernels take None as causal, the unfused one does not. Only the Qwen2 body takes such entries. Llama's would
    build a whole mask for None, so it gets the ones and reads them back: one wait for the device per pass.
    """
    fused = body.config._attn_implementation in ("sdpa", "flash_attention_2")
    if fused and not getattr(body, "has_sliding_layers", True):
        return {"full_attention": None}
    return None if mask is None else torch.ones_like(mask, dtype=torch.bool)


def first_layers(body: nn.Module, count: int) -> nn.Module:
    """The LLM body cut after `count` layers, sharing every module with it; its last output is hidden state `count`.

    With all layers it is the body itself, whose last output is normed.
    """
    layers = body.layers
    assert isinstance(layers, nn.ModuleList)  # in every body of the library
    if count >= len(layers):
        return body
    view = copy.copy(body)
    view._modules = {**body._modules, "layers": layers[:count], "norm": nn.Identity()}
    return view
