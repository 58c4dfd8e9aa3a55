"""What an optimizer step asks of a method that keeps what the start model could do."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prismatic.craft.reference import CRaFTWeightManager
from prismatic.models.vla_policy import CraftRequest, PolicyOutput


@dataclass(frozen=True)
class StepFacts:
    """What `Retention.combine_` gets of a step.

    reduce_mean: average of a tensor over processes, None with one. loss_scale: factor of fp16 training that gradients
    taken beside `p.grad` still carry.
    """

    optimizer: torch.optim.Optimizer | None = None
    reduce_mean: Callable[[Tensor], Tensor] | None = None
    loss_scale: float = 1.0


class Retention:
    """A method of keeping. The step calls the hooks in this order; each does nothing unless a method says otherwise."""

    uses_training_pass = False
    """Whether the method reads the policy's output of the training pass (`value_of`, `loss_term`)."""
    request: CraftRequest | None = None
    """Features that the training pass has to return beside the actions."""
    weights: CRaFTWeightManager | None = None
    """The snapshot theta_0 that the run is held to; it is saved with the checkpoint and never taken anew."""

    def at(self, step: int) -> Retention | None:
        """What acts in this optimizer step (0-based); None makes it a plain one."""
        return self

    def before_pass(self, batch: dict[str, Any], fraction: float, loss_scale: float) -> dict[str, Any]:
        """Before the training pass of a micro-batch, while no graph is alive; returns the batch to train on.

        fraction: what this micro-batch is of the step.
        """
        return batch

    def live_graph(self) -> AbstractContextManager[Any]:
        """Held from the training pass to the end of its backward pass."""
        return nullcontext()

    def value_of(self, output: PolicyOutput) -> Any:
        """What the method reads of the training pass, with graph."""
        return None

    def loss_term(self, value: Any, fraction: float, loss_scale: float) -> Tensor | float:
        """What has to be added to the (unscaled) action loss of a micro-batch before its backward pass."""
        return 0.0

    def combine_(self, facts: StepFacts) -> dict[str, float]:
        """Once per step, when `p.grad` holds the action gradient: change it in place; returns metrics by log name."""
        return {}

    def after_update(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Metrics of the update that the optimizer has made; asked for in steps that are logged."""
        return {}

    def banner(self) -> list[str]:
        """Lines that the run prints before it starts."""
        return []

    def verdict(self) -> str | None:
        """The line that the run prints at its end."""
        return None

    def record(self) -> dict[str, Any] | None:
        """What the checkpoint's manifest says about the method, JSON-ready."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """State beside theta_0, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any], anchor: dict[str, Tensor]) -> None:
        """Restore `state_dict` and theta_0."""
        assert self.weights is not None  # only a method with theta_0 has something to restore
        self.weights.load_state_dict(anchor)
