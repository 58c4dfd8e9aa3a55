"""The constraint over one optimizer step: measure drift, collect r over the micro-batches, combine, move lambda."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn

from prismatic.training.craft_utils.anchors import (
    CRaFTWeightManager,
    build_anchor,
    extract_anchor_features_online,
    unwrap,
)
from prismatic.training.craft_utils.config import ConflictMetric, CRaFTConfig, Rule, When
from prismatic.training.craft_utils.dual import CRaFTDualOptimizer
from prismatic.training.craft_utils.features import (
    BridgeFeatures,
    CRaFTFeatureExtractor,
    drift_of_parts,
    retention_loss,
)
from prismatic.training.craft_utils.projection import (
    CRaFTGradientProjector,
    Groups,
    Price,
    Products,
    adam_scaling,
    adam_updates,
    inner_products,
    kappa,
    part_label,
    threshold,
)


class Plan(str, Enum):
    """How the coming step treats the retention loss. Decided before its first micro-batch.

    When kappa is lambda for every group, which the gate or the rule tells beforehand, the two gradients need not be
    told apart: one backward pass of L_act + lambda L_ret gives their sum, and none of L_ret when lambda is zero.
    """

    SEPARATE = "separate"
    FUSED = "fused"
    MEASURE = "measure"


class NonFiniteRetentionError(RuntimeError):
    """The retention gradient was NaN or infinite in many steps in a row."""


class CRaFTConstraint:
    """One per run. In each optimizer step: `anchor_features`, `accumulate` per micro-batch, then once `combine_`.

    Args:
        module: module whose trainable parameters are constrained.
        config: settings.
        compute_features: (bare module, batch) -> (raw, aq, raw mask or None), see `CRaFTFeatureExtractor.parts`;
            without the action head.
        keep: which trainable parameters can reach the features, by name; None means all. The others are neither
            snapshot nor changed.
    """

    max_non_finite = 10
    """Steps in a row that may go without a constraint before the run stops."""

    def __init__(
        self,
        module: nn.Module,
        config: CRaFTConfig,
        compute_features: Callable,
        keep: Callable[[str], bool] | None = None,
    ) -> None:
        self.config = config
        self.anchor = build_anchor(config.anchor, module, keep)
        self.extractor = CRaFTFeatureExtractor(config)
        self.projector = CRaFTGradientProjector(config)
        self.dual = CRaFTDualOptimizer(config)
        self._module = module
        self._compute_features = compute_features
        named = unwrap(module).named_parameters()
        self._candidates = {n: p for n, p in named if p.requires_grad and (keep is None or keep(n))}
        if not self._candidates:
            raise ValueError("no trainable parameter reaches the anchored features: CRaFT has nothing to constrain")
        # The constrained parameters S and the buffer of their retention gradients, set by the first separate step.
        self._names: list[str] = []
        self._parameters: list[nn.Parameter] = []
        self._g_ret: list[Tensor] = []
        self._flat: Tensor | None = None
        self._groups: Groups | None = None
        self._last_plan: Plan | None = None
        self.statistics = {"constrained_steps": 0, "non_finite_steps": 0, "non_finite_in_a_row": 0}
        self._begin_step()

    @property
    def module(self) -> nn.Module:
        """The bare module."""
        return unwrap(self._module)

    @property
    def weights(self) -> CRaFTWeightManager:
        """The snapshot theta_0."""
        return self.anchor.weights

    # ------------------------------------------------------------------------------------------- one micro-batch

    def anchor_features(self, batch: dict) -> BridgeFeatures:
        """Features under theta_0 for this batch, no grad.

        Must run before the forward pass with gradients, and not inside the same autocast context: autocast keeps its
        low-precision copies of weights until the context ends.
        """
        started = time.perf_counter()
        features = extract_anchor_features_online(
            self._module, lambda bare: self.extractor.parts(*self._compute_features(bare, batch)), self.anchor
        )
        self._anchor_seconds += time.perf_counter() - started
        return features

    def current_features(self, batch: dict) -> BridgeFeatures:
        """Features under the current weights with graph, by a pass of their own, for data without an action loss."""
        return self.extractor.parts(*self._compute_features(unwrap(self._module), batch))

    def forget_anchor_time(self) -> None:
        """Do not count the anchor passes so far as part of the coming step."""
        self._anchor_seconds = 0.0

    @contextmanager
    def live_graph(self) -> Iterator[None]:
        """To be held from the forward pass with gradients to the end of its backward pass: no swap may happen."""
        with self.weights.live_graph():
            yield

    def accumulate(
        self, features: BridgeFeatures, anchor: BridgeFeatures, share: float, loss_scale: float = 1.0
    ) -> Tensor | float:
        """Add `share` of this micro-batch's retention loss and its gradient.

        Returns what has to be added to the (unscaled) action loss before its backward pass: lambda L_ret when one
        pass does for both, else 0. `autograd.grad` leaves `p.grad` and DDP's hooks alone; the graph is kept for the
        action loss. `loss_scale` is the factor of fp16 training.

        Raises ValueError when no trainable parameter reaches the features.
        """
        loss = retention_loss(features, anchor, self.config)
        if not loss.requires_grad:
            raise ValueError("no trainable parameter reaches the anchored features: CRaFT has nothing to constrain")
        self._measure("loss", loss.detach(), share)
        for name, value in drift_of_parts(features, anchor).items():
            self._measure(name, value, share)
        if self.plan is Plan.FUSED:
            return self.dual.get_lambda() * loss
        if self.plan is Plan.SEPARATE:
            self._add_gradients(loss * (share * loss_scale))
        return 0.0

    def _measure(self, name: str, value: Tensor, share: float) -> None:
        self._measured[name] = self._measured.get(name, 0.0) + value.float() * share

    def _add_gradients(self, loss: Tensor) -> None:
        parameters = self._parameters or list(self._candidates.values())
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        if self._flat is None:
            self._allocate(gradients)
            gradients = [g for g in gradients if g is not None]
        elif self._buffer_is_old:
            self._flat.zero_()
        self._buffer_is_old = False
        for buffer, g in zip(self._g_ret, gradients, strict=True):
            if g is not None:
                buffer.add_(g)

    def _allocate(self, gradients: Sequence[Tensor | None]) -> None:
        """S = the parameters that got a gradient; one flat fp32 buffer for their retention gradients."""
        reached = [(n, p) for (n, p), g in zip(self._candidates.items(), gradients, strict=True) if g is not None]
        self._names, self._parameters = [n for n, _ in reached], [p for _, p in reached]
        device = self._parameters[0].device
        self._flat = torch.zeros(sum(p.numel() for p in self._parameters), dtype=torch.float32, device=device)
        offset = 0
        for p in self._parameters:
            self._g_ret.append(self._flat[offset : offset + p.numel()].view_as(p))
            offset += p.numel()
        self.projector.names = self._names
        self._groups = self.projector.groups(len(self._names)).to(device)

    # ------------------------------------------------------------------------------------------- the whole step

    def combine_(
        self,
        reduce_mean: Callable[[Tensor], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss_scale: float = 1.0,
    ) -> dict[str, float]:
        """In place p.grad <- p.grad + kappa r, then move lambda; returns the step's measurements by log name.

        The only place where the two gradients meet. Parameters without a retention gradient (action head, proprio
        projector) keep their gradient bit for bit.

        Args:
            reduce_mean: average of a flat tensor over the processes; None with one process. Projection is not linear:
                it must see the averaged gradient, and lambda the averaged loss, or the replicas drift apart.
            optimizer: needed for the Adam metric.
            loss_scale: factor that the retention gradients still carry; `p.grad` no longer does.

        Raises NonFiniteRetentionError after `max_non_finite` steps in a row with a retention gradient that is not
        finite. Until then such a step is a plain one. (When one backward pass does for both losses the retention
        gradient cannot be told apart; the optimizer step then stops at the norm of the sum.)
        """
        if reduce_mean is not None:
            self._reduce(reduce_mean)
        multiplier, plan = self.dual.get_lambda(), self.plan
        self._last_plan = plan
        can_reduce, metrics = True, {}
        if plan is Plan.SEPARATE:
            can_reduce, metrics = self._combine_gradients(multiplier, optimizer, loss_scale)
        measured = dict(zip(self._measured, torch.stack(list(self._measured.values())).tolist(), strict=True))
        loss = measured.pop("loss")
        metrics = {"CRaFT/Retention Loss": loss, "CRaFT/Lambda": multiplier} | metrics
        metrics |= {f"CRaFT/Drift/{name}": value for name, value in measured.items()}
        metrics |= {"CRaFT/Anchor Seconds": self._anchor_seconds, "CRaFT/Gate Open": float(self._gate_is_open)}
        self.statistics["constrained_steps"] += 1
        self.dual.step(loss, can_reduce)
        self._begin_step()
        return metrics

    def _begin_step(self) -> None:
        # The buffer keeps this step's r for `raising_updates`, until the next step writes to it.
        self._buffer_is_old = True
        self._measured: dict[str, Tensor | float] = {}
        self._anchor_seconds = 0.0
        self._gate_is_open = self.config.projection_when is When.ALWAYS or self.dual.is_active
        self.plan = self._next_plan()

    def _next_plan(self) -> Plan:
        if self.config.rule is Rule.BARRIER or (self.config.rule is not Rule.OFF and self._gate_is_open):
            return Plan.SEPARATE
        return Plan.FUSED if self.dual.get_lambda() > 0 else Plan.MEASURE

    def _combine_gradients(
        self, multiplier: float, optimizer: torch.optim.Optimizer | None, loss_scale: float
    ) -> tuple[bool, dict[str, float]]:
        if loss_scale != 1.0:
            self._flat.mul_(1.0 / loss_scale)
        scaling = None
        if self.config.projection_metric is ConflictMetric.ADAM:
            if optimizer is None:
                raise ValueError("CRaFT projection_metric adam needs the optimizer")
            scaling = adam_scaling(optimizer, self._parameters)
        products = inner_products([p.grad for p in self._parameters], self._g_ret, scaling)
        self.projector.conflict_ratio = (products.dot < 0).float().mean()
        price = Price(multiplier, self._measured["loss"] - self.config.retention_budget, self._gate_is_open)
        coefficients, projection = kappa(products, self._groups, price, self.config)
        summary = _summary(products, projection, self._groups)
        # One transfer from the device: everything the host has to know about the gradients.
        values = dict(zip(summary, torch.stack(list(summary.values())).tolist(), strict=True))
        informative, is_finite = bool(values.pop("informative")), bool(values.pop("finite"))
        self._count_non_finite(is_finite)
        if is_finite:
            self._add_to_gradients(coefficients[self._groups.index])
            values |= self._conflicts_by_part(products)
        else:
            values = {}
            self._last_plan = None
        return informative and is_finite, values

    def _add_to_gradients(self, coefficients: Tensor) -> None:
        for p, r, c in zip(self._parameters, self._g_ret, coefficients, strict=True):
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            if p.grad.dtype is torch.float32:
                p.grad.addcmul_(r, c)
            else:
                p.grad.add_((c * r).to(p.grad.dtype))

    def _conflicts_by_part(self, products: Products) -> dict[str, float]:
        parts = [part_label(name) for name in self._names]
        conflicts = (products.dot < 0).tolist()
        counts: dict[str, list[bool]] = {}
        for part, conflict in zip(parts, conflicts, strict=True):
            counts.setdefault(part, []).append(conflict)
        return {f"CRaFT/Conflict Ratio/{part}": sum(c) / len(c) for part, c in counts.items()}

    def _count_non_finite(self, is_finite: bool) -> None:
        if is_finite:
            self.statistics["non_finite_in_a_row"] = 0
            return
        self.statistics["non_finite_steps"] += 1
        self.statistics["non_finite_in_a_row"] += 1
        if self.statistics["non_finite_in_a_row"] >= self.max_non_finite:
            raise NonFiniteRetentionError(
                f"the retention gradient was not finite in {self.max_non_finite} constrained steps in a row, after "
                f"{self.statistics['constrained_steps']} steps: the features overflow, or the anchor is damaged"
            )

    def _reduce(self, reduce_mean: Callable[[Tensor], Tensor]) -> None:
        """Average gradients and measurements over the processes, in one collective."""
        measured = torch.stack([torch.as_tensor(v) for v in self._measured.values()])
        if self.plan is Plan.SEPARATE:
            flat = reduce_mean(torch.cat([self._flat, measured]))
            self._flat.copy_(flat[: self._flat.numel()])
            measured = flat[self._flat.numel() :]
        else:
            measured = reduce_mean(measured)
        self._measured = dict(zip(self._measured, measured.unbind(), strict=True))

    def raising_updates(self, optimizer: torch.optim.Optimizer) -> float | None:
        """Share of parameter tensors whose last AdamW update raises L_ret to first order, <update, r> > 0.

        To be called after the optimizer step and before the next constrained step. None when r was not computed.
        """
        if self._last_plan is not Plan.SEPARATE:
            return None
        raising = [
            (update * r).sum() > 0
            for update, r in zip(adam_updates(optimizer, self._parameters), self._g_ret, strict=True)
            if update is not None
        ]
        return float(torch.stack(raising).float().mean()) if raising else None

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict:
        """Multiplier, statistics and settings; theta_0 is saved apart as tensors (`weights.state_dict()`)."""
        return {"dual": self.dual.state_dict(), "statistics": dict(self.statistics), "config": self.config.to_dict()}

    def load_state_dict(self, state: dict, anchor: dict[str, Tensor]) -> None:
        """Restore multiplier, statistics and theta_0: a new snapshot at resume would reset the drift to zero."""
        self.dual.load_state_dict(state["dual"])
        self.statistics.update(state["statistics"])
        self.weights.load_state_dict(anchor)
        self._begin_step()


def _summary(products: Products, projection: Tensor, groups: Groups) -> dict[str, Tensor]:
    """Scalars about a step's gradients, by log name.

    Shed energy: share of ||a||^2 that the projection removes, from ||a + c r||^2 = ||a||^2 + 2 c d + c^2 n.
    """
    act, ret, dot = products.act.sum(), products.ret_euclid.sum(), products.dot_euclid.sum()
    shed = -2 * projection * groups.sum(products.dot_euclid) - projection.square() * groups.sum(products.ret_euclid)
    tiny = torch.finfo(torch.float32).tiny
    return {
        "CRaFT/Conflict Ratio": (products.dot < 0).float().mean(),
        "CRaFT/Shed Energy": shed.sum() / act.clamp(min=tiny),
        "CRaFT/Gradient Cosine": dot / (act.sqrt() * ret.sqrt()).clamp(min=tiny),
        "CRaFT/Retention Gradient Norm": ret.sqrt(),
        "informative": (ret > threshold(act)).float(),
        "finite": torch.isfinite(ret + products.ret.sum()).float(),
    }
