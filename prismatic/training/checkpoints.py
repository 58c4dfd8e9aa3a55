"""Checkpoint folders: what a trained policy needs to run, and beside it what a run needs to go on.

    {run_root_dir}/{run_id}--{step}_chkpt/
      craft_checkpoint.json                          everything that is not a tensor (see `_manifest`)
      dataset_statistics.json                        normalisation, per data set
      config.json, preprocessor and tokenizer files
      model.safetensors                              the whole VLM     (full and frozen tuning; LoRA when merged)
      lora_adapter/, action_queries--*.safetensors   adapters on the base     (LoRA)
      action_head--{step}_checkpoint.safetensors, proprio_projector--{step}_checkpoint.safetensors
      training_state/                                optimizer, RNG, lambda, CRaFT anchor (optional)

With `--ema_decay` the policy above is the averaged one; `training_state/` holds the weights training goes on with.

Folders are written under a temporary name and renamed, so a folder that exists is complete. Folders in the published
layout (`published.py`) are read as well.
"""

from __future__ import annotations

import importlib.metadata
import random
import re
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.native import load_native_weights
from prismatic.models.projectors import ProprioProjector
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import (
    FORMAT_VERSION,
    MANIFEST,
    LoadedCheckpoint,
    contiguous,
    existing,
    has_weights,
    load_module,
    load_vla,
    read_json,
    read_manifest,
    tensors_hash,
    weights_hash,
    write_json,
)
from prismatic.training.config import FinetuneConfig, TuningMode
from prismatic.training.craft_utils import CRaFTConstraint, CRaFTWeightManager
from prismatic.training.ema import WeightAverage
from prismatic.training.lora import merged_state_dict, verify_merge, with_unused_targets
from prismatic.training.published import export_published, is_published, load_published
from prismatic.training.retention import L2SPPenalty
from prismatic.vla.prompts import PROMPT_KIND

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "safetensors")


@dataclass
class TrainingState:
    """What changes during a run beside the model's weights."""

    step: int
    samples_seen: int
    optimizer: torch.optim.Optimizer
    craft: CRaFTConstraint | None = None
    penalty: L2SPPenalty | None = None
    ema: WeightAverage | None = None
    scaler: torch.amp.GradScaler | None = None
    # The last measurement of the constraint, which the log repeats until the next one.
    constraint_metrics: dict[str, float] = field(default_factory=dict)

    @property
    def anchor(self) -> CRaFTWeightManager | None:
        """The weights theta_0 the run is held to, if it is."""
        holder = self.craft or self.penalty
        return None if holder is None else holder.weights

    def policy_weights(self) -> AbstractContextManager:
        """Context in which the model holds the weights of the policy: the averaged ones, if there are any."""
        return nullcontext() if self.ema is None else self.ema.averaged_weights()


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
    """Write the checkpoint of `state.step` and return its folder.

    Raises ValueError when a merged model does not act like the adapted one, or cannot be exported.
    """
    folder = checkpoint_path(cfg, state.step)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    suffix = "latest_checkpoint" if cfg.save_latest_checkpoint_only else f"{state.step}_checkpoint"
    with state.policy_weights():
        _save_modules(cfg, setup.model, temporary, suffix)
    setup.processor.save_pretrained(temporary)
    write_json(temporary / "dataset_statistics.json", setup.statistics)
    manifest = _manifest(cfg, setup, state, suffix)
    write_json(temporary / MANIFEST, manifest)
    if cfg.merge_lora_during_training:
        with state.policy_weights():
            add_merged_model(setup.model, temporary)
    if cfg.export_published_layout:
        export_published(load_checkpoint(temporary), folder.with_name(f"{folder.name}--published"), suffix)
    if cfg.save_training_state:
        _save_training_state(setup, state, temporary / "training_state")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return folder


