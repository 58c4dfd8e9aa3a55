"""The upstream step, plain and as the original notes write it, with its costs."""

from __future__ import annotations

import torch
from torch import Tensor

from prismatic.craft import CRaFTConfig, CRaFTFeatureExtractor
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.retention.signals import reaches


def forward_with_logits(model: VLAPolicyModel, batch: dict):
    """(model output, actions (B, K, A)) of the causal LM with its logits, which nothing reads, as upstream does."""
    output = model.vla(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "action_mask", "pixel_values")},
        output_hidden_states=True,
        output_craft_features=True,
        output_logits=True,
    )
    states = model.vla.bridge_states(output.hidden_states, batch["action_mask"], model.legacy_slices)
    return output, lambda: model.action_head(states, model.proprio_projector(batch["proprio"]))


def logits_step(model: VLAPolicyModel, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """Plain step of the upstream procedure."""
    _, actions = forward_with_logits(model, batch)
    loss = (actions() - batch["actions"]).abs().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class OriginalProcedure:
    """One step as the original notes write it (docs/IDEA.md section 6), with its costs.

    Weights are copied out and in around the anchor pass, both passes are those of the causal LM with logits, both
    gradients come from a `backward` of their own and are cloned, and projection is a loop with a host decision per
    tensor. Two errors are left out because they would make it cheaper: gradients of the head are kept, and the mask
    places C_AQ.
    """

    def __init__(self, model: VLAPolicyModel, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.config = CRaFTConfig()
        self.extractor = CRaFTFeatureExtractor(self.config)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        in_vla = reaches(model, [model.vla])
        self.vla = [p for n, p in trainable if in_vla(n)]
        self.all = [p for _, p in trainable]
        self.initial = [p.detach().clone() for p in self.vla]
        self.multiplier = self.config.retention_weight

    def _features(self, output) -> Tensor:
        return self.extractor(output.raw_latent_features, output.action_query_features)

    @torch.no_grad()
    def _anchor(self, batch: dict) -> Tensor:
        current = [p.data.clone() for p in self.vla]
        for p, initial in zip(self.vla, self.initial, strict=True):
            p.data.copy_(initial)
        features = self._features(forward_with_logits(self.model, batch)[0])
        for p, saved in zip(self.vla, current, strict=True):
            p.data.copy_(saved)
        return features

    def step(self, batch: dict) -> None:
        """One optimizer step."""
        anchor = self._anchor(batch)
        output, actions = forward_with_logits(self.model, batch)
        loss = (actions() - batch["actions"]).abs().mean()
        retention = (self._features(output) - anchor).square().mean()
        loss.backward(retain_graph=True)
        g_act = [None if p.grad is None else p.grad.clone() for p in self.all]
        self.optimizer.zero_grad()
        retention.backward()
        g_ret = [None if p.grad is None else p.grad.clone() for p in self.all]
        for p, a, r in zip(self.all, g_act, g_ret, strict=True):
            p.grad = a if a is None or r is None else self._combined(a, r)
        self.optimizer.step()
        self.multiplier = max(0.0, self.multiplier + self.config.dual_lr * (retention.item() - 0.1))
        self.optimizer.zero_grad()

    def _combined(self, a: Tensor, r: Tensor) -> Tensor:
        dot = (a * r).sum()
        if dot.item() < 0:
            a = a - dot / ((r * r).sum() + self.config.projection_eps) * r
        return a + self.multiplier * r
