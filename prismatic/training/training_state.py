"""What a run needs to go on, beside the model: `training_state/` of a checkpoint folder.

    trainable.safetensors                     the trained weights
    optimizer.safetensors, optimizer.json     its tensors ("{parameter}.{name}") and everything else
    generators.json                           Python's, NumPy's, torch's and CUDA's generator of every rank
    state.json                                step, samples, position in the data, fingerprints of the data sets
    scaler.json                               loss scale of fp16 training
    craft.json, craft_anchor.safetensors      state of the retention method, and theta_0
    ema.safetensors                           averaged weights

No file is a pickle. Folders of earlier versions (`optimizer.pt`, `rng.pt`, one rank's generators) are read as well.
"""

from __future__ import annotations

import base64
import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prismatic.craft import CRaFTWeightManager
from prismatic.model_files import CheckpointError, existing, read_json, reading, regular_file
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.base_model import BaseModel
from prismatic.training.checkpoint_files import contiguous, load_tensors, tensors_hash
from prismatic.training.checkpoint_folder import TRAINING_STATE
from prismatic.training.ema import WeightAverage
from prismatic.training.retention.landing import Landing
from prismatic.training.retention.protocol import Retention
from prismatic.training.training_setup import TrainingSetup

_MOST_SAMPLES = 1 << 62


@dataclass
class TrainingState:
    """What changes during a run beside the model's weights.

    `sampler` is the position in the data (`EpochSampler.state_dict`), `generators` holds `generator_states()` of each
    rank. Both are None where a run is only built, and filled in by `restore_training_state`.
    """

    step: int
    samples_seen: int
    optimizer: torch.optim.Optimizer
    retention: Retention | None = None
    ema: WeightAverage | None = None
    landing: Landing | None = None
    scaler: torch.amp.GradScaler | None = None
    # The last measurement of the constraint, which the log repeats until the next one.
    constraint_metrics: dict[str, float] = field(default_factory=dict)
    sampler: dict[str, int] | None = None
    generators: list[dict[str, Any]] | None = None

    @property
    def anchor(self) -> CRaFTWeightManager | None:
        """The weights theta_0 the run is held to, if it is."""
        return None if self.retention is None else self.retention.weights

    def policy_weights(self) -> AbstractContextManager[Any]:
        """Context in which the model holds the weights of the policy: averaged or landed ones, if there are any."""
        if self.landing is not None:
            return self.landing.policy_weights()
        return nullcontext() if self.ema is None else self.ema.averaged_weights()


# ------------------------------------------------------------------------------------------------ generators