def add_merged_model(model: VLAPolicyModel, folder: Path, tolerance: float = 1e-3) -> float:
    """Write the merged VLM into a LoRA checkpoint folder, read it back and compare; returns the largest difference.

    Args:
        model: the policy with adapters, as saved in `folder`.
        folder: its checkpoint folder.
        tolerance: largest allowed difference of a normalised action.

    Raises ValueError above the tolerance.
    """
    base = model.vla.get_base_model()
    base.save_pretrained(folder, state_dict=merged_state_dict(base))
    manifest = read_manifest(folder)
    merged = load_checkpoint(folder).model
    difference = verify_merge(model, merged, tolerance)
    write_json(folder / MANIFEST, manifest | {"merge": {"max_difference": difference, "tolerance": tolerance}})
    return difference


def _save_modules(cfg: FinetuneConfig, model: VLAPolicyModel, folder: Path, suffix: str) -> None:
    if isinstance(model.vla, PeftModel):
        # Embeddings are never adapted; "auto" would ask the hub about the base model.
        model.vla.save_pretrained(folder / "lora_adapter", save_embedding_layers=False)
        base = model.vla.get_base_model()
        if cfg.lora_emit_unused:
            file = folder / "lora_adapter" / "adapter_model.safetensors"
            save_file(with_unused_targets(load_file(file), base, cfg.lora_rank), file)
        base.config.save_pretrained(folder)
        save_file({"weight": base.action_queries.weight.detach()}, folder / f"action_queries--{suffix}.safetensors")
    else:
        model.vla.save_pretrained(folder)
    save_file(contiguous(model.action_head.state_dict()), folder / f"action_head--{suffix}.safetensors")
    if model.proprio_projector is not None:
        save_file(contiguous(model.proprio_projector.state_dict()), folder / f"proprio_projector--{suffix}.safetensors")


