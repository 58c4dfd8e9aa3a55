"""What can be set, and the choices with names.

Apart from `settings.py`: rules and duals read the fields, and the settings are checked against rules and duals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

OFF = "off"
"""Name of the rule, and of the dual, that does nothing."""


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


@dataclass(frozen=True)
class CRaFTFields:
    """The fields of `CRaFTConfig`, which checks them. The defaults are those of the original procedure.

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
        dual: a name in `duals.DUALS`.
        dual_lr, dual_error: its rate eta >= 0, and the error it integrates.
        dual_ki, dual_kp, dual_nu: PI gains >= 0, and the averaging factor in [0, 1) of PI and of the gate.
        lambda_max: upper bound of the multiplier, > 0.
        share_limit: of the dual `share`: the retention gradient may be at most e^share_limit times the action gradient.
        aim: factor > 0 on the budget that the dual steers to, for a run that lands afterwards.
        enable_dual: False keeps lambda at `fixed_lambda` (the same as dual = off).
        fixed_lambda: the constant used without dual ascent, >= 0.
        enable_projection: False is the same as projection_rule = off.
        projection_eps: delta of the additive guard, >= 0.
        projection_rule: a name in `rules.RULES`.
        projection_granularity, projection_when, projection_guard, projection_metric: see the enums.
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
    dual: str = "ascent"
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
    projection_rule: str = "add"
    projection_when: When = When.ALWAYS
    projection_gamma: float = 1.0
    projection_guard: Guard = Guard.ADDITIVE
    projection_metric: ConflictMetric = ConflictMetric.EUCLID
    barrier_phi: float = 1.0
    anchor: AnchorKind = AnchorKind.ONLINE_SWAP

    @property
    def loss_budget(self) -> float:
        """The budget in the unit of the retention loss, a mean over samples: of all but features the mean square."""
        budget = self.retention_budget * self.aim
        return budget if self.signal is SignalKind.FEATURES else budget**2

    def drift_of(self, loss: float) -> float:
        """A retention loss (mean over samples) in the unit of `retention_budget`."""
        return loss if self.signal is SignalKind.FEATURES else math.sqrt(loss)

    @property
    def rule(self) -> str:
        """The projection rule, `off` when projection is disabled."""
        return self.projection_rule if self.enable_projection else OFF

    @property
    def dual_kind(self) -> str:
        """The multiplier's rule, `off` when the dual is disabled."""
        return self.dual if self.enable_dual else OFF

    @property
    def initial_lambda(self) -> float:
        """lambda before the first step."""
        return self.fixed_lambda if self.dual_kind == OFF else self.retention_weight

    @property
    def part_weights(self) -> tuple[float, float]:
        """Weights of C_R and C_AQ in L_ret; the anchor type sets one of them to zero."""
        return (
            0.0 if self.anchor_type is AnchorType.AQ_ONLY else self.w_raw,
            0.0 if self.anchor_type is AnchorType.RAW_ONLY else self.w_aq,
        )
