"""What reading and writing checkpoint folders share: loaded object, manifest, strict loading, hashes, JSON."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.vla.prompts import PROMPT_KIND

MANIFEST = "craft_checkpoint.json"
FORMAT_VERSION = 1
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


@dataclass
class LoadedCheckpoint:
    """A policy read from disk: the module (fp32, CPU, eval mode), its processor and its description."""

    model: VLAPolicyModel
    processor: PrismaticProcessor
    manifest: dict
    statistics: dict
    path: Path


def read_manifest(path: Path) -> dict:
    """The checkpoint's description; FileNotFoundError or ValueError when it is absent or of another format."""
    manifest = read_json(Path(path) / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise ValueError(f"{path / MANIFEST}: format_version is {found}, expected {FORMAT_VERSION}")
    if manifest["prompt_kind"] != PROMPT_KIND:
        raise ValueError(f"{path / MANIFEST}: prompt_kind is {manifest['prompt_kind']!r}, expected {PROMPT_KIND!r}")
    return manifest


def load_vla(path: Path, num_images: int | None = None) -> OpenVLAForActionPrediction:
    """The VLM of a folder with `config.json` and `model.safetensors` or its shards, in fp32.

    `num_images` replaces the configured number of images. Raises FileNotFoundError without weights, ValueError
    listing the missing, unexpected or mismatched keys.
    """
    if not has_weights(path):
        raise FileNotFoundError(f"{path} has neither {' nor '.join(WEIGHT_FILES)}: not a complete checkpoint folder")
    settings = {} if num_images is None else {"num_images_in_input": num_images}
    vla, report = OpenVLAForActionPrediction.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32, local_files_only=True, **settings
    )
    problems = {k: sorted(report[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]}
    if problems:
        raise ValueError(f"weights of {path} do not fit its config.json: {problems}")
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
        raise ValueError(f"{source} does not fit the model: {error}") from error


def load_module(module: nn.Module, file: Path) -> None:
    """Fill a module from a safetensors file, strictly."""
    load_strictly(module, load_file(existing(file)), file)


def contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detached contiguous tensors, as safetensors wants them."""
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def existing(path: Path) -> Path:
    """The path; FileNotFoundError when there is nothing."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: not a complete checkpoint folder")
    return path


def write_json(path: Path, value: dict) -> None:
    """JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """Content of a JSON file; FileNotFoundError when it is missing, ValueError when it is not JSON."""
    try:
        return json.loads(existing(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