def _manifest(cfg: FinetuneConfig, setup, state: TrainingState, suffix: str) -> dict:
    base = setup.base.to_dict() if cfg.tuning_mode is TuningMode.LORA else None
    return {
        "format_version": FORMAT_VERSION,
        "origin": setup.origin,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "file_suffix": suffix,
        "tuning": cfg.tuning_mode.value,
        "base": base,
        "action_spec": setup.action_spec.to_dict(),
        "image_spec": setup.image_spec.to_dict(),
        "prompt_kind": PROMPT_KIND,
        "num_images": setup.num_images,
        "use_proprio": setup.model.proprio_projector is not None,
        "legacy_slices": setup.model.legacy_slices,
        "action_head": setup.model.action_head.config,
        "datasets": setup.dataset_metadata,
        "craft": None if state.craft is None else _craft_record(state.craft, base),
        "training": cfg.to_dict(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _craft_record(craft: CRaFTConstraint, base: dict | None) -> dict:
    """Settings, multiplier and the identity of theta_0: the drift budget counts from there."""
    anchor = {"kind": craft.anchor.kind.value, "sha256": tensors_hash(craft.weights.state_dict()), "base": base}
    return craft.state_dict() | {"anchor": anchor}


def _save_training_state(setup, state: TrainingState, folder: Path) -> None:
    model, base = setup.model, setup.base
    folder.mkdir()
    save_file(_trainable(model), folder / "trainable.safetensors")
    torch.save(state.optimizer.state_dict(), folder / "optimizer.pt")
    torch.save({"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}, folder / "rng.pt")
    version, keys, gauss = random.getstate()
    kind, numpy_keys, *numpy_rest = np.random.get_state()  # noqa: NPY002 - the global generator is what libraries use
    generators = {"python": [version, keys, gauss], "numpy": [kind, numpy_keys.tolist(), *numpy_rest]}
    write_json(folder / "generators.json", generators)
    write_json(
        folder / "state.json",
        {"step": state.step, "samples_seen": state.samples_seen, "constraint_metrics": state.constraint_metrics},
    )
    if state.scaler is not None:
        write_json(folder / "scaler.json", state.scaler.state_dict())
    if state.ema is not None:
        save_file(state.ema.state_dict(), folder / "ema.safetensors")
    if state.anchor is not None:
        anchor = state.anchor.state_dict()
        record = {"anchor_sha256": tensors_hash(anchor), "base_sha256": None if base is None else base.sha256}
        write_json(folder / "craft.json", record | ({} if state.craft is None else state.craft.state_dict()))
        save_file(contiguous(anchor), folder / "craft_anchor.safetensors")


# ------------------------------------------------------------------------------------------------ reading


def load_checkpoint(path: str | Path, num_images: int | None = None) -> LoadedCheckpoint:
    """Read a checkpoint folder, ours or published; LoRA adapters without a merged model are merged after loading.

    `num_images`: images per sample of a published folder, which does not state it. Raises FileNotFoundError for a
    missing file and ValueError for one that does not fit, naming it.
    """
    path = Path(path)
    if not (path / MANIFEST).exists() and is_published(path):
        return load_published(path, num_images)
    loaded = _load_own(path, merged=has_weights(path))
    if isinstance(loaded.model.vla, PeftModel):
        loaded.model.vla = loaded.model.vla.merge_and_unload()
    return loaded


def load_unmerged(path: str | Path, base_path: str | Path | None = None) -> LoadedCheckpoint:
    """As `load_checkpoint` for a LoRA checkpoint of ours, with the adapters beside the base weights.

    `base_path`: where the base model is now, None for the recorded path. ValueError for a checkpoint without adapters.
    """
    path = Path(path)
    if read_manifest(path)["tuning"] != TuningMode.LORA.value:
        raise ValueError(f"{path / MANIFEST}: tuning is {read_manifest(path)['tuning']!r}, expected 'lora'")
    return _load_own(path, merged=False, base_path=base_path)


def _load_own(path: Path, merged: bool, base_path: str | Path | None = None) -> LoadedCheckpoint:
    manifest = read_manifest(path)
    if base_path is not None:
        manifest["base"] = {**(manifest["base"] or {}), "path": str(base_path)}
    suffix = manifest["file_suffix"]
    adapted = manifest["tuning"] == TuningMode.LORA.value and not merged
    vla = _load_adapted_vla(path, manifest) if adapted else load_vla(path)
    bare = vla.get_base_model() if adapted else vla
    head = L1RegressionActionHead(**manifest["action_head"])
    load_module(head, path / f"action_head--{suffix}.safetensors")
    projector = None
    if manifest["use_proprio"]:
        projector = ProprioProjector(bare.llm_dim, manifest["action_spec"]["proprio_dim"])
        load_module(projector, path / f"proprio_projector--{suffix}.safetensors")
    model = VLAPolicyModel(vla, head, projector, legacy_slices=manifest["legacy_slices"])
    statistics = read_json(path / "dataset_statistics.json")
    return LoadedCheckpoint(model.eval(), PrismaticProcessor.from_pretrained(path), manifest, statistics, path)


def _load_adapted_vla(path: Path, manifest: dict) -> PeftModel:
    base = BaseModel.from_dict(manifest["base"], path / MANIFEST)
    adapter = existing(path / "lora_adapter")
    adapted = PeftModel.from_pretrained(base.load(path, manifest["num_images"]), adapter)
    queries = load_file(existing(path / f"action_queries--{manifest['file_suffix']}.safetensors"))
    adapted.get_base_model().action_queries.load_state_dict(queries)
    return adapted


@dataclass(frozen=True)
class BaseModel:
    """The model that adapters belong to: a checkpoint folder or a native Prismatic VLM, and its weights' hash."""

    kind: str
    path: str
    sha256: str

    @classmethod
    def of_checkpoint(cls, path: Path) -> BaseModel:
        """Identity of a checkpoint folder (LoRA checkpoints count with their adapters)."""
        adapter = Path(path) / "lora_adapter" / "adapter_model.safetensors"
        digest = weights_hash(path) or tensors_hash(load_file(existing(adapter)))
        return cls("checkpoint", str(path), digest)

    def to_dict(self) -> dict[str, str]:
        """JSON-ready fields."""
        return {"kind": self.kind, "path": self.path, "sha256": self.sha256}

    @classmethod
    def from_dict(cls, values: dict | None, source: Path) -> BaseModel:
        """Inverse of `to_dict`; ValueError naming `source` when the entry is missing."""
        if not values:
            raise ValueError(f"{source}: base is missing: the adapter cannot be applied to anything")
        return cls(**values)

    def load(self, adapted: Path, num_images: int) -> OpenVLAForActionPrediction:
        """The base VLM; ValueError when its weights are not those the adapter in `adapted` was trained on."""
        if self.kind == "native":
            config = OpenVLAForActionPrediction.config_class.from_pretrained(adapted, local_files_only=True)
            vla = OpenVLAForActionPrediction(config)
            found = load_native_weights(vla, self.path).sha256
        else:
            found = BaseModel.of_checkpoint(Path(self.path)).sha256
            vla = load_checkpoint(self.path, num_images).model.vla if found == self.sha256 else None
        if found != self.sha256:
            raise ValueError(
                f"base {self.path}: sha256 of its weights is {found}, "
                f"the adapter in {adapted} was trained on {self.sha256}"
            )
        return vla


def restore_training_state(folder: str | Path, setup, state: TrainingState) -> int:
    """Put the objects of `state` and the model of `setup` back where the checkpoint left them; returns its step.

    Raises FileNotFoundError when the folder holds no training state, or no anchor for a run that is held to one;
    ValueError when the trained parameters, the anchor or the base model are not those of the interrupted run.
    """
    folder = existing(Path(folder) / "training_state")
    trainable = load_file(folder / "trainable.safetensors")
    expected = {n: p for n, p in setup.model.named_parameters() if p.requires_grad}
    if trainable.keys() != expected.keys():
        difference = sorted(trainable.keys() ^ expected.keys())[:5]
        raise ValueError(f"{folder}: trained parameters differ from this configuration's, e.g. {difference}")
    if state.anchor is not None:
        _restore_anchor(folder, setup.base, state)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(trainable[name])
    state.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    if state.scaler is not None:
        state.scaler.load_state_dict(read_json(folder / "scaler.json"))
    if state.ema is not None:
        state.ema.load_state_dict(load_file(existing(folder / "ema.safetensors")))
    _restore_generators(folder)
    counters = read_json(folder / "state.json")
    state.constraint_metrics = counters["constraint_metrics"]
    return counters["step"]


def _restore_anchor(folder: Path, base: BaseModel | None, state: TrainingState) -> None:
    file, record = folder / "craft_anchor.safetensors", read_json(folder / "craft.json")
    anchor = load_file(existing(file))
    if tensors_hash(anchor) != record["anchor_sha256"]:
        raise ValueError(f"{file} is not the anchor this run started from: its hash is not the one in craft.json")
    # With adapters the frozen base weights are part of theta_0.
    if base is not None and record["base_sha256"] != base.sha256:
        raise ValueError(
            f"base {base.path}: sha256 of its weights is {base.sha256}, the interrupted run in {folder} started from "
            f"{record['base_sha256']}"
        )
    if state.craft is not None:
        state.craft.load_state_dict(record, anchor)
    else:
        state.anchor.load_state_dict(anchor)


def _restore_generators(folder: Path) -> None:
    rng = torch.load(folder / "rng.pt", weights_only=True)
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and len(rng["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(rng["cuda"])
    generators = read_json(folder / "generators.json")
    version, keys, gauss = generators["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = generators["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002


def _trainable(model: VLAPolicyModel) -> dict[str, Tensor]:
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}
