"""Frozen matrices in the precision of the step's products: half the memory, and no copy for the backward pass.

Autocast would round them in every pass anyway, so results are the same. What a checkpoint holds is not rounded: state
dicts give the exact values back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_PRODUCTS = (nn.Linear, nn.Conv2d, nn.Embedding)
_KEEPER = "_exact_weight"


class _Exact:
    """The values of a narrowed weight. Those that lost nothing are not kept twice. Copies of a module share it."""

    def __init__(self, weight: Tensor, narrow: Tensor) -> None:
        self.remember(weight, narrow)

    def remember(self, weight: Tensor, narrow: Tensor) -> None:
        self._dtype = weight.dtype
        lost = not weight.is_meta and not torch.equal(narrow.to(weight.device, weight.dtype), weight)
        self._kept = weight.to("cpu") if lost else None

    def values(self, narrow: Tensor) -> Tensor:
        """On the CPU, in the dtype the weight had."""
        return narrow.detach().cpu().to(self._dtype) if self._kept is None else self._kept

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Exact:
        return self


def narrow_frozen_weights(model: nn.Module, dtype: torch.dtype) -> int:
    """Hold the frozen float32 weights of products and embeddings in `dtype`, in place; returns their number of values.

    Vectors (biases, norms) stay: they take no room. Call it before the model moves to its device.
    """
    done: dict[int, _Exact] = {}
    count = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, _PRODUCTS) or weight is None or weight.requires_grad:
            continue
        if weight.dtype is torch.float32:
            narrow = weight.data.to(dtype)
            done[id(weight)] = _Exact(weight.data, narrow)
            weight.data = narrow
            count += weight.numel()
        if id(weight) in done:  # a tied weight belongs to two modules
            setattr(module, _KEEPER, done[id(weight)])
            module.register_state_dict_post_hook(_give_exact)
            module.register_load_state_dict_pre_hook(_take_exact)
    return count


def _give_exact(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]) -> None:
    state[f"{prefix}weight"] = getattr(module, _KEEPER).values(module.weight)


def _take_exact(module: nn.Module, state: dict[str, Any], prefix: str, *_rest: object) -> None:
    weight = state.get(f"{prefix}weight")
    if weight is not None:
        getattr(module, _KEEPER).remember(weight.detach(), weight.detach().to(module.weight.dtype))


@contextmanager
def exact_frozen_weights(model: nn.Module) -> Iterator[None]:
    """Context in which the model computes with the exact weights, on its device."""
    narrowed = {id(m.weight): m for m in model.modules() if hasattr(m, _KEEPER)}
    narrow = {key: module.weight.data for key, module in narrowed.items()}
    try:
        for module in narrowed.values():
            module.weight.data = getattr(module, _KEEPER).values(module.weight).to(module.weight.device)
        yield
    finally:
        for key, module in narrowed.items():
            module.weight.data = narrow[key]
