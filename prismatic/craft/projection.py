"""Conflict of the two gradients per group, and the projection that removes it (A-GEM, arXiv 1812.00420)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prismatic.craft.fields import CRaFTFields, Granularity, Guard
from prismatic.craft.gradients import Products, inner_products

_BLOCK = re.compile(r".*?\.?(?:layers|blocks)\.\d+(?=\.)")
_WRAPPERS = ("module", "vla", "base_model", "model")


@dataclass(frozen=True)
class Groups:
    """Which parameter tensors share a coefficient: index per tensor (number of tensors,) int64, number of groups."""

    index: Tensor
    count: int

    @classmethod
    def of_labels(cls, labels: Sequence[str], device: torch.device | None = None) -> Groups:
        """Equal labels, equal group."""
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return cls(torch.tensor([order[label] for label in labels], dtype=torch.int64, device=device), len(order))

    def sum(self, values: Tensor) -> Tensor:
        """Sum per group: (number of tensors,) -> (count,)."""
        return values.new_zeros(self.count).index_add_(0, self.index, values)

    def informative(self, products: Products) -> Tensor:
        """Whether the retention gradient of a group is more than rounding, (count,) bool."""
        return self.sum(products.ret) > threshold(self.sum(products.act))

    def projection(self, products: Products, config: CRaFTFields) -> Tensor:
        """[d < 0] (-d) / n per group, >= 0 fp32, with the configured guard."""
        dot, ret = self.sum(products.dot), self.sum(products.ret)
        if config.projection_guard is Guard.ADDITIVE:
            usable, denominator = dot < 0, ret + config.projection_eps
        else:
            usable, denominator = (dot < 0) & self.informative(products), ret
        # Where there is no conflict the quotient may be 0/0 and is not used.
        return torch.where(usable, -dot / denominator, torch.zeros_like(dot))


class CRaFTGradientProjector:
    """Groups of the parameter tensors, and the projection as the original procedure documents it.

    A training step takes the groups alone, and its coefficients from `rules.py`.

    Args:
        config: settings.
        names: parameter names, in the order of the gradients; needed for granularities other than tensor and global.
    """

    def __init__(self, config: CRaFTFields, names: Sequence[str] | None = None) -> None:
        self.config = config
        self.names = names
        self.conflict_ratio: Tensor | float = 0.0

    def project_gradients(self, g_act: Sequence[Tensor | None], g_ret: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Projected action gradients (lambda = 0), same order, shapes and dtypes as `g_act`, which is not changed."""
        coefficients = self.coefficients(g_act, g_ret)
        projected: list[Tensor | None] = []
        for a, r, c in zip(g_act, g_ret, coefficients, strict=True):
            if a is None or r is None:
                projected.append(a)
            else:
                projected.append(torch.where(c > 0, a.float() + c * r.float(), a.float()).to(a.dtype))
        return projected

    def coefficients(self, g_act: Sequence[Tensor | None], g_ret: Sequence[Tensor | None]) -> Tensor:
        """Projection coefficient >= 0 of each r: (number of tensors,) fp32. Sets the conflict ratio.

        A tensor with a missing gradient on either side takes no part: its coefficient is not used.
        """
        products = inner_products(g_act, [None if a is None else r for a, r in zip(g_act, g_ret, strict=True)])
        self.conflict_ratio = (products.dot < 0).float().mean()
        groups = self.groups(len(g_act), products.dot.device)
        return groups.projection(products, self.config)[groups.index]

    def groups(self, count: int, device: torch.device | None = None) -> Groups:
        """Groups of the parameter tensors; ValueError when the granularity needs names and there are none."""
        granularity = self.config.projection_granularity
        if granularity is Granularity.TENSOR:
            return Groups(torch.arange(count, device=device), count)
        if granularity is Granularity.GLOBAL:
            return Groups(torch.zeros(count, dtype=torch.int64, device=device), min(count, 1))
        if self.names is None or len(self.names) != count:
            raise ValueError(f"projection_granularity {granularity.value} needs the names of the {count} parameters")
        return Groups.of_labels([group_label(name, granularity) for name in self.names], device)


def group_label(name: str, granularity: Granularity) -> str:
    """Label of a parameter's group.

    module: the layer that owns the parameter, so that weight and bias, or LoRA's A and B, share a coefficient;
    layer: the transformer block it is in, or the owning layer outside of blocks.
    """
    if granularity is Granularity.GLOBAL:
        return ""
    if granularity is Granularity.TENSOR:
        return name
    block = _BLOCK.match(name)
    if granularity is Granularity.LAYER and block:
        return block[0]
    owner = re.split(r"\.(?:lora_|base_layer)", name)[0]
    return owner if owner != name else name.rpartition(".")[0]


def part_label(name: str) -> str:
    """The part of the model a parameter belongs to: `vision_backbone`, `projector`, `language_model` ..."""
    pieces = name.split(".")
    while len(pieces) > 1 and pieces[0] in _WRAPPERS:
        pieces = pieces[1:]
    return pieces[0]


def threshold(act: Tensor) -> Tensor:
    """tau: a squared retention norm at or below this carries no information (section 3 of docs/IDEA.md)."""
    return 1e-20 * (1 + act)
