"""CRaFT: fine-tuning under a bound on the drift of the bridge features.

    minimise L_act(theta)   subject to   L_ret(theta) = MSE(f(theta), f(theta_0)) <= eps

One class per idea: the frozen snapshot (`CRaFTWeightManager`), the features (`CRaFTFeatureExtractor`), the combination
of the two gradients (`CRaFTGradientProjector`), the multiplier (`CRaFTDualOptimizer`). `CRaFTConstraint` puts them
together for the optimizer step. The maths and its limits are explained in docs/IDEA.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum

import torch
from torch import Tensor, nn


class AnchorType(str, Enum):
    """Which bridge features are anchored."""

    CONCAT = "concat"
    AQ_ONLY = "aq_only"
    RAW_ONLY = "raw_only"


@dataclass(frozen=True)
class CRaFTConfig:
    """Settings of the constraint. The defaults are those of the original procedure.

    Attributes:
        anchor_layer_idx: index into the hidden states for C_R; None is the middle, negative counts from the end.
        use_mean_pooling: mean over tokens; False takes the maximum.
        anchor_type: which of C_R and C_AQ enter the features.
        cr_token_mode: `vision_only`, or `vision_plus_prompt` to add the prompt tokens to C_R.
        retention_weight: initial multiplier lambda, >= 0.
        retention_budget: eps, >= 0; infinity only monitors the drift.
        dual_lr: eta of the dual ascent, >= 0.
        projection_eps: delta in the denominator of the projection, >= 0.
        enable_projection: remove the part of the action gradient that raises L_ret.
        enable_dual: False keeps lambda at `fixed_lambda`.
        fixed_lambda: the constant used without dual ascent, >= 0.
    """

    anchor_layer_idx: int | None = None
    use_mean_pooling: bool = True
    anchor_type: AnchorType = AnchorType.CONCAT
    cr_token_mode: str = "vision_only"
    retention_weight: float = 1.0
    retention_budget: float = 0.1
    dual_lr: float = 0.01
    projection_eps: float = 1e-8
    enable_projection: bool = True
    enable_dual: bool = True
    fixed_lambda: float = 0.1

    def __post_init__(self) -> None:
        """Reject values outside their range by name."""
        object.__setattr__(self, "anchor_type", AnchorType(self.anchor_type))
        if self.cr_token_mode not in ("vision_only", "vision_plus_prompt"):
            raise ValueError(f"cr_token_mode is {self.cr_token_mode!r}, expected vision_only or vision_plus_prompt")
        for name in ("retention_weight", "retention_budget", "dual_lr", "projection_eps", "fixed_lambda"):
            value = getattr(self, name)
            if math.isnan(value) or value < 0:
                raise ValueError(f"CRaFT {name} is {value}, expected a number >= 0")

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return {**asdict(self), "anchor_type": self.anchor_type.value}


class CRaFTWeightManager:
    """Holds the weights theta_0 of all trainable parameters and lends them to the anchor pass.

    Swapping exchanges storage pointers: no element is copied, the optimizer (which is keyed by parameter object) and
    DDP (whose buckets hold gradients) are untouched. A swap between a forward pass and its backward pass would give
    wrong gradients without any error, so use `initial_weights()`, which always swaps back.

    Args:
        module: the module being trained; a DDP wrapper is removed.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = {n: p for n, p in unwrap(module).named_parameters() if p.requires_grad}
        self._initial = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._current: dict[str, Tensor] | None = None

    @property
    def num_parameters(self) -> int:
        """Number of scalars in the snapshot."""
        return sum(t.numel() for t in self._initial.values())

    @property
    def is_swapped(self) -> bool:
        """True while the initial weights are in place."""
        return self._current is not None

    def save_current_weights(self) -> None:
        """Remember the weights now in place; raises RuntimeError while the initial weights are."""
        if self.is_swapped:
            raise RuntimeError("the initial weights are already in place; nested swaps would lose the current weights")
        self._current = {name: p.data for name, p in self._parameters.items()}

    def swap_to_initial(self) -> None:
        """Put theta_0 in place of the current weights."""
        self.save_current_weights()
        for name, p in self._parameters.items():
            p.data = self._initial[name]

    def swap_to_current(self) -> None:
        """Put the remembered weights back; does nothing when they are in place."""
        if self._current is None:
            return
        for name, p in self._parameters.items():
            p.data = self._current[name]
        self._current = None

    @contextmanager
    def initial_weights(self) -> Iterator[None]:
        """Context with theta_0 in place. The current weights come back however the body ends."""
        self.swap_to_initial()
        try:
            yield
        finally:
            self.swap_to_current()

    def state_dict(self) -> dict[str, Tensor]:
        """theta_0 by parameter name."""
        return dict(self._initial)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace theta_0, for instance by that of the interrupted run; names and shapes must match."""
        missing, unexpected = sorted(self._initial.keys() - state.keys()), sorted(state.keys() - self._initial.keys())
        if missing or unexpected:
            raise ValueError(f"CRaFT anchor does not fit the model: missing {missing[:5]}, unexpected {unexpected[:5]}")
        for name, tensor in self._initial.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"CRaFT anchor {name}: found {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])


class CRaFTFeatureExtractor(nn.Module):
    """Pools the bridge conditions to one feature vector per sample, in fp32."""

    def __init__(self, config: CRaFTConfig) -> None:
        super().__init__()
        self.config = config

    def pool_features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool over tokens: (B, T, D) any float dtype, optional mask (B, T) bool -> (B, D) fp32."""
        tokens = tokens.float()
        if mask is None:
            return tokens.mean(dim=1) if self.config.use_mean_pooling else tokens.amax(dim=1)
        if not mask.any(dim=1).all():
            raise ValueError("a row of the token mask is empty: there is nothing to pool")
        if self.config.use_mean_pooling:
            weights = mask.unsqueeze(-1).float()
            return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        return tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)

    def forward(self, raw: Tensor, aq: Tensor, raw_mask: Tensor | None = None) -> Tensor:
        """f_theta from C_R (B, N, D) and C_AQ (B, Q, D): (B, 2D) for `concat`, (B, D) otherwise; fp32."""
        if self.config.anchor_type is AnchorType.RAW_ONLY:
            return self.pool_features(raw, raw_mask)
        if self.config.anchor_type is AnchorType.AQ_ONLY:
            return self.pool_features(aq)
        return torch.cat([self.pool_features(raw, raw_mask), self.pool_features(aq)], dim=-1)


