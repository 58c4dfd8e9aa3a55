"""The start model of a run without its weights: a module on the meta device, made from descriptions alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.model_files import reading
from prismatic.models.presets import PRESETS, build_config, build_policy_parts, build_processor, get_preset
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import load_processor, read_config, read_manifest, read_statistics
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.training.config import FinetuneConfig
from prismatic.training.folder_kinds import check_is_checkpoint, is_published, is_vlm
from prismatic.training.instruction_record import recorded_instructions
from prismatic.training.published import published_shape
from prismatic.training.setup import StartModel, action_spec_of_data, head_flags, native_config, with_images
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.registry import load_data_set_file
from prismatic.vla.images import ImageSpec


@dataclass(frozen=True)
class _Shape:
    """What decides the sizes of a start model, and where it comes from (`StartModel.origin`)."""

    config: OpenVLAConfig
    head: dict[str, Any]
    spec: ActionSpec
    has_proprio: bool
    legacy_slices: bool
    origin: str

    def empty(self) -> VLAPolicyModel:
        with torch.device("meta"):
            vla, head, projector = build_policy_parts(self.config, 0, self.spec.proprio_dim, **self.head)
            return VLAPolicyModel(vla, head, projector if self.has_proprio else None, self.legacy_slices)


def empty_model(cfg: FinetuneConfig) -> VLAPolicyModel:
    """The policy of `empty_start`, for which no tokenizer is needed, for the data sets of `--data_set_file` too."""
    if cfg.data_set_file is not None:
        load_data_set_file(cfg.data_set_file)
    return _shape(cfg).empty()


def empty_start(cfg: FinetuneConfig) -> StartModel:
    """What `load_start_model` would load, without content. Raises what that does for descriptions that do not fit."""
    shape, source = _shape(cfg), cfg.config_file_path.rstrip("/")
    model, path = shape.empty(), Path(source)
    image = ImageSpec(size=shape.config.tower_specs()[0].image_size)
    if source in PRESETS:
        processor = build_processor(source, cfg.tokenizer_path)
    else:
        processor = PrismaticProcessor.from_pretrained(source) if cfg.vlm_path else load_processor(path, model.vla)
    start = StartModel(model, processor, shape.spec, image, None, shape.origin)
    if not (path / MANIFEST).exists():
        start.statistics = read_statistics(path) if shape.origin == "published" else {}
        return start
    manifest = read_manifest(path)
    start.image_spec, start.dataset_metadata = ImageSpec.from_dict(manifest["image_spec"]), manifest["datasets"]
    start.statistics, start.instructions = read_statistics(path), recorded_instructions(manifest, path / MANIFEST)
    return start


def _shape(cfg: FinetuneConfig) -> _Shape:
    source, legacy = cfg.config_file_path.rstrip("/"), bool(cfg.legacy_slices)
    if cfg.vlm_path or source in PRESETS or is_vlm(Path(source)):
        spec, head, origin = action_spec_of_data(cfg), {}, "native"
        if cfg.vlm_path:
            config = native_config(cfg, source)
        elif source in PRESETS:
            preset, config = get_preset(source), with_images(build_config(source), cfg)
            head, origin = preset.head, "random" if preset.language_model is None else "llm"
        else:
            config, origin = with_images(read_config(Path(source)), cfg), "vlm"
        return _Shape(config, head | head_flags(cfg, spec), spec, True, legacy, origin)
    path = check_is_checkpoint(source)
    if is_published(path):
        found = published_shape(path, cfg.num_images_in_input, cfg.robot_platform, cfg.dataset_name)
        return _Shape(found.config, found.head, found.action_spec, found.has_proprio, True, "published")
    manifest = read_manifest(path)
    with reading(path / MANIFEST):
        spec = ActionSpec.from_dict(manifest["action_spec"])
    origin = "published" if manifest.get("origin") == "published" else "craft"
    use_proprio, legacy = manifest["use_proprio"], manifest["legacy_slices"]
    return _Shape(read_config(path), manifest["action_head"], spec, use_proprio, legacy, origin)
