"""Checkpoint folders in the published VLA-Adapter layout: reading them, and writing what the public code reads.

    config.json, model.safetensors (or shards)              the merged VLM, bf16
    action_head--*checkpoint.pt, proprio_projector--*checkpoint.pt     state dicts, keys with a `module.` prefix
    dataset_statistics.json, tokenizer and preprocessor files

Such a folder does not say whether its head is plain or Pro, how many images it takes, or that its head reads shifted
slices under bf16 rotary angles. The first follows from the keys; the rest is fixed by the origin.
"""

from __future__ import annotations

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from prismatic.evidence.files import write_json
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.model_files import CheckpointError, read_json, reading, regular_file
from prismatic.models.action_heads import ChunkStart, L1RegressionActionHead, RopeMode
from prismatic.models.projectors import ProprioProjector
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import (
    FORMAT_VERSION,
    LoadedCheckpoint,
    build_and_fill,
    contiguous,
    load_processor,
    load_vla,
    read_config,
    read_statistics,
)
from prismatic.training.checkpoint_folder import recover, replace_folder, start_folder
from prismatic.training.model_card import write_card
from prismatic.training.published_spec import HeadSizes, published_spec
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.images import ImageSpec

PUBLISHED_TASK_TOKENS = 512
"""Vision tokens that published heads are built for, whatever the model: two images of 256 patches."""
PUBLISHED_HEADS = 8
_HEAD, _PROPRIO = "action_head", "proprio_projector"
_AUTO_MAP = {
    "AutoConfig": "configuration_prismatic.OpenVLAConfig",
    "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
}


def load_published(
    path: str | Path,
    num_images: int | None = None,
    robot: str | ActionSpec | None = None,
    data_set: str | None = None,
) -> LoadedCheckpoint:
    """Read a published folder; everything it does not state is derived and recorded in the manifest.

    Args:
        path: the folder.
        num_images: images per sample; None takes the config's own entry or, as published folders have none, the 512
            vision tokens of published heads divided by the patches of an image.
        robot, data_set: what says chunk length and normalisation when the names in the statistics do not
            (`published_spec`).

    Raises FileNotFoundError for a missing file, ValueError for keys or shapes that do not fit, naming them.
    """
    path = Path(path)
    _refuse_oft(path)
    statistics, projector = read_statistics(path), None
    head_file, state, proprio, spec = _components(path, statistics, robot, data_set)
    vla = load_vla(path, num_images or _published_num_images(path))
    if proprio is not None:
        file, sized = _only_component(path, _PROPRIO), (vla.llm_dim, spec.proprio_dim)
        projector = build_and_fill(lambda: ProprioProjector(*sized), proprio, file)
    else:
        statistics = {name: _without_proprio(entry, spec) for name, entry in statistics.items()}
    options = _head_options(state, cast(OpenVLAConfig, vla.config), spec)
    with reading(head_file):
        head = build_and_fill(lambda: L1RegressionActionHead(**options), state, head_file)
    with reading(path):
        model = VLAPolicyModel(vla, head, projector, legacy_slices=True).eval()
    manifest = _derived_manifest(model, spec) | {"step": _step_in_name(head_file)}
    return LoadedCheckpoint(model, load_processor(path, vla), manifest, statistics, path)


@dataclass(frozen=True)
class PublishedShape:
    """Sizes of a published policy."""

    config: OpenVLAConfig
    head: dict[str, Any]
    action_spec: ActionSpec
    has_proprio: bool


def published_shape(
    path: Path, num_images: int | None = None, robot: str | ActionSpec | None = None, data_set: str | None = None
) -> PublishedShape:
    """What `load_published` would load, without reading the VLM's weights; arguments and errors as there."""
    _, state, proprio, spec = _components(path, read_statistics(path), robot, data_set)
    config = read_config(path)
    config.num_images_in_input = num_images or _published_num_images(path)
    return PublishedShape(config, _head_options(state, config, spec), spec, proprio is not None)


