"""A folder laid out as OpenVLA is published, with random weights of a small geometry."""

from __future__ import annotations

import json
from pathlib import Path

import micro
import torch

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor

QUERIES = "action_queries.weight"
_OURS = ("num_images_in_input", "num_action_queries")


def small_llama_config(tokenizer, **changes) -> OpenVLAConfig:
    """The micro geometry with a llama body: vocabulary padded to a multiple of 64, embeddings and head apart."""
    values = micro.MICRO.config()
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    text = {name: values["text_config"][name] for name in sizes}
    text |= {"model_type": "llama", "vocab_size": -(-len(tokenizer) // 64) * 64, "pad_token_id": len(tokenizer) - 1}
    del values["num_images_in_input"]
    return OpenVLAConfig(**values | {"llm_backbone_id": "llama2-7b-pure", "text_config": text | changes})


def make_openvla_folder(folder: Path, tokenizer) -> Path:
    """Sharded bf16 weights without action queries, statistics inside config.json, no head and no proprio projector."""
    config = small_llama_config(tokenizer)
    config.norm_stats = {"bridge_orig": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}
    torch.manual_seed(4)
    vla = OpenVLAForActionPrediction(config).to(torch.bfloat16)
    state = {name: tensor for name, tensor in vla.state_dict().items() if name != QUERIES}
    vla.save_pretrained(folder, state_dict=state, max_shard_size="100KB")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if k not in _OURS}))
    PrismaticProcessor(PrismaticImageProcessor(input_sizes=[[3, 32, 32]] * 2), tokenizer).save_pretrained(folder)
    return folder
