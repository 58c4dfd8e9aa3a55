"""What a policy can be held to: which module computes it, which weights reach it, and whether the training pass has it.

A new signal is a class here with a line in `SIGNALS`, and a name in `SignalKind` (`prismatic/craft/fields.py`) for the
flag.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import nn

from prismatic.craft import AnchorType, BridgeFeatures, CRaFTConfig, FeatureSignal, FeatureSource, OutputSignal, Signal
from prismatic.craft.settings import SignalKind
from prismatic.craft.signals import RawParts
from prismatic.models.vla_policy import CraftRequest, PolicyOutput, VLAPolicyModel


def reaches(module: nn.Module, parts: Iterable[nn.Module]) -> Callable[[str], bool]:
    """Whether the parameter of `module` with this name belongs to one of the parts."""
    owned = {id(p) for part in parts for p in part.parameters()}
    names = {name for name, p in module.named_parameters() if id(p) in owned}
    return names.__contains__


def craft_request(config: CRaFTConfig) -> CraftRequest:
    """Which features the model has to return for these settings."""
    return CraftRequest(
        layer_idx=config.anchor_layer_idx,
        cr_token_mode=config.cr_token_mode,
        bridge=config.feature_source is FeatureSource.BRIDGE,
        raw_only=config.anchor_type is AnchorType.RAW_ONLY,
    )


class PolicySignal(Protocol):
    """What `CRaFT` asks of a signal of the policy."""

    needs_skill: bool
    """Whether a start with a new action head has nothing of it to keep."""

    @property
    def unit(self) -> str:
        """Unit of the budget, for people."""

    @property
    def request(self) -> CraftRequest | None:
        """Features that the training pass has to return for it."""

    @property
    def signal(self) -> Signal:
        """The signal as the constraint knows it."""

    def parts_of(self, policy: VLAPolicyModel) -> list[nn.Module]:
        """Modules whose weights reach the signal."""

    def comes_with_training_pass(self, policy: VLAPolicyModel) -> bool:
        """Whether the training pass may stand in for a pass of the signal's own."""

    def value_of(self, output: PolicyOutput) -> Any:
        """The signal in the training pass."""


class PolicyFeatures:
    """The bridge features: they come with every training pass, and head and proprio projector cannot change them."""

    needs_skill = False

    def __init__(self, config: CRaFTConfig, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.request, self._autocast = craft_request(config), autocast
        self.unit = f"{config.retention_metric.value} of features"
        self.signal = FeatureSignal(config, self._compute)

    def _compute(self, policy: VLAPolicyModel, batch: dict[str, Any]) -> RawParts:
        with self._autocast():
            return policy.anchor_features(batch, self.request)

    @staticmethod
    def parts_of(policy: VLAPolicyModel) -> list[nn.Module]:
        """Modules whose weights reach the signal."""
        return [policy.vla]

    @staticmethod
    def comes_with_training_pass(policy: VLAPolicyModel) -> bool:
        """Whether the training pass may stand in for a pass of the signal's own."""
        return True

    def value_of(self, output: PolicyOutput) -> BridgeFeatures:
        """The signal in the training pass."""
        parts = output.raw_latent_features, output.action_query_features, output.raw_latent_mask
        return self.signal.extractor.parts(*parts)


class PolicyActions:
    """The normalised action chunk (B, K, A) of the whole policy, without start noise of the head or dropout."""

    request: CraftRequest | None = None
    needs_skill = True
    unit = "RMS of normalised actions"

    def __init__(self, config: CRaFTConfig, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self._autocast = autocast
        self.signal: Signal = OutputSignal(self._compute, "actions", config.signal)

    def _compute(self, policy: VLAPolicyModel, batch: dict[str, Any]) -> Any:
        # `forward` and not a call: exchanged weights must not meet a compiled graph (`compilation.py`).
        with self._autocast():
            return policy.forward(batch).actions

    @staticmethod
    def parts_of(policy: VLAPolicyModel) -> list[nn.Module]:
        """Everything that is trained acts on the actions."""
        return [policy]

    @staticmethod
    def comes_with_training_pass(policy: VLAPolicyModel) -> bool:
        """Only of a policy that draws nothing in training."""
        dropout = any(isinstance(m, nn.Dropout) and m.p > 0 for m in policy.modules())
        attention = getattr(policy.vla.config.text_config, "attention_dropout", 0.0)
        return not dropout and not attention and policy.action_head.geometry.start_noise_std == 0

    def value_of(self, output: PolicyOutput) -> Any:
        """The signal in the training pass."""
        return output.actions


class MakesSignal(Protocol):
    """A class of `SIGNALS`. autocast: context of the precision of its passes."""

    needs_skill: bool

    def __call__(self, config: CRaFTConfig, autocast: Callable[[], AbstractContextManager[Any]]) -> PolicySignal: ...


SIGNALS: dict[SignalKind, MakesSignal] = {SignalKind.FEATURES: PolicyFeatures, SignalKind.ACTIONS: PolicyActions}
