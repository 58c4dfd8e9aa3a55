"""What reading and writing checkpoint folders share: loaded object, manifest, strict loading, hashes of weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from prismatic.evidence.checks import check_collection
from prismatic.evidence.hashes import sha256_of
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, PrismaticConfig
from prismatic.extern.hf.language_body import require_body
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.model_files import (
    CheckpointError,
    check_numbers,
    has_weights,
    is_file_name,
    read_json,
    reading,
    regular_file,
    weight_files,
)
from prismatic.models.action_heads import ActionHeadConfig
from prismatic.models.quiet_library import quiet_library
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.images import ImageSpec
from prismatic.vla.prompts import PromptKind, check_tokenizer

FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")
_COUNT, _TEXT, _SWITCH, _OBJECT = ("a count", int), ("text", str), ("true or false", bool), ("an object", dict)
_MANIFEST_FIELDS: dict[str, tuple[str, type[Any]]] = {
    "action_head": _OBJECT,
    "action_spec": _OBJECT,
    "file_suffix": _TEXT,
    "image_spec": _OBJECT,
    "legacy_slices": _SWITCH,
    "num_images": _COUNT,
    "tuning": _TEXT,
    "use_proprio": _SWITCH,
}
_OPTIONAL_FIELDS: dict[str, tuple[str, type[Any]]] = {
    "base": _OBJECT,
    "cameras": _OBJECT,
    "conventions": _OBJECT,
    "datasets": _OBJECT,
    "instructions": _OBJECT,
    "interpolation": _OBJECT,
    "merge": _OBJECT,
    "origin": _TEXT,
    "samples_seen": _COUNT,
    "start": _OBJECT,
    "step": _COUNT,
    "training": _OBJECT,
}
M = TypeVar("M", bound=nn.Module)
_CONFIG_SIZES = ("num_images_in_input", "num_action_queries", "projector_hidden_multiplier", "pad_token_id")
_LARGEST_SIZE = 1 << 20
"""Of a chunk, a width, a number of images, an image in pixels."""
_MOST_LAYERS = 1000
_SHOWN = 8  # keys
_LARGEST_STATISTIC = 1e10
"""No robot moves further, in any unit."""


@dataclass
class LoadedCheckpoint:
    """A policy read from disk: the module (fp32, CPU, eval mode), its processor and its description."""

    model: VLAPolicyModel
    processor: PrismaticProcessor
    manifest: dict[str, Any]
    statistics: dict[str, Any]
    path: Path


def read_manifest(path: Path) -> dict[str, Any]:
    """The checkpoint's description; MissingFileError or CheckpointError when it is absent or of another format."""
    file = Path(path) / MANIFEST
    manifest = read_json(file)
    for name, choices in (("format_version", [FORMAT_VERSION]), ("prompt_kind", [kind.value for kind in PromptKind])):
        if manifest.get(name) not in choices:
            expected = " or ".join(map(repr, choices))
            raise CheckpointError(f"{file}: {name} is {manifest.get(name)!r}, expected {expected}")
    missing = sorted(_MANIFEST_FIELDS.keys() - manifest.keys())
    if missing:
        raise CheckpointError(f"{file}: {', '.join(missing)} missing")
    _check_manifest(manifest, file)
    return manifest


