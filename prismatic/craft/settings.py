"""Settings of the constraint, checked, and the presets.

Read before anything is loaded: nothing that this imports needs torch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from prismatic.craft.duals import DUALS
from prismatic.craft.fields import (
    OFF,
    AnchorKind,
    AnchorType,
    ConflictMetric,
    CRaFTFields,
    DualError,
    FeatureSource,
    Granularity,
    Guard,
    RetentionMetric,
    SignalKind,
    When,
)
from prismatic.craft.rules import RULES

__all__ = [
    "PRESETS",
    "PRESET_FIELDS",
    "AnchorKind",
    "AnchorType",
    "CRaFTConfig",
    "ConflictMetric",
    "DualError",
    "FeatureSource",
    "Granularity",
    "Guard",
    "RetentionMetric",
    "SignalKind",
    "When",
    "choices_of",
    "plain_values",
]

# Fields in which the presets differ. `original` is the original procedure, `budget` the one that meets a budget of the
# features, `keep` the one that keeps what the policy does: a bound on its actions, and one force that holds it.
PRESETS: dict[str, dict[str, Any]] = {
    "original": {
        "signal": SignalKind.FEATURES,
        "retention_weight": 1.0,
        "retention_budget": 0.1,
        "retention_metric": RetentionMetric.MSE,
        "dual": "ascent",
        "dual_error": DualError.ABSOLUTE,
        "dual_lr": 0.01,
        "lambda_max": math.inf,
        "projection_rule": "add",
        "projection_when": When.ALWAYS,
        "projection_guard": Guard.ADDITIVE,
        "anchor": AnchorKind.ONLINE_SWAP,
    },
    "budget": {
        "signal": SignalKind.FEATURES,
        "retention_weight": 0.0,
        "retention_budget": 0.05,
        "retention_metric": RetentionMetric.REL_MSE,
        "dual": "pi",
        "dual_error": DualError.RELATIVE,
        "dual_lr": 0.05,
        "lambda_max": 1e3,
        "projection_rule": "max",
        "projection_when": When.ACTIVE,
        "projection_guard": Guard.EXACT,
        "anchor": AnchorKind.AUTO,
    },
    "keep": {
        "signal": SignalKind.ACTIONS,
        "retention_weight": 0.0,
        "retention_budget": 0.03,
        "retention_metric": RetentionMetric.REL_MSE,
        "dual": "share",
        "dual_error": DualError.RELATIVE,
        "dual_lr": 0.05,
        "lambda_max": math.inf,
        "projection_rule": "off",
        "projection_when": When.ALWAYS,
        "projection_guard": Guard.EXACT,
        "anchor": AnchorKind.AUTO,
    },
}


@dataclass(frozen=True)
class CRaFTConfig(CRaFTFields):
    """Settings of the constraint; the fields are those of `CRaFTFields`. See also `from_preset`."""

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> CRaFTConfig:
        """One of `PRESETS`, with other fields replaced; ValueError for an unknown name."""
        if preset not in PRESETS:
            raise ValueError(f"CRaFT preset is {preset!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **overrides})

    def __post_init__(self) -> None:
        """Reject unknown choices, values outside their range and combinations without a meaning, by name."""
        for name in filter(choices_of, _DEFAULTS):
            object.__setattr__(self, name, _choice(name, getattr(self, name)))
        if self.cr_token_mode not in ("vision_only", "vision_plus_prompt"):
            raise ValueError(
                f"CRaFT cr_token_mode is {self.cr_token_mode!r}, expected vision_only or vision_plus_prompt"
            )
        for name in _NON_NEGATIVE:
            value = getattr(self, name)
            _require(name, value, 0 <= value < math.inf, "a finite number >= 0")
        for name in ("projection_gamma", "barrier_phi", "aim"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a finite number > 0")
        for name in ("retention_budget", "lambda_max"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "a number > 0")
        _require("share_limit", self.share_limit, -5 < self.share_limit <= 10, "a number above -5 and at most 10")
        _require("dual_nu", self.dual_nu, 0 <= self.dual_nu < 1, "a number in [0, 1)")
        self._check_combinations()

    def _check_combinations(self) -> None:
        if sum(self.part_weights) == 0:
            raise ValueError(
                f"CRaFT w_raw {self.w_raw} and w_aq {self.w_aq} with anchor_type {self.anchor_type.value} leave "
                "nothing to anchor"
            )
        rule = RULES[self.rule]
        if rule.one_group and self.projection_granularity is not Granularity.GLOBAL:
            raise ValueError(f"CRaFT projection_rule {self.rule} is defined for projection_granularity global only")
        if self.feature_source is FeatureSource.BRIDGE and (
            self.cr_token_mode != "vision_only" or self.anchor_layer_idx is not None
        ):
            raise ValueError(
                "CRaFT feature_source bridge reads all layers at the positions of the action head: cr_token_mode and "
                "anchor_layer_idx have no meaning there"
            )
        if not rule.reads_multiplier and DUALS[self.dual_kind].needs_norms:
            raise ValueError(
                f"CRaFT projection_rule {self.rule} reads no multiplier, so dual {self.dual_kind} would steer nothing"
            )
        if self.initial_lambda > self.lambda_max:
            name = "fixed_lambda" if self.dual_kind == OFF else "retention_weight"
            raise ValueError(f"CRaFT {name} is {self.initial_lambda}, expected at most lambda_max {self.lambda_max}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain_values(asdict(self))


_DEFAULTS = {entry.name: entry.default for entry in fields(CRaFTFields)}
_NON_NEGATIVE = (
    "w_raw",
    "w_aq",
    "retention_weight",
    "dual_lr",
    "dual_ki",
    "dual_kp",
    "fixed_lambda",
    "projection_eps",
)
PRESET_FIELDS = tuple(PRESETS["original"])


def choices_of(name: str) -> tuple[str, ...]:
    """The names that a field takes, none for one that is no choice."""
    if name in ("dual", "projection_rule"):
        return tuple(DUALS if name == "dual" else RULES)
    kind = type(_DEFAULTS[name])
    return tuple(member.value for member in kind) if issubclass(kind, Enum) else ()


def _choice(name: str, value: Any) -> Any:
    """The choice of this name, an enum's member where there is one."""
    names = choices_of(name)
    if value not in names:
        raise ValueError(f"CRaFT {name} is {value!r}, expected one of {', '.join(names)}")
    default = _DEFAULTS[name]
    return type(default)(value) if isinstance(default, Enum) else value


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if math.isnan(value) or not holds:
        raise ValueError(f"CRaFT {name} is {value}, expected {expected}")


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Enums as their values and infinities as "inf", which JSON has no number for."""
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}
    return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in plain.items()}
