"""What is held: how a signal is computed from a module and a batch, and how far two values of it are apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor, nn

from prismatic.craft.distances import drift_of_parts, retention_loss
from prismatic.craft.features import BridgeFeatures, CRaFTFeatureExtractor, require_same_shape
from prismatic.craft.settings import CRaFTConfig, SignalKind

ROOT_MEAN_SQUARE = "_rms"
"""Ending of the names of parts that are mean squares over samples, to be reported as their root."""


RawParts = tuple[Tensor | None, Tensor | None, Tensor | None]
"""C_R, C_AQ and the mask of C_R; None for what is not needed."""


class Signal(Protocol):
    """One thing that the constraint can hold. Losses are means over samples, so that they may be averaged."""

    kind: SignalKind
    """Whose unit the budget has (`CRaFTConfig.retention_budget`)."""

    def compute(self, module: nn.Module, batch: Any) -> Any:
        """The signal of a batch under the module's current weights, by a pass of its own."""

    def loss(self, value: Any, reference: Any) -> Tensor:
        """Retention loss: a scalar with the graph of `value`, exactly 0 where both are equal."""

    def parts(self, value: Any, reference: Any) -> dict[str, Tensor]:
        """Drift of parts of the signal by log name, detached scalars, means over samples."""


class FeatureSignal:
    """The bridge features of a policy.

    Args:
        config: which features, and their distance.
        compute: (bare module, batch) -> (raw, aq, raw mask or None), see `CRaFTFeatureExtractor.parts`.
    """

    kind = SignalKind.FEATURES

    def __init__(self, config: CRaFTConfig, compute: Callable[[Any, Any], RawParts]) -> None:
        self.config, self._compute = config, compute
        self.extractor = CRaFTFeatureExtractor(config)

    def compute(self, module: nn.Module, batch: Any) -> BridgeFeatures:
        """C_R and C_AQ, pooled, fp32."""
        return self.extractor.parts(*self._compute(module, batch))

    def loss(self, value: BridgeFeatures, reference: BridgeFeatures) -> Tensor:
        """The weighted distance of the parts (`retention_loss`)."""
        return retention_loss(value, reference, self.config)

    def parts(self, value: BridgeFeatures, reference: BridgeFeatures) -> dict[str, Tensor]:
        """Both parts in both units (`drift_of_parts`)."""
        return drift_of_parts(value, reference)


class OutputSignal:
    """A tensor that the module puts out, (B, ...) of any float dtype: the actions of a policy, the logits of a
    classifier.

    Args:
        compute: (bare module, batch) -> the tensor; by default the module is called with the batch. Without dropout or
            other noise, or the loss at theta_0 is not 0.
        name: of the signal in the log.
        kind: any but the features has a budget in root mean squares.
    """

    def __init__(
        self,
        compute: Callable[[Any, Any], Tensor] = lambda module, batch: module(batch),
        name: str = "output",
        kind: SignalKind = SignalKind.ACTIONS,
    ) -> None:
        self._compute, self._name, self.kind = compute, name, kind

    def compute(self, module: nn.Module, batch: Any) -> Tensor:
        """The tensor of a batch."""
        return self._compute(module, batch)

    def loss(self, value: Tensor, reference: Tensor) -> Tensor:
        """Mean squared difference, in fp32."""
        require_same_shape(value, reference)
        return (value.float() - reference.detach().float()).square().mean()

    def parts(self, value: Tensor, reference: Tensor) -> dict[str, Tensor]:
        """The mean square, to be reported as root mean square."""
        return {f"{self._name}{ROOT_MEAN_SQUARE}": self.loss(value.detach(), reference)}
