"""Native Prismatic checkpoints: from their `.pt` file straight into our model, without a second model or the network.

    <run>/config.json              "model" (a VLM) or "vla" (a policy trained natively)
    <run>/checkpoints/step-*.pt    {"model": {"projector": ..., "llm_backbone": ..., and maybe "vision_backbone": ...}}
    <run>/vision_backbone/         ours, optional: weights of vision towers that the file leaves out

A native run stores the components it trained. VLMs keep their vision towers frozen as a rule, so that their files hold
no `vision_backbone`: those towers are the published timm weights and have to be given beside the file. A component that
is stored is stored whole, including what the forward pass never runs (last block, final norm, attention pool). Rotary
tables are derived from the configuration and are in no file.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prismatic.evidence.checks import FOREIGN, read_object
from prismatic.evidence.hashes import sha256_of
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, VisionTowerSpec
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.model_files import MissingFileError, nothing_there, regular_file

VISION_FOLDER = "vision_backbone"
"""Folder of a native run where vision weights are looked for when the checkpoint file has none."""

_QUERIES = "action_queries.weight"
_LM_HEAD, _EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
_VISION_PREFIX = "vision_backbone."
_STEP_NAME = re.compile(r"step-(\d+)(?:\D.*)?\.pt")
_LATEST = "latest-checkpoint.pt"
_TOWERS = {
    "featurizer": "featurizer",
    "dino_featurizer": "featurizer",
    "siglip_featurizer": "fused_featurizer",
    "clip_featurizer": "fused_featurizer",
}
_PROJECTOR_LAYERS = {"projector.0": "fc1", "projector.2": "fc2", "projector.4": "fc3"}
# Fields that decide what the weights mean; `model_id` is only a name and `llm_max_length` informational.
_CONFIG_FIELDS = (
    "vision_backbone_id",
    "llm_backbone_id",
    "arch_specifier",
    "image_resize_strategy",
)


@dataclass(frozen=True)
class NativeReport:
    """What was loaded.

    `file` is the checkpoint, `vision_files` the files of separately given vision weights (empty when the checkpoint
    holds them). `sha256` runs over the bytes of `file` and then of `vision_files`, so that without the latter it is
    the checksum of the file. `missing` are the model's keys that no file holds: the action queries and, where the file
    stores a tied table once, the LM head.
    """

    file: Path
    sha256: str
    missing: tuple[str, ...]
    vision_files: tuple[Path, ...] = ()


def find_native_checkpoint(path: str | Path) -> Path:
    """The `.pt` file of a native checkpoint.

    Args:
        path: a `.pt` file, a folder with `checkpoints/*.pt`, or a folder of `.pt` files. Of several files the one with
            the highest `step-<n>` in its name is taken; `latest-checkpoint.pt` counts only where no file has a number.

    Raises FileNotFoundError when nothing fits, ValueError for a file of another kind or two files of the same step;
    both name the path, what was found and what was expected.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".pt":
            raise ValueError(
                f"{path}: expected a native checkpoint, a .pt file, found a file ending in {path.suffix!r}"
            )
        return path
    if not path.is_dir():
        raise MissingFileError(nothing_there(str(path), "a native checkpoint (a .pt file or a folder)"))
    place = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    files = sorted(file for file in place.glob("*.pt") if file.is_file())
    steps = [(int(match[1]), file) for file in files if (match := _STEP_NAME.fullmatch(file.name))]
    if steps:
        newest = max(step for step, _ in steps)
        candidates = [file for step, file in steps if step == newest]
        if len(candidates) > 1:
            names = [file.name for file in candidates]
            raise ValueError(f"{place}: expected one file of step {newest}, found {names}; name the .pt file itself")
        return candidates[0]
    if (place / _LATEST).is_file():
        return place / _LATEST
    raise FileNotFoundError(
        f"{place}: expected step-<number>-*.pt or {_LATEST}, found {_some(sorted(p.name for p in place.iterdir()))}"
    )