def _components(
    path: Path, statistics: dict[str, Any], robot: str | ActionSpec | None, data_set: str | None
) -> tuple[Path, dict[str, Tensor], dict[str, Tensor] | None, ActionSpec]:
    """The head's file, the tensors of head and proprio projector, and the action specification."""
    head_file = _only_component(path, _HEAD)
    state = read_component(head_file)
    proprio = read_component(_only_component(path, _PROPRIO)) if _component_files(path, _PROPRIO) else None
    sizes = HeadSizes(_action_dim(state, head_file), None if proprio is None else _proprio_dim(proprio, path))
    return head_file, state, proprio, published_spec(sizes, statistics, path, robot, data_set)


def _without_proprio(entry: dict[str, Any], spec: ActionSpec) -> dict[str, Any]:
    """Statistics of a policy that reads no robot state: public files hold zeros of any number there, or nothing."""
    quantities = ("mean", "std", "max", "min", "q01", "q99")
    found = entry.get("proprio")
    if isinstance(found, dict) and all(len(found.get(name) or ()) == spec.proprio_dim for name in quantities):
        return entry
    return entry | {"proprio": dict.fromkeys(quantities, [0.0] * spec.proprio_dim)}


def _derived_manifest(model: VLAPolicyModel, spec: ActionSpec) -> dict[str, Any]:
    image = ImageSpec(size=model.vla.vision_backbone.featurizer.spec.image_size)
    return {
        "format_version": FORMAT_VERSION,
        "origin": "published",
        "tuning": "full",
        "action_spec": spec.to_dict(),
        "image_spec": image.to_dict(),
        "prompt_kind": model.prompt_kind.value,
        "num_images": model.num_images,
        "use_proprio": model.proprio_projector is not None,
        "legacy_slices": True,
        "action_head": model.action_head.geometry.to_dict(),
        "datasets": {},
    }


# ------------------------------------------------------------------------------------------------ reading


def _refuse_oft(path: Path) -> None:
    if read_config(path).text_config.model_type == "llama":
        raise CheckpointError(
            f"{path}: an action head beside a llama body is OpenVLA-OFT's, which reads the last layer of a model that "
            "attends in both directions: another model, which is not read"
        )


def _published_num_images(path: Path) -> int:
    config = read_config(path)
    if read_json(path / "config.json").get("num_images_in_input") is not None:
        return config.num_images_in_input
    with reading(path / "config.json"):
        patches = config.tower_specs()[0].num_patches
    if PUBLISHED_TASK_TOKENS % patches:
        raise CheckpointError(
            f"{path}: config.json states no number of images, and the {PUBLISHED_TASK_TOKENS} vision tokens of a "
            f"published head are no multiple of {patches} patches per image: pass --num_images_in_input"
        )
    return PUBLISHED_TASK_TOKENS // patches


def _action_dim(state: dict[str, Tensor], file: Path) -> int:
    missing = [key for key in ("model.fc1.weight", "model.fc2.weight") if key not in state]
    if missing:
        raise CheckpointError(f"{file}: not an L1 action head: {missing} missing, found {sorted(state)[:8]}")
    return state["model.fc2.weight"].shape[0]


def _proprio_dim(state: dict[str, Tensor], path: Path) -> int:
    if "fc1.weight" not in state:
        file = _only_component(path, _PROPRIO)
        raise CheckpointError(f"{file}: not a proprio projector: fc1.weight is missing, found {sorted(state)[:8]}")
    return state["fc1.weight"].shape[-1]


def _head_options(state: dict[str, Tensor], config: OpenVLAConfig, spec: ActionSpec) -> dict[str, Any]:
    blocks = {int(m[1]) for key in state if (m := re.match(r"model\.mlp_resnet_blocks\.(\d+)\.", key))}
    return {
        "hidden_dim": state["model.fc2.weight"].shape[-1],
        "action_dim": spec.action_dim,
        "chunk_len": spec.chunk_len,
        "num_blocks": max(1, len(blocks)),
        "num_heads": PUBLISHED_HEADS,
        "num_task_tokens": config.tower_specs()[0].num_patches * config.num_images_in_input,
        "use_pro_version": any(".k_self." in key for key in state),
        "rope_mode": RopeMode.LEGACY,
        "chunk_start": ChunkStart.ZEROS,
        "published_layout": True,
    }


