"""Checkpoint folders: what a trained policy needs to run, and beside it what a run needs to go on.

    {run_root_dir}/{run_id}--{step}_chkpt/
      craft_checkpoint.json                          everything that is not a tensor (see `_manifest`)
      dataset_statistics.json                        normalisation, per data set
      config.json, preprocessor and tokenizer files
      model.safetensors                              the whole VLM     (full and frozen tuning; LoRA when merged)
      lora_adapter/, action_queries--*.safetensors   adapters on the base     (LoRA)
      action_head--{step}_checkpoint.safetensors, proprio_projector--{step}_checkpoint.safetensors
      training_state/                                what a run needs to go on (optional): `training_state.py`
      files.json                                     sizes and sha256 of all of these: `checkpoint_folder.py`
      README.md                                      the model card: `model_card.py`

With `--ema_decay` the policy above is the averaged one; `training_state/` holds the weights training goes on with.

Folders are written under a temporary name and renamed, so a folder that exists is complete. Folders in the published
layout (`published.py`) are read as well.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from prismatic.evidence.files import write_json
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.model_files import CheckpointError, existing, has_weights, reading
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.native import load_native_weights
from prismatic.models.projectors import ProprioProjector
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_files import (
    FORMAT_VERSION,
    LoadedCheckpoint,
    build_and_fill,
    contiguous,
    load_processor,
    load_strictly,
    load_tensors,
    load_vla,
    package_versions,
    read_config,
    read_manifest,
    read_statistics,
)
from prismatic.training.checkpoint_folder import (
    LISTING,
    MANIFEST,
    PUBLISHED,
    TRAINING_STATE,
    check_files,
    explained_write_errors,
    find_checkpoints,
    publish,
    start_folder,
)
from prismatic.training.config import FinetuneConfig, TuningMode
from prismatic.training.folder_kinds import check_is_checkpoint, is_published
from prismatic.training.lora import load_adapter, merged_state_dict, verify_merge, with_unused_targets
from prismatic.training.model_card import write_card
from prismatic.training.published import export_published, load_published
from prismatic.training.published_spec import HeadSizes, read_robot
from prismatic.training.training_setup import TrainingSetup
from prismatic.training.training_state import TrainingState, training_state_files
from prismatic.training.vlm_folder import load_vlm
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.registry import convention_of


def checkpoint_path(cfg: FinetuneConfig, step: int | None = None) -> Path:
    """Folder of `step`, or of the newest step on disk; FileNotFoundError when there is none."""
    root = Path(cfg.run_root_dir)
    if cfg.save_latest_checkpoint_only:
        return root / cfg.run_id
    if step is not None:
        return root / f"{cfg.run_id}--{step}_chkpt"
    found = find_checkpoints(root, cfg.run_id)
    if not found:
        raise FileNotFoundError(f"no checkpoint of run {cfg.run_id!r} in {root}: nothing to resume from")
    return found[-1][1]


# ------------------------------------------------------------------------------------------------ writing


@dataclass
class Snapshot:
    """Content of a checkpoint folder that changes during a run.

    vla: state of the VLM, or of its adapters. tensors: {file: {name: tensor}}. documents: {file: JSON value}, not
    shared with the run. suffix: of the component files. policy_weights: context in which the model of the run holds
    the weights in `vla`.
    """

    step: int
    suffix: str
    vla: dict[str, Tensor]
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, dict[str, Any]]
    policy_weights: Callable[[], AbstractContextManager[Any]]


class CpuCopies:
    """Copies tensors to CPU memory; one copy for tensors that share their memory, as tied weights do."""

    def __init__(self) -> None:
        # The originals are kept as well: freed memory could be given to another tensor with the same key.
        self._copies: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        """The copy, detached."""
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if key not in self._copies:
            self._copies[key] = tensor, tensor.to("cpu", copy=True)
        return self._copies[key][1]


def take_snapshot(cfg: FinetuneConfig, setup: TrainingSetup, state: TrainingState, copy: bool = False) -> Snapshot:
    """What a checkpoint of this moment holds; with `copy` the run may go on while it is written."""
    keep = CpuCopies() if copy else Tensor.detach
    suffix = "latest_checkpoint" if cfg.save_latest_checkpoint_only else f"{state.step}_checkpoint"
    with state.policy_weights():
        vla, tensors = _policy_tensors(setup.model, suffix, keep)
    documents = {MANIFEST: _manifest(cfg, setup, state, suffix)}
    if cfg.save_training_state:
        groups, values = training_state_files(setup, state, keep)
        tensors |= {f"{TRAINING_STATE}/{file}": group for file, group in groups.items()}
        documents |= {f"{TRAINING_STATE}/{file}": value for file, value in values.items()}
    return Snapshot(state.step, suffix, vla, tensors, copy_values(documents), state.policy_weights)


def _policy_tensors(
    model: VLAPolicyModel, suffix: str, keep: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """State of the VLM (of its adapters when it has some), and {file: tensors} of everything beside it."""
    vla, files = model.vla.state_dict(), {}
    if isinstance(model.vla, PeftModel):
        vla = {name: tensor for name, tensor in vla.items() if "lora_" in name}
        files["action_queries"] = {"weight": model.vla.get_base_model().action_queries.weight}
    for name, module in (("action_head", model.action_head), ("proprio_projector", model.proprio_projector)):
        if module is not None:
            files[name] = contiguous(module.state_dict())
    tensors = {f"{name}--{suffix}.safetensors": {k: keep(t) for k, t in group.items()} for name, group in files.items()}
    return {name: keep(tensor) for name, tensor in vla.items()}, tensors


def copy_values(documents: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same JSON values in new containers."""
    copied: dict[str, dict[str, Any]] = json.loads(json.dumps(documents))
    return copied


