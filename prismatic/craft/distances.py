"""How far features have drifted: distances per sample, and L_ret, their mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prismatic.craft.features import BridgeFeatures, PartFeatures, require_same_shape
from prismatic.craft.settings import CRaFTConfig, RetentionMetric

# Keeps a relative error finite for features of norm zero, far below the norms of real ones.
_TINY = 1e-12


def retention_loss(features: BridgeFeatures, reference: BridgeFeatures, config: CRaFTConfig) -> Tensor:
    """L_ret: weighted mean of the two parts' distances, each a mean over samples; a scalar fp32 with graph.

    With metric `mse` and equal weights it is `compute_retention_loss(features.f, reference.f)`. Every metric is
    computed per sample, so that micro-batches and processes may be averaged.
    """
    total: Tensor | float = 0.0
    weights = config.part_weights
    for weight, part, start in zip(weights, (features.raw, features.aq), (reference.raw, reference.aq), strict=True):
        if part is not None and weight > 0:
            assert start is not None  # both sides hold the same parts
            total = total + weight * _DISTANCES[config.retention_metric](part, start).mean()
    assert isinstance(total, Tensor)  # at least one part has a weight
    return total / sum(weights)


@torch.no_grad()
def drift_of_parts(features: BridgeFeatures, reference: BridgeFeatures) -> dict[str, Tensor]:
    """Drift of the pooled parts in both units, whatever the metric: `raw_mse`, `raw_relative`, `aq_mse`, ..."""
    drifts = {}
    for name, part, start in (("raw", features.raw, reference.raw), ("aq", features.aq, reference.aq)):
        if part is not None:
            assert start is not None
            drifts[f"{name}_mse"] = _mse(part, start).mean()
            drifts[f"{name}_relative"] = _rel_mse(part, start).mean()
    return drifts


def _mse(part: PartFeatures, reference: PartFeatures) -> Tensor:
    require_same_shape(part.pooled, reference.pooled)
    return (part.pooled - reference.pooled.detach()).square().mean(dim=-1)


def _rel_mse(part: PartFeatures, reference: PartFeatures) -> Tensor:
    return _relative_square(part.pooled, reference.pooled)


def _token_rel_mse(part: PartFeatures, reference: PartFeatures) -> Tensor:
    return _relative_square(_tokens(part).flatten(2), _tokens(reference).flatten(2))


def _relative_square(x: Tensor, reference: Tensor) -> Tensor:
    require_same_shape(x, reference)
    reference = reference.detach()
    return (x - reference).square().sum(dim=-1) / (reference.square().sum(dim=-1) + _TINY)


def _cosine(part: PartFeatures, reference: PartFeatures) -> Tensor:
    require_same_shape(part.pooled, reference.pooled)
    # Half the squared distance of the unit vectors is 1 - cos, and exactly zero at the reference.
    now, start = F.normalize(part.pooled, dim=-1), F.normalize(reference.pooled.detach(), dim=-1)
    return 0.5 * (now - start).square().sum(dim=-1)


def _gram(part: PartFeatures, reference: PartFeatures) -> Tensor:
    """Half the squared distance of the normalised token Gram matrices = 1 - (uncentred) linear CKA of the tokens."""
    tokens, start = _tokens(part), _tokens(reference)
    require_same_shape(tokens, start)
    return 0.5 * (_normalised_gram(tokens) - _normalised_gram(start.detach())).square().sum(dim=(-2, -1))


def _tokens(part: PartFeatures) -> Tensor:
    assert part.tokens is not None  # `RetentionMetric.needs_tokens` says which metrics have them
    return part.tokens


def _normalised_gram(tokens: Tensor) -> Tensor:
    gram = tokens @ tokens.transpose(-2, -1)
    return gram / (gram.square().sum(dim=(-2, -1), keepdim=True) + _TINY).sqrt()


# Distance per sample and layer, (B, K). Sources: rel_mse, token_rel_mse: section 2 of docs/IDEA.md; gram: linear CKA,
# arXiv 1905.00414, without centring.
_DISTANCES: dict[RetentionMetric, Callable[[PartFeatures, PartFeatures], Tensor]] = {
    RetentionMetric.MSE: _mse,
    RetentionMetric.REL_MSE: _rel_mse,
    RetentionMetric.COSINE: _cosine,
    RetentionMetric.TOKEN_REL_MSE: _token_rel_mse,
    RetentionMetric.GRAM: _gram,
}
