"""Distilled replay (Dark Experience Replay, arXiv 2004.07211): old samples with the start policy's actions as labels.

Plain replay needs no method of the step: `ReplayMixture` mixes the samples into the batches.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from prismatic.craft.reference import (
    CRaFTWeightManager,
    build_anchor,
    extract_anchor_features_online,
    unwrap,
)
from prismatic.craft.settings import AnchorKind
from prismatic.training.retention.memory import take_rows
from prismatic.training.retention.protocol import Retention


class DistilledReplay(Retention):
    """Replaces the labels of the replayed samples of a batch by what the start policy does with them.

    The start policy sees the very images of the sample, after augmentation, and has neither start noise nor dropout.

    Args:
        model: the policy, possibly wrapped by DDP.
        autocast: context of the forward pass.
    """

    weights: CRaFTWeightManager

    def __init__(self, model: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self._module, self._autocast = unwrap(model), autocast
        self._anchor = build_anchor(AnchorKind.AUTO, model)
        self.weights = self._anchor.weights

    def before_pass(self, batch: dict[str, Any], fraction: float, loss_scale: float) -> dict[str, Any]:
        rows = [row for row, is_replay in enumerate(batch["is_replay"]) if is_replay]
        if not rows:
            return batch
        old = take_rows(batch, rows)
        labels = extract_anchor_features_online(self._module, lambda policy: self._actions(policy, old), self._anchor)
        actions = batch["actions"].clone()
        actions[rows] = labels.to(actions.dtype)
        return batch | {"actions": actions}

    def _actions(self, policy: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        with self._autocast():
            actions: torch.Tensor = policy.forward(batch).actions
            return actions
