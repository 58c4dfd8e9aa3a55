"""One optimizer step over its micro-batches: the only place where gradients are made, combined and applied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prismatic.models.vla_policy import CraftRequest, PolicyOutput
from prismatic.training.craft_utils import (
    AnchorType,
    BridgeFeatures,
    CRaFTConfig,
    CRaFTConstraint,
    FeatureSource,
    unwrap,
)


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm of a step is NaN or infinite; the weights are those before the step."""


@dataclass
class StepContext:
    """What a step needs beside its batches.

    Attributes:
        model: the policy module, possibly wrapped by DDP.
        optimizer: over the trainable parameters of `model`.
        craft: the constraint, or None for plain fine-tuning.
        penalty: adds the gradient of a penalty on the weights to `p.grad`, or None.
        probe: batches to measure the retention loss on instead of the training batch, or None.
        max_grad_norm: clip to this norm after the gradients are combined; None does not clip.
        measure_updates: also report how many AdamW updates raise the retention loss (costs a pass over the weights).
        scaler: loss scaling of fp16 training, or None.
        no_sync: context that holds back DDP's all-reduce (all micro-batches but the last).
        autocast: context of the mixed-precision forward pass.
        reduce_mean: average of a tensor over processes, None with one process.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    craft: CRaFTConstraint | None = None
    penalty: Callable[[], None] | None = None
    probe: Iterator[dict] | None = None
    max_grad_norm: float | None = None
    measure_updates: bool = False
    scaler: torch.amp.GradScaler | None = None
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    autocast: Callable[[], AbstractContextManager] = nullcontext
    reduce_mean: Callable[[Tensor], Tensor] | None = None

    @property
    def loss_scale(self) -> float:
        """Factor on the losses before their backward passes."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()


def optimizer_step(context: StepContext, micro_batches: Sequence[dict], step: int) -> dict[str, float]:
    """Train on the micro-batches of one step, each with the same number of samples; returns the step's metrics.

    Without a constraint this is plain fine-tuning. With one, each micro-batch adds to two gradients that stay apart:
    the action gradient in `p.grad` and the retention gradient in the constraint, combined once at the end.
    Raises NonFiniteLossError before the weights change.
    """
    share, loss_scale = 1.0 / len(micro_batches), context.loss_scale
    metrics: dict[str, Tensor | float] = {}
    for k, batch in enumerate(micro_batches):
        is_last = k == len(micro_batches) - 1
        with nullcontext() if is_last else context.no_sync():
            backward = _plain_pass if context.craft is None else _constrained_pass
            parts = backward(context, batch, share * loss_scale, share)
        for name, value in parts.items():
            metrics[name] = metrics.get(name, 0.0) + value * share
    own_loss = metrics["VLA Train/Loss"]
    if context.reduce_mean is not None:
        metrics = _mean_over_processes(metrics, context.reduce_mean)
    # After the reduction: a NaN of one process is one of all, so that all stop and none waits in a collective.
    _require_finite("action loss", metrics["VLA Train/Loss"], step, micro_batches, own_loss)
    if context.scaler is not None:
        context.scaler.unscale_(context.optimizer)
    if context.craft is not None:
        metrics |= context.craft.combine_(context.reduce_mean, context.optimizer, loss_scale)
    if context.penalty is not None:
        context.penalty()
    metrics["VLA Train/Gradient Norm"] = norm = _gradient_norm(context)
    if context.scaler is None:  # with one, an overflow is expected now and then: the scaler skips the step
        _require_finite("gradient norm", norm, step, micro_batches)
        context.optimizer.step()
    else:
        context.scaler.step(context.optimizer)
        context.scaler.update()
    if context.craft is not None and context.measure_updates:
        raising = context.craft.raising_updates(context.optimizer)
        metrics |= {} if raising is None else {"CRaFT/Raising Updates": raising}
    context.optimizer.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in metrics.items()}


def _mean_over_processes(
    metrics: dict[str, Tensor], reduce_mean: Callable[[Tensor], Tensor]
) -> dict[str, Tensor | float]:
    return dict(zip(metrics, reduce_mean(torch.stack(list(metrics.values()))).unbind(), strict=True))


def _plain_pass(context: StepContext, batch: dict, factor: float, _share: float) -> dict[str, Tensor]:
    with context.autocast():
        loss, metrics = run_forward_pass(context.model, batch)
    (loss * factor).backward()
    return metrics


def _constrained_pass(context: StepContext, batch: dict, factor: float, share: float) -> dict[str, Tensor]:
    craft = context.craft
    with context.autocast():
        batch = unwrap(context.model).share_vision(batch)
        probe = None if context.probe is None else unwrap(context.model).share_vision(next(context.probe))
        # The anchor pass may exchange weights, so it must be over before the graph of the main pass exists.
        anchor = craft.anchor_features(batch if probe is None else probe)
    with craft.live_graph():
        with context.autocast():
            if probe is None:
                loss, metrics, features = run_forward_pass_craft(context.model, batch, craft)
            else:
                loss, metrics = run_forward_pass(context.model, batch)
                features = craft.current_features(probe)
        loss = loss + craft.accumulate(features, anchor, share, context.loss_scale)
        (loss * factor).backward()
    return metrics


def run_forward_pass(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Action L1 loss of a batch (scalar, with graph) and its detached parts by log name."""
    return action_loss(model(batch), batch["actions"])


def run_forward_pass_craft(
    model: nn.Module, batch: dict, craft: CRaFTConstraint
) -> tuple[Tensor, dict[str, Tensor], BridgeFeatures]:
    """As `run_forward_pass`, and the current features in the same graph."""
    output = model(batch, craft_request(craft.config))
    loss, metrics = action_loss(output, batch["actions"])
    parts = output.raw_latent_features, output.action_query_features, output.raw_latent_mask
    return loss, metrics, craft.extractor.parts(*parts)


def craft_request(config: CRaFTConfig) -> CraftRequest:
    """Which features the model has to return for this constraint."""
    return CraftRequest(
        layer_idx=config.anchor_layer_idx,
        cr_token_mode=config.cr_token_mode,
        bridge=config.feature_source is FeatureSource.BRIDGE,
        raw_only=config.anchor_type is AnchorType.RAW_ONLY,
    )


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
    what: str, value: Tensor, step: int, micro_batches: Sequence[dict], own: Tensor | None = None
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


def _non_finite_samples(batch: dict) -> list[tuple]:
    """(data set, (episode, step)) of the samples with a NaN or infinity among their numbers."""
    bad = torch.zeros(len(batch["sample_ids"]), dtype=torch.bool)
    for name in ("actions", "proprio", "pixel_values"):
        bad |= ~batch[name].isfinite().flatten(1).all(dim=1).cpu()
    return [(batch["dataset_names"][i], batch["sample_ids"][i]) for i in bad.nonzero().flatten().tolist()]