def _check_manifest(manifest: dict[str, Any], file: Path) -> None:
    """Types, sizes and names: what is read becomes sizes of tensors and names of files."""
    given = {name for name in _OPTIONAL_FIELDS if manifest.get(name) is not None} | _MANIFEST_FIELDS.keys()
    for name in sorted(given):
        (words, kind), value = (_OPTIONAL_FIELDS | _MANIFEST_FIELDS)[name], manifest[name]
        if type(value) is not kind or (kind is int and value < 0):
            raise CheckpointError(f"{file}: {name} is {str(value)[:80]!r}, expected {words}")
    for name, facts in (manifest.get("datasets") or {}).items():
        _check_collected(facts, f"{file}: datasets: {str(name)[:80]}")
    for name, cameras in (manifest.get("cameras") or {}).items():
        if not isinstance(cameras, list) or not all(isinstance(camera, str) for camera in cameras):
            raise CheckpointError(f"{file}: cameras: {str(name)[:80]} is {str(cameras)[:80]!r}, expected names")
    for name, found in (manifest.get("conventions") or {}).items():
        if not isinstance(found, dict) or type(found.get("libero")) is not bool:
            raise CheckpointError(f"{file}: conventions: {str(name)[:80]} is {str(found)[:80]!r}, expected a libero")
        check_numbers({"control_hz": found.get("control_hz")}, str(file), _LARGEST_SIZE)
    if not is_file_name(manifest["file_suffix"]):
        raise CheckpointError(f"{file}: file_suffix is {manifest['file_suffix']!r}, expected a part of a file's name")
    sizes = {name: manifest[name] for name in ("action_head", "action_spec", "image_spec", "num_images")}
    check_numbers(sizes, str(file), _LARGEST_SIZE)
    with reading(file):
        spec, head = ActionSpec.from_dict(sizes["action_spec"]), ActionHeadConfig.from_dict(sizes["action_head"])
        ImageSpec.from_dict(sizes["image_spec"])
    if (head.chunk_len, head.action_dim) != (spec.chunk_len, spec.action_dim) or head.num_blocks > _MOST_LAYERS:
        raise CheckpointError(
            f"{file}: action_head has chunks of {head.chunk_len} actions of {head.action_dim} numbers in "
            f"{head.num_blocks} blocks, expected chunks of {spec.chunk_len} of {spec.action_dim} as in action_spec and "
            f"at most {_MOST_LAYERS} blocks"
        )


def _check_collected(facts: Any, where: str) -> None:
    """What a data set records of how it was collected; None: nothing."""
    if not isinstance(facts, dict | None):
        raise CheckpointError(f"{where}: found {type(facts).__name__}, expected an object or null")
    try:
        check_collection(facts or {}, where)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def read_statistics(path: Path) -> dict[str, Any]:
    """`dataset_statistics.json` of a checkpoint: {data set name: statistics}, all numbers finite and of a robot's size.

    Raises MissingFileError and CheckpointError, naming file and entry.
    """
    file = Path(path) / "dataset_statistics.json"
    statistics = read_json(file)
    wrong = [name for name, entry in statistics.items() if not isinstance(entry, dict)]
    if wrong or not statistics:
        raise CheckpointError(f"{file}: expected statistics by data set name, found {wrong[:3] or 'nothing'}")
    check_numbers(statistics, str(file), _LARGEST_STATISTIC)
    return statistics


def read_config(path: Path) -> OpenVLAConfig:
    """`config.json` of a folder. Code, kernels and quantisation that it names are not followed.

    Raises MissingFileError and CheckpointError.
    """
    file = Path(path) / "config.json"
    values = _without_code(read_json(file))
    known = (OpenVLAConfig.model_type, PrismaticConfig.model_type)
    if values.get("model_type", known[0]) not in known:
        raise CheckpointError(f"{file}: model_type is {values['model_type']!r}, expected {known[0]!r}")
    if values.get("quantization_config") is not None:
        raise CheckpointError(f"{file}: the weights are quantised, expected bf16, fp16 or fp32")
    with reading(file):
        text, towers = values.get("text_config") or {}, values.get("vision_towers") or []
        depths = [text.get("num_hidden_layers"), *(tower.get("depth") for tower in towers)]
    check_numbers([text, towers, values.get("image_sizes")], str(file), 1e9)
    check_numbers({name: values.get(name) for name in _CONFIG_SIZES}, str(file), _LARGEST_SIZE)
    check_numbers(depths, f"{file}: layers", _MOST_LAYERS)
    with reading(file):
        config = OpenVLAConfig.from_dict(values)
    try:
        require_body(config.text_config.model_type, str(file))
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return config


