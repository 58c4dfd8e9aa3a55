"""Landing: after the last step, go back towards theta_0 until the drift is within the budget.

Interpolation with the start weights (RETAIN, arXiv 2512.08333), with a factor that the budget chooses. The weights that
training would go on with stay as they are; the landed ones are the policy that the last checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.drift_monitor import mean_measurement

SAMPLES = 128
"""Memory samples on which the drift is measured."""
_HALVINGS = 8


class Landing:
    """theta_0 + s (theta - theta_0) over the constrained weights, s in [0, 1].

    Of LoRA adapters, which add B A to frozen weights, only B is scaled: their sum then is what is interpolated.

    Args:
        craft: the run's method.
        reduce_mean: average of a tensor over processes, None with one.
    """

    def __init__(self, craft: CRaFT, reduce_mean: Callable[[Tensor], Tensor] | None = None) -> None:
        self._craft, self._reduce_mean = craft, reduce_mean
        self.scale: float | None = None
        self.drift: float | None = None

    def record(self) -> dict[str, Any]:
        """What the manifest says, JSON-ready; scale None before the landing."""
        return {"scale": self.scale, "drift": self.drift}

    def land(self, batches: list[dict[str, Any]]) -> float:
        """Choose s by bisection on fixed batches of the memories; returns it. All processes find the same."""
        constraint = self._craft.constraint
        references = [constraint.reference(batch) for batch in batches]
        budget = self._craft.config.retention_budget

        def drift_at(scale: float) -> float:
            with self._scaled(scale):
                loss = mean_measurement(constraint, batches, references)["loss"]
            if self._reduce_mean is not None:
                loss = float(self._reduce_mean(torch.tensor([loss], device=batches[0]["input_ids"].device)))
            return self._craft.config.drift_of(loss)

        low, high = 0.0, 1.0
        self.drift = drift_at(1.0)
        if self.drift <= budget:
            low = 1.0
        else:
            self.drift = 0.0
            for _ in range(_HALVINGS):
                middle = (low + high) / 2
                found = drift_at(middle)
                if found <= budget:
                    low, self.drift = middle, found
                else:
                    high = middle
        self.scale = low
        return low

    @contextmanager
    def policy_weights(self) -> Iterator[None]:
        """Context with the landed weights in place; the trained ones before `land`."""
        if self.scale is None or self.scale == 1.0:
            yield
            return
        with self._scaled(self.scale):
            yield

    @contextmanager
    def _scaled(self, scale: float) -> Iterator[None]:
        weights = self._craft.weights
        weights.require_no_graph()
        initial = weights.state_dict()
        trained: dict[str, Tensor] = {}
        parameters = {n: p for n, p in self._craft.constraint.module.named_parameters() if p.requires_grad}
        try:
            for name, p in parameters.items():
                target = _interpolated(name, p.data, initial.get(name), scale)
                if target is not None:
                    trained[name], p.data = p.data, target
            torch.clear_autocast_cache()
            yield
        finally:
            for name, data in trained.items():
                parameters[name].data = data
            torch.clear_autocast_cache()


def _interpolated(name: str, trained: Tensor, initial: Tensor | None, scale: float) -> Tensor | None:
    """The weight at this scale; None when it stays as trained."""
    if "lora_A" in name:
        return None
    if "lora_B" in name:
        return trained * scale
    if initial is None:
        return None
    return torch.lerp(initial.float(), trained.float(), scale).to(trained.dtype)
