"""Inputs of the published `forward` that we read in another form, ignore or refuse."""

from __future__ import annotations

from typing import Any

import torch

IGNORE_INDEX = -100
# Labels above this id count as action tokens: tokenizer vocabulary (Qwen2.5: 151643) minus 256 bins minus 1.
ACTION_TOKEN_BEGIN_IDX = 151386
_ACTION_TOKEN_BEGIN = {"qwen2": ACTION_TOKEN_BEGIN_IDX, "llama": 32000 - 256 - 1}


def action_mask_from_labels(labels: torch.Tensor, body: str = "qwen2") -> torch.Tensor:
    """Bool (B, L) union mask by the published rule: supervised (not -100) labels above the first action token.

    `body` is `text_config.model_type`. The published current/next split by cumulative counts only partitions this set.
    """
    return (labels != IGNORE_INDEX) & (labels > _ACTION_TOKEN_BEGIN[body])


def check_unsupported(cached: bool | None, inputs_embeds: Any, pixel_values: Any) -> None:
    """NotImplementedError for cached generation and for text embeddings beside pixels."""
    if cached:
        raise NotImplementedError("cached generation is not supported: actions come from one parallel pass")
    if inputs_embeds is not None and pixel_values is not None:
        raise NotImplementedError("`inputs_embeds` together with `pixel_values` is not supported")


def check_craft(features: bool | None, raw_only: bool, pixel_values: Any) -> None:
    """ValueError for C_R alone without the features, and for features without images."""
    if raw_only and not features:
        raise ValueError("craft_raw_only needs output_craft_features")
    if features and pixel_values is None:
        raise ValueError("CRaFT features need `pixel_values`")


def check_compat(compat: dict[str, Any]) -> None:
    """Reject inputs outside the implemented scope instead of ignoring them."""
    ignored = {"proprio", "proprio_projector"}
    out_of_scope = {"noisy_actions", "noisy_action_projector", "diffusion_timestep_embeddings", "use_film"}
    for name, value in compat.items():
        if name in out_of_scope and value not in (None, False):
            raise NotImplementedError(f"`{name}`: diffusion and FiLM are not supported")
        if name not in ignored | out_of_scope:
            raise TypeError(f"forward() got an unexpected argument {name!r}")