def read_component(file: Path) -> dict[str, Tensor]:
    """State dict of a published `.pt` file in fp32, without the `module.` prefix that DDP left in its keys."""
    try:
        state = torch.load(regular_file(file), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: expected tensors alone, found other objects, which are not read") from error
    except (RuntimeError, ValueError, EOFError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: truncated, or not a file written by torch.save: {error}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: expected a state dict (name -> tensor), found {type(state).__name__}")
    return {key.removeprefix("module."): value.float() for key, value in state.items()}


def _component_files(path: Path, component: str) -> list[Path]:
    return sorted(file for file in path.glob(f"{component}--*checkpoint.pt") if file.is_file())


def _only_component(path: Path, component: str) -> Path:
    files = _component_files(path, component)
    if len(files) != 1:
        found = [file.name for file in files]
        raise CheckpointError(f"{path}: expected exactly one {component}--*checkpoint.pt, found {found}")
    return files[0]


def _step_in_name(file: Path) -> int | None:
    match = re.search(r"--(\d+)_checkpoint", file.name)
    return None if match is None else int(match[1])


# ------------------------------------------------------------------------------------------------ writing


def check_exportable(model: VLAPolicyModel) -> None:
    """ValueError listing what the public evaluation code cannot express: it would load the weights and act wrongly."""
    geometry = model.action_head.geometry
    problems = []
    if not model.legacy_slices:
        problems.append("the head reads the true token positions, the public code the shifted ones")
    if geometry.use_pro_version and geometry.rope_mode is not RopeMode.LEGACY:
        problems.append("rotary angles are exact, the public code's are bf16")
    if geometry.chunk_start is not ChunkStart.ZEROS:
        problems.append("the chunk starts from learned rows")
    if geometry.use_pro_version and not geometry.published_layout:
        problems.append("the head lacks the film_gen tensors")
    if model.vla.config.text_config.model_type == "llama":
        problems.append("the llama body attends to the past alone, the public code's in both directions")
    if model.vla.config.vision_towers is not None:
        problems.append("the vision towers have a geometry of their own")
    if problems:
        raise ValueError(
            f"--export_published_layout: {'; '.join(problems)}. Only policies that started from published weights, or "
            "with --legacy_slices True, have this layout"
        )


def export_published(
    checkpoint: LoadedCheckpoint, folder: str | Path, suffix: str, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Write the policy as the public evaluation code reads it; returns the folder.

    Args:
        checkpoint: a policy with a merged VLM; its weights are converted to `dtype` in place.
        folder: target, replaced when it exists.
        suffix: of the component files, `{step}_checkpoint` or `latest_checkpoint`.
        dtype: of all files; published ones are bf16.

    `check_exportable` says whether the public code would run the policy as it was trained.
    """
    folder = Path(folder)
    temporary = start_folder(folder)
    model = checkpoint.model.to(dtype)
    model.vla.save_pretrained(temporary, max_shard_size="50GB")  # the public loader is written for one file
    config = read_json(temporary / "config.json")
    write_json(temporary / "config.json", config | {"auto_map": _AUTO_MAP})
    checkpoint.processor.save_pretrained(temporary)
    write_json(temporary / "dataset_statistics.json", checkpoint.statistics)
    _write_component(model.action_head.state_dict(), temporary / f"{_HEAD}--{suffix}.pt")
    if model.proprio_projector is not None:
        _write_component(model.proprio_projector.state_dict(), temporary / f"{_PROPRIO}--{suffix}.pt")
    write_card(temporary, manifest=checkpoint.manifest, earlier=folder)
    recover(folder)  # what a dead process left
    replace_folder(temporary, folder)
    return folder


def _write_component(state: dict[str, Tensor], file: Path) -> None:
    torch.save({f"module.{name}": tensor for name, tensor in contiguous(state).items()}, file)
