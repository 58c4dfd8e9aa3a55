"""What the start model of a run looks like, from descriptions alone: no weights are read into memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.models.action_heads import ActionHeadConfig
from prismatic.models.presets import PRESETS, PROPRIO_DIM, build_config, build_policy_parts, get_preset, head_geometry
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import read_config, read_manifest
from prismatic.training.config import FinetuneConfig
from prismatic.training.folder_kinds import check_is_checkpoint, is_published
from prismatic.training.published import published_shape
from prismatic.training.setup import action_spec_of_data, head_flags, native_config
from prismatic.vla.action_spec import ActionSpec


@dataclass(frozen=True)
class PolicyShape:
    """Everything that decides the sizes of a policy.

    config: of the VLM. head: fields of `ActionHeadConfig`. proprio_dim: P, None for a policy without a projector.
    """

    config: OpenVLAConfig
    head: dict
    proprio_dim: int | None
    legacy_slices: bool = False

    def build_empty(self) -> VLAPolicyModel:
        """The policy on the meta device: sizes without content."""
        with torch.device("meta"):
            vla, head, projector = build_policy_parts(self.config, 0, self.proprio_dim or PROPRIO_DIM, **self.head)
            projector = None if self.proprio_dim is None else projector
            return VLAPolicyModel(vla, head, projector, legacy_slices=self.legacy_slices)


def shape_of_preset(name: str, proprio_dim: int = PROPRIO_DIM, **options: object) -> PolicyShape:
    """A preset; `options` are of its head. Raises KeyError for an unknown one."""
    preset, config = get_preset(name), build_config(name)
    return PolicyShape(config, {**head_geometry(config), **preset.head, **options}, proprio_dim)


def shape_of_start(cfg: FinetuneConfig) -> PolicyShape:
    """The start model that `load_start_model` would load; raises what that does for a folder that is none."""
    source, legacy = cfg.config_file_path.rstrip("/"), bool(cfg.legacy_slices)
    if cfg.vlm_path or source in PRESETS:
        spec = action_spec_of_data(cfg)
        flags = head_flags(cfg, spec)
        if not cfg.vlm_path:
            return shape_of_preset(source, spec.proprio_dim, **flags)
        config = native_config(cfg, source)
        return PolicyShape(config, {**head_geometry(config), **flags}, spec.proprio_dim, legacy)
    path = check_is_checkpoint(source)
    if is_published(path):
        config, head, proprio = published_shape(path, cfg.num_images_in_input, cfg.robot_platform, cfg.dataset_name)
        return PolicyShape(config, head, proprio, True)
    return _own_shape(path)


def _own_shape(path: Path) -> PolicyShape:
    manifest = read_manifest(path)
    head = ActionHeadConfig.from_dict(manifest["action_head"]).to_dict()
    proprio = ActionSpec.from_dict(manifest["action_spec"]).proprio_dim if manifest["use_proprio"] else None
    return PolicyShape(read_config(path), head, proprio, manifest["legacy_slices"])