def native_to_hf_state_dict(components: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rename the tensors of a native checkpoint to the keys of our model; tensors are passed on, not copied.

    Args:
        components: the checkpoint's "model" entry: tensors by component (`projector`, `llm_backbone`,
            `vision_backbone`) and key without the component's name. Components without tensors are skipped.

    Raises ValueError listing components and keys outside the native layout, or two keys with the same meaning.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for component, tensors in components.items():
        rename = _RENAMES.get(component)
        for key, tensor in tensors.items():
            name = rename(key) if rename else None
            if name is None:
                unknown.append(f"{component}.{key}")
            elif name in renamed:
                raise ValueError(f"two native keys stand for `{name}`, the second is `{component}.{key}`")
            else:
                renamed[name] = tensor
    if unknown:
        raise ValueError(
            f"unknown native keys {_some(unknown)}; expected projector.projector.{{0,2,4}}.*, llm_backbone.llm.* and "
            f"vision_backbone.<tower>.* with a tower of {sorted(_TOWERS)}"
        )
    return renamed


def load_native_weights(
    vla: OpenVLAForActionPrediction, path: str | Path, vision_weights: str | Path | None = None
) -> NativeReport:
    """Copy the weights of a native checkpoint (VLM or VLA) into `vla`, in the dtype and on the device it has.

    The file is mapped, not read: beyond the model, memory for at most one tensor is used. The action queries keep the
    values they have, since no native model knows them.

    Args:
        vla: model to fill, not on the meta device. After an error raised while copying its weights are undefined;
            wrong keys and shapes are found before.
        path: see `find_native_checkpoint`.
        vision_weights: weights of the vision towers for a checkpoint without them, default the folder
            `vision_backbone/` of the native run. Either a safetensors file or a folder with `model*.safetensors` that
            use our key names (`vision_backbone.*`, other keys are ignored), or a folder with timm's own weights, one
            `<timm id>.safetensors` or `<timm id>/*.safetensors` per tower (`config.timm_model_ids`).

    Raises:
        FileNotFoundError: no checkpoint or no vision weights at the path.
        ValueError: unreadable or truncated file, unknown, missing or unexpected keys, a shape (as of another
            vocabulary) or dtype that does not fit, non-finite values, vision weights given twice or not at all.
    """
    file = find_native_checkpoint(path)
    components = _read_components(file)
    try:
        tensors = native_to_hf_state_dict(components)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    vision, vision_files = _separate_vision(vla.config, file, tensors, vision_weights)
    tensors |= vision
    source = f"{file} with components {sorted(components)}"
    if vision:
        source += f" and vision weights {[str(f) for f in vision_files]}"
    state = vla.state_dict()
    missing = _check_keys(state, tensors, _is_tied(vla), source)
    _check_tensors(state, tensors, source)
    if _is_tied(vla) and _LM_HEAD in tensors:
        _check_equal(tensors.pop(_LM_HEAD), tensors[_EMBEDDINGS], source)
    _copy(state, tensors, source)
    return NativeReport(file, sha256_of(file, *vision_files), missing, vision_files)


def check_native_config(path: str | Path, config: OpenVLAConfig) -> None:
    """Compare the `config.json` of a native checkpoint with the configuration of the model that is to hold it.

    Every field stated under "model" (a VLM) or "vla" (a VLA) that our configuration has as well must be equal:
    vision_backbone_id, llm_backbone_id, arch_specifier, image_resize_strategy. A VLA's `base_vlm` is
    checked the same way when it is a folder with a `config.json`.

    Args:
        path: the native folder or its `.pt` file. Without a `config.json` a bare `.pt` (or a folder of them) passes.

    Raises FileNotFoundError without a checkpoint or, for a folder with `checkpoints/`, without a config.json,
    ValueError naming the file and each field with the value found and expected.
    """
    checkpoint = find_native_checkpoint(path)
    file = _run_folder(checkpoint) / "config.json"
    if not file.is_file():
        if Path(path).is_dir() and checkpoint.parent.name == "checkpoints":
            raise FileNotFoundError(f"{file}: expected the configuration of the native checkpoint, found nothing")
        return
    values = _read_config(file)
    _compare_config(file, values, config)
    base = values.get("vla", {}).get("base_vlm")
    if base and isinstance(base, str) and (Path(base) / "config.json").is_file():
        base_file = Path(base) / "config.json"
        _compare_config(base_file, _read_config(base_file), config)


# ----------------------------------------------------------------------------------------------- renaming


def _vision_key(key: str) -> str | None:
    tower, _, rest = key.partition(".")
    return f"{_VISION_PREFIX}{_TOWERS[tower]}.{_tower_key(rest)}" if tower in _TOWERS and rest else None