def _without_code(values: dict[str, Any]) -> dict[str, Any]:
    kept = {k: v for k, v in values.items() if k != "auto_map" and not k.endswith("_implementation")}
    return {k: _without_code(v) if k == "text_config" and isinstance(v, dict) else v for k, v in kept.items()}


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def load_vla(path: Path, num_images: int | None = None, new: Collection[str] = ()) -> OpenVLAForActionPrediction:
    """The VLM of a folder with `config.json` and `model.safetensors` or its shards, in fp32.

    `num_images` replaces the configured number of images; keys `new` may be in no file and are then drawn at random.
    Raises MissingFileError without weights, CheckpointError listing the missing, unexpected or mismatched keys.
    """
    for file in weight_files(path):
        _check_header(file)
    if (path / "generation_config.json").exists():
        regular_file(path / "generation_config.json")
    if (path / "adapter_config.json").exists():  # the library would take the base model that this file names
        raise CheckpointError(f"{path / 'adapter_config.json'} lies beside whole weights, expected one of the two")
    config = read_config(path)
    if num_images is not None:
        config.num_images_in_input = num_images
    vla: OpenVLAForActionPrediction
    with reading(path), quiet_library():
        vla, report = OpenVLAForActionPrediction.from_pretrained(
            path,
            config=config,
            output_loading_info=True,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_kernels=False,
            use_safetensors=True,
            weights_only=True,
        )
    kinds = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    kinds["missing"] = [key for key in kinds["missing"] if key not in new]
    problems = [f"{len(keys)} {kind}: {', '.join(keys[:_SHOWN])}" for kind, keys in kinds.items() if keys]
    if problems:
        files = " and ".join(file.name for file in weight_files(path)[:2])
        raise CheckpointError(f"{path}: the weights in {files} do not fit config.json: {'; '.join(problems)}")
    return vla


def _check_header(file: Path) -> None:
    """CheckpointError for a file whose length does not fit its header, or that has none; reads the header alone."""
    try:
        with safe_open(file, "pt") as weights:
            weights.keys()
    except SafetensorError as error:
        raise CheckpointError(
            f"{file}: truncated, or not a safetensors file ({error}): copy or download it again"
        ) from error


def load_processor(path: Path, vla: OpenVLAForActionPrediction) -> PrismaticProcessor:
    """Tokenizer and image processor of a folder.

    Raises MissingFileError and CheckpointError, also when the tokenizer has tokens without an embedding in the model or
    lacks one that the model's prompt begins with.
    """
    with reading(path):
        processor = PrismaticProcessor.from_pretrained(path)
    try:
        check_tokenizer(processor.tokenizer, vla.config.prompt_kind)
    except ValueError as error:
        raise CheckpointError(f"{path / 'tokenizer_config.json'}: {error}") from None
    tokens, rows = len(processor.tokenizer), vla.config.text_config.vocab_size
    if tokens > rows:
        raise CheckpointError(f"{path / 'tokenizer.json'}: {tokens} tokens, expected at most the {rows} of config.json")
    return processor


def weights_hash(path: Path) -> str | None:
    """sha256 over the files of the folder's whole model in name order; None without one.

    Raises MissingFileError for an index without its shards, CheckpointError as `weight_files`.
    """
    return sha256_of(*weight_files(path)) if has_weights(path) else None


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and contents, in name order; independent of the device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Fill a module; CheckpointError naming the file and the keys that do not fit."""
    try:
        # A module without memory takes the tensors themselves: only to compare keys and shapes.
        module.load_state_dict(state, assign=any(p.is_meta for p in module.parameters()))
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit the model: {error}") from error


def build_and_fill(build: Callable[[], M], state: dict[str, Tensor], source: Path) -> M:
    """A module with these weights. Sizes are compared before memory is taken for them; errors as of `load_strictly`."""
    with torch.device("meta"):
        load_strictly(build(), state, source)
    module = build()
    load_strictly(module, state, source)
    return module


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Content of a safetensors file; MissingFileError without it, CheckpointError when it is damaged."""
    with reading(regular_file(file)):
        return load_file(file)


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached contiguous tensors, as safetensors wants them."""
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}