def save_checkpoint(cfg: FinetuneConfig, setup: TrainingSetup, state: TrainingState) -> Path:
    """Write the checkpoint of `state.step` and return its folder.

    Raises ValueError when a merged model does not act like the adapted one, or cannot be exported;
    CheckpointWriteError when the disk refuses.
    """
    return write_checkpoint(cfg, setup, take_snapshot(cfg, setup, state))


def write_checkpoint(cfg: FinetuneConfig, setup: TrainingSetup, snapshot: Snapshot) -> Path:
    """Write a snapshot and return its folder; errors as of `save_checkpoint`.

    Reads nothing from the running model but its configuration, unless adapters are merged.
    """
    folder = checkpoint_path(cfg, snapshot.step)
    temporary = folder.with_name(folder.name + ".tmp")
    with explained_write_errors(temporary, folder):
        start_folder(folder)
        _write_vla(cfg, setup.model, temporary, snapshot.vla)
        setup.processor.save_pretrained(temporary)
        write_json(temporary / "dataset_statistics.json", setup.statistics)
        if cfg.save_training_state:
            (temporary / TRAINING_STATE).mkdir()
        for file, tensors in snapshot.tensors.items():
            save_file(tensors, temporary / file)
        for file, values in snapshot.documents.items():
            write_json(temporary / file, values)
        if cfg.merge_lora_during_training:
            with snapshot.policy_weights():
                add_merged_model(setup.model, temporary)
        write_card(temporary, earlier=folder)
        if cfg.export_published_layout:
            published = folder.with_name(f"{folder.name}{PUBLISHED}")
            export_published(load_checkpoint(temporary), published, snapshot.suffix)
        publish(temporary, folder)
    return folder


def add_merged_model(model: VLAPolicyModel, folder: Path, tolerance: float = 1e-3) -> float:
    """Write the merged VLM into a LoRA checkpoint folder, read it back and compare; returns the largest difference.

    Args:
        model: the policy with adapters, as saved in `folder`.
        folder: its checkpoint folder.
        tolerance: largest allowed difference of a normalised action.

    Raises ValueError above the tolerance. The list of files is left to the caller (`seal`, `publish`).
    """
    (folder / LISTING).unlink(missing_ok=True)  # of the files before the merge
    adapted: Any = model.vla  # PEFT's wrapper, which stands for the VLM
    base: OpenVLAForActionPrediction = adapted.get_base_model()
    base.save_pretrained(folder, state_dict=merged_state_dict(base))
    manifest = read_manifest(folder)
    merged = load_checkpoint(folder).model
    difference = verify_merge(model, merged, tolerance)
    write_json(folder / MANIFEST, manifest | {"merge": {"max_difference": difference, "tolerance": tolerance}})
    return difference


