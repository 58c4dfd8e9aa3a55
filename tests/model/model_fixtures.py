"""Builders shared by the model tests: a very small model for property tests and batches for it."""

import torch

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction


def max_difference(a, b):
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()


def small_config(**overrides):
    """Two towers of 16 px (4 patches), LLM of width 32 with 2 layers, 5 action queries, 2 images."""
    tower = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 24}
    values = {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "qwen25-0_5b-extra",
        "num_images_in_input": 2,
        "num_action_queries": 5,
        "projector_hidden_multiplier": 1,
        "vision_towers": [
            {**tower, "class_token": True, "reg_tokens": 2, "layer_scale": True},
            {**tower, "attention_pool": True},
        ],
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": 50,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    }
    return OpenVLAConfig(**(values | overrides))


LLAMA_TEXT = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
"""Like Llama-2's: as many key heads as heads, embeddings and head apart."""


def small_model(seed=0, **overrides):
    torch.manual_seed(seed)
    return OpenVLAForActionPrediction(small_config(**overrides)).eval()


def ragged_batch(model, prompt_lengths=(6, 3, 4), seed=1):
    """Right-padded batch for `model`; prompts of the given lengths, then the query slots."""
    generator = torch.Generator().manual_seed(seed)
    queries, count = model.num_action_queries, len(prompt_lengths)
    length = max(prompt_lengths) + queries
    spec = model.vision_backbone.featurizer.spec
    channels = 3 * len(model.vision_backbone.towers) * model.vision_backbone.num_images_in_input
    positions = torch.arange(length)[None]
    prompts = torch.tensor(prompt_lengths)[:, None]
    return {
        "input_ids": torch.randint(1, 50, (count, length), generator=generator),
        "attention_mask": positions < prompts + queries,
        "action_mask": (positions >= prompts) & (positions < prompts + queries),
        "pixel_values": torch.randn(count, channels, spec.image_size, spec.image_size, generator=generator),
        "proprio": torch.rand(count, 8, generator=generator) * 2 - 1,
    }


def vlm_inputs(batch):
    return {k: batch[k] for k in ("input_ids", "attention_mask", "action_mask", "pixel_values")}
