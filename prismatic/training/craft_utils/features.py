"""Bridge features and how far they have drifted.

A *part* is C_R or C_AQ. Shapes: B samples, K layers (1 unless the source is `bridge`), T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prismatic.training.craft_utils.config import AnchorType, CRaFTConfig, RetentionMetric

# Keeps a relative error finite for features of norm zero, far below the norms of real ones.
_TINY = 1e-12


@dataclass(frozen=True)
class PartFeatures:
    """One part in fp32: the pooled tokens (B, K, D) and, when the metric needs them, the tokens (B, K, T, D)."""

    pooled: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class BridgeFeatures:
    """C_R and C_AQ of a batch; a part that is not anchored is None."""

    raw: PartFeatures | None
    aq: PartFeatures | None

    @property
    def f(self) -> Tensor:
        """f_theta: the pooled parts side by side, (B, 2 K D), or (B, K D) for one part."""
        return torch.cat([p.pooled.flatten(1) for p in (self.raw, self.aq) if p is not None], dim=1)

    @property
    def requires_grad(self) -> bool:
        """Whether a trainable parameter reaches the features."""
        return any(p.pooled.requires_grad for p in (self.raw, self.aq) if p is not None)


class CRaFTFeatureExtractor(nn.Module):
    """Turns the bridge conditions of a model output into the features that are compared, in fp32."""

    def __init__(self, config: CRaFTConfig) -> None:
        super().__init__()
        self.config = config

    def pool_features(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pool over tokens: (..., T, D) any float dtype -> (..., D) fp32.

        `mask` (B, T) bool selects tokens of (B, T, D); ValueError when a row selects none.
        """
        if mask is not None and not mask.any(dim=1).all():
            raise ValueError("a row of the token mask is empty: there is nothing to pool")
        return self._pool(tokens, mask)

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        tokens = tokens.float()
        if mask is None:
            return tokens.mean(dim=-2) if self.config.use_mean_pooling else tokens.amax(dim=-2)
        if self.config.use_mean_pooling:
            weights = mask.unsqueeze(-1).float()
            return (tokens * weights).sum(dim=1) / weights.sum(dim=1)
        return tokens.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(dim=1)

    def forward(self, raw: Tensor, aq: Tensor | None, raw_mask: Tensor | None = None) -> Tensor:
        """f_theta from C_R (B, T, D) and C_AQ (B, Q, D): (B, 2D) for `concat`, (B, D) otherwise; fp32."""
        return self.parts(raw, aq, raw_mask).f

    def parts(self, raw: Tensor, aq: Tensor | None, raw_mask: Tensor | None = None) -> BridgeFeatures:
        """Both parts from C_R (B, T, D) and C_AQ (B, Q, D), or (B, K, T, D) and (B, K, Q, D) for several layers."""
        kind = self.config.anchor_type
        return BridgeFeatures(
            None if kind is AnchorType.AQ_ONLY else self._part(raw, raw_mask),
            None if kind is AnchorType.RAW_ONLY else self._part(aq, None),
        )

    def _part(self, tokens: Tensor, mask: Tensor | None) -> PartFeatures:
        # Unchecked: the model's mask always has the patches, and a check would wait for the device.
        pooled = self._pool(tokens, mask)
        if tokens.ndim == 3:
            pooled, tokens = pooled.unsqueeze(1), tokens.unsqueeze(1)
        if not self.config.retention_metric.needs_tokens:
            return PartFeatures(pooled)
        tokens = tokens.float()
        # Masked tokens become zero on both sides of the comparison and so add nothing to it.
        return PartFeatures(pooled, tokens if mask is None else tokens * mask[:, None, :, None])


def compute_retention_loss(f: Tensor, f_anchor: Tensor) -> Tensor:
    """Mean squared difference of two feature batches (B, F), in fp32; a scalar. The original's L_ret."""
    _require_same_shape(f, f_anchor)
    return (f.float() - f_anchor.detach().float()).square().mean()


def retention_loss(features: BridgeFeatures, anchor: BridgeFeatures, config: CRaFTConfig) -> Tensor:
    """L_ret: weighted mean of the two parts' distances, each a mean over samples; a scalar fp32 with graph.

    With metric `mse` and equal weights it is `compute_retention_loss(features.f, anchor.f)`. Every metric is computed
    per sample, so that micro-batches and processes may be averaged.
    """
    total, weights = 0.0, config.part_weights
    for weight, part, reference in zip(weights, (features.raw, features.aq), (anchor.raw, anchor.aq), strict=True):
        if part is not None and weight > 0:
            total = total + weight * _DISTANCES[config.retention_metric](part, reference).mean()
    return total / sum(weights)


@torch.no_grad()
def drift_of_parts(features: BridgeFeatures, anchor: BridgeFeatures) -> dict[str, Tensor]:
    """Drift of the pooled parts in both units, whatever the metric: `raw_mse`, `raw_relative`, `aq_mse`, ..."""
    drifts = {}
    for name, part, reference in (("raw", features.raw, anchor.raw), ("aq", features.aq, anchor.aq)):
        if part is not None:
            drifts[f"{name}_mse"] = _mse(part, reference).mean()
            drifts[f"{name}_relative"] = _rel_mse(part, reference).mean()
    return drifts


def _mse(part: PartFeatures, anchor: PartFeatures) -> Tensor:
    _require_same_shape(part.pooled, anchor.pooled)
    return (part.pooled - anchor.pooled.detach()).square().mean(dim=-1)


def _rel_mse(part: PartFeatures, anchor: PartFeatures) -> Tensor:
    return _relative_square(part.pooled, anchor.pooled)


def _token_rel_mse(part: PartFeatures, anchor: PartFeatures) -> Tensor:
    return _relative_square(part.tokens.flatten(2), anchor.tokens.flatten(2))


def _relative_square(x: Tensor, anchor: Tensor) -> Tensor:
    _require_same_shape(x, anchor)
    anchor = anchor.detach()
    return (x - anchor).square().sum(dim=-1) / (anchor.square().sum(dim=-1) + _TINY)


def _cosine(part: PartFeatures, anchor: PartFeatures) -> Tensor:
    _require_same_shape(part.pooled, anchor.pooled)
    # Half the squared distance of the unit vectors is 1 - cos, and exactly zero at the anchor.
    return 0.5 * (F.normalize(part.pooled, dim=-1) - F.normalize(anchor.pooled.detach(), dim=-1)).square().sum(dim=-1)


def _gram(part: PartFeatures, anchor: PartFeatures) -> Tensor:
    """Half the squared distance of the normalised token Gram matrices = 1 - (uncentred) linear CKA of the tokens."""
    _require_same_shape(part.tokens, anchor.tokens)
    return 0.5 * (_normalised_gram(part.tokens) - _normalised_gram(anchor.tokens.detach())).square().sum(dim=(-2, -1))


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


def _require_same_shape(f: Tensor, anchor: Tensor) -> None:
    if f.shape != anchor.shape:
        raise ValueError(f"features {tuple(f.shape)} and anchor features {tuple(anchor.shape)} differ in shape")