def _tower_key(key: str) -> str:
    return re.sub(r"\.gamma$", ".scale_factor", key)


def _llm_key(key: str) -> str | None:
    return f"language_model.{key.removeprefix('llm.')}" if key.startswith("llm.") else None


def _projector_key(key: str) -> str | None:
    layer, _, leaf = key.rpartition(".")
    return f"projector.{_PROJECTOR_LAYERS[layer]}.{leaf}" if layer in _PROJECTOR_LAYERS else None


_RENAMES: dict[str, Callable[[str], str | None]] = {
    "vision_backbone": _vision_key,
    "llm_backbone": _llm_key,
    "projector": _projector_key,
}


# ------------------------------------------------------------------------------------------ reading files


def _read_components(file: Path) -> dict[str, dict[str, Tensor]]:
    """The "model" entry of a checkpoint, its tensors mapped from the file."""
    regular_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file}: expected nothing but tensors, found other objects, which are not read") from error
    except (RuntimeError, ValueError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file}: truncated, or not a file written by torch.save: {reason}") from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), Mapping):
        found = sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise ValueError(f'{file}: expected a dictionary of components under "model", found {found}')
    components = content["model"]
    wrong = [name for name, tensors in components.items() if not isinstance(tensors, Mapping)]
    if not wrong:
        entries = ((f"{name}.{key}", value) for name, tensors in components.items() for key, value in tensors.items())
        wrong = [name for name, value in entries if not isinstance(value, Tensor)]
    if wrong:
        raise ValueError(f"{file}: expected dictionaries of tensors, found something else at {_some(wrong)}")
    return components


def _separate_vision(
    config: OpenVLAConfig, file: Path, tensors: Mapping[str, Tensor], given: str | Path | None
) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Vision tensors by our keys and their files; nothing when the checkpoint holds its own."""
    if any(key.startswith(_VISION_PREFIX) for key in tensors):
        if given is not None:
            raise ValueError(f"{file} holds a vision_backbone of its own: expected no vision weights, found {given}")
        return {}, ()
    path = _run_folder(file) / VISION_FOLDER if given is None else Path(given)
    if not path.exists():
        raise FileNotFoundError(
            f"{file} holds no vision_backbone (frozen in training): expected the weights of {config.timm_model_ids} at "
            f"{path}, found nothing"
        )
    files = [path] if path.is_file() else sorted(path.glob("model*.safetensors"))
    if not files:
        return _read_timm_towers(path, config)
    weights = {key: value for file in files for key, value in _read_safetensors(file).items()}
    vision = {key: value for key, value in weights.items() if key.startswith(_VISION_PREFIX)}
    if not vision:
        raise ValueError(f"{path}: expected keys {_VISION_PREFIX}*, found {_some(sorted(weights))}")
    return vision, tuple(files)


def _read_timm_towers(folder: Path, config: OpenVLAConfig) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """timm's published weights, one entry of the folder per tower; a classification head is left out."""
    tensors, files = {}, []
    towers = zip(("featurizer", "fused_featurizer"), config.timm_model_ids, config.tower_specs(), strict=False)
    for tower, timm_id, spec in towers:
        file = _timm_file(folder, timm_id)
        files.append(file)
        for key, value in _read_safetensors(file).items():
            if key.startswith("head."):
                continue
            if key == "pos_embed":
                value = _resample_positions(value, spec)
            tensors[f"{_VISION_PREFIX}{tower}.{_tower_key(key)}"] = value
    return tensors, tuple(files)


def _timm_file(folder: Path, timm_id: str) -> Path:
    # A pretrained tag is part of newer ids; the SigLIP towers of the table have only one, which timm took by default.
    names = [timm_id] if "." in timm_id else [timm_id, f"{timm_id}.webli"]
    files = [
        file for name in names for file in [folder / f"{name}.safetensors", *(folder / name).glob("*.safetensors")]
    ]
    found = [file for file in files if file.is_file()]
    if len(found) != 1:
        raise FileNotFoundError(
            f"{folder}: expected one file {timm_id}.safetensors or {timm_id}/*.safetensors, found "
            f"{[str(file) for file in found] or _some(sorted(p.name for p in folder.iterdir()))}"
        )
    return found[0]


