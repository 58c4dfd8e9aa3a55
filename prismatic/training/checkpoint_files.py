"""What reading and writing checkpoint folders share: loaded object, manifest, strict loading, hashes of weights."""

from __future__ import annotations

import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    MissingFileError,
    existing,
    read_json,
    reading,
)
from prismatic.vla.prompts import PROMPT_KIND

FORMAT_VERSION = 1
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")
_MANIFEST_FIELDS = {
    "action_head",
    "action_spec",
    "file_suffix",
    "image_spec",
    "legacy_slices",
    "num_images",
    "tuning",
    "use_proprio",
}


@dataclass
class LoadedCheckpoint:
    """A policy read from disk: the module (fp32, CPU, eval mode), its processor and its description."""

    model: VLAPolicyModel
    processor: PrismaticProcessor
    manifest: dict
    statistics: dict
    path: Path


def read_manifest(path: Path) -> dict:
    """The checkpoint's description; MissingFileError or CheckpointError when it is absent or of another format."""
    file = Path(path) / MANIFEST
    manifest = read_json(file)
    for name, expected in (("format_version", FORMAT_VERSION), ("prompt_kind", PROMPT_KIND)):
        if manifest.get(name) != expected:
            raise CheckpointError(f"{file}: {name} is {manifest.get(name)!r}, expected {expected!r}")
    missing = sorted(_MANIFEST_FIELDS - manifest.keys())
    if missing:
        raise CheckpointError(f"{file}: {', '.join(missing)} missing")
    return manifest


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def load_vla(path: Path, num_images: int | None = None) -> OpenVLAForActionPrediction:
    """The VLM of a folder with `config.json` and `model.safetensors` or its shards, in fp32.

    `num_images` replaces the configured number of images. Raises MissingFileError without weights, CheckpointError
    listing the missing, unexpected or mismatched keys.
    """
    if not has_weights(path):
        raise MissingFileError(f"{path} has neither {' nor '.join(WEIGHT_FILES)}: not a complete checkpoint folder")
    settings = {} if num_images is None else {"num_images_in_input": num_images}
    with reading(path):
        vla, report = OpenVLAForActionPrediction.from_pretrained(
            path, output_loading_info=True, dtype=torch.float32, local_files_only=True, **settings
        )
    problems = {k: sorted(report[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]}
    if problems:
        raise CheckpointError(f"weights of {path} do not fit its config.json: {problems}")
    return vla


def has_weights(path: Path) -> bool:
    """Whether the folder holds a whole model, in one file or in shards."""
    return any((path / name).is_file() for name in WEIGHT_FILES)


def weights_hash(path: Path | None) -> str | None:
    """sha256 over the folder's `model*.safetensors` in name order; None for a model that was not read from one."""
    files = [] if path is None else sorted(Path(path).glob("model*.safetensors"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and contents, in name order; independent of the device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_strictly(module: nn.Module, state: dict[str, Tensor], source: Path) -> None:
    """Fill a module; ValueError naming the file and the keys that do not fit."""
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit the model: {error}") from error


def load_module(module: nn.Module, file: Path) -> None:
    """Fill a module from a safetensors file, strictly."""
    load_strictly(module, load_tensors(file), file)


def load_tensors(file: Path) -> dict[str, Tensor]:
    """Content of a safetensors file; MissingFileError without it, CheckpointError when it is damaged."""
    with reading(existing(file)):
        return load_file(file)


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached contiguous tensors, as safetensors wants them."""
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}
