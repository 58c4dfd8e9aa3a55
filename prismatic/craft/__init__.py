"""CRaFT: training under a bound on the drift of what a model says.

    minimise L_act(theta)   subject to   L_ret(theta) = distance(s(theta), s(theta_0)) <= eps

This package knows tensors and modules, no policy and no data: it works in any PyTorch loop
(examples/constrain_your_model.py). One file per idea: `settings` and their `fields`, what is held (`features`,
`distances`), the start weights theta_0 (`reference`), the gate (`gate`), the multiplier (`duals/`, one file per rule),
the combination of the two gradients (`rules`) and their arithmetic (`gradients`); `constraint` puts them together. The
maths: docs/IDEA.md.

Names are imported when they are used: the settings alone need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prismatic.craft.constraint import CRaFTConstraint
    from prismatic.craft.distances import retention_loss
    from prismatic.craft.duals import CRaFTDualOptimizer
    from prismatic.craft.features import BridgeFeatures, CRaFTFeatureExtractor, PartFeatures, compute_retention_loss
    from prismatic.craft.finite import NonFiniteRetentionError
    from prismatic.craft.plan import Plan
    from prismatic.craft.projection import CRaFTGradientProjector
    from prismatic.craft.reference import (
        Anchor,
        CRaFTWeightManager,
        DisableAdapterAnchor,
        FrozenCopyAnchor,
        FunctionalAnchor,
        build_anchor,
        extract_anchor_features_online,
        unwrap,
    )
    from prismatic.craft.settings import (
        PRESET_FIELDS,
        PRESETS,
        AnchorKind,
        AnchorType,
        CRaFTConfig,
        FeatureSource,
        RetentionMetric,
        SignalKind,
        plain_values,
    )
    from prismatic.craft.signals import FeatureSignal, OutputSignal, Signal

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
    "FeatureSignal",
    "FeatureSource",
    "FrozenCopyAnchor",
    "FunctionalAnchor",
    "NonFiniteRetentionError",
    "OutputSignal",
    "PartFeatures",
    "Plan",
    "RetentionMetric",
    "Signal",
    "SignalKind",
    "build_anchor",
    "compute_retention_loss",
    "extract_anchor_features_online",
    "plain_values",
    "retention_loss",
    "unwrap",
]

_FILES = (
    "settings",
    "features",
    "distances",
    "duals",
    "finite",
    "plan",
    "projection",
    "reference",
    "signals",
    "constraint",
)


def __getattr__(name: str) -> Any:
    """A name from the first file that has it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    homes = (import_module(f"{__name__}.{file}") for file in _FILES)
    return next(getattr(home, name) for home in homes if hasattr(home, name))