def _resample_positions(positions: Tensor, spec: VisionTowerSpec) -> Tensor:
    """Position table (1, P', D) of another image size -> (1, P, D), as timm does when it builds the tower.

    timm/layers/pos_embed.py, resample_abs_pos_embed: bicubic with antialiasing, in float32. Only for tables without
    prefix tokens; any other shape passes and is refused by the shape check.
    """
    if spec.pos_embed != "patches" or positions.ndim != 3:
        return positions
    side, target = math.isqrt(positions.shape[1]), spec.image_size // spec.patch_size
    if side**2 != positions.shape[1] or side == target:
        return positions
    grid = positions.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(target, target), mode="bicubic", antialias=True)
    return grid.permute(0, 2, 3, 1).reshape(1, target**2, -1).to(positions.dtype)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    """A safetensors file, its tensors mapped from the file."""
    try:
        return load_file(regular_file(file))
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated, or not a safetensors file: {error}") from error


def _read_config(file: Path) -> dict[str, Any]:
    values = read_object(regular_file(file), finite=False, limits=FOREIGN)
    if not any(isinstance(values.get(name), dict) for name in ("model", "vla")):
        raise ValueError(f'{file}: expected a native configuration with "model" or "vla", found {sorted(values)}')
    return {name: values[name] for name in ("model", "vla") if isinstance(values.get(name), dict)}


def _run_folder(file: Path) -> Path:
    """The folder of the native run that a checkpoint file belongs to."""
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


# -------------------------------------------------------------------------------------- checking, copying


def _compare_config(file: Path, values: Mapping[str, Mapping[str, Any]], config: OpenVLAConfig) -> None:
    problems = [
        f"{section}.{name}: found {fields[name]!r}, expected {getattr(config, name)!r}"
        for section, fields in values.items()
        for name in _CONFIG_FIELDS
        if name in fields and fields[name] != getattr(config, name)
    ]
    if problems:
        raise ValueError(f"{file}: the native checkpoint is of another model than ours: {'; '.join(problems)}")


def _is_tied(vla: OpenVLAForActionPrediction) -> bool:
    return vla.get_output_embeddings().weight is vla.get_input_embeddings().weight


def _check_keys(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], tied: bool, source: str) -> tuple[str, ...]:
    """The keys that are rightly missing; ValueError listing the others and the unexpected ones."""
    allowed = {_QUERIES, _LM_HEAD} if tied else {_QUERIES}
    absent, unexpected = state.keys() - tensors.keys(), sorted(tensors.keys() - state.keys())
    missing = sorted(absent - allowed)
    if missing or unexpected:
        raise ValueError(
            f"{source}: the weights do not fit the model: missing {_some(missing)}, unexpected {_some(unexpected)}"
        )
    return tuple(sorted(absent))


def _check_tensors(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    problems = []
    for key, tensor in tensors.items():
        if tensor.shape != state[key].shape:
            problems.append(f"{key}: found shape {tuple(tensor.shape)}, expected {tuple(state[key].shape)}")
        elif not tensor.is_floating_point():
            problems.append(f"{key}: found {tensor.dtype}, expected a floating-point dtype")
    if problems:
        raise ValueError(f"{source}: the weights do not fit the model: {_some(problems)}")
    meta = [key for key, target in state.items() if target.is_meta]
    if meta:
        raise ValueError(f"expected a model with memory, found parameters on the meta device: {_some(meta)}")


def _check_equal(head: Tensor, embeddings: Tensor, source: str) -> None:
    """A tied model has room for one table, so a file with two must hold the same twice."""
    if head.dtype != embeddings.dtype or not torch.equal(head, embeddings):
        raise ValueError(
            f"{source}: expected equal {_LM_HEAD} and {_EMBEDDINGS} (the model ties them), found a difference"
        )


@torch.no_grad()
def _copy(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> None:
    for key, tensor in tensors.items():
        state[key].copy_(tensor)
        # After conversion, since half precision turns large values into infinity; aminmax passes NaN on.
        if not all(math.isfinite(bound.item()) for bound in state[key].aminmax()):
            raise ValueError(f"{source}: {key} holds NaN or infinity as {state[key].dtype}, expected finite values")


def _some(items: list[str], limit: int = 8) -> str:
    """The first items and the number of the others."""
    return str(items) if len(items) <= limit else f"{str(items[:limit])[:-1]}, ...] ({len(items)} in all)"
