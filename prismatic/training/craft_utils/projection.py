"""One coefficient per group of parameters: how much retention gradient the step takes.

With a = the action gradient, r = the retention gradient of a group, d = <a, r>, n = ||r||^2, all fp32:

    g = a + kappa r
    off      kappa = lambda
    add      kappa = lambda + [d < 0] (-d) / (n + delta)                     the original procedure
    max      kappa = max(lambda, [d < 0] (-d) / n)                           one force, not two
    barrier  kappa = clip((phi (L_ret - eps) - d) / n, 0, lambda_max)   argmin ||g - a||^2, <g, r> >= phi (L_ret - eps)

The bracket is also zero while the gate is closed. The projection is A-GEM's (arXiv 1812.00420), the barrier is the
dynamic barrier of Gong et al. (NeurIPS 2021) with L_ret - eps as the barrier function.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prismatic.training.craft_utils.config import CRaFTConfig, Granularity, Guard, Rule

_BLOCK = re.compile(r".*?\.?(?:layers|blocks)\.\d+(?=\.)")
_WRAPPERS = ("module", "vla", "base_model", "model")


@dataclass(frozen=True)
class Groups:
    """Which parameter tensors share a coefficient: index per tensor (number of tensors,) int64, number of groups."""

    index: Tensor
    count: int

    @classmethod
    def of_labels(cls, labels: Sequence[str]) -> Groups:
        """Equal labels, equal group."""
        order = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return cls(torch.tensor([order[label] for label in labels], dtype=torch.int64), len(order))

    def to(self, device: torch.device) -> Groups:
        """On another device."""
        return Groups(self.index.to(device), self.count)

    def sum(self, values: Tensor) -> Tensor:
        """Sum per group: (number of tensors,) -> (count,)."""
        return values.new_zeros(self.count).index_add_(0, self.index, values)


@dataclass(frozen=True)
class Products:
    """Inner products per parameter tensor, each (number of tensors,) fp32: <a, r>, ||r||^2, ||a||^2.

    `dot` and `ret` are in the configured conflict metric, the others (`*_euclid`, `act`) always Euclidean.
    """

    dot: Tensor
    ret: Tensor
    act: Tensor
    dot_euclid: Tensor
    ret_euclid: Tensor


class CRaFTGradientProjector:
    """Conflict-aware combination of the action and the retention gradient.

    Args:
        config: settings.
        names: parameter names, in the order of the gradients; needed for granularities other than tensor and global.
    """

    def __init__(self, config: CRaFTConfig, names: Sequence[str] | None = None) -> None:
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
        groups = self.groups(len(g_act)).to(products.dot.device)
        return projection_coefficients(products, groups, self.config)[groups.index]

    def groups(self, count: int) -> Groups:
        """Groups of the parameter tensors; ValueError when the granularity needs names and there are none."""
        granularity = self.config.projection_granularity
        if granularity is Granularity.TENSOR:
            return Groups(torch.arange(count), count)
        if granularity is Granularity.GLOBAL:
            return Groups(torch.zeros(count, dtype=torch.int64), min(count, 1))
        if self.names is None or len(self.names) != count:
            raise ValueError(f"projection_granularity {granularity.value} needs the names of the {count} parameters")
        return Groups.of_labels([group_label(name, granularity) for name in self.names])


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


def inner_products(
    g_act: Sequence[Tensor | None],
    g_ret: Sequence[Tensor | None],
    scaling: Sequence[Tensor | None] | None = None,
) -> Products:
    """Inner products of each pair, fp32; zeros where a gradient is missing.

    `scaling`: the diagonal of the conflict metric per tensor, None for Euclidean.
    """
    zero = next((g.new_zeros((), dtype=torch.float32) for g in (*g_ret, *g_act) if g is not None), torch.zeros(()))
    rows = []
    for i, (a, r) in enumerate(zip(g_act, g_ret, strict=True)):
        act = zero if a is None else _dot(a, a)
        if a is None or r is None:
            ret = zero if r is None else _dot(r, r)
            rows.append((zero, ret, act, zero, ret))
            continue
        dot, ret = _dot(a, r), _dot(r, r)
        scale = None if scaling is None else scaling[i]
        scaled = (dot, ret) if scale is None else (_dot(a.float() * scale, r), _dot(r.float() * scale, r))
        rows.append((*scaled, act, dot, ret))
    return Products(*torch.stack([torch.stack(row) for row in rows]).unbind(dim=1))


def projection_coefficients(products: Products, groups: Groups, config: CRaFTConfig) -> Tensor:
    """[d < 0] (-d) / n per group, >= 0 fp32, with the configured guard."""
    dot, ret, act = (groups.sum(x) for x in (products.dot, products.ret, products.act))
    if config.projection_guard is Guard.ADDITIVE:
        usable, denominator = dot < 0, ret + config.projection_eps
    else:
        usable, denominator = (dot < 0) & (ret > threshold(act)), ret
    # Where there is no conflict the quotient may be 0/0 and is not used.
    return torch.where(usable, -dot / denominator, torch.zeros_like(dot))


def threshold(act: Tensor) -> Tensor:
    """tau: a squared retention norm at or below this carries no information (section 3 of docs/IDEA.md)."""
    return 1e-20 * (1 + act)


@dataclass(frozen=True)
class Price:
    """What the coefficients depend on beside the gradients.

    `multiplier` is lambda, `violation` L_ret - eps (scalar tensor, for the barrier), `gate_is_open` whether projection
    is on.
    """

    multiplier: float
    violation: Tensor | float = 0.0
    gate_is_open: bool = True


def kappa(products: Products, groups: Groups, price: Price, config: CRaFTConfig) -> tuple[Tensor, Tensor]:
    """Coefficients of the retention gradient, and the projection that is in them, both per group (G,) fp32."""
    projection = projection_coefficients(products, groups, config)
    if config.rule is Rule.BARRIER:
        dot, ret, act = (groups.sum(x) for x in (products.dot, products.ret, products.act))
        wanted = ((config.barrier_phi * price.violation - dot) / ret).clamp(0.0, config.lambda_max)
        return torch.where(ret > threshold(act), wanted, torch.zeros_like(ret)), torch.zeros_like(ret)
    if config.rule is Rule.OFF or not price.gate_is_open:
        projection = torch.zeros_like(projection)
    if config.rule is Rule.MAX:
        return projection.clamp(min=price.multiplier), projection
    return projection + price.multiplier, projection


def adam_scaling(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Diagonal 1 / (sqrt(v_hat) + eps) of AdamW's update per parameter, from the steps so far; None before the first.

    Momentum is ignored. Raises ValueError for an optimizer without second moments.
    """
    scales: list[Tensor | None] = []
    options = {p: group for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "betas" in options[p] and not state:
            scales.append(None)
            continue
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"CRaFT projection_metric adam needs an Adam optimizer, found "
                f"{type(optimizer).__name__} without exp_avg_sq"
            )
        correction = 1 - options[p]["betas"][1] ** float(state["step"])
        scales.append(1 / ((state["exp_avg_sq"].float() / correction).sqrt() + options[p]["eps"]))
    return scales


def adam_updates(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> Iterator[Tensor | None]:
    """The change (fp32) AdamW made to each parameter in its last step, from its state; None when it has none."""
    options = {p: group for group in optimizer.param_groups for p in group["params"]}
    for p in parameters:
        state = optimizer.state.get(p, {})
        if "exp_avg_sq" not in state:
            yield None
            continue
        group, step = options[p], float(state["step"])
        beta1, beta2 = group["betas"]
        scale = (state["exp_avg_sq"].float() / (1 - beta2**step)).sqrt() + group["eps"]
        change = -group["lr"] * state["exp_avg"].float() / (1 - beta1**step) / scale
        decay = group["lr"] * group["weight_decay"]
        before = (p.detach().float() - change) / (1 - decay)
        yield change - decay * before


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.detach().flatten().float(), b.detach().flatten().float())