def _write_vla(cfg: FinetuneConfig, model: VLAPolicyModel, folder: Path, state: dict[str, Tensor]) -> None:
    if not isinstance(model.vla, PeftModel):
        model.vla.save_pretrained(folder, state_dict=state)
        return
    # Embeddings are never adapted; "auto" would ask the hub about the base model.
    model.vla.save_pretrained(folder / "lora_adapter", state_dict=state, save_embedding_layers=False)
    base = model.vla.get_base_model()
    if cfg.lora_emit_unused:
        file = folder / "lora_adapter" / "adapter_model.safetensors"
        save_file(with_unused_targets(load_tensors(file), base, cfg.lora_rank), file)
    base.config.save_pretrained(folder)


def _manifest(cfg: FinetuneConfig, setup: TrainingSetup, state: TrainingState, suffix: str) -> dict[str, Any]:
    folder = checkpoint_path(cfg, state.step)
    start = None if setup.base is None else setup.base.to_dict(folder)
    base = start if cfg.tuning_mode is TuningMode.LORA else None
    return {
        "format_version": FORMAT_VERSION,
        "origin": setup.origin,
        "step": state.step,
        "samples_seen": state.samples_seen,
        "file_suffix": suffix,
        "tuning": cfg.tuning_mode.value,
        "base": base,
        "start": start,
        "action_spec": setup.action_spec.to_dict(),
        "image_spec": setup.image_spec.to_dict(),
        "prompt_kind": setup.model.prompt_kind.value,
        "num_images": setup.num_images,
        "use_proprio": setup.model.proprio_projector is not None,
        "legacy_slices": setup.model.legacy_slices,
        "action_head": setup.model.action_head.config,
        "datasets": setup.dataset_metadata,
        "cameras": setup.dataset.cameras,
        "conventions": {name: convention_of(name) for name in setup.dataset.data_set_names},
        "instructions": setup.instructions,
        "craft": None if state.retention is None else _retention_record(state, base),
        "training": cfg.to_dict(),
        "versions": package_versions(),
    }


