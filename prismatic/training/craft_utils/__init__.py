"""CRaFT: fine-tuning under a bound on the drift of the bridge features.

    minimise L_act(theta)   subject to   L_ret(theta) = distance(f(theta), f(theta_0)) <= eps

One file per idea: the settings and presets (`config`), the features and their distance (`features`), the frozen
snapshot (`anchors`), the combination of the two gradients (`projection`), the multiplier (`dual`). `constraint` puts
them together for the optimizer step. The maths and its limits are explained in docs/IDEA.md.
"""

from prismatic.training.craft_utils.anchors import (
    Anchor,
    CRaFTWeightManager,
    DisableAdapterAnchor,
    FrozenCopyAnchor,
    FunctionalAnchor,
    build_anchor,
    extract_anchor_features_online,
    unwrap,
)
from prismatic.training.craft_utils.config import (
    PRESET_FIELDS,
    PRESETS,
    AnchorKind,
    AnchorType,
    CRaFTConfig,
    FeatureSource,
    RetentionMetric,
    plain_values,
)
from prismatic.training.craft_utils.constraint import CRaFTConstraint, NonFiniteRetentionError, Plan
from prismatic.training.craft_utils.dual import CRaFTDualOptimizer
from prismatic.training.craft_utils.features import (
    BridgeFeatures,
    CRaFTFeatureExtractor,
    PartFeatures,
    compute_retention_loss,
    retention_loss,
)
from prismatic.training.craft_utils.projection import CRaFTGradientProjector

__all__ = [
    "PRESETS",
    "PRESET_FIELDS",
    "Anchor",
    "AnchorKind",
    "AnchorType",
    "BridgeFeatures",
    "CRaFTConfig",
    "CRaFTConstraint",
    "CRaFTDualOptimizer",
    "CRaFTFeatureExtractor",
    "CRaFTGradientProjector",
    "CRaFTWeightManager",
    "DisableAdapterAnchor",
    "FeatureSource",
    "FrozenCopyAnchor",
    "FunctionalAnchor",
    "NonFiniteRetentionError",
    "PartFeatures",
    "Plan",
    "RetentionMetric",
    "build_anchor",
    "compute_retention_loss",
    "extract_anchor_features_online",
    "plain_values",
    "retention_loss",
    "unwrap",
]
