"""Checkpoint folders: what a trained policy needs to run, and beside it what a run needs to go on.

    {run_root_dir}/{run_id}--{step}_chkpt/
      craft_checkpoint.json                          everything that is not a tensor (see `_manifest`)
      dataset_statistics.json                        normalisation, per data set
      config.json, preprocessor and tokenizer files
      model.safetensors                              the whole VLM            (full and frozen tuning)
      lora_adapter/, action_queries--*.safetensors   adapters on the base     (LoRA)
      action_head--{step}_checkpoint.safetensors, proprio_projector--{step}_checkpoint.safetensors
      training_state/                                optimizer, RNG, lambda, CRaFT anchor (optional)

Folders are written under a temporary name and renamed, so a folder that exists is complete.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.projectors import ProprioProjector
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.config import FinetuneConfig, TuningMode
from prismatic.training.craft_utils import CRaFTConstraint
from prismatic.vla.prompts import PROMPT_KIND

MANIFEST = "craft_checkpoint.json"
FORMAT_VERSION = 1
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")


@dataclass
class TrainingState:
    """What changes during a run beside the model's weights."""

    step: int
    samples_seen: int
    optimizer: torch.optim.Optimizer
    craft: CRaFTConstraint | None


@dataclass
class LoadedCheckpoint:
    """A policy read from disk: the module (fp32, CPU, eval mode), its processor and its description."""

    model: VLAPolicyModel
    processor: PrismaticProcessor
    manifest: dict
    statistics: dict
    path: Path


def checkpoint_path(cfg: FinetuneConfig, step: int | None = None) -> Path:
    """Folder of `step`, or of the newest step on disk; FileNotFoundError when there is none."""
    root = Path(cfg.run_root_dir)
    if cfg.save_latest_checkpoint_only:
        return root / cfg.run_id
    if step is not None:
        return root / f"{cfg.run_id}--{step}_chkpt"
    pattern = re.compile(re.escape(cfg.run_id) + r"--(\d+)_chkpt")
    found = [(int(m[1]), p) for p in (root.iterdir() if root.exists() else ()) if (m := pattern.fullmatch(p.name))]
    if not found:
        raise FileNotFoundError(f"no checkpoint of run {cfg.run_id!r} in {root}: nothing to resume from")
    return max(found)[1]


# ------------------------------------------------------------------------------------------------ writing


def save_checkpoint(cfg: FinetuneConfig, setup, state: TrainingState) -> Path:
    """Write the checkpoint of `state.step` and return its folder."""
    folder = checkpoint_path(cfg, state.step)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    suffix = "latest_checkpoint" if cfg.save_latest_checkpoint_only else f"{state.step}_checkpoint"
    _save_modules(setup.model, temporary, suffix)
    setup.processor.save_pretrained(temporary)
    _write_json(temporary / "dataset_statistics.json", setup.statistics)
    _write_json(temporary / MANIFEST, _manifest(cfg, setup, state, suffix))
    if cfg.save_training_state:
        _save_training_state(setup.model, state, temporary / "training_state")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def _save_modules(model: VLAPolicyModel, folder: Path, suffix: str) -> None:
    if isinstance(model.vla, PeftModel):
        # Embeddings are never adapted; "auto" would ask the hub about the base model.
        model.vla.save_pretrained(folder / "lora_adapter", save_embedding_layers=False)
        base = model.vla.get_base_model()
        base.config.save_pretrained(folder)
        save_file({"weight": base.action_queries.weight.detach()}, folder / f"action_queries--{suffix}.safetensors")
    else:
        model.vla.save_pretrained(folder)
    save_file(_contiguous(model.action_head.state_dict()), folder / f"action_head--{suffix}.safetensors")
    if model.proprio_projector is not None:
        save_file(
            _contiguous(model.proprio_projector.state_dict()), folder / f"proprio_projector--{suffix}.safetensors"
        )


def _manifest(cfg: FinetuneConfig, setup, state: TrainingState, suffix: str) -> dict:
    return {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "file_suffix": suffix,
        "tuning": cfg.tuning_mode.value,
        "base_checkpoint": str(setup.base_path) if cfg.tuning_mode is TuningMode.LORA else None,
        "base_sha256": weights_hash(setup.base_path) if cfg.tuning_mode is TuningMode.LORA else None,
        "action_spec": setup.action_spec.to_dict(),
        "image_spec": setup.image_spec.to_dict(),
        "prompt_kind": PROMPT_KIND,
        "num_images": setup.num_images,
        "use_proprio": setup.model.proprio_projector is not None,
        "legacy_slices": setup.model.legacy_slices,
        "action_head": setup.model.action_head.config,
        "datasets": setup.dataset_metadata,
        "craft": None if state.craft is None else state.craft.state_dict(),
        "training": cfg.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _save_training_state(model: VLAPolicyModel, state: TrainingState, folder: Path) -> None:
    folder.mkdir()
    save_file(_trainable(model), folder / "trainable.safetensors")
    torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, folder / "rng.pt")
    version, keys, gauss = random.getstate()
    kind, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002 - the global generator is what libraries use
    generators = {"python": [version, keys, gauss], "numpy": [kind, numpy_keys.tolist(), *numpy_rest]}
    _write_json(folder / "generators.json", generators)
    _write_json(folder / "state.json", {"step": state.step, "samples_seen": state.samples_seen})
    if state.craft is not None:
        _write_json(folder / "craft.json", state.craft.state_dict())
        save_file(_contiguous(state.craft.weights.state_dict()), folder / "craft_anchor.safetensors")


