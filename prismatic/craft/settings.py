"""Settings of the constraint, as choices with names, and the presets."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any


class SignalKind(str, Enum):
    """What is held: the bridge features, or the normalised actions that the whole policy predicts."""

    FEATURES = "features"
    ACTIONS = "actions"


class AnchorType(str, Enum):
    """Which bridge features are anchored."""

    CONCAT = "concat"
    AQ_ONLY = "aq_only"
    RAW_ONLY = "raw_only"


class FeatureSource(str, Enum):
    """Where the features are read: one middle and the last layer, or every tensor the action head reads."""

    ORIGINAL = "original"
    BRIDGE = "bridge"


class RetentionMetric(str, Enum):
    """Distance between current and anchor features (`distances.py`)."""

    MSE = "mse"
    REL_MSE = "rel_mse"
    COSINE = "cosine"
    TOKEN_REL_MSE = "token_rel_mse"
    GRAM = "gram"

    @property
    def needs_tokens(self) -> bool:
        """True when the metric compares tokens and not their pooled summary."""
        return self in (RetentionMetric.TOKEN_REL_MSE, RetentionMetric.GRAM)


class Granularity(str, Enum):
    """Parameters that share one projection coefficient."""

    TENSOR = "tensor"
    MODULE = "module"
    LAYER = "layer"
    GLOBAL = "global"


class Rule(str, Enum):
    """How multiplier and projection make one coefficient (`rules.py`)."""

    ADD = "add"
    MAX = "max"
    BARRIER = "barrier"
    OFF = "off"


class When(str, Enum):
    """Project always, or only while the averaged retention loss is above gamma * eps."""

    ALWAYS = "always"
    ACTIVE = "active"


class Guard(str, Enum):
    """Protection of the division by ||r||^2: an additive delta, or none above a tiny threshold."""

    ADDITIVE = "additive"
    EXACT = "exact"


class ConflictMetric(str, Enum):
    """Inner product in which a conflict is measured: Euclidean, or AdamW's per-coordinate scaling."""

    EUCLID = "euclid"
    ADAM = "adam"


class DualKind(str, Enum):
    """Rule of the multiplier (`duals/`)."""

    ASCENT = "ascent"
    PI = "pi"
    SHARE = "share"
    OFF = "off"


class DualError(str, Enum):
    """Constraint violation: L_ret - eps, or (L_ret - eps) / eps."""

    ABSOLUTE = "absolute"
    RELATIVE = "relative"


class AnchorKind(str, Enum):
    """How the features under theta_0 are computed (`reference.py`)."""

    ONLINE_SWAP = "online_swap"
    DISABLE_ADAPTER = "disable_adapter"
    FUNCTIONAL = "functional"
    FROZEN_COPY = "frozen_copy"
    AUTO = "auto"


# Fields in which the presets differ. `original` is the original procedure, `budget` the one that meets a budget of the
# features, `keep` the one that keeps what the policy does: a bound on its actions, and one force that holds it.
PRESETS: dict[str, dict[str, Any]] = {
    "original": {
        "signal": SignalKind.FEATURES,
        "retention_weight": 1.0,
        "retention_budget": 0.1,
        "retention_metric": RetentionMetric.MSE,
        "dual": DualKind.ASCENT,
        "dual_error": DualError.ABSOLUTE,
        "dual_lr": 0.01,
        "lambda_max": math.inf,
        "projection_rule": Rule.ADD,
        "projection_when": When.ALWAYS,
        "projection_guard": Guard.ADDITIVE,
        "anchor": AnchorKind.ONLINE_SWAP,
    },
    "budget": {
        "signal": SignalKind.FEATURES,
        "retention_weight": 0.0,
        "retention_budget": 0.05,
        "retention_metric": RetentionMetric.REL_MSE,
        "dual": DualKind.PI,
        "dual_error": DualError.RELATIVE,
        "dual_lr": 0.05,
        "lambda_max": 1e3,
        "projection_rule": Rule.MAX,
        "projection_when": When.ACTIVE,
        "projection_guard": Guard.EXACT,
        "anchor": AnchorKind.AUTO,
    },
    "keep": {
        "signal": SignalKind.ACTIONS,
        "retention_weight": 0.0,
        "retention_budget": 0.03,
        "retention_metric": RetentionMetric.REL_MSE,
        "dual": DualKind.SHARE,
        "dual_error": DualError.RELATIVE,
        "dual_lr": 0.05,
        "lambda_max": math.inf,
        "projection_rule": Rule.OFF,
        "projection_when": When.ALWAYS,
        "projection_guard": Guard.EXACT,
        "anchor": AnchorKind.AUTO,
    },
}


