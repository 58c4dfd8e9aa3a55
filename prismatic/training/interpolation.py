"""Weights between the start model and a trained one: theta_0 + scale (theta - theta_0), after training.

WiSE-FT (arXiv 2109.01903), for policies RETAIN (arXiv 2512.08333). scale 0 is the start model, 1 the trained one, above
1 extrapolates. For LoRA checkpoints it is the scaling of the adapters; what is trained beside them (action queries,
head, proprio projector) is interpolated as in full tuning, tensor by tensor in fp32. RETAIN's variant of the language
model alone is `Parts.LLM`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from prismatic.evidence.files import write_json
from prismatic.model_files import existing
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_files import LoadedCheckpoint, contiguous, read_manifest
from prismatic.training.checkpoint_folder import MANIFEST, publish, start_folder
from prismatic.training.checkpoints import load_checkpoint, load_unmerged
from prismatic.training.config import TuningMode
from prismatic.training.folder_kinds import check_is_checkpoint
from prismatic.training.model_card import write_card
from prismatic.vla.action_spec import ActionSpec

_QUERIES, _VLA, _LLM = "vla.action_queries", "vla", "vla.language_model"
_HEAD, _PROPRIO = "action_head", "proprio_projector"
_LATEST = "latest_checkpoint"


class Parts(str, Enum):
    """What is interpolated; everything else stays as trained.

    `vlm`: the VLM with its action queries; `llm`: the language model alone, with its embeddings; `head`: the head with
    the proprio projector; `all`: VLM and head.
    """

    VLM = "vlm"
    LLM = "llm"
    HEAD = "head"
    ALL = "all"

    @property
    def vlm_component(self) -> str | None:
        """What of the VLM is interpolated."""
        return {Parts.LLM: _LLM, Parts.HEAD: None}.get(self, _VLA)

    @property
    def has_head(self) -> bool:
        """Whether head and proprio projector are interpolated."""
        return self in (Parts.HEAD, Parts.ALL)

    def components(self, with_adapters: bool) -> list[str]:
        """Modules of the policy whose tensors are interpolated; `with_adapters`: those beside the scaled adapters."""
        vlm = self.vlm_component
        if with_adapters:  # of the VLM only the action queries are trained beside them
            vlm = _QUERIES if vlm == _VLA else None
        return ([] if vlm is None else [vlm]) + [_HEAD, _PROPRIO] * self.has_head


@dataclass(frozen=True)
class _Start:
    """What is needed of the start model: tensors by component of the policy, and how its head reads them."""

    path: Path
    sha256: str
    tensors: dict[str, dict[str, Tensor]]
    conventions: dict[str, Any]


def check_scale(scale: float) -> float:
    """The scale; ValueError unless it is a finite number >= 0."""
    if not (math.isfinite(scale) and scale >= 0):
        raise ValueError(f"--adapter_scale is {scale}, expected a finite number >= 0")
    return scale


def scale_adapters(model: nn.Module, scale: float) -> None:
    """In place: multiply what the adapters of a model, or of a part of one, add to the base weights.

    `peft.helpers.rescale_adapter_scale`, for good. ValueError for a bad scale or without adapters.
    """
    check_scale(scale)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        raise ValueError("--adapter_scale: the model has no LoRA adapters to scale")
    for layer in layers:
        layer.scaling = {name: value * scale for name, value in layer.scaling.items()}


def interpolate_checkpoint(
    checkpoint: str | Path,
    scale: float,
    base: str | Path | None = None,
    parts: str | Parts = Parts.ALL,
    robot: str | None = None,
) -> LoadedCheckpoint:
    """The policy between a trained checkpoint and the model it started from, with a merged VLM.

    Args:
        checkpoint: trained checkpoint, any that `load_checkpoint` reads.
        scale: of the difference, finite and >= 0.
        base: folder of the start model. None takes, for LoRA, the base recorded in the checkpoint, whose hash is
            checked either way; otherwise the recorded `--config_file_path`, which must still be a folder.
        parts: `all`; `vlm` keeps head and proprio projector as trained; `llm` the vision towers, their projector and
            the action queries too; `head` keeps the VLM, so that at scale 0 the start model's head reads the trained
            features. Adapters on a VLM alone allow `vlm` and `llm` only, and `vlm` keeps the action queries too:
            nothing of that existed before the training.
        robot: of two published folders that do not name theirs (`published_spec`).

    The manifest is that of a full-tuning checkpoint and describes the interpolation. Raises ValueError for a bad scale,
    another hash, or a start model of another shape, naming file, key and shapes; FileNotFoundError for missing files.
    """
    check_scale(scale)
    parts, checkpoint = _parts(parts), check_is_checkpoint(checkpoint)
    # The start model goes first: of one with adapters only the small tensors stay in memory.
    if is_lora(checkpoint):
        start = _start_of_adapters(checkpoint, base, parts)
        loaded = load_unmerged(checkpoint, base)
        adapted: Any = loaded.model.vla  # PEFT's wrapper, which stands for the VLM
        if parts.vlm_component is not None:
            scale_adapters(_adapted(adapted, parts.vlm_component), scale)
        loaded.model.vla = adapted.merge_and_unload()
    else:
        loaded = load_checkpoint(checkpoint, robot=robot)
        start = _start_of_weights(loaded, base, parts)
    _check_fits(loaded, start, parts)
    for component, tensors in start.tensors.items():
        module = _component(loaded, component)
        assert module is not None  # `_check_fits` has found it
        _interpolate_(module, tensors, scale)
    record = {
        "adapter_scale": scale,
        "parts": parts.value,
        "base": str(start.path),
        "base_sha256": start.sha256,
        "checkpoint": str(checkpoint),
    }
    loaded.manifest = _manifest(loaded.manifest, record)
    return loaded


def is_lora(checkpoint: Path) -> bool:
    """Whether the folder holds adapters of ours, merged or not."""
    if not (checkpoint / MANIFEST).exists():  # published folders hold merged models
        return False
    tuning: str = read_manifest(checkpoint)["tuning"]
    return tuning == TuningMode.LORA.value


def _adapted(vla: PeftModel, component: str) -> nn.Module:
    return vla if component == _VLA else vla.get_base_model().get_submodule(component.removeprefix(f"{_VLA}."))


def _parts(value: str | Parts) -> Parts:
    try:
        return Parts(value)
    except ValueError:
        raise ValueError(f"--parts is {value!r}, expected one of {', '.join(p.value for p in Parts)}") from None


def _manifest(manifest: dict[str, Any], interpolation: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in manifest.items() if key != "merge"}
    changes = {"tuning": TuningMode.FULL.value, "base": None, "interpolation": interpolation}
    return {"file_suffix": _LATEST, **kept, **changes}


# ------------------------------------------------------------------------------------------------ the start model


def _start_of_adapters(checkpoint: Path, base: str | Path | None, parts: Parts) -> _Start:
    """Start model of a LoRA checkpoint, without the weights that the adapters belong to."""
    existing(checkpoint / "lora_adapter")
    manifest, file = read_manifest(checkpoint), checkpoint / MANIFEST
    record = BaseModel.from_dict(manifest.get("base"), file)
    path = record.find(checkpoint, base)
    if record.kind != "checkpoint":
        if parts.has_head:
            raise ValueError(
                f"{file}: base is the VLM {path}, which has no action head to interpolate with; use --parts vlm or llm"
            )
        return _Start(path, record.sha256, {}, {})
    start = _load_start(path, manifest["num_images"], ActionSpec.from_dict(manifest["action_spec"]))
    return _describe(start, record.sha256, parts.components(with_adapters=True))


def _start_of_weights(loaded: LoadedCheckpoint, base: str | Path | None, parts: Parts) -> _Start:
    """Start model of a checkpoint that holds whole weights."""
    record = loaded.manifest.get("start")
    if not base and record and record.get("kind") == "checkpoint":
        base = BaseModel.from_dict(record, loaded.path / MANIFEST).find(loaded.path)
    if not base:
        training = loaded.manifest.get("training") or {}
        base, vlm = training.get("config_file_path", ""), training.get("vlm_path", "")
        if vlm or not base or not Path(base).is_dir():
            raise ValueError(
                f"--base is missing: {loaded.path / MANIFEST} records no folder of the start model "
                f"(training.config_file_path is {base!r}, training.vlm_path {vlm!r})"
            )
    path = Path(base)
    start = _load_start(path, loaded.model.num_images, ActionSpec.from_dict(loaded.manifest["action_spec"]))
    return _describe(start, BaseModel.of_checkpoint(path).sha256, parts.components(with_adapters=False))


def _load_start(path: Path, num_images: int, spec: ActionSpec) -> LoadedCheckpoint:
    if not path.is_dir():
        raise FileNotFoundError(f"start model {path}: not a folder; name the folder it is in now with --base")
    return load_checkpoint(path, num_images, robot=spec)


def _describe(start: LoadedCheckpoint, sha256: str, components: list[str]) -> _Start:
    modules = {name: _component(start, name) for name in components}
    tensors = {name: _parameters(module) for name, module in modules.items() if module is not None}
    return _Start(start.path, sha256, tensors, _conventions(start))


def _component(loaded: LoadedCheckpoint, name: str) -> nn.Module | None:
    return loaded.model.get_submodule(name) if name != _PROPRIO else loaded.model.proprio_projector


def _parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, tied ones once. The policy has no buffers that are saved."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def _conventions(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """What gives head and projector their meaning beside their shapes."""
    head = {f"action_head.{name}": value for name, value in loaded.model.action_head.config.items()}
    return {"legacy_slices": loaded.model.legacy_slices, "action_spec": loaded.manifest["action_spec"], **head}


# ------------------------------------------------------------------------------------------------ interpolation


@torch.no_grad()
def _interpolate_(module: nn.Module, start: dict[str, Tensor], scale: float) -> None:
    """In place: parameters <- start + scale (parameters - start), in fp32."""
    for name, tensor in _parameters(module).items():
        # `lerp` is exact at both ends: scale 1 gives the trained tensor bit for bit, 0 the start's.
        tensor.copy_(torch.lerp(start[name].float(), tensor.float(), scale))


def _check_fits(loaded: LoadedCheckpoint, start: _Start, parts: Parts) -> None:
    """ValueError unless both have the same tensors in the parts and, with the head, the same conventions."""
    expected, found = loaded.model.proprio_projector is not None, _PROPRIO in start.tensors
    if parts.has_head and expected != found:
        raise ValueError(
            f"{start.path}: proprio projector is {'present' if found else 'missing'}, expected "
            f"{'one' if expected else 'none'} as in {loaded.path}; --parts vlm interpolates the VLM alone"
        )
    for component, tensors in start.tensors.items():
        where = f"{_file_of(start.path, component)}, start model of {loaded.path}"
        module = _component(loaded, component)
        assert module is not None  # a proprio projector is there, or was refused above
        _check_same_shapes(_parameters(module), tensors, component, where)
    if not parts.has_head:
        return
    for name, value in _conventions(loaded).items():
        if start.conventions[name] != value:
            raise ValueError(
                f"{start.path}: {name} is {start.conventions[name]!r}, expected {value!r} as in {loaded.path}: weights "
                "of heads with different conventions cannot be mixed; --parts vlm interpolates the VLM alone"
            )


def _check_same_shapes(trained: dict[str, Tensor], start: dict[str, Tensor], component: str, where: str) -> None:
    missing, unexpected = sorted(trained.keys() - start.keys()), sorted(start.keys() - trained.keys())
    if missing or unexpected:
        raise ValueError(f"{where}: tensors of {component} differ: missing {missing[:3]}, unexpected {unexpected[:3]}")
    for name, tensor in trained.items():
        if start[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {component}.{name} is {tuple(start[name].shape)}, expected {tuple(tensor.shape)} as in the "
                "trained checkpoint"
            )


def _file_of(path: Path, component: str) -> Path:
    """The file of a component when it has one of its own, else the folder."""
    return next(iter(sorted(path.glob(f"{component}--*"))), path)


# ------------------------------------------------------------------------------------------------ writing


def save_policy(loaded: LoadedCheckpoint, folder: str | Path) -> Path:
    """Write a policy with a merged VLM as a full-tuning checkpoint folder without training state; returns it.

    Written under a temporary name and renamed. Raises FileExistsError when the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"--output {folder} exists already")
    temporary = start_folder(folder)
    suffix, model = loaded.manifest["file_suffix"], loaded.model
    model.vla.save_pretrained(temporary)
    for name in (_HEAD, _PROPRIO):
        module = _component(loaded, name)
        if module is not None:
            save_file(contiguous(module.state_dict()), temporary / f"{name}--{suffix}.safetensors")
    loaded.processor.save_pretrained(temporary)
    write_json(temporary / "dataset_statistics.json", loaded.statistics)
    write_json(temporary / MANIFEST, loaded.manifest)
    write_card(temporary)
    publish(temporary, folder)
    return folder
