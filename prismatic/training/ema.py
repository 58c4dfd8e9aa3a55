"""Exponential moving average of the trained weights.

With `--ema_decay` the averaged weights are the policy: validation measures them and checkpoint folders hold them, so
that evaluation and later runs need to know nothing. The weights that training goes on with are in `training_state/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """average <- d average + (1 - d) weights, once per optimizer step, in fp32, for every trainable parameter.

    d is min(decay, (1 + t) / (10 + t)) in the t-th update (from 0): a short run is not dominated by its start weights.

    Args:
        module: module whose trainable parameters are averaged; the average starts at their values now.
        decay: between 0 and 1, exclusive.

    Raises ValueError for another decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        check_decay(decay)
        self.decay, self.updates = decay, 0
        self._parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._average = {
            n: p.detach().float().clone(memory_format=torch.contiguous_format) for n, p in self._parameters.items()
        }

    def decay_at(self, update: int) -> float:
        """d of the update with this number (0-based)."""
        return min(self.decay, (1 + update) / (10 + update))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current weights. To be called once after each optimizer step."""
        weights = [p.detach().float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._average.values()), weights, 1 - self.decay_at(self.updates))
        self.updates += 1

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Context with the averaged weights in place of the trained ones, by exchange of storage; not in a graph."""
        current = {name: p.data for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            p.data = self._average[name].to(p.dtype)
        torch.clear_autocast_cache()  # it holds low-precision copies of the weights that were in place
        try:
            yield
        finally:
            for name, p in self._parameters.items():
                p.data = current[name]
            torch.clear_autocast_cache()

    def state_dict(self) -> dict[str, Tensor]:
        """fp32 averages by parameter name, and `updates` as a scalar int64 tensor (no parameter has that name)."""
        return {**self._average, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Inverse of `state_dict`; ValueError for other names or shapes."""
        expected = self.state_dict()
        if state.keys() != expected.keys():
            raise ValueError(
                f"averaged weights do not fit the model, e.g. {sorted(state.keys() ^ expected.keys())[:5]}"
            )
        for name, tensor in expected.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"averaged weights {name}: found {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
        for name, tensor in self._average.items():
            tensor.copy_(state[name])
        self.updates = int(state["updates"])


def check_decay(decay: float) -> None:
    """ValueError unless 0 < decay < 1."""
    if not 0 < decay < 1:
        raise ValueError(f"--ema_decay is {decay}, expected more than 0 and less than 1 (for instance 0.999)")
