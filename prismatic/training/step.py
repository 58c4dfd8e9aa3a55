"""One optimizer step over its micro-batches: passes, `Retention.combine_`, clipping, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prismatic.models.vla_policy import PolicyOutput
from prismatic.training.retention.protocol import Retention, StepFacts


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm of a step is NaN or infinite; the weights are those before the step."""


@dataclass
class StepContext:
    """What a step needs beside its batches.

    Attributes:
        model: the policy module, possibly wrapped by DDP.
        optimizer: over the trainable parameters of `model`.
        retention: keeps what the start model could do, or None for plain fine-tuning.
        max_grad_norm: clip to this norm after the gradients are combined; None does not clip.
        measure_updates: also report what the update did to the retention loss (costs a pass over the weights).
        scaler: loss scaling of fp16 training, or None.
        no_sync: context that holds back DDP's all-reduce (all micro-batches but the last).
        autocast: context of the mixed-precision forward pass.
        reduce_mean: average of a tensor over processes, None with one process.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    retention: Retention | None = None
    max_grad_norm: float | None = None
    measure_updates: bool = False
    scaler: torch.amp.GradScaler | None = None
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    reduce_mean: Callable[[Tensor], Tensor] | None = None

    @property
    def loss_scale(self) -> float:
        """Factor on the losses before their backward passes."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()


def optimizer_step(context: StepContext, micro_batches: Sequence[dict[str, Any]], step: int) -> dict[str, float]:
    """Train on the micro-batches of one step, each with the same number of samples; returns the step's metrics.

    Without a retention method this is plain fine-tuning. With one, it sees each micro-batch before its pass, may read
    the pass's output and add to its loss, and once at the end changes the action gradient, which is then complete in
    `p.grad`.
    Raises NonFiniteLossError before the weights change.
    """
    fraction, retention = 1.0 / len(micro_batches), context.retention
    means: dict[str, Tensor] = {}
    for k, batch in enumerate(micro_batches):
        is_last = k == len(micro_batches) - 1
        with nullcontext() if is_last else context.no_sync():
            values = _pass(context, batch, fraction)
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value * fraction
    own_loss = means["VLA Train/Loss"]
    if context.reduce_mean is not None:
        means = _mean_over_processes(means, context.reduce_mean)
    # After the reduction: a NaN of one process is one of all, so that all stop and none waits in a collective.
    _require_finite("action loss", means["VLA Train/Loss"], step, micro_batches, own_loss)
    metrics: dict[str, Tensor | float] = {**means}
    loss_scale = context.loss_scale
    if context.scaler is not None:
        context.scaler.unscale_(context.optimizer)
    if retention is not None:
        metrics |= retention.combine_(StepFacts(context.optimizer, context.reduce_mean, loss_scale))
    metrics["VLA Train/Gradient Norm"] = norm = _gradient_norm(context)
    if context.scaler is None:  # with one, an overflow is expected now and then: the scaler skips the step
        _require_finite("gradient norm", norm, step, micro_batches)
        context.optimizer.step()
    else:
        context.scaler.step(context.optimizer)
        context.scaler.update()
    if retention is not None and context.measure_updates:
        metrics |= retention.after_update(context.optimizer)
    context.optimizer.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in metrics.items()}


def _mean_over_processes(metrics: dict[str, Tensor], reduce_mean: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    return dict(zip(metrics, reduce_mean(torch.stack(list(metrics.values()))).unbind(), strict=True))


def _pass(context: StepContext, batch: dict[str, Any], fraction: float) -> dict[str, Tensor]:
    """Forward and backward pass of one micro-batch; returns its metrics."""
    retention, scale = context.retention, context.loss_scale
    if retention is None:
        with context.autocast():
            loss, metrics = run_forward_pass(context.model, batch)
        (loss * (fraction * scale)).backward()
        return metrics
    batch = retention.before_pass(batch, fraction, scale)
    with retention.live_graph():
        with context.autocast():
            loss, metrics, value = run_forward_pass_craft(context.model, batch, retention)
        loss = loss + retention.loss_term(value, fraction, scale)
        (loss * (fraction * scale)).backward()
    return metrics


def run_forward_pass(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Action L1 loss of a batch (scalar, with graph) and its detached parts by log name."""
    return action_loss(model(batch), batch["actions"])


def run_forward_pass_craft(
    model: nn.Module, batch: dict[str, Any], retention: Retention
) -> tuple[Tensor, dict[str, Tensor], Any]:
    """As `run_forward_pass`, and what the method reads of the same graph: the current features, for instance."""
    output = model(batch) if retention.request is None else model(batch, retention.request)
    return *action_loss(output, batch["actions"]), retention.value_of(output)


def action_loss(output: PolicyOutput, actions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean |predicted - true| over (B, K, A) normalised actions, in fp32; the current action is chunk index 0."""
    error = (output.actions.float() - actions.float()).abs()
    loss = error.mean()
    with torch.no_grad():
        metrics = {
            "VLA Train/Loss": loss.detach(),
            "VLA Train/Curr Action L1 Loss": error[:, 0].mean(),
            "VLA Train/Next Actions L1 Loss": error[:, 1:].mean(),
        }
    return loss, metrics


def _gradient_norm(context: StepContext) -> Tensor:
    parameters = [p for group in context.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if context.max_grad_norm is not None:
        return nn.utils.clip_grad_norm_(parameters, context.max_grad_norm)
    return nn.utils.get_total_norm([p.grad for p in parameters])


def _require_finite(
    what: str, value: Tensor, step: int, micro_batches: Sequence[dict[str, Any]], own: Tensor | None = None
) -> None:
    """NonFiniteLossError unless `value`, which is the same in all processes, is finite; `own` is of this process."""
    if torch.isfinite(value):
        return
    suspects = [s for batch in micro_batches for s in _non_finite_samples(batch)]
    where = "all inputs are finite: the model diverged"
    if suspects:
        where = f"non-finite input in samples {suspects}"
    elif own is not None and torch.isfinite(own):
        where = f"this process has {float(own)}: another one is not finite and says why"
    raise NonFiniteLossError(
        f"{what} is {float(value)} at optimizer step {step}; {where}. The weights were not changed"
    )


def _non_finite_samples(batch: dict[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    """(data set, (episode, step)) of the samples with a NaN or infinity among their numbers."""
    bad = torch.zeros(len(batch["sample_ids"]), dtype=torch.bool)
    for name in ("actions", "proprio", "pixel_values"):
        bad |= ~batch[name].isfinite().flatten(1).all(dim=1).cpu()
    return [(batch["dataset_names"][i], batch["sample_ids"][i]) for i in bad.nonzero().flatten().tolist()]
