"""What an optimizer step measures of the retention loss: sums over its micro-batches and memories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prismatic.craft.signals import Signal
from prismatic.craft.telemetry import as_reported


class Measurements:
    """Retention loss and drift of the signal's parts in one optimizer step.

    Args:
        signal: what is held.
        memories: number of memories, each with an equal say in the loss.
    """

    def __init__(self, signal: Signal, memories: int = 1) -> None:
        self._signal, self._memories = signal, memories
        self._sums: dict[str, Tensor] = {}

    def note(self, value: Any, reference: Any, fraction: float, memory: str = "") -> Tensor:
        """Add `fraction` of what a batch says; returns its retention loss, with the graph of `value`.

        Parts of one memory are means over its own samples; the loss is one for all memories.

        Raises ValueError when no trainable parameter reaches the signal.
        """
        loss = self._signal.loss(value, reference)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError("no trainable parameter reaches the signal: CRaFT has nothing to constrain")
        self._add("loss", loss.detach(), fraction / self._memories)
        for part, drift in self._signal.parts(value, reference).items():
            self._add(f"{memory}/{part}" if memory else part, drift, fraction)
        return loss

    def _add(self, name: str, value: Tensor, fraction: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value.float() * fraction

    @property
    def loss(self) -> Tensor:
        """The retention loss of the step so far."""
        return self._sums["loss"]

    def reduce_(self, reduce_mean: Callable[[Tensor], Tensor], gradient: Tensor | None) -> None:
        """Average over the processes in place, together with a flat gradient, in one collective."""
        sums = torch.stack([torch.as_tensor(v) for v in self._sums.values()])
        if gradient is None:
            sums = reduce_mean(sums)
        else:
            flat = reduce_mean(torch.cat([gradient, sums]))
            gradient.copy_(flat[: gradient.numel()])
            sums = flat[gradient.numel() :]
        self._sums = dict(zip(self._sums, sums.unbind(), strict=True))

    def read(self) -> tuple[float, dict[str, float]]:
        """The loss and the drifts by log name, in one transfer from the device."""
        values = dict(zip(self._sums, torch.stack(list(self._sums.values())).tolist(), strict=True))
        loss = values.pop("loss")
        return loss, {f"CRaFT/Drift/{name}": as_reported(name, value) for name, value in values.items()}
