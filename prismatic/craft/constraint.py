"""The constraint over one optimizer step: measure drift, collect r over the micro-batches, combine, move lambda."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prismatic.craft.duals import CRaFTDualOptimizer
from prismatic.craft.finite import count_finite_, new_statistics
from prismatic.craft.gradients import RetentionGradient, adam_scaling, inner_products, raising_fraction
from prismatic.craft.measurements import Measurements
from prismatic.craft.plan import Plan, next_plan
from prismatic.craft.projection import CRaFTGradientProjector, Groups
from prismatic.craft.reference import (
    CRaFTWeightManager,
    build_anchor,
    extract_anchor_features_online,
    noise_free,
    quiet_pass,
    unwrap,
)
from prismatic.craft.rules import RULES, RuleInputs
from prismatic.craft.settings import ConflictMetric, CRaFTConfig
from prismatic.craft.signals import Signal
from prismatic.craft.telemetry import conflicts_by_part, gradient_facts


class CRaFTConstraint:
    """One per run. In each optimizer step: `reference` and `accumulate`, or `hold`, per micro-batch, then `combine_`.

    Args:
        module: module whose trainable parameters are constrained; a DDP wrapper is removed.
        config: settings. The signal decides which of the two units its budget has.
        signal: what is held.
        reaches: which trainable parameters can change the signal, by name; None means all. The others are neither
            snapshot nor changed.
        memories: number of memories that `hold` gets in every micro-batch, each with an equal say in L_ret; 0 when the
            signal comes with the action loss (`accumulate`). With passes of its own a memory's gradient is apart
            anyway.
    """

    max_non_finite = 10
    """Steps in a row that may go without a constraint before the run stops."""

    def __init__(
        self,
        module: nn.Module,
        config: CRaFTConfig,
        signal: Signal,
        reaches: Callable[[str], bool] | None = None,
        memories: int = 0,
    ) -> None:
        config = replace(config, signal=signal.kind)
        self.config, self.signal = config, signal
        self.anchor = build_anchor(config.anchor, module, reaches)
        self.projector = CRaFTGradientProjector(config)
        self.dual = CRaFTDualOptimizer(config)
        self.module = unwrap(module)
        named = self.module.named_parameters()
        candidates = {n: p for n, p in named if p.requires_grad and (reaches is None or reaches(n))}
        if not candidates:
            raise ValueError("no trainable parameter reaches the signal: CRaFT has nothing to constrain")
        self.gradient = RetentionGradient(candidates)
        self._memories = memories
        self._groups: Groups | None = None
        self._last_plan: Plan | None = None
        self.statistics = new_statistics()
        self._begin_step()

    @property
    def weights(self) -> CRaFTWeightManager:
        """The snapshot theta_0."""
        return self.anchor.weights

    # ------------------------------------------------------------------------------------------- one micro-batch

    def reference(self, batch: Any) -> Any:
        """The signal under theta_0 for this batch, no grad.

        Must run before the forward pass with gradients, and not inside the same autocast context: autocast keeps its
        low-precision copies of weights until the context ends.
        """
        started = time.perf_counter()
        value = extract_anchor_features_online(self.module, lambda bare: self.signal.compute(bare, batch), self.anchor)
        self._anchor_seconds += time.perf_counter() - started
        return value

    def current(self, batch: Any) -> Any:
        """The signal under the current weights, by a pass of its own with graph."""
        return self.signal.compute(self.module, batch)

    def measure(self, batch: Any, reference: Any) -> dict[str, Tensor]:
        """`loss` and the parts' drift of a batch, means over samples, without gradients or noise."""
        with quiet_pass(self.module):
            value = self.current(batch)
            return {"loss": self.signal.loss(value, reference), **self.signal.parts(value, reference)}

    def forget_anchor_time(self) -> None:
        """Do not count the reference passes so far as part of the coming step."""
        self._anchor_seconds = 0.0

    @contextmanager
    def live_graph(self) -> Iterator[None]:
        """To be held from the forward pass with gradients to the end of its backward pass: no swap may happen."""
        with self.weights.live_graph():
            yield

    def hold(self, batch: Any, fraction: float = 1.0, loss_scale: float = 1.0, name: str = "") -> None:
        """Add `fraction` of the retention loss of one memory's batch and its gradient, by passes of their own.

        Must run before the forward pass of the action loss: the graph is gone when it begins. `name` tells this
        memory's drift from that of others in the log.
        """
        if not self._memories:
            raise ValueError(
                "CRaFTConstraint has memories 0, expected the number of memories that `hold` gets: 1 for one"
            )
        reference = self.reference(batch)
        if self.plan is Plan.MEASURE:
            with quiet_pass(self.module):
                self._measured.note(self.current(batch), reference, fraction, name)
            return
        with noise_free(self.module), self.live_graph():
            loss = self._measured.note(self.current(batch), reference, fraction, name)
            self.gradient.add(loss * (fraction / self._memories * loss_scale), retain_graph=False)

    def accumulate(self, value: Any, reference: Any, fraction: float, loss_scale: float = 1.0) -> Tensor | float:
        """Add `fraction` of this micro-batch's retention loss and its gradient.

        `value` is the signal in the graph of the action loss. Returns what has to be added to the (unscaled) action
        loss before its backward pass: lambda L_ret when one pass does for both, else 0. `loss_scale` is the factor of
        fp16 training.

        Raises ValueError when no trainable parameter reaches the signal.
        """
        loss = self._measured.note(value, reference, fraction)
        if self.plan is Plan.FUSED:
            return self.dual.get_lambda() * loss
        if self.plan is Plan.SEPARATE:
            self.gradient.add(loss * (fraction * loss_scale), retain_graph=True)
        return 0.0

    # ------------------------------------------------------------------------------------------- the whole step

    def combine_(
        self,
        reduce_mean: Callable[[Tensor], Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        loss_scale: float = 1.0,
    ) -> dict[str, float]:
        """In place p.grad <- p.grad + kappa r, then move lambda; returns the step's measurements by log name.

        Where r is added to a; with `Plan.FUSED` their sum is in `p.grad` already. Parameters without a retention
        gradient keep their gradient bit for bit.

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
            self._measured.reduce_(reduce_mean, self.gradient.flat if self.plan is Plan.SEPARATE else None)
        self._last_plan = self.plan
        metrics: dict[str, float] = {}
        multiplier, can_reduce = self.dual.get_lambda(), True
        if self.plan is Plan.SEPARATE:
            multiplier, can_reduce, metrics = self._combine_gradients(optimizer, loss_scale)
        loss, drift = self._measured.read()
        metrics = {"CRaFT/Retention Loss": self.config.drift_of(loss), "CRaFT/Lambda": multiplier} | metrics | drift
        metrics |= {"CRaFT/Anchor Seconds": self._anchor_seconds, "CRaFT/Gate Open": float(self._gate_is_open)}
        self.statistics["constrained_steps"] += 1
        self.dual.step(loss, can_reduce)
        if self.dual.controller.needs_norms:
            metrics["CRaFT/Out Of Reach"] = float(self.dual.controller.out_of_reach)
        self._begin_step()
        return metrics

    def _begin_step(self) -> None:
        # The buffer keeps this step's r for `raising_updates`, until the next step writes to it.
        self.gradient.begin()
        self._measured = Measurements(self.signal, self._memories or 1)
        self._anchor_seconds = 0.0
        self._gate_is_open = self.dual.gate.is_open
        self.plan = next_plan(self.config.rule, self.dual, self._memories > 0)

    def _combine_gradients(
        self, optimizer: torch.optim.Optimizer | None, loss_scale: float
    ) -> tuple[float, bool, dict[str, float]]:
        """lambda of this step, whether |r| is above rounding, and the telemetry of the gradients."""
        r = self.gradient
        assert r.flat is not None  # a gradient was added in this step
        if self._groups is None:
            self.projector.names = r.names
            self._groups = self.projector.groups(len(r.names), r.flat.device)
        if loss_scale != 1.0:
            r.flat.mul_(1.0 / loss_scale)
        products = inner_products([p.grad for p in r.parameters], r.tensors, self._metric(optimizer))
        rule, multiplier = RULES[self.config.rule], self.dual.get_lambda()
        inputs = RuleInputs(multiplier, self._measured.loss - self.config.loss_budget, self._gate_is_open)
        projection = rule.projection(products, self._groups, inputs, self.config)
        # One transfer from the device: everything the host has to know about the gradients.
        facts = gradient_facts(products, rule.shed(projection), self._groups)
        count_finite_(self.statistics, facts.is_finite, self.max_non_finite)
        if not facts.is_finite:
            self._last_plan = None
            return multiplier, False, {}
        ret_norm = facts.ret_norm if facts.is_informative else 0.0
        multiplier = self.dual.controller.multiplier_for(facts.act_norm, ret_norm)
        r.add_to_action_gradients(rule.kappa(projection, multiplier)[self._groups.index])
        values = facts.metrics | conflicts_by_part(products, r.names)
        if self.dual.controller.needs_norms:
            values["CRaFT/Share"] = multiplier * facts.ret_norm / max(facts.act_norm, sys.float_info.min)
        return multiplier, facts.is_informative, values

    def _metric(self, optimizer: torch.optim.Optimizer | None) -> list[Tensor | None] | None:
        if self.config.projection_metric is not ConflictMetric.ADAM:
            return None
        if optimizer is None:
            raise ValueError("CRaFT projection_metric adam needs the optimizer")
        return adam_scaling(optimizer, self.gradient.parameters)

    def raising_updates(self, optimizer: torch.optim.Optimizer) -> float | None:
        """Share of parameter tensors whose last AdamW update raises L_ret to first order, <update, r> > 0.

        To be called after the optimizer step and before the next constrained step. None when r was not computed.
        """
        return raising_fraction(optimizer, self.gradient) if self._last_plan is Plan.SEPARATE else None

    # ------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Multiplier, statistics and settings; theta_0 is saved apart as tensors (`weights.state_dict()`)."""
        return {"dual": self.dual.state_dict(), "statistics": dict(self.statistics), "config": self.config.to_dict()}

    def load_state_dict(self, state: dict[str, Any], anchor: dict[str, Tensor]) -> None:
        """Restore multiplier, statistics and theta_0: a new snapshot at resume would reset the drift to zero."""
        self.dual.load_state_dict(state["dual"])
        self.statistics.update(state["statistics"])
        self.weights.load_state_dict(anchor)
        self._begin_step()
