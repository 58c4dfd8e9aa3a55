"""The two gradients: the buffer of r, inner products with a, and AdamW's view of both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class RetentionGradient:
    """The sum r of retention gradients over a step, in one flat fp32 buffer beside `p.grad`.

    `autograd.grad` leaves `p.grad` and DDP's hooks alone. The parameters S that a retention loss reaches are found by
    the first gradient; until then `parameters` is empty.

    Args:
        candidates: trainable parameters that may be reached, by name.
    """

    def __init__(self, candidates: dict[str, nn.Parameter]) -> None:
        self._candidates = candidates
        self.names: list[str] = []
        self.parameters: list[nn.Parameter] = []
        self.tensors: list[Tensor] = []
        self.flat: Tensor | None = None
        self._is_old = True

    def begin(self) -> None:
        """Start a new sum with the next gradient; until then the buffer keeps that of the last step."""
        self._is_old = True

    def add(self, loss: Tensor, retain_graph: bool) -> None:
        """Add the gradient of a loss (scalar with graph)."""
        parameters = self.parameters or list(self._candidates.values())
        found: Sequence[Tensor | None]
        found = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
        if self.flat is None:
            self._allocate(found)
            found = [g for g in found if g is not None]
        pairs = zip(self.tensors, found, strict=True)
        gradients = [torch.zeros_like(buffer) if g is None else g for buffer, g in pairs]
        # One call for all tensors: the many small ones of a policy would cost more than their sums.
        (torch._foreach_copy_ if self._is_old else torch._foreach_add_)(self.tensors, gradients)
        self._is_old = False

    def _allocate(self, gradients: Sequence[Tensor | None]) -> None:
        reached = [(n, p) for (n, p), g in zip(self._candidates.items(), gradients, strict=True) if g is not None]
        self.names, self.parameters = [n for n, _ in reached], [p for _, p in reached]
        device = self.parameters[0].device
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float32, device=device)
        offset = 0
        for p in self.parameters:
            self.tensors.append(self.flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()

    def add_to_action_gradients(self, coefficients: Tensor) -> None:
        """In place p.grad <- p.grad + c r for every parameter of S; coefficients (number of tensors,) fp32."""
        for p, r, c in zip(self.parameters, self.tensors, coefficients, strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if p.grad.dtype is torch.float32:
                p.grad.addcmul_(r, c)
            else:
                p.grad.add_((c * r).to(p.grad.dtype))


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
        a, r = (None if g is None else _vector(g) for g in (a, r))
        act = zero if a is None else torch.dot(a, a)
        if a is None or r is None:
            ret = zero if r is None else torch.dot(r, r)
            rows.append((zero, ret, act, zero, ret))
            continue
        dot, ret = torch.dot(a, r), torch.dot(r, r)
        diagonal = None if scaling is None else scaling[i]
        scale = None if diagonal is None else _vector(diagonal)
        scaled = (dot, ret) if scale is None else (torch.dot(a * scale, r), torch.dot(r * scale, r))
        rows.append((*scaled, act, dot, ret))
    return Products(*(torch.stack(column) for column in zip(*rows, strict=True)))


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


def raising_fraction(optimizer: torch.optim.Optimizer, gradient: RetentionGradient) -> float | None:
    """Share of tensors whose last AdamW update raises L_ret to first order, <update, r> > 0; None without updates."""
    updates = adam_updates(optimizer, gradient.parameters)
    pairs = zip(updates, gradient.tensors, strict=True)
    raising = [(update * r).sum() > 0 for update, r in pairs if update is not None]
    return float(torch.stack(raising).float().mean()) if raising else None


def _vector(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).float()