@dataclass(frozen=True)
class CRaFTConfig:
    """Settings of the constraint. The defaults are those of the original procedure; see also `from_preset`.

    Attributes:
        signal: what is held, `features` or `actions`.
        anchor_layer_idx: index into the hidden states for C_R; None is the middle, negative counts from the end.
        use_mean_pooling: mean over tokens; False takes the maximum.
        anchor_type: which of C_R and C_AQ enter the features.
        cr_token_mode: `vision_only`, or `vision_plus_prompt` to add the prompt tokens to C_R.
        feature_source: `original`, or `bridge` for all hidden states the action head reads.
        w_raw, w_aq: weights of the two parts of L_ret, >= 0, not both 0.
        retention_metric: distance of the features.
        retention_weight: initial multiplier lambda, >= 0.
        retention_budget: eps, > 0; infinity only monitors the drift. Of features in units of the metric, of actions a
            root-mean-square difference of normalised actions: 0.03 is 3 % of half their range.
        dual, dual_lr, dual_error: rule of the multiplier, its rate eta >= 0, and the error it integrates.
        dual_ki, dual_kp, dual_nu: PI gains >= 0, and the averaging factor in [0, 1) of PI and of the gate.
        lambda_max: upper bound of the multiplier, > 0.
        share_limit: of the dual `share`: the retention gradient may be at most e^share_limit times the action gradient.
        aim: factor > 0 on the budget that the dual steers to, for a run that lands afterwards.
        enable_dual: False keeps lambda at `fixed_lambda` (the same as dual = off).
        fixed_lambda: the constant used without dual ascent, >= 0.
        enable_projection: False is the same as projection_rule = off.
        projection_eps: delta of the additive guard, >= 0.
        projection_granularity, projection_rule, projection_when, projection_guard, projection_metric: see the enums.
        projection_gamma: the gate of `active` opens above gamma * eps, > 0.
        barrier_phi: rate of the barrier rule, > 0.
        anchor: how theta_0 is kept.
    """

    signal: SignalKind = SignalKind.FEATURES
    anchor_layer_idx: int | None = None
    use_mean_pooling: bool = True
    anchor_type: AnchorType = AnchorType.CONCAT
    cr_token_mode: str = "vision_only"
    feature_source: FeatureSource = FeatureSource.ORIGINAL
    w_raw: float = 1.0
    w_aq: float = 1.0
    retention_metric: RetentionMetric = RetentionMetric.MSE
    retention_weight: float = 1.0
    retention_budget: float = 0.1
    dual: DualKind = DualKind.ASCENT
    dual_lr: float = 0.01
    dual_error: DualError = DualError.ABSOLUTE
    dual_ki: float = 1.0
    dual_kp: float = 1.0
    dual_nu: float = 0.9
    lambda_max: float = math.inf
    share_limit: float = 1.0
    aim: float = 1.0
    enable_dual: bool = True
    fixed_lambda: float = 0.1
    enable_projection: bool = True
    projection_eps: float = 1e-8
    projection_granularity: Granularity = Granularity.TENSOR
    projection_rule: Rule = Rule.ADD
    projection_when: When = When.ALWAYS
    projection_gamma: float = 1.0
    projection_guard: Guard = Guard.ADDITIVE
    projection_metric: ConflictMetric = ConflictMetric.EUCLID
    barrier_phi: float = 1.0
    anchor: AnchorKind = AnchorKind.ONLINE_SWAP

    @classmethod
    def from_preset(cls, preset: str, **overrides: Any) -> CRaFTConfig:
        """One of `PRESETS`, with other fields replaced; ValueError for an unknown name."""
        if preset not in PRESETS:
            raise ValueError(f"CRaFT preset is {preset!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[preset], **overrides})

    def __post_init__(self) -> None:
        """Reject unknown choices, values outside their range and combinations without a meaning, by name."""
        for name, kind in _CHOICES.items():
            object.__setattr__(self, name, _choice(name, kind, getattr(self, name)))
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
        if self.rule is Rule.BARRIER and self.projection_granularity is not Granularity.GLOBAL:
            raise ValueError("CRaFT projection_rule barrier is defined for projection_granularity global only")
        if self.feature_source is FeatureSource.BRIDGE and (
            self.cr_token_mode != "vision_only" or self.anchor_layer_idx is not None
        ):
            raise ValueError(
                "CRaFT feature_source bridge reads all layers at the positions of the action head: cr_token_mode and "
                "anchor_layer_idx have no meaning there"
            )
        if self.rule is Rule.BARRIER and self.dual_kind is DualKind.SHARE:
            raise ValueError("CRaFT projection_rule barrier reads no multiplier, so dual share would steer nothing")
        if self.initial_lambda > self.lambda_max:
            name = "fixed_lambda" if self.dual_kind is DualKind.OFF else "retention_weight"
            raise ValueError(f"CRaFT {name} is {self.initial_lambda}, expected at most lambda_max {self.lambda_max}")

    @property
    def loss_budget(self) -> float:
        """The budget in the unit of the retention loss, a mean over samples: of actions the mean square."""
        budget = self.retention_budget * self.aim
        return budget**2 if self.signal is SignalKind.ACTIONS else budget

    def drift_of(self, loss: float) -> float:
        """A retention loss (mean over samples) in the unit of `retention_budget`."""
        return math.sqrt(loss) if self.signal is SignalKind.ACTIONS else loss

    @property
    def rule(self) -> Rule:
        """The projection rule, `off` when projection is disabled."""
        return self.projection_rule if self.enable_projection else Rule.OFF

    @property
    def dual_kind(self) -> DualKind:
        """The multiplier's rule, `off` when the dual is disabled."""
        return self.dual if self.enable_dual else DualKind.OFF

    @property
    def initial_lambda(self) -> float:
        """lambda before the first step."""
        return self.fixed_lambda if self.dual_kind is DualKind.OFF else self.retention_weight

    @property
    def part_weights(self) -> tuple[float, float]:
        """Weights of C_R and C_AQ in L_ret; the anchor type sets one of them to zero."""
        return (
            0.0 if self.anchor_type is AnchorType.AQ_ONLY else self.w_raw,
            0.0 if self.anchor_type is AnchorType.RAW_ONLY else self.w_aq,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain_values(asdict(self))


_CHOICES: dict[str, type[Enum]] = {
    "signal": SignalKind,
    "anchor_type": AnchorType,
    "feature_source": FeatureSource,
    "retention_metric": RetentionMetric,
    "dual": DualKind,
    "dual_error": DualError,
    "projection_granularity": Granularity,
    "projection_rule": Rule,
    "projection_when": When,
    "projection_guard": Guard,
    "projection_metric": ConflictMetric,
    "anchor": AnchorKind,
}
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


def _choice(name: str, kind: type[Enum], value: Any) -> Enum:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(member.value for member in kind)
        raise ValueError(f"CRaFT {name} is {value!r}, expected one of {names}") from None


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if math.isnan(value) or not holds:
        raise ValueError(f"CRaFT {name} is {value}, expected {expected}")


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Enums as their values and infinities as "inf", which JSON has no number for."""
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}
    return {k: str(v) if isinstance(v, float) and math.isinf(v) else v for k, v in plain.items()}
