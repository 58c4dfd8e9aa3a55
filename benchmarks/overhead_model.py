"""Random models of each size, and one random batch."""

from __future__ import annotations

import torch
from overhead_config import OverheadConfig

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.models.presets import build_policy_parts, build_vla
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.config import FinetuneConfig
from prismatic.training.lora import fixed_batch
from prismatic.training.setup import apply_tuning


def mid_config() -> OpenVLAConfig:
    """About 60 M parameters with the published ratio of vision to language FLOPs (about 1.5): 160 px, two images."""
    tower = {"image_size": 160, "patch_size": 16, "embed_dim": 384, "depth": 9, "num_heads": 6, "mlp_hidden_dim": 1536}
    text = {
        "model_type": "qwen2",
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="qwen25-0_5b-extra",
        arch_specifier="no-align+fused-gelu-mlp",
        image_resize_strategy="resize-naive",
        image_sizes=[160, 160],
        num_images_in_input=2,
        pad_token_id=0,
        projector_hidden_multiplier=1,
        vision_towers=[{**tower, "class_token": True, "reg_tokens": 4, "layer_scale": True}, tower],
        text_config=text,
    )


def build_model(cfg: OverheadConfig) -> VLAPolicyModel:
    """Random weights with the trainable ones chosen."""
    if cfg.size == "mid":
        parts = build_policy_parts(mid_config(), published_layout=False)
    else:
        parts = build_vla({"tiny": "tiny", "full": "qwen25-0_5b"}[cfg.size])
    model = VLAPolicyModel(*parts)
    lora = {"use_lora": True, "lora_rank": cfg.lora_rank} if cfg.tuning == "lora" else {}
    apply_tuning(model, FinetuneConfig(**lora))
    return model.train()


def random_batch(model: VLAPolicyModel, cfg: OverheadConfig) -> dict:
    """Noise images, random prompt of 50 tokens (24 below the published size), random state and actions."""
    batch = fixed_batch(model, rows=cfg.batch_size, prompt_length=50 if cfg.size == "full" else 24)
    geometry, generator = model.action_head.geometry, torch.Generator().manual_seed(1)
    batch["actions"] = 2 * torch.rand(cfg.batch_size, geometry.chunk_len, geometry.action_dim, generator=generator) - 1
    batch["keys"] = [(0, i) for i in range(cfg.batch_size)]
    return batch
