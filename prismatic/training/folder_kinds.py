"""What a path that should be a checkpoint really is, in words that say which folder was meant.

A run leaves several folders that look alike, other code bases have layouts of their own, and names of the Hugging Face
Hub are no paths here. Nothing is loaded: names and descriptions of files decide.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prismatic.model_files import (
    CheckpointError,
    MissingFileError,
    existing,
    has_weights,
    nothing_there,
    read_json,
    regular_file,
    weight_files,
)
from prismatic.training.checkpoint_folder import LATEST, MANIFEST, TRAINING_STATE
from prismatic.vla.datasets.format_table import is_data_set

_STEP = re.compile(r"(.+)--(\d+)_chkpt")
_HEAD = "action_head--*checkpoint.*"
_ADAPTER_FILE = "adapter_config.json"
_VLM_TYPES = ("openvla", "prismatic")
_SMALL = 1 << 24


def is_published(path: Path) -> bool:
    """Whether the folder holds a merged model beside a published action-head file."""
    heads = any(True for _ in path.glob("action_head--*checkpoint.pt"))
    return not (path / MANIFEST).exists() and has_weights(path) and heads


def is_vlm(path: Path) -> bool:
    """Whether the folder holds a whole VLM of ours or OpenVLA's, and no action head."""
    if not os.path.isdir(path):  # also for a text that is no path
        return False
    alone = not (path / MANIFEST).exists() and not any(path.glob(_HEAD)) and not (path / _ADAPTER_FILE).exists()
    return alone and has_weights(path) and _json(path / "config.json").get("model_type") in _VLM_TYPES


def is_checkpoint(path: Path) -> bool:
    """Whether the folder looks like a checkpoint, ours or published."""
    return path.is_dir() and ((path / MANIFEST).exists() or is_published(path))


def check_is_checkpoint(path: str | Path) -> Path:
    """The folder of a checkpoint with all files that every checkpoint has.

    Raises MissingFileError for no folder or a missing file, CheckpointError for a folder of another kind. The message
    says what the path is and, as far as that can be seen, which folder to name.
    """
    text, path = str(path), Path(path)
    try:
        if "\0" in text:
            raise ValueError("NUL character")
        there, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long, or no name
        raise CheckpointError(f"{text[:200]!r}: no path of a folder: {error}") from None
    if not there:
        raise MissingFileError(nothing_there(text, "the folder of a checkpoint"))
    if not is_folder:
        raise CheckpointError(f"{existing(path)} is a file, expected the folder of a checkpoint{_parent_of(path)}")
    if not is_checkpoint(path):
        found = next((words for recognise in _KINDS if (words := recognise(path))), None)
        raise MissingFileError(f"{path} {found or _unknown(path)}")
    _check_complete(path)
    return path


def _check_complete(path: Path) -> None:
    for name in ("config.json", "preprocessor_config.json", "dataset_statistics.json"):
        regular_file(path / name)
    if has_weights(path):
        weight_files(path)
    elif _json(path / MANIFEST).get("tuning") == "lora":
        existing(path / "lora_adapter")
    else:
        weight_files(path)  # says which files are missing
    for file in sorted(path.glob(_HEAD)):
        regular_file(file)


def _parent_of(path: Path) -> str:
    return f": {path.parent}" if is_checkpoint(path.parent) else ""


# ----------------------------------------------------------------------------------- what it is instead, in words


def _run_folder(path: Path) -> str | None:
    """The folder of a run, which holds logs and the name of the newest checkpoint beside it."""
    found = _steps(path.parent, path.name)
    if (path / LATEST).is_file():
        named = path.parent / (path / LATEST).read_text(encoding="utf-8", errors="replace")[:300].strip()
        newest = named if is_checkpoint(named) else None
    elif not found and not (path / "metrics.jsonl").is_file():
        return None
    else:
        newest = None
    newest = newest or (found[-1] if found else None)
    if newest is None:
        return "is the folder of a run that has no checkpoint"
    return f"is the folder of a run; its newest checkpoint is {newest}"


def _steps(root: Path, run_id: str | None = None) -> list[Path]:
    """Checkpoints by step: of one run, or of every run, with the run last whose last one is the newest file.

    Within a run the step decides: clocks are set back, and copies have other times.
    """
    runs: dict[str, list[tuple[int, Path]]] = {}
    for path in root.iterdir():
        if (match := _STEP.fullmatch(path.name)) and is_checkpoint(path):
            runs.setdefault(match[1], []).append((int(match[2]), path))
    if run_id is not None:
        runs = {run_id: runs.get(run_id, [])}
    by_step = [[path for _, path in sorted(steps)] for steps in runs.values()]
    return [path for steps in sorted(by_step, key=_last_written) for path in steps]


def _last_written(steps: list[Path]) -> int:
    return steps[-1].stat().st_mtime_ns if steps else 0


