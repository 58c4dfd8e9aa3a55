"""The start model of a run without its weights: a module on the meta device, made from descriptions alone."""

from __future__ import annotations

import torch

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.model_files import reading
from prismatic.models.presets import PRESETS, build_policy_parts, build_processor
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import load_processor, read_config, read_manifest, read_statistics
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.training.config import FinetuneConfig
from prismatic.training.folder_kinds import check_is_checkpoint, is_published
from prismatic.training.instruction_record import recorded_instructions
from prismatic.training.published import published_shape
from prismatic.training.setup import StartModel, action_spec_of_data, head_flags, load_start_model, native_config
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.images import ImageSpec


def empty_start(cfg: FinetuneConfig) -> StartModel:
    """What `load_start_model` would load, without content. Raises what that does for descriptions that do not fit."""
    source = cfg.config_file_path.rstrip("/")
    if cfg.vlm_path:
        return _empty_native(cfg, source)
    if source in PRESETS:
        with torch.device("meta"):
            return load_start_model(cfg)
    path = check_is_checkpoint(source)
    if is_published(path):
        shape = published_shape(path, cfg.num_images_in_input, cfg.robot_platform, cfg.dataset_name)
        model = _empty(shape.config, shape.head, shape.proprio_dim, legacy_slices=True)
        image = ImageSpec(size=shape.config.tower_specs()[0].image_size)
        processor, statistics = load_processor(path, model.vla), read_statistics(path)
        return StartModel(model, processor, shape.action_spec, image, None, "published", statistics)
    manifest, spec = read_manifest(path), None
    with reading(path / MANIFEST):
        spec, image = ActionSpec.from_dict(manifest["action_spec"]), ImageSpec.from_dict(manifest["image_spec"])
        proprio_dim = spec.proprio_dim if manifest["use_proprio"] else None
        model = _empty(read_config(path), manifest["action_head"], proprio_dim, manifest["legacy_slices"])
    return StartModel(
        model,
        load_processor(path, model.vla),
        spec,
        image,
        None,
        "published" if manifest.get("origin") == "published" else "craft",
        read_statistics(path),
        manifest["datasets"],
        recorded_instructions(manifest, path / MANIFEST),
    )


def _empty_native(cfg: FinetuneConfig, source: str) -> StartModel:
    config, spec = native_config(cfg, source), action_spec_of_data(cfg)
    model = _empty(config, head_flags(cfg, spec), spec.proprio_dim, bool(cfg.legacy_slices))
    is_preset = source in PRESETS
    processor = build_processor(source, cfg.tokenizer_path) if is_preset else PrismaticProcessor.from_pretrained(source)
    return StartModel(model, processor, spec, ImageSpec(size=config.tower_specs()[0].image_size), None, "native")


def _empty(config: OpenVLAConfig, head: dict, proprio_dim: int | None, legacy_slices: bool) -> VLAPolicyModel:
    with torch.device("meta"):
        vla, action_head, projector = build_policy_parts(config, 0, proprio_dim or 1, **head)
        return VLAPolicyModel(vla, action_head, projector if proprio_dim else None, legacy_slices)