class CRaFTGradientProjector:
    """Conflict-aware combination of the action gradient a and the retention gradient r, per parameter tensor.

    Projection (A-GEM's formula, arXiv 1812.00420, tensor by tensor):
    a' = a - <a,r> / (||r||^2 + delta) r   if <a,r> < 0, else a. All dot products are fp32.
    """

    def __init__(self, config: CRaFTConfig) -> None:
        self.config = config
        self.conflict_ratio = 0.0

    def coefficients(self, g_act: Sequence[Tensor | None], g_ret: Sequence[Tensor | None]) -> Tensor:
        """Multiplier c >= 0 of each r in a' = a + c r: (number of tensors,) fp32. Sets the conflict statistics.

        A tensor with a missing gradient on either side has c = 0 and counts as not conflicting.
        """
        pairs = [(a, r) for a, r in zip(g_act, g_ret, strict=True)]
        zero = next((r.new_zeros((), dtype=torch.float32) for r in g_ret if r is not None), torch.zeros(()))
        dots = torch.stack([zero if a is None or r is None else _dot(a, r) for a, r in pairs])
        norms = torch.stack([zero if r is None else _dot(r, r) for r in g_ret])
        conflict = dots < 0
        self.conflict_ratio = conflict.float().mean()
        # A conflict implies ||r|| > 0; where there is none the quotient may be 0/0 and is not used.
        return torch.where(conflict, -dots / (norms + self.config.projection_eps), torch.zeros_like(dots))

    def project_gradients(self, g_act: Sequence[Tensor | None], g_ret: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Projected action gradients, same order, shapes and dtypes as `g_act`; the inputs are not changed."""
        coefficients = self.coefficients(g_act, g_ret)
        projected: list[Tensor | None] = []
        for a, r, c in zip(g_act, g_ret, coefficients, strict=True):
            if a is None or r is None:
                projected.append(a)
            else:
                projected.append(torch.where(c > 0, a.float() + c * r.float(), a.float()).to(a.dtype))
        return projected

    def combine_(self, parameters: Sequence[nn.Parameter], g_ret: Sequence[Tensor | None], multiplier: float) -> None:
        """In place p.grad <- projected(p.grad) + lambda * r. The only place where the two gradients meet.

        Parameters without a retention gradient (action head, proprio projector) keep their gradient bit for bit.
        """
        coefficients = self.coefficients([p.grad for p in parameters], g_ret)
        if not self.config.enable_projection:
            coefficients = torch.zeros_like(coefficients)
        if not self.config.enable_projection and multiplier == 0.0:
            return
        for p, r, c in zip(parameters, g_ret, coefficients + multiplier, strict=True):
            if r is None:
                continue
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad.add_((c * r).to(p.grad.dtype))


class CRaFTDualOptimizer:
    """The multiplier: lambda <- max(0, lambda + eta (L_ret - eps)), once per optimizer step, in fp64 on the CPU."""

    def __init__(self, config: CRaFTConfig) -> None:
        self.config = config
        self._lambda = 0.0
        self.reset()

    def reset(self) -> None:
        """Back to the initial value."""
        self._lambda = self.config.retention_weight if self.config.enable_dual else self.config.fixed_lambda

    def get_lambda(self) -> float:
        """Current multiplier, >= 0."""
        return self._lambda

    def step(self, l_ret: float) -> float:
        """Dual ascent on the measured retention loss; returns the new multiplier.

        Constant when the dual is disabled. An infinite budget or a non-finite measurement leaves it unchanged.
        """
        violation = float(l_ret) - self.config.retention_budget
        if self.config.enable_dual and math.isfinite(violation):
            self._lambda = max(0.0, self._lambda + self.config.dual_lr * violation)
        return self._lambda

    def state_dict(self) -> dict[str, float]:
        """The multiplier."""
        return {"lambda": self._lambda}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the multiplier; raises ValueError when it is negative."""
        if state["lambda"] < 0:
            raise ValueError(f"CRaFT lambda is {state['lambda']}, expected >= 0")
        self._lambda = float(state["lambda"])


def compute_retention_loss(f: Tensor, f_anchor: Tensor) -> Tensor:
    """Mean squared difference of two feature batches (B, F), in fp32; a scalar."""
    if f.shape != f_anchor.shape:
        raise ValueError(f"features {tuple(f.shape)} and anchor features {tuple(f_anchor.shape)} differ in shape")
    return (f.float() - f_anchor.detach().float()).square().mean()


def extract_anchor_features_online(
    module: nn.Module, compute_features: Callable[[nn.Module], Tensor], weights: CRaFTWeightManager
) -> Tensor:
    """Features of the same batch under theta_0: no gradient, no dropout, RNG untouched, current weights restored.

    Args:
        module: the trained module; its DDP wrapper is bypassed, so that no collective is started.
        compute_features: called with the bare module, returns (B, F).
        weights: the snapshot.
    """
    module = unwrap(module)
    # Dropout in the anchor would make L_ret(theta_0) > 0. Flags are restored one by one: frozen parts may be in eval.
    training_modules = [m for m in module.modules() if m.training]
    devices = sorted({p.device.index for p in module.parameters() if p.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices), weights.initial_weights():
        module.eval()
        try:
            return compute_features(module)
        finally:
            for m in training_modules:
                m.training = True


class CRaFTConstraint:
    """The constraint over one optimizer step: measures drift, accumulates r over micro-batches, combines, steps lambda.

    Args:
        module: module whose trainable parameters are constrained.
        config: settings.
        compute_features: (bare module, batch) -> (raw (B,N,D), aq (B,Q,D), raw mask or None), without the action head.
    """

    def __init__(self, module: nn.Module, config: CRaFTConfig, compute_features: Callable) -> None:
        self.config = config
        self.weights = CRaFTWeightManager(module)
        self.extractor = CRaFTFeatureExtractor(config)
        self.projector = CRaFTGradientProjector(config)
        self.dual = CRaFTDualOptimizer(config)
        self._module = module
        self._compute_features = compute_features
        self._parameters = [p for p in unwrap(module).parameters() if p.requires_grad]
        self._begin_step()

    def _begin_step(self) -> None:
        self._g_ret: list[Tensor | None] = [None] * len(self._parameters)
        self._l_ret: Tensor | float = 0.0

    def anchor_features(self, batch: dict) -> Tensor:
        """f under theta_0 for this batch: (B, F) fp32, no grad. Must run before the forward pass with gradients."""
        return extract_anchor_features_online(
            self._module, lambda bare: self.extractor(*self._compute_features(bare, batch)), self.weights
        )

    def accumulate(self, features: Tensor, anchor: Tensor, share: float) -> Tensor:
        """Add `share` of this micro-batch's retention loss and its gradient; returns the loss (detached).

        `autograd.grad` leaves `p.grad` and DDP's hooks alone; the graph is kept for the action loss's backward pass.
        """
        loss = compute_retention_loss(features, anchor)
        if not loss.requires_grad:
            raise ValueError("no trainable parameter reaches the anchored features: CRaFT has nothing to constrain")
        gradients = torch.autograd.grad(loss * share, self._parameters, retain_graph=True, allow_unused=True)
        for i, g in enumerate(gradients):
            if g is not None:
                previous = self._g_ret[i]
                self._g_ret[i] = g.float() if previous is None else previous.add_(g.float())
        self._l_ret = self._l_ret + loss.detach() * share
        return loss.detach()

    def combine_(self, reduce_mean: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor | float]:
        """Combine the gradients of the step in place (see `CRaFTGradientProjector.combine_`) and step lambda.

        Args:
            reduce_mean: average of a flat tensor over the processes; None with one process. Projection is not linear:
                it must see the averaged gradient, and lambda the averaged loss, or the replicas drift apart.
        """
        if reduce_mean is not None:
            self._reduce(reduce_mean)
        multiplier = self.dual.get_lambda()
        self.projector.combine_(self._parameters, self._g_ret, multiplier)
        l_ret = float(self._l_ret)
        self._begin_step()
        self.dual.step(l_ret)
        return {
            "CRaFT/Retention Loss": l_ret,
            "CRaFT/Lambda": multiplier,
            "CRaFT/Conflict Ratio": float(self.projector.conflict_ratio),
        }

    def _reduce(self, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        present = [g for g in self._g_ret if g is not None]
        flat = torch.cat([g.flatten() for g in present] + [torch.as_tensor(self._l_ret).reshape(1)])
        flat = reduce_mean(flat)
        offset = 0
        for g in present:
            g.copy_(flat[offset : offset + g.numel()].view_as(g))
            offset += g.numel()
        self._l_ret = flat[-1]

    def state_dict(self) -> dict:
        """Multiplier and settings; theta_0 is saved apart as tensors (`weights.state_dict()`)."""
        return {"dual": self.dual.state_dict(), "config": self.config.to_dict()}

    def load_state_dict(self, state: dict, anchor: dict[str, Tensor]) -> None:
        """Restore the multiplier and theta_0: a new snapshot at resume would reset the drift to zero."""
        self.dual.load_state_dict(state["dual"])
        self.weights.load_state_dict(anchor)


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, or the module itself."""
    return module.module if isinstance(module, nn.parallel.DistributedDataParallel) else module


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(a.detach().flatten().float(), b.detach().flatten().float())
