"""Passes of two policies over the same samples, and what is kept of them: pooled features, drift, action errors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from prismatic.craft import BridgeFeatures, CRaFTConfig, CRaFTFeatureExtractor, retention_loss
from prismatic.craft.settings import FeatureSource, RetentionMetric
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.retention.signals import craft_request

_METRICS = (RetentionMetric.REL_MSE, RetentionMetric.MSE, RetentionMetric.TOKEN_REL_MSE)
_PART_WEIGHTS = {"total": (1.0, 1.0), "raw": (1.0, 0.0), "aq": (0.0, 1.0)}
# With this metric the extractor returns pooled features and tokens, which serve all metrics.
_SOURCES = {
    source.value: CRaFTConfig(feature_source=source, retention_metric=RetentionMetric.TOKEN_REL_MSE)
    for source in (FeatureSource.ORIGINAL, FeatureSource.BRIDGE)
}


@dataclass(frozen=True)
class Pooled:
    """Pooled features of samples, float32 on the CPU: f (N, 2D), and per hidden state (N, layers + 1, D)."""

    f: np.ndarray
    patches: np.ndarray
    queries: np.ndarray

    @classmethod
    def of(cls, features: dict[str, BridgeFeatures]) -> Pooled:
        bridge = features[FeatureSource.BRIDGE.value]
        assert bridge.raw is not None and bridge.aq is not None  # `_SOURCES` anchor both parts
        values = features[FeatureSource.ORIGINAL.value].f, bridge.raw.pooled, bridge.aq.pooled
        return cls(*(value.cpu().numpy() for value in values))

    @classmethod
    def joined(cls, chunks: list[Pooled]) -> Pooled:
        return cls(*(np.concatenate([getattr(c, name) for c in chunks]) for name in ("f", "patches", "queries")))


class Record:
    """What is kept of the passes over all batches."""

    def __init__(self) -> None:
        self.pooled: dict[str, list[Pooled]] = {"start": [], "trained": []}
        self._drift: dict[tuple[str, str, str], float] = defaultdict(float)
        self._l1: dict[str, float] = defaultdict(float)
        self._count = 0

    def add(self, models: Sequence[VLAPolicyModel], batches: Sequence[dict[str, Any]]) -> None:
        """Run both models, start first, each on its batch of the same samples."""
        (first, states), (last, trained_states) = map(_run, models, batches)
        self._count += len(batches[0]["actions"])
        self.pooled["start"].append(Pooled.of(first))
        self.pooled["trained"].append(Pooled.of(last))
        self._add_drift(last, first, len(batches[0]["actions"]))
        for name, head, own, batch in (
            ("start", models[0], states, batches[0]),
            ("trained", models[1], trained_states, batches[1]),
            ("start_head", models[0], trained_states, batches[0]),
        ):
            error = (head.actions_of(own, batch).float() - batch["actions"]).abs()
            self._l1[name] += float(error.mean(dim=(1, 2)).double().sum())

    def _add_drift(self, features: dict[str, Any], anchor: dict[str, Any], samples: int) -> None:
        for source, config in _SOURCES.items():
            for metric in _METRICS:
                for part, (w_raw, w_aq) in _PART_WEIGHTS.items():
                    settings = replace(config, retention_metric=metric, w_raw=w_raw, w_aq=w_aq)
                    loss = retention_loss(features[source], anchor[source], settings)
                    self._drift[source, metric.value, part] += float(loss) * samples

    def drift(self) -> dict[str, Any]:
        """{feature source: {metric: {total, raw, aq}}}, means over samples."""
        result: dict[str, Any] = {}
        for (source, metric, part), value in self._drift.items():
            result.setdefault(source, {}).setdefault(metric, {})[part] = value / self._count
        return result

    def action_l1(self) -> dict[str, float]:
        """Mean |predicted - true| of the normalised chunk by policy."""
        return {name: value / self._count for name, value in self._l1.items()}


def _run(model: VLAPolicyModel, batch: dict[str, Any]) -> tuple[dict[str, BridgeFeatures], tuple[Tensor, Tensor]]:
    """Features by source, and the bridge states that the head reads."""
    batch = model.share_vision(batch)
    outputs = {name: model.anchor_features(batch, craft_request(config)) for name, config in _SOURCES.items()}
    features = {name: CRaFTFeatureExtractor(_SOURCES[name]).parts(*output) for name, output in outputs.items()}
    raw, aq, _ = outputs[FeatureSource.BRIDGE.value]
    assert raw is not None and aq is not None
    return features, (raw, aq)