# ------------------------------------------------------------------------------------------------ reading


def load_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Read a checkpoint folder; LoRA adapters are applied to their base and merged.

    Raises FileNotFoundError for a missing file and ValueError for one that does not fit, naming it.
    """
    path = Path(path)
    manifest = read_manifest(path)
    suffix = manifest["file_suffix"]
    vla = _load_adapted_vla(path, manifest) if manifest["tuning"] == TuningMode.LORA.value else _load_vla(path)
    head = L1RegressionActionHead(**manifest["action_head"])
    _load_strictly(head, path / f"action_head--{suffix}.safetensors")
    projector = None
    if manifest["use_proprio"]:
        projector = ProprioProjector(vla.llm_dim, manifest["action_spec"]["proprio_dim"])
        _load_strictly(projector, path / f"proprio_projector--{suffix}.safetensors")
    model = VLAPolicyModel(vla, head, projector, legacy_slices=manifest["legacy_slices"])
    statistics = json.loads(_existing(path / "dataset_statistics.json").read_text(encoding="utf-8"))
    processor = PrismaticProcessor.from_pretrained(path)
    return LoadedCheckpoint(model.eval(), processor, manifest, statistics, path)


def read_manifest(path: Path) -> dict:
    """The checkpoint's description; FileNotFoundError or ValueError when it is absent or of another format."""
    manifest = json.loads(_existing(Path(path) / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format_version") != FORMAT_VERSION:
        found = manifest.get("format_version")
        raise ValueError(f"{path / MANIFEST}: format_version is {found}, expected {FORMAT_VERSION}")
    if manifest["prompt_kind"] != PROMPT_KIND:
        raise ValueError(f"{path / MANIFEST}: prompt_kind is {manifest['prompt_kind']!r}, expected {PROMPT_KIND!r}")
    return manifest


def restore_training_state(
    folder: str | Path, model: VLAPolicyModel, optimizer: torch.optim.Optimizer, craft: CRaFTConstraint | None
) -> int:
    """Put a run back where the checkpoint left it and return its step.

    Raises FileNotFoundError when the folder holds no training state, or no anchor for a CRaFT run.
    """
    folder = _existing(Path(folder) / "training_state")
    trainable = load_file(folder / "trainable.safetensors")
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if trainable.keys() != expected.keys():
        difference = sorted(trainable.keys() ^ expected.keys())[:5]
        raise ValueError(f"{folder}: trained parameters differ from this configuration's, e.g. {difference}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(trainable[name])
    optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    if craft is not None:
        anchor = load_file(_existing(folder / "craft_anchor.safetensors"))
        craft.load_state_dict(_read_json(folder / "craft.json"), anchor)
    _restore_generators(folder)
    return _read_json(folder / "state.json")["step"]


def _restore_generators(folder: Path) -> None:
    rng = torch.load(folder / "rng.pt", weights_only=True)
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
    generators = _read_json(folder / "generators.json")
    version, keys, gauss = generators["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def weights_hash(path: Path | None) -> str | None:
    """sha256 of `model.safetensors` in the folder, None for a model that was not read from one."""
    file = None if path is None else Path(path) / "model.safetensors"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.exists() else None


def _load_vla(path: Path) -> OpenVLAForActionPrediction:
    _existing(path / "model.safetensors")
    vla, report = OpenVLAForActionPrediction.from_pretrained(path, output_loading_info=True, dtype=torch.float32)
    problems = {k: sorted(report[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if report[k]}
    if problems:
        raise ValueError(f"{path / 'model.safetensors'} does not fit its config.json: {problems}")
    return vla


def _load_adapted_vla(path: Path, manifest: dict) -> OpenVLAForActionPrediction:
    base_path = manifest["base_checkpoint"]
    if base_path is None:
        raise ValueError(f"{path / MANIFEST}: base_checkpoint is missing: the adapter cannot be applied to anything")
    found = weights_hash(base_path)
    if found != manifest["base_sha256"]:
        raise ValueError(
            f"base checkpoint {base_path}: sha256 of model.safetensors is {found}, "
            f"the adapter in {path} was trained on {manifest['base_sha256']}"
        )
    adapted = PeftModel.from_pretrained(load_checkpoint(base_path).model.vla, path / "lora_adapter")
    queries = load_file(_existing(path / f"action_queries--{manifest['file_suffix']}.safetensors"))
    vla = adapted.merge_and_unload()
    vla.action_queries.load_state_dict(queries)
    return vla


def _load_strictly(module: torch.nn.Module, file: Path) -> None:
    try:
        module.load_state_dict(load_file(_existing(file)))
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit the model: {error}") from error


def _trainable(model: VLAPolicyModel) -> dict[str, Tensor]:
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: not a complete checkpoint folder")
    return path


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict:
    return json.loads(_existing(path).read_text(encoding="utf-8"))