def _retention_record(state: TrainingState, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the method says of itself and the identity of theta_0: the drift budget counts from there."""
    assert state.retention is not None
    record = state.retention.record()
    if record is None:
        return None
    landed = {} if state.landing is None else {"landing": state.landing.record()}
    return record | {"anchor": record["anchor"] | {"base": base}} | landed


# ------------------------------------------------------------------------------------------------ reading


def load_checkpoint(
    path: str | Path,
    num_images: int | None = None,
    base: str | Path | None = None,
    robot: str | ActionSpec | None = None,
    data_set: str | None = None,
) -> LoadedCheckpoint:
    """Read a checkpoint folder, ours or published; LoRA adapters without a merged model are merged after loading.

    Args:
        path: the folder.
        num_images: images per sample of a published folder, which does not state it.
        base: where the base of adapters is now (`--base_checkpoint`); None looks where it is recorded.
        robot, data_set: what says chunk length and normalisation of a published head (`published_spec`).

    Raises MissingFileError for a missing file and CheckpointError for one that is damaged or does not fit, naming it,
    and for a folder of another kind, naming the one that was meant.
    """
    path = check_is_checkpoint(path)
    loaded = _load(path, _Given(num_images, base, robot, data_set))
    if isinstance(loaded.model.vla, PeftModel):
        loaded.model.vla = loaded.model.vla.merge_and_unload()
    return loaded


def load_unmerged(path: str | Path, base_path: str | Path | None = None) -> LoadedCheckpoint:
    """As `load_checkpoint` for a LoRA checkpoint of ours, with the adapters beside the base weights.

    `base_path`: where the base model is now, None for the recorded path. ValueError for a checkpoint without adapters.
    """
    path = check_is_checkpoint(path)
    if read_manifest(path)["tuning"] != TuningMode.LORA.value:
        raise CheckpointError(f"{path / MANIFEST}: tuning is {read_manifest(path)['tuning']!r}, expected 'lora'")
    return _load_own(path, _Given(base=base_path), merged=False)


@dataclass(frozen=True)
class _Given:
    """Arguments of `load_checkpoint`. chain: the checkpoints whose base is being read, outermost first."""

    num_images: int | None = None
    base: str | Path | None = None
    robot: str | ActionSpec | None = None
    data_set: str | None = None
    chain: tuple[Path, ...] = ()


def _load(path: Path, given: _Given) -> LoadedCheckpoint:
    if is_published(path):
        _refuse_base(path, given)
        return load_published(path, given.num_images, given.robot, given.data_set)
    return _load_own(path, given, merged=has_weights(path))


def _refuse_base(path: Path, given: _Given) -> None:
    if given.base is not None:
        raise CheckpointError(f"--base_checkpoint {given.base}: {path} holds whole weights and needs no base")


def _load_own(path: Path, given: _Given, merged: bool) -> LoadedCheckpoint:
    check_files(path)
    manifest = read_manifest(path)
    _check_prompt(path, manifest)
    suffix, spec = manifest["file_suffix"], ActionSpec.from_dict(manifest["action_spec"])
    if isinstance(given.robot, str) and read_robot(given.robot, HeadSizes(spec.action_dim, spec.proprio_dim)) != spec:
        raise CheckpointError(f"--robot_platform {given.robot}: {path / MANIFEST} states {manifest['action_spec']}")
    adapted = manifest["tuning"] == TuningMode.LORA.value and not merged
    if not adapted:
        _refuse_base(path, given)
    # Any: PEFT's wrapper stands for the VLM.
    vla: Any = _load_adapted_vla(path, manifest, given) if adapted else load_vla(path)
    bare: OpenVLAForActionPrediction = vla.get_base_model() if adapted else vla
    file, options = path / f"action_head--{suffix}.safetensors", manifest["action_head"]
    with reading(path / MANIFEST):
        head = build_and_fill(lambda: L1RegressionActionHead(**options), load_tensors(file), file)
    projector = None
    if manifest["use_proprio"]:
        file, sizes = path / f"proprio_projector--{suffix}.safetensors", (bare.llm_dim, spec.proprio_dim)
        projector = build_and_fill(lambda: ProprioProjector(*sizes), load_tensors(file), file)
    with reading(path / MANIFEST):
        model = VLAPolicyModel(vla, head, projector, legacy_slices=manifest["legacy_slices"])
    return LoadedCheckpoint(model.eval(), load_processor(path, bare), manifest, read_statistics(path), path)


def _check_prompt(path: Path, manifest: dict[str, Any]) -> None:
    config, found = read_config(path), manifest["prompt_kind"]
    body, expected = config.text_config.model_type, config.prompt_kind.value
    if found != expected:
        raise CheckpointError(
            f"{path / MANIFEST}: prompt_kind is {found!r}, expected {expected!r} for the {body} body of config.json"
        )


def _load_adapted_vla(path: Path, manifest: dict[str, Any], given: _Given) -> PeftModel:
    adapter = existing(path / "lora_adapter")
    adapted = load_adapter(_load_base(path, manifest, given), adapter)
    file = path / f"action_queries--{manifest['file_suffix']}.safetensors"
    load_strictly(adapted.get_base_model().get_submodule("action_queries"), load_tensors(file), file)
    return adapted


def _load_base(path: Path, manifest: dict[str, Any], given: _Given) -> OpenVLAForActionPrediction:
    """The VLM that the adapters in `path` belong to; errors as of `BaseModel.find`, and for another native file."""
    base = BaseModel.from_dict(manifest.get("base"), path / MANIFEST)
    place = base.find(path, given.base, given.chain)
    if base.kind == "vlm":
        return load_vlm(place, manifest["num_images"])[0]
    if base.kind == "native":
        vla = OpenVLAForActionPrediction(read_config(path))
        found = load_native_weights(vla, place).sha256
        if found != base.sha256:
            raise CheckpointError(
                f"base {place}: sha256 of its weights is {found}, the adapter in {path} was trained on {base.sha256}"
            )
        return vla
    spec = ActionSpec.from_dict(manifest["action_spec"])
    inner = _Given(manifest["num_images"], robot=spec, chain=(*given.chain, path.resolve()))
    loaded = _load(check_is_checkpoint(place), inner)
    if isinstance(loaded.model.vla, PeftModel):
        loaded.model.vla = loaded.model.vla.merge_and_unload()
    return loaded.model.vla
