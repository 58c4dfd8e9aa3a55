"""One optimizer step over its micro-batches: the only place where gradients are made, combined and applied."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prismatic.models.vla_policy import CraftRequest, PolicyOutput
from prismatic.training.craft_utils import CRaFTConstraint


class NonFiniteLossError(RuntimeError):
    """The loss or the gradient norm of a step is NaN or infinite; the weights are those before the step."""


@dataclass
class StepContext:
    """What a step needs beside its batches.

    Attributes:
        model: the policy module, possibly wrapped by DDP.
        optimizer: over the trainable parameters of `model`.
        craft: the constraint, or None for plain fine-tuning.
        max_grad_norm: clip to this norm after the gradients are combined; None does not clip.
        no_sync: context that holds back DDP's all-reduce (all micro-batches but the last).
        autocast: context of the mixed-precision forward pass.
        reduce_mean: average of a tensor over processes, None with one process.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    craft: CRaFTConstraint | None = None
    max_grad_norm: float | None = None
    no_sync: Callable[[], AbstractContextManager] = nullcontext
    autocast: Callable[[], AbstractContextManager] = nullcontext
    reduce_mean: Callable[[Tensor], Tensor] | None = None


def optimizer_step(context: StepContext, micro_batches: Sequence[dict], step: int) -> dict[str, float]:
    """Train on the micro-batches of one step, each with the same number of samples; returns the step's metrics.

    Without a constraint this is plain fine-tuning. With one, each micro-batch adds to two gradients that stay apart:
    the action gradient in `p.grad` and the retention gradient in the constraint, combined once at the end.
    Raises NonFiniteLossError before the weights change.
    """
    share = 1.0 / len(micro_batches)
    metrics: dict[str, Tensor | float] = {}
    for k, batch in enumerate(micro_batches):
        is_last = k == len(micro_batches) - 1
        with nullcontext() if is_last else context.no_sync():
            loss, parts = _forward(context, batch, share)
            (loss * share).backward()
        for name, value in parts.items():
            metrics[name] = metrics.get(name, 0.0) + value * share
    _require_finite("action loss", metrics["VLA Train/Loss"], step, micro_batches)
    if context.craft is not None:
        metrics |= context.craft.combine_(context.reduce_mean)
    norm = _gradient_norm(context)
    _require_finite("gradient norm", norm, step, micro_batches)
    context.optimizer.step()
    context.optimizer.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in metrics.items()} | {"VLA Train/Gradient Norm": float(norm)}


def _forward(context: StepContext, batch: dict, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    with context.autocast():
        if context.craft is None:
            return run_forward_pass(context.model, batch)
        # The anchor pass swaps weights, so it must be over before the graph of the main pass exists.
        anchor = context.craft.anchor_features(batch)
        loss, metrics, features = run_forward_pass_craft(context.model, batch, context.craft)
    context.craft.accumulate(features, anchor, share)
    return loss, metrics


def run_forward_pass(model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
    """Action L1 loss of a batch (scalar, with graph) and its detached parts by log name."""
    return action_loss(model(batch), batch["actions"])


def run_forward_pass_craft(
    model: nn.Module, batch: dict, craft: CRaFTConstraint
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """As `run_forward_pass`, and the current features f_theta (B, F) fp32 in the same graph."""
    output = model(batch, craft_request(craft))
    loss, metrics = action_loss(output, batch["actions"])
    features = craft.extractor(output.raw_latent_features, output.action_query_features, output.raw_latent_mask)
    return loss, metrics, features


def craft_request(craft: CRaFTConstraint) -> CraftRequest:
    """Which features the model has to return for this constraint."""
    return CraftRequest(layer_idx=craft.config.anchor_layer_idx, cr_token_mode=craft.config.cr_token_mode)


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


def _require_finite(what: str, value: Tensor | float, step: int, micro_batches: Sequence[dict]) -> None:
    if torch.isfinite(torch.as_tensor(value)):
        return
    suspects = [s for batch in micro_batches for s in _non_finite_samples(batch)]
    where = f"non-finite input in samples {suspects}" if suspects else "all inputs are finite: the model diverged"
    raise NonFiniteLossError(
        f"{what} is {float(value)} at optimizer step {step}; {where}. The weights were not changed"
    )


def _non_finite_samples(batch: dict) -> list[tuple]:
    """(data set, (episode, step)) of the samples with a NaN or infinity among their numbers."""
    bad = torch.zeros(len(batch["sample_ids"]), dtype=torch.bool)
    for name in ("actions", "proprio", "pixel_values"):
        bad |= ~batch[name].isfinite().flatten(1).all(dim=1).cpu()
    return [(batch["dataset_names"][i], batch["sample_ids"][i]) for i in bad.nonzero().flatten().tolist()]
