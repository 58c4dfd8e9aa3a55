"""The whole policy as one module: VLM, action head and proprio projector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from prismatic.extern.hf.modeling_prismatic import (
    CrTokenMode,
    OpenVLAForActionPrediction,
    PrismaticCausalLMOutputWithPast,
)
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.activations import fewer_kept
from prismatic.models.projectors import ProprioProjector
from prismatic.vla.prompts import PromptKind


@dataclass(frozen=True)
class CraftRequest:
    """Which constraint features a forward pass returns.

    `layer_idx` indexes the hidden states (None = the middle one, negative from the end); `cr_token_mode` is
    "vision_only" or "vision_plus_prompt". `bridge` returns what the action head reads instead: all hidden states.
    `raw_only` says that C_AQ is not needed, so that a pass for the features alone may stop at C_R's layer.
    """

    layer_idx: int | None = None
    cr_token_mode: CrTokenMode | str = CrTokenMode.VISION_ONLY
    bridge: bool = False
    raw_only: bool = False


@dataclass
class PolicyOutput:
    """Normalised actions (B, K, A) and, on request, C_R (B, T, D), C_AQ (B, Q, D) and the token mask of C_R (B, T).

    With `bridge` the features are (B, layers + 1, N, D) and (B, layers + 1, Q, D).
    """

    actions: torch.Tensor
    raw_latent_features: torch.Tensor | None = None
    action_query_features: torch.Tensor | None = None
    raw_latent_mask: torch.Tensor | None = None


class VLAPolicyModel(nn.Module):
    """One module, so that a distributed wrapper sees head and projector gradients in the same forward pass."""

    def __init__(
        self,
        vla: OpenVLAForActionPrediction,
        action_head: L1RegressionActionHead,
        proprio_projector: ProprioProjector | None = None,
        legacy_slices: bool = False,
    ) -> None:
        """`legacy_slices` True reads the hidden states one position early, as published heads expect.

        Raises ValueError when the head was made for another number of vision tokens or layers.
        """
        super().__init__()
        self.vla = vla
        self.action_head = action_head
        self.proprio_projector = proprio_projector
        self.legacy_slices = legacy_slices
        tokens = vla.vision_backbone.num_vision_tokens
        if action_head.geometry.num_task_tokens != tokens:
            raise ValueError(
                f"action head was made for {action_head.geometry.num_task_tokens} vision tokens, the model produces "
                f"{tokens} ({self.num_images} images of {vla.vision_backbone.get_num_patches()} patches)"
            )
        layers = vla.config.text_config.num_hidden_layers
        if action_head.geometry.num_blocks != layers:
            raise ValueError(
                f"action head has {action_head.geometry.num_blocks} blocks, the language model {layers} layers"
            )

    @property
    def num_images(self) -> int:
        """Images per sample."""
        return self.vla.vision_backbone.get_num_images_in_input()

    @property
    def num_action_queries(self) -> int:
        """Q."""
        return self.vla.num_action_queries

    @property
    def prompt_kind(self) -> PromptKind:
        """The form of the prompt, which follows from the language model."""
        return self.vla.config.prompt_kind

    def freezes_vision(self) -> bool:
        """Whether no weight of the vision towers is trained."""
        return not any(p.requires_grad for p in self.vla.vision_backbone.parameters())

    @torch.no_grad()
    def share_vision(self, batch: dict) -> dict:
        """The batch with `vision_features` (B, N, vision width) computed once, when the towers are frozen.

        Frozen towers give the same features in every pass over the batch. Otherwise the batch itself.
        """
        if not self.freezes_vision():
            return batch
        return {**batch, "vision_features": self.vla.vision_backbone(batch["pixel_values"])}

    def _run_vla(
        self, batch: dict, craft: CraftRequest | None, output_hidden_states: bool, raw_only: bool = False
    ) -> PrismaticCausalLMOutputWithPast:
        request = craft or CraftRequest()
        return self.vla(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            action_mask=batch["action_mask"],
            output_hidden_states=output_hidden_states,
            output_craft_features=craft is not None and not request.bridge,
            craft_layer_idx=request.layer_idx,
            craft_cr_token_mode=request.cr_token_mode,
            craft_raw_only=raw_only,
            vision_features=batch.get("vision_features"),
            trusted_masks=batch.get("trusted_masks", False),
        )

    def forward(self, batch: dict, craft: CraftRequest | None = None) -> PolicyOutput:
        """Actions of a collated batch.

        Args:
            batch: input_ids, attention_mask, action_mask (B, L); pixel_values (B, 3*towers*n, H, W); proprio (B, P)
                normalised, needed iff the policy has a proprio projector; optionally vision_features (`share_vision`)
                and trusted_masks (the collator's word that the masks need no check).
            craft: also return the constraint features of the same pass.

        Raises KeyError for a missing batch entry, ValueError for inconsistent shapes.
        """
        with fewer_kept():
            output = self._run_vla(batch, craft, output_hidden_states=True)
            assert output.hidden_states is not None  # asked for
            states = self.vla.bridge_states(output.hidden_states, batch["action_mask"], self.legacy_slices)
            actions = self.actions_of(states, batch)
        if craft is not None and craft.bridge:
            return PolicyOutput(actions, *states)
        return PolicyOutput(actions, output.raw_latent_features, output.action_query_features, output.raw_latent_mask)

    def actions_of(self, states: tuple[torch.Tensor, torch.Tensor], batch: dict) -> torch.Tensor:
        """Normalised actions (B, K, A) that the head makes of bridge states, of this VLM or of another one.

        states: (B, layers + 1, N, D) and (B, layers + 1, Q, D), as with `CraftRequest(bridge=True)`; of the batch only
        `proprio` is read, and only with a proprio projector.
        """
        features = None
        if self.proprio_projector is not None:
            features = self.proprio_projector(batch["proprio"])
        return self.action_head(states, features)

    def anchor_features(
        self, batch: dict, craft: CraftRequest | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """C_R (B, T, D), C_AQ (B, Q, D) and the mask of C_R (None in vision_only mode), without running the head.

        With `raw_only` C_AQ is None and the language model stops at C_R's layer; shapes with `bridge`: `PolicyOutput`.
        """
        request = craft or CraftRequest()
        with fewer_kept():
            output = self._run_vla(batch, request, request.bridge, request.raw_only and not request.bridge)
        if request.bridge:
            assert output.hidden_states is not None  # asked for
            return *self.vla.bridge_states(output.hidden_states, batch["action_mask"], self.legacy_slices), None
        assert output.raw_latent_features is not None  # asked for
        return output.raw_latent_features, output.action_query_features, output.raw_latent_mask