def generator_states() -> dict[str, Any]:
    """State of this process's generators, JSON-ready."""
    version, keys, gauss = random.getstate()
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - the global generator is what libraries use
    kind, numpy_keys, *rest = numpy_state
    return {
        "python": [version, list(keys), gauss],
        "numpy": [kind, numpy_keys.tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        # Only this rank's device: the others belong to other processes.
        "cuda": _encode(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def restore_generators(state: dict[str, Any]) -> None:
    """Inverse of `generator_states`; the CUDA generator stays as it is when either side has none."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(_decode(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(state["cuda"]))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text, validate=True)), dtype=torch.uint8)


def _saved_generators(folder: Path) -> list[dict[str, Any]]:
    """Generators of each rank that was saved, in rank order."""
    file = folder / "generators.json"
    saved = read_json(file)
    if "ranks" in saved:
        ranks: list[dict[str, Any]] = saved["ranks"]
        return ranks
    with reading(folder / "rng.pt"):  # an earlier version, which saved rank 0 only
        rng = torch.load(regular_file(folder / "rng.pt"), weights_only=True)
        cuda = _encode(rng["cuda"][0]) if rng["cuda"] else None
        return [saved | {"torch": _encode(rng["torch"]), "cuda": cuda}]


# ------------------------------------------------------------------------------------------------ writing


def training_state_files(
    setup: TrainingSetup, state: TrainingState, copy: Callable[[Tensor], Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content of `training_state/`: {file: tensors} and {file: JSON value}; tensors pass through `copy`."""
    values, optimizer_tensors = _optimizer_content(state.optimizer)
    tensors = {"trainable.safetensors": trainable_tensors(setup.model), "optimizer.safetensors": optimizer_tensors}
    documents = {
        "optimizer.json": values,
        "generators.json": {"ranks": state.generators or [generator_states()]},
        "state.json": {
            "step": state.step,
            "samples_seen": state.samples_seen,
            "sampler": state.sampler,
            "dataset_fingerprints": fingerprints(setup),
            "constraint_metrics": state.constraint_metrics,
        },
    }
    if state.scaler is not None:
        documents["scaler.json"] = state.scaler.state_dict()
    if state.ema is not None:
        tensors["ema.safetensors"] = state.ema.state_dict()
    if state.anchor is not None:
        anchor = contiguous(state.anchor.state_dict())
        record = {
            "anchor_sha256": tensors_hash(anchor),
            "base_sha256": None if setup.base is None else setup.base.sha256,
        }
        assert state.retention is not None  # whose anchor it is
        documents["craft.json"] = record | state.retention.state_dict()
        tensors["craft_anchor.safetensors"] = anchor
    copied = {file: {name: copy(tensor) for name, tensor in group.items()} for file, group in tensors.items()}
    return copied, documents


def trainable_tensors(model: VLAPolicyModel) -> dict[str, Tensor]:
    """The trained weights by name, detached and contiguous."""
    return {n: p.detach().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def fingerprints(setup: TrainingSetup) -> dict[str, str]:
    """{data set name: hash of its content}; empty for data sets that have none."""
    return dict(getattr(setup.dataset, "fingerprints", None) or {})


def _optimizer_content(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        for name, value in entry.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value.detach().contiguous()
            else:
                values.setdefault(str(index), {})[name] = value
    return {"param_groups": state["param_groups"], "state": values}, tensors


# ------------------------------------------------------------------------------------------------ reading


def restore_training_state(folder: str | Path, setup: TrainingSetup, state: TrainingState, rank: int = 0) -> int:
    """Put the objects of `state` and the model of `setup` back where the checkpoint left them; returns its step.

    Fills in `samples_seen`, `sampler` and `generators` of `state`. The generators of this process are restored when
    the run had a rank of this number, and left as they are otherwise.

    Raises MissingFileError when the folder holds no training state, or no anchor for a run that is held to one;
    CheckpointError when a file is damaged, or when the trained parameters, the anchor, the base model or the data sets
    are not those of the interrupted run.
    """
    folder = existing(Path(folder) / TRAINING_STATE)
    counters = _read_counters(folder / "state.json", setup)
    trainable = load_tensors(folder / "trainable.safetensors")
    expected = {n: p for n, p in setup.model.named_parameters() if p.requires_grad}
    _check_trainable(folder / "trainable.safetensors", trainable, expected)
    if state.anchor is not None:
        _restore_anchor(folder, setup.base, state)
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(trainable[name])
    _restore_optimizer(folder, state.optimizer)
    if state.scaler is not None:
        file = folder / "scaler.json"
        with reading(file):
            state.scaler.load_state_dict(read_json(file))
    if state.ema is not None:
        averages = load_tensors(folder / "ema.safetensors")
        with reading(folder / "ema.safetensors"):
            state.ema.load_state_dict(averages)
    state.generators = _saved_generators(folder)
    with reading(folder / "generators.json"):
        if rank < len(state.generators):
            restore_generators(state.generators[rank])
    state.constraint_metrics, state.sampler = counters["constraint_metrics"], counters.get("sampler")
    state.step, state.samples_seen = counters["step"], counters["samples_seen"]
    return state.step


def _read_counters(file: Path, setup: TrainingSetup) -> dict[str, Any]:
    counters = read_json(file)
    kinds: dict[str, type[Any]] = {"step": int, "samples_seen": int, "constraint_metrics": dict}
    for name, kind in kinds.items():
        value: Any = counters.get(name)
        if type(value) is not kind or (kind is int and not 0 <= value < _MOST_SAMPLES):
            raise CheckpointError(f"{file}: {name} is {str(value)[:80]!r}, expected {kind.__name__}")
    saved, current = counters.get("dataset_fingerprints") or {}, fingerprints(setup)
    if saved and current and saved != current:
        changed = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
        details = "; ".join(f"{name} is {current.get(name)}, expected {saved.get(name)}" for name in changed)
        raise CheckpointError(
            f"{file}: the data is not what the interrupted run trained on: {details}. Restore the data sets, or start "
            "a new run from the checkpoint with --config_file_path"
        )
    return counters


def _check_trainable(file: Path, found: dict[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    if found.keys() != expected.keys():
        difference = sorted(found.keys() ^ expected.keys())[:5]
        raise CheckpointError(f"{file}: trained parameters differ from this configuration's, e.g. {difference}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(f"{file}: {name} is {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")


def _restore_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    old = folder / "optimizer.pt"
    if old.exists():  # an earlier version
        with reading(old):
            optimizer.load_state_dict(torch.load(regular_file(old), weights_only=True))
        return
    file = folder / "optimizer.json"
    values, tensors = read_json(file), load_tensors(folder / "optimizer.safetensors")
    with reading(file):
        state = {int(index): dict(entry) for index, entry in values["state"].items()}
        for name, tensor in tensors.items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({"state": state, "param_groups": [_group(g) for g in values["param_groups"]]})


def _group(values: dict[str, Any]) -> dict[str, Any]:
    # JSON has no tuples; the only list of an optimizer is its parameters.
    return {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in values.items()}


def _restore_anchor(folder: Path, base: BaseModel | None, state: TrainingState) -> None:
    file, record_file = folder / "craft_anchor.safetensors", folder / "craft.json"
    record, anchor = read_json(record_file), load_tensors(file)
    if tensors_hash(anchor) != record.get("anchor_sha256"):
        raise CheckpointError(
            f"{file} is not the anchor this run started from: its hash is {tensors_hash(anchor)}, expected "
            f"{record.get('anchor_sha256')} as in craft.json"
        )
    # With adapters the frozen base weights are part of theta_0.
    if base is not None and record.get("base_sha256") != base.sha256:
        raise CheckpointError(
            f"base {base.path}: sha256 of its weights is {base.sha256}, the interrupted run in {folder} started from "
            f"{record.get('base_sha256')}"
        )
    assert state.retention is not None  # it has the anchor
    with reading(record_file):
        state.retention.load_state_dict(record, anchor)
