"""Vision side of the model: one or two towers over all images, and the projector to the width of the LLM."""

from __future__ import annotations

import torch
from torch import nn

from prismatic.extern.hf.configuration_prismatic import PrismaticConfig
from prismatic.extern.hf.vision_transformer import VisionTransformer
from prismatic.models.activations import activated


class PrismaticVisionBackbone(nn.Module):
    """One or two vision towers; features of fused towers are concatenated on the feature axis, first tower first."""

    def __init__(self, config: PrismaticConfig) -> None:
        """Towers are named `featurizer` and, when fused, `fused_featurizer`."""
        super().__init__()
        self.config = config
        specs = config.tower_specs()
        self.featurizer = VisionTransformer(specs[0])
        if len(specs) == 2:
            self.fused_featurizer = VisionTransformer(specs[1])
        self.embed_dim = sum(spec.embed_dim for spec in specs)

    @property
    def towers(self) -> list[VisionTransformer]:
        """The towers in channel order of `pixel_values`."""
        return [self.featurizer] + ([self.fused_featurizer] if hasattr(self, "fused_featurizer") else [])

    def get_num_patches(self) -> int:
        """Patches per image."""
        return self.featurizer.spec.num_patches

    @property
    def num_images_in_input(self) -> int:
        """Images per sample, kept in the configuration so that it is saved with the model."""
        return self.config.num_images_in_input

    def get_num_images_in_input(self) -> int:
        """Images per sample."""
        return self.num_images_in_input

    def set_num_images_in_input(self, num_images_in_input: int) -> None:
        """Set the images per sample (>= 1, ValueError otherwise)."""
        if num_images_in_input < 1:
            raise ValueError(f"num_images_in_input: expected at least 1, got {num_images_in_input}")
        self.config.num_images_in_input = num_images_in_input

    @property
    def num_vision_tokens(self) -> int:
        """N: vision tokens per sample."""
        return self.get_num_patches() * self.num_images_in_input

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3*towers*n, H, W) -> features (B, N, embed_dim), images in order on the token axis.

        Raises ValueError when the channel count does not match the number of images.
        """
        towers, images = self.towers, self.num_images_in_input
        batch, channels, height, width = pixel_values.shape
        if channels != 3 * len(towers) * images:
            raise ValueError(
                f"pixel_values: expected {3 * len(towers) * images} channels for num_images_in_input={images} and "
                f"{len(towers)} tower(s), found {channels}"
            )
        # Cameras join the batch axis: one call per tower instead of one per image.
        folded = pixel_values.view(batch * images, len(towers), 3, height, width)
        features = torch.cat([tower(folded[:, index]) for index, tower in enumerate(towers)], dim=-1)
        return features.reshape(batch, -1, self.embed_dim)


class PrismaticProjector(nn.Module):
    """MLP from vision width to LLM width: three layers for fused towers, two otherwise, GELU between."""

    def __init__(self, use_fused: bool, vision_dim: int, llm_dim: int, hidden_multiplier: int = 4) -> None:
        """`hidden_multiplier` sets the first layer's width (fused only, in units of `vision_dim`)."""
        super().__init__()
        self.fused = use_fused
        hidden = hidden_multiplier * vision_dim if use_fused else llm_dim
        self.fc1 = nn.Linear(vision_dim, hidden)
        self.fc2 = nn.Linear(hidden, llm_dim)
        if use_fused:
            self.fc3 = nn.Linear(llm_dim, llm_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, N, vision_dim) -> (B, N, llm_dim)."""
        x = self.fc2(activated("gelu", self.fc1(features)))
        return self.fc3(activated("gelu", x)) if self.fused else x
