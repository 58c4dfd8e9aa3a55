"""Folders in the published layout with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.models.presets import build_vla
from prismatic.models.tiny_tokenizer import load_tiny_tokenizer


def make_published_folder(folder: Path, pro: bool = True, preset: str = "tiny", **changes) -> Path:
    """A merged VLM, head and proprio projector. `changes`: fields of config.json, None drops one."""
    vla, head, projector = build_vla(
        preset, seed=3, use_pro_version=pro, chunk_start="zeros", rope_mode="legacy", published_layout=True
    )
    with torch.no_grad():  # gates start at zero, which would hide the vision tokens
        for block in head.model.mlp_resnet_blocks:
            block.gating_factor.fill_(0.3)
    if preset != "tiny":  # published files are bf16, and half as large
        vla.to(torch.bfloat16)
    vla.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    image_size = vla.vision_backbone.featurizer.spec.image_size
    image_processor = PrismaticImageProcessor(input_sizes=[[3, image_size, image_size]] * 2)
    PrismaticProcessor(image_processor, load_tiny_tokenizer()).save_pretrained(folder)
    for name, module in (("action_head", head), ("proprio_projector", projector)):
        state = {f"module.{key}": value for key, value in module.state_dict().items()}
        torch.save(state, folder / f"{name}--checkpoint.pt")
    bounds = {"mean": 0.0, "std": 0.5, "max": 1.0, "min": -1.0, "q01": -0.9, "q99": 0.9}
    statistics = {
        group: {name: [value] * size for name, value in bounds.items()}
        for group, size in (("action", 7), ("proprio", 8))
    }
    statistics["action"]["mask"] = [True] * 6 + [False]
    (folder / "dataset_statistics.json").write_text(json.dumps({"libero_mini_no_noops": statistics}))
    return folder
