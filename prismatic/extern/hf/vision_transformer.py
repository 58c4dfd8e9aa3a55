"""Vision transformer with timm's parameter names, executed only as far as its features are needed."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from prismatic.extern.hf.configuration_prismatic import VisionTowerSpec
from prismatic.models.activations import activated, as_stream, layer_norm


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one strided convolution: (B,3,H,W) -> (B,P,D), row-major patches."""

    def __init__(self, spec: VisionTowerSpec) -> None:
        """`proj` carries timm's parameter name."""
        super().__init__()
        self.proj = nn.Conv2d(3, spec.embed_dim, spec.patch_size, stride=spec.patch_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) -> (B,P,D)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class ConvStem(nn.Module):
    """Stride-2 3x3 convolutions down to the patch grid; learns localisation from few samples.

    Channels double per stage up to `embed_dim`. Group normalisation (one group) keeps samples independent.
    """

    def __init__(self, spec: VisionTowerSpec) -> None:
        """One stage per halving: patch_size 16 gives four stages."""
        super().__init__()
        stages = spec.patch_size.bit_length() - 1
        widths = [3] + [max(8, spec.embed_dim >> (stages - 1 - i)) for i in range(stages)]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths[:-1], widths[1:], strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(1, width) for width in widths[1:])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B,3,H,W) -> (B,P,D)."""
        # Channels last halves the time of small convolutions on CPUs and makes the final transpose free.
        x = images.contiguous(memory_format=torch.channels_last)
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            if index != last:
                x = F.gelu(x)
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with a joint qkv projection."""

    def __init__(self, dim: int, num_heads: int) -> None:
        """`dim` must be a multiple of `num_heads`."""
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B,T,D) -> (B,T,D)."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    """fc1 -> activation -> fc2."""

    def __init__(self, dim: int, hidden: int, act: str) -> None:
        """`act` is a name known to `activated`."""
        super().__init__()
        self.act = act
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...,D) -> (...,D)."""
        return self.fc2(activated(self.act, self.fc1(x)))


class LayerScale(nn.Module):
    """Per-channel scale. Named `scale_factor` because Hugging Face loaders rewrite names containing "gamma"."""

    def __init__(self, dim: int, init: float) -> None:
        """All channels start at `init`."""
        super().__init__()
        self.init = init
        self.scale_factor = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(...,D) -> (...,D)."""
        return (x * self.scale_factor).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, spec: VisionTowerSpec) -> None:
        """Layer scale modules exist only if the spec asks for them (they own parameters)."""
        super().__init__()
        dim = spec.embed_dim
        self.norm1 = nn.LayerNorm(dim, eps=spec.norm_eps)
        self.attn = Attention(dim, spec.num_heads)
        self.ls1 = LayerScale(dim, spec.layer_scale_init) if spec.layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=spec.norm_eps)
        self.mlp = Mlp(dim, spec.mlp_hidden_dim, spec.activation)
        self.ls2 = LayerScale(dim, spec.layer_scale_init) if spec.layer_scale else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B,T,D) -> (B,T,D)."""
        x = x + self.ls1(self.attn(layer_norm(x, self.norm1)))
        return x + self.ls2(self.mlp(layer_norm(x, self.norm2)))


class AttentionPool(nn.Module):
    """Parameters of the pooling head that published SigLIP files contain. Patch features never pass through it."""

    def __init__(self, spec: VisionTowerSpec) -> None:
        """Only the parameter names and shapes matter."""
        super().__init__()
        dim = spec.embed_dim
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=spec.norm_eps)
        self.mlp = Mlp(dim, spec.mlp_hidden_dim, spec.activation)


class VisionTransformer(nn.Module):
    """One vision tower. `forward` returns un-normed patch features of the second to last block.

    The last block, the final norm and the pooling head exist for key compatibility and are never executed
    (see `unreached_module_names`).
    """

    def __init__(self, spec: VisionTowerSpec) -> None:
        """Build every parameter the published layout names."""
        super().__init__()
        self.spec = spec
        self._gradient_checkpointing_func: Callable[..., torch.Tensor]  # given with the next
        self.gradient_checkpointing = False  # set by `apply_tuning`, or Hugging Face's `gradient_checkpointing_enable`
        dim = spec.embed_dim
        if spec.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if spec.reg_tokens:
            self.reg_token = nn.Parameter(torch.zeros(1, spec.reg_tokens, dim))
        positions = spec.num_patches + (spec.num_prefix_tokens if spec.pos_embed == "all" else 0)
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, dim))
        self.patch_embed = ConvStem(spec) if spec.stem == "conv" else PatchEmbed(spec)
        if spec.pre_norm:
            self.norm_pre = nn.LayerNorm(dim, eps=spec.norm_eps)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(dim, eps=spec.norm_eps)
        if spec.attention_pool:
            self.attn_pool = AttentionPool(spec)

    @property
    def unreached_module_names(self) -> list[str]:
        """Submodules that never influence the features."""
        return [f"blocks.{self.spec.depth - 1}", "norm"] + (["attn_pool"] if self.spec.attention_pool else [])

    def reset_embeddings(self, std: float) -> None:
        """Draw class, register and position embeddings from N(0, std)."""
        for name in ("cls_token", "reg_token", "pos_embed"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=std)

    def _embed(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        names = [name for name in ("cls_token", "reg_token") if hasattr(self, name)]
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in names]
        if self.spec.pos_embed == "all":
            x = torch.cat([*prefix, x], dim=1) + self.pos_embed
        else:
            x = torch.cat([*prefix, x + self.pos_embed], dim=1)
        return as_stream(self.norm_pre(x) if self.spec.pre_norm else x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B,3,H,W), normalised floats -> patch features (B,P,D). ValueError on a wrong image size."""
        size = (self.spec.image_size, self.spec.image_size)
        if tuple(images.shape[-2:]) != size:
            raise ValueError(f"vision tower: expected images of {size} pixels, got {tuple(images.shape[-2:])}")
        x = self._embed(images)
        for block in self.blocks[: self.spec.depth - 1]:
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(block.__call__, x)
            else:
                x = block(x)
        return x[:, self.spec.num_prefix_tokens :]