def _run_root(path: Path) -> str | None:
    found = _steps(path)
    if not found:
        return None
    return f"is a folder of runs with {len(found)} checkpoints; the newest is {found[-1]}"


def _part_of_a_checkpoint(path: Path) -> str | None:
    if not (path.parent / MANIFEST).exists():
        return None
    parts = {"lora_adapter": "the adapters", TRAINING_STATE: "the training state"}
    return f"holds {parts.get(path.name, 'a part')} of a checkpoint; name the checkpoint: {path.parent}"


def _half_written(path: Path) -> str | None:
    if not path.name.endswith((".tmp", ".old", ".deleted")):
        return None
    return "is what a checkpoint that was being written or deleted left; name a folder without this ending"


def _published_adapters(path: Path) -> str | None:
    inner = path / "lora_adapter"
    if (path / _ADAPTER_FILE).is_file():
        base = _json(path / _ADAPTER_FILE).get("base_model_name_or_path")
        what = "holds LoRA adapters alone"
    elif (inner / _ADAPTER_FILE).is_file() and any(path.glob(_HEAD)):
        base = _json(inner / _ADAPTER_FILE).get("base_model_name_or_path")
        what = "is a checkpoint of the public code whose adapters are not merged"
    else:
        return None
    return (
        f"{what}; merge them into their base ({str(base)[:200]}) with the public code's "
        "vla-scripts/merge_lora_weights_and_save.py, which writes model.safetensors, then name the folder"
    )


def _hub_cache(path: Path) -> str | None:
    snapshots = sorted((path / "snapshots").glob("*/")) if (path / "snapshots").is_dir() else []
    return f"is a cache of the Hugging Face Hub; name the folder in it: {snapshots[-1]}" if snapshots else None


def _folder_above(path: Path) -> str | None:
    inside = [p for p in sorted(path.iterdir())[:1000] if p.is_dir() and is_checkpoint(p)]
    return f"is no checkpoint but holds {len(inside)}; name one, such as {inside[0]}" if inside else None


def _native(path: Path) -> str | None:
    place = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not any(place.glob("*.pt")) or not (_json(path / "config.json").keys() & {"model", "vla"}):
        return None
    return "is a native Prismatic VLM without a policy; train from it with --vlm_path"


def _vlm(path: Path) -> str | None:
    if not is_vlm(path):
        return None
    return (
        "is a vision-language model without an action head, so it cannot act; train one from it with finetune.py "
        "--config_file_path (OpenVLA's actions as text tokens are not read)"
    )


def _data_set(path: Path) -> str | None:
    return "is a data set, expected a checkpoint" if is_data_set(path) else None


def _other_code_base(path: Path) -> str | None:
    """Layouts that cannot be read, by what only they have."""
    config = _json(path / "config.json")
    if (path / "params").is_dir() and ((path / "assets").is_dir() or (path / "_CHECKPOINT_METADATA").exists()):
        return "is a checkpoint of openpi (JAX), which is another model: it cannot be read here"
    if isinstance(config.get("type"), str) and ("input_features" in config or (path / "train_config.json").is_file()):
        return f"is a LeRobot policy of type {config['type'][:40]}, which is another model: it cannot be read here"
    if any(path.glob("global_step*")) or any(path.glob("*.distcp")) or any(path.glob("mp_rank_*")):
        return "is a sharded training state (DeepSpeed or FSDP); convert it to model.safetensors first"
    if any(path.glob("pytorch_model*.bin")) and not has_weights(path):
        return "holds weights as pickle (pytorch_model.bin), which are not read; save them as safetensors"
    if has_weights(path):
        kind = config.get("model_type")
        named = f"a model of type {kind[:40]}" if isinstance(kind, str) else "a model"
        return (
            f"holds {named} without an action head; expected {MANIFEST}, or action_head--*checkpoint.pt of the "
            "published VLA-Adapter layout"
        )
    return None


def _unknown(path: Path) -> str:
    found = sorted(p.name for p in path.iterdir())
    if not found:
        return f"is an empty folder, expected a checkpoint with {MANIFEST}"
    return (
        f"is no checkpoint: expected {MANIFEST}, or model.safetensors beside action_head--*checkpoint.pt of the "
        f"published layout; {path / MANIFEST} does not exist, found {', '.join(found[:8])}"
    )


def _json(file: Path) -> dict[str, Any]:
    """A description that decides words only: nothing is said of one that cannot be read."""
    try:
        return read_json(file) if file.is_file() and file.stat().st_size < _SMALL else {}
    except CheckpointError:
        return {}


_KINDS: tuple[Callable[[Path], str | None], ...] = (
    _part_of_a_checkpoint,
    _half_written,
    _run_folder,
    _run_root,
    _published_adapters,
    _hub_cache,
    _native,
    _vlm,
    _data_set,
    _other_code_base,
    _folder_above,
)
