"""L2-SP (arXiv 1802.01483): the weights are pulled to the start weights."""

from __future__ import annotations

from typing import cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from prismatic.craft.reference import CRaFTWeightManager, adapter_layers, adapter_parameter_names, unwrap
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.retention.protocol import Retention, StepFacts
from prismatic.training.retention.signals import reaches


class L2SP(Retention):
    """Gradient of weight / 2 * ||theta - theta_0||^2 over everything that reaches the features.

    For LoRA the difference is the product: ||scaling B A||^2, whose gradients are weight * scaling^2 * B (A A^T) and
    weight * scaling^2 * (B^T B) A. Added once per optimizer step and the same on every process.

    Args:
        module: the policy, possibly wrapped by DDP.
        weight: strength, > 0.
    """

    def __init__(self, module: nn.Module, weight: float) -> None:
        # DDP's type does not say what it wraps.
        bare, self.weight = cast(VLAPolicyModel, unwrap(module)), weight
        reaches_features = reaches(bare, [bare.vla])
        adapters = adapter_parameter_names(bare)
        self.weights = CRaFTWeightManager(bare, lambda name: reaches_features(name) and name not in adapters)
        named = dict(bare.named_parameters())
        self._pairs = [(named[name], initial) for name, initial in self.weights.state_dict().items()]
        self._layers = [layer for layer in adapter_layers(bare) if isinstance(layer, LoraLayer)]

    def combine_(self, facts: StepFacts) -> dict[str, float]:
        """In place p.grad += gradient of the penalty; reports nothing."""
        self.add_gradient()
        return {}

    @torch.no_grad()
    def add_gradient(self) -> None:
        """In place p.grad += gradient of the penalty."""
        for parameter, initial in self._pairs:
            _add(parameter, self.weight * (parameter - initial))
        for layer in self._layers:
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    factor = self.weight * layer.scaling[name] ** 2
                    a, b = (factors[name].get_parameter("weight") for factors in (layer.lora_A, layer.lora_B))
                    flat_a, flat_b = a.flatten(1), b.flatten(1)
                    _add(b, factor * (flat_b @ (flat_a @ flat_a.T)).view_as(b))
                    _add(a, factor * ((flat_b.T @ flat_b) @ flat_a).view_as(a))


def _add(parameter: nn.Parameter, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    parameter.grad.add_(gradient)
