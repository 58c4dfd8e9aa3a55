"""Bridge features: what of C_R and C_AQ is compared.

A *part* is C_R or C_AQ. Shapes: B samples, K layers (1 unless the source is `bridge`), T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prismatic.craft.settings import AnchorType, CRaFTConfig


@dataclass(frozen=True)
class PartFeatures:
    """One part in fp32: the pooled tokens (B, K, D) and, when the metric needs them, the tokens (B, K, T, D)."""

    pooled: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class BridgeFeatures:
    """C_R and C_AQ of a batch; a part that is not held is None."""

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

    def parts(self, raw: Tensor | None, aq: Tensor | None, raw_mask: Tensor | None = None) -> BridgeFeatures:
        """Both parts from C_R (B, T, D) and C_AQ (B, Q, D), or (B, K, T, D) and (B, K, Q, D) for several layers."""
        kind = self.config.anchor_type
        return BridgeFeatures(
            None if kind is AnchorType.AQ_ONLY else self._part(raw, raw_mask),
            None if kind is AnchorType.RAW_ONLY else self._part(aq, None),
        )

    def _part(self, tokens: Tensor | None, mask: Tensor | None) -> PartFeatures:
        assert tokens is not None  # only a part that is not held may be missing
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
    require_same_shape(f, f_anchor)
    return (f.float() - f_anchor.detach().float()).square().mean()


def require_same_shape(f: Tensor, reference: Tensor) -> None:
    """ValueError for features that cannot be compared."""
    if f.shape != reference.shape:
        raise ValueError(f"features {tuple(f.shape)} and anchor features {tuple(reference.shape)} differ in shape")
