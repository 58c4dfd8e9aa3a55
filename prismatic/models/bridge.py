"""Where the tokens of a row lie in the multimodal sequence, and what is cut out of its hidden states.

Cut out are C_R (raw latent), C_AQ (action-query latent) and what the action head reads. Everything here is a function
of tensors and masks; no parameters, no other module of this project.

Multimodal sequence of one row: [text 0 | N patches | text 1..P-1 | Q action queries | right padding]. A text index
i >= 1 therefore sits at absolute position N + i, and text 0 at position 0. Shapes: B rows, L text length (prompt, query
slots and padding), S = N + L multimodal length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class CrTokenMode(str, Enum):
    """Tokens that make up the raw latent C_R."""

    VISION_ONLY = "vision_only"
    VISION_PLUS_PROMPT = "vision_plus_prompt"


@dataclass(frozen=True)
class BridgeLayout:
    """Token layout of a row with `num_vision_tokens` (N) patches of all its images and `num_action_queries` (Q).

    Masks are text masks (B, L), True at prompt and slots (`attention_mask`) or at the Q query slots (`action_mask`).
    The cuts trust them, since a check waits for the device: `require_query_slots` is that check.
    """

    num_vision_tokens: int
    num_action_queries: int

    def require_query_slots(self, action_mask: Tensor) -> None:
        """ValueError when a row of the bool mask (B, L) does not hold exactly Q slots."""
        counts = action_mask.sum(dim=1)
        if not bool((counts == self.num_action_queries).all()):
            raise ValueError(f"action mask: expected {self.num_action_queries} slots per row, found {counts.tolist()}")

    def fill_query_slots(self, text: Tensor, queries: Tensor, action_mask: Tensor) -> Tensor:
        """Text embeddings (B, L, D) with the rows of `queries` (Q, D) at the slots, in order."""
        slot = (action_mask.long().cumsum(dim=1) - 1).clamp(min=0, max=self.num_action_queries - 1)
        return torch.where(action_mask.unsqueeze(-1), queries[slot], text)

    def insert_patches(self, text: Tensor, patches: Tensor) -> Tensor:
        """Text (B, L, ...) and patches (B, N, ...) of one dtype -> multimodal sequence (B, S, ...)."""
        return torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)

    def multimodal_mask(self, text_mask: Tensor, vision_value: bool) -> Tensor:
        """Text mask (B, L) -> multimodal mask (B, S) with `vision_value` at the patches."""
        return self.insert_patches(
            text_mask, text_mask.new_full((text_mask.shape[0], self.num_vision_tokens), vision_value)
        )

    def query_positions(self, action_mask: Tensor) -> Tensor:
        """Absolute positions (B, Q) int64 of the action queries, in order. Text 0 is no slot."""
        # A stable sort puts the slots first, in order; `nonzero` would wait for the device to learn how many there are.
        order = torch.sort(action_mask.byte(), dim=1, descending=True, stable=True).indices
        return order[:, : self.num_action_queries] + self.num_vision_tokens

    def raw_latent(
        self, state: Tensor, attention_mask: Tensor | None, action_mask: Tensor, mode: CrTokenMode
    ) -> tuple[Tensor, Tensor | None]:
        """C_R of one hidden state (B, S, D), and its token mask.

        Args:
            state: hidden state of the layer that `resolve_craft_layer` names.
            attention_mask: (B, L) bool or 0/1; None means no padding.
            action_mask: (B, L) bool.
            mode: which tokens.

        Returns:
            vision_only: the patches (B, N, D) and None. vision_plus_prompt: the whole state (B, S, D) and the bool
            mask (B, S) of patches and prompt, without queries and padding.
        """
        if mode is CrTokenMode.VISION_ONLY:
            return state[:, 1 : 1 + self.num_vision_tokens], None
        # Position 0 is the first prompt token, so it counts.
        prompt = ~action_mask if attention_mask is None else attention_mask.bool() & ~action_mask
        return state, self.multimodal_mask(prompt, True)

    def action_query_latent(self, state: Tensor, action_mask: Tensor) -> Tensor:
        """C_AQ (B, Q, D) of the last hidden state (B, S, D); `action_mask` (B, L) bool."""
        return gather_tokens(state, self.query_positions(action_mask))

    def bridge_states(
        self, hidden_states: Sequence[Tensor], action_mask: Tensor, legacy_slices: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Hidden states the action head reads.

        Args:
            hidden_states: layers + 1 tensors (B, S, D).
            action_mask: (B, L) bool or 0/1, Q slots per row.
            legacy_slices: True = slices published heads were trained on, one position early: task tokens 0..N-1
                (first text token, last patch missing), action tokens one before each query. False = the patches and
                the queries themselves.

        Returns:
            task (B, layers+1, N, D) and action (B, layers+1, Q, D).
        """
        first = 0 if legacy_slices else 1
        positions = self.query_positions(action_mask.bool()) - int(legacy_slices)
        task = torch.stack([state[:, first : first + self.num_vision_tokens] for state in hidden_states], dim=1)
        action = torch.stack([gather_tokens(state, positions) for state in hidden_states], dim=1)
        return task, action


def gather_tokens(states: Tensor, positions: Tensor) -> Tensor:
    """Tokens (B, Q, D) of states (B, S, D) at int64 positions (B, Q)."""
    rows = torch.arange(states.shape[0], device=states.device).unsqueeze(1)
    return states[rows, positions]


def resolve_craft_layer(layer_idx: int | None, num_hidden_states: int) -> int:
    """Index into hidden_states: None -> the middle one, negative counts from the end; ValueError out of range."""
    if layer_idx is None:
        return num_hidden_states // 2
    if not -num_hidden_states <= layer_idx < num_hidden_states:
        raise ValueError(
            f"craft_layer_idx: expected {-num_hidden_states}..{num_hidden_states - 1} (0 = input embeddings), "
            f"got {layer_idx}"
        )
    return layer_idx % num_hidden_states
