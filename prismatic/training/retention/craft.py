"""CRaFT as a method of the optimizer step: a signal, its memories, and the constraint on both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from prismatic.craft import CRaFTConfig, CRaFTConstraint, CRaFTWeightManager, unwrap
from prismatic.craft.fields import OFF
from prismatic.models.vla_policy import CraftRequest, PolicyOutput, VLAPolicyModel
from prismatic.training.checkpoint_files import tensors_hash
from prismatic.training.retention.memory import BATCH, Memory
from prismatic.training.retention.protocol import Retention, StepFacts
from prismatic.training.retention.signals import SIGNALS, reaches

TOLERANCE = 1.1
"""A drift of at most this multiple of the budget has met it."""


class CRaFT(Retention):
    """Holds a signal of the policy on its memories.

    The signal comes with the training pass when the only memory is the training batch and the pass draws nothing that
    the signal sees. Otherwise each memory has passes of its own, before the training pass.

    Args:
        model: the policy, possibly wrapped by DDP.
        config: settings of the constraint.
        memories: at least one.
        accelerator: for the precision of the passes.
        every: constrain every n-th optimizer step; the others are plain steps.
    """

    weights: CRaFTWeightManager
    _reference: Any  # of the micro-batch in progress

    def __init__(
        self,
        model: nn.Module,
        config: CRaFTConfig,
        memories: Sequence[Memory],
        accelerator: Accelerator,
        every: int = 1,
    ) -> None:
        policy = cast(VLAPolicyModel, unwrap(model))  # DDP's type does not say what it wraps
        self.config, self.memories, self.every = config, list(memories), every
        self._autocast = accelerator.autocast
        self.policy_signal = SIGNALS[config.signal](config, accelerator.autocast)
        alone = [m.name for m in self.memories] == [BATCH] and self.memories[0].size is None
        self.uses_training_pass = alone and self.policy_signal.comes_with_training_pass(policy)
        self.request: CraftRequest | None = self.policy_signal.request if self.uses_training_pass else None
        count = 0 if self.uses_training_pass else len(self.memories)
        self.constraint = CRaFTConstraint(
            model, config, self.policy_signal.signal, reaches(policy, self.policy_signal.parts_of(policy)), count
        )
        self.weights = self.constraint.weights
        self.unit = self.policy_signal.unit
        self._policy, self._reference = policy, None

    def at(self, step: int) -> Retention | None:
        return self if step % self.every == 0 else None

    def before_pass(self, batch: dict[str, Any], fraction: float, loss_scale: float) -> dict[str, Any]:
        batch = self._with_vision(batch)
        if self.uses_training_pass:
            # The reference pass may exchange weights, so it must be over before the graph of the training pass exists.
            self._reference = self.constraint.reference(batch)
            return batch
        for memory in self.memories:
            inputs = self._with_vision(memory.batch(batch))
            self.constraint.hold(inputs, fraction, loss_scale, memory.name)
        return batch

    def _with_vision(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Frozen towers run once for all passes over the same images."""
        if "vision_features" in batch:
            return batch
        with self._autocast():
            return self._policy.share_vision(batch)

    def live_graph(self) -> AbstractContextManager[Any]:
        return self.constraint.live_graph()

    def value_of(self, output: PolicyOutput) -> Any:
        return self.policy_signal.value_of(output) if self.uses_training_pass else None

    def loss_term(self, value: Any, fraction: float, loss_scale: float) -> Tensor | float:
        if not self.uses_training_pass:
            return 0.0
        reference, self._reference = self._reference, None
        return self.constraint.accumulate(value, reference, fraction, loss_scale)

    def combine_(self, facts: StepFacts) -> dict[str, float]:
        return self.constraint.combine_(facts.reduce_mean, facts.optimizer, facts.loss_scale)

    def after_update(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        raising = self.constraint.raising_updates(optimizer)
        return {} if raising is None else {"CRaFT/Raising Updates": raising}

    def banner(self) -> list[str]:
        craft = self.config
        memories = ", ".join(m.name if m.size is None else f"{m.name} ({m.size} samples)" for m in self.memories)
        return [
            f"CRaFT: saved {self.weights.num_parameters:,} initial trainable parameters; "
            f"retention budget eps = {craft.retention_budget}, dual learning rate = {craft.dual_lr}, "
            f"projection {'disabled' if craft.rule == OFF else 'enabled'}",
            f"CRaFT: signal {craft.signal.value}, memory {memories}, budget in {self.unit}, anchor "
            f"{self.constraint.anchor.kind.value}, rule {craft.rule} per {craft.projection_granularity.value}, "
            f"dual {craft.dual_kind}, every {self.every} steps",
        ]

    @property
    def drift(self) -> float | None:
        """Averaged drift in the unit of the budget; None before the first measurement."""
        mean = self.constraint.dual.gate.loss_mean
        return None if mean is None else self.config.drift_of(mean)

    def verdict(self) -> str | None:
        if self.drift is None:
            return None
        budget = f"budget {self.config.retention_budget:g} ({self.unit})"
        return f"CRaFT: {budget} {self.outcome}: averaged drift at the end of the training {self.drift:.3g}"

    @property
    def outcome(self) -> str | None:
        """How the drift stands to the budget: met, exceeded or out of reach; None before the first measurement."""
        if self.drift is None:
            return None
        if self.drift <= TOLERANCE * self.config.retention_budget:
            return "met"  # also by a controller that has been at its limit for it
        return "out of reach" if self.constraint.dual.controller.out_of_reach else "exceeded"

    def out_of_reach_warning(self) -> str:
        """What is said once when the controller has pulled as hard as it may for long."""
        return (
            f"the retention budget {self.config.retention_budget:g} ({self.unit}) is out of reach: the drift stays at "
            f"{self.drift:.3g} although the retention gradient is at its largest share. A lower learning rate, a "
            "constraint in every step (--craft_every 1) or a larger --craft_memory_batch_size may help"
        )

    def memory_batches(self, training: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
        """Batches of all memories beside the next `count` training batches; the memories stay where they are."""
        positions = [memory.state_dict() for memory in self.memories]
        batches = [self._with_vision(m.batch(batch)) for batch in islice(training, count) for m in self.memories]
        for memory, position in zip(self.memories, positions, strict=True):
            memory.load_state_dict(position)
        return batches

    def record(self) -> dict[str, Any]:
        anchor = {"kind": self.constraint.anchor.kind.value, "sha256": tensors_hash(self.weights.state_dict())}
        found = {"achieved_drift": self.drift, "unit": self.unit, "verdict": self.outcome}
        return self.state_dict() | {"anchor": anchor} | found

    def state_dict(self) -> dict[str, Any]:
        return self.constraint.state_dict() | {"memory": {m.name: m.state_dict() for m in self.memories}}

    def load_state_dict(self, state: dict[str, Any], anchor: dict[str, Tensor]) -> None:
        self.constraint.load_state_dict(state, anchor)
        for memory in self.memories:
            saved = state.get("memory", {}).get(memory.name)
            if saved:
                memory.load_state_dict(saved)
