"""Files of models as data: what is read is a file, was downloaded, and holds numbers that can be meant.

Nothing here or above it runs code that a checkpoint names: JSON is data, weights are safetensors or tensors alone.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prismatic.command_line import UsageError, nearest
from prismatic.evidence.checks import FOREIGN, read_object

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
BASE_CHECKPOINT = "where the base of LoRA adapters is now, when it is neither where it was nor moved with them"
ROBOT_PLATFORM = (
    "of a published folder whose statistics do not name its robot: libero, calvin, aloha, bridge, a registered data "
    "set, or chunk length and normalisation as in 10,bounds_q99"
)
"""Help texts of the flags that every program with a checkpoint has."""
_DEEPEST = 32
_HUB = re.compile(
    r"(?P<site>(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?([\w.-]+/[\w.-]+)(?:/tree/.*|/)?"
)
_IN_PLACE_OF_A_FILE = {
    b"version https://git-lfs": "a Git LFS pointer",
    b"# xet version": "a Xet pointer",
    b"/annex/objects": "a git-annex pointer",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"<?xml": "a web page",
}


class CheckpointError(UsageError):
    """A file of a checkpoint is damaged or does not fit; the message names it, what was found and what was expected."""


class MissingFileError(CheckpointError, FileNotFoundError):
    """A file of a checkpoint is not there."""


def existing(path: Path) -> Path:
    """The path of a file or folder; MissingFileError when there is nothing, CheckpointError for a device or a pipe."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise MissingFileError(f"{path} is a link to {os.readlink(path)}, which does not exist") from None
        raise MissingFileError(f"{path} does not exist: not a complete checkpoint folder") from None
    except OSError as error:  # a loop of links, a name that is too long
        raise CheckpointError(f"{str(path)[:300]}: {error.strerror}, expected a file or folder") from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CheckpointError(f"{path} is a device, pipe or socket, expected a file or folder")
    return path


def nothing_there(text: str, expected: str) -> str:
    """The message for a path at which there is nothing: a name on the Hugging Face Hub, a broken link, or a typo."""
    path = Path(text)
    if path.is_symlink():
        return f"{path} is a link that leads nowhere, expected {expected}"
    hub = _HUB.fullmatch(text)
    if hub and (hub["site"] or not Path(path.parts[0]).exists()):
        name = hub[2]
        return (
            f"{text} is no folder here, and nothing is downloaded: `hf download {name} --local-dir "
            f"pretrained_models/{name.split('/')[1]}`, then name that folder"
        )
    beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    return f"{path} does not exist, expected {expected}{nearest(path.name, beside, f'{path.parent}/')}"


def regular_file(path: Path) -> Path:
    """The path of a file that can be read: there, not empty, and no pointer left by an incomplete download.

    Raises MissingFileError and CheckpointError.
    """
    path = existing(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, expected a file")
    with path.open("rb") as stream:
        start = stream.read(32)
    if not start:
        raise CheckpointError(f"{path} is empty: copy or download it again")
    for words, kind in _IN_PLACE_OF_A_FILE.items():
        if start.startswith(words):
            raise CheckpointError(
                f"{path} is {kind} in place of the file: it was not downloaded. In a Git clone: `git lfs pull`; "
                f"otherwise `hf download ORGANISATION/NAME --local-dir {path.parent}`"
            )
    return path


def read_json(path: Path) -> dict:
    """Content of a JSON file; MissingFileError without it, CheckpointError when it does not hold one JSON object."""
    try:
        return read_object(regular_file(path), finite=False, limits=FOREIGN)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever damaged content raises into a CheckpointError that names the file."""
    try:
        yield
    except (CheckpointError, FileNotFoundError, MemoryError):
        raise
    except Exception as error:  # parsers of weights raise many kinds
        raise CheckpointError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def check_numbers(value: Any, where: str, largest: float) -> None:
    """CheckpointError for a number in nested JSON values that is not finite or beyond `largest`, naming its place."""
    pending = [(value, where, 0)]
    while pending:
        item, place, depth = pending.pop()
        if depth > _DEEPEST:
            raise CheckpointError(f"{place}: nested more than {_DEEPEST} deep")
        if isinstance(item, dict):
            pending += [(inner, f"{place}.{key}", depth + 1) for key, inner in item.items()]
        elif isinstance(item, list):
            pending += [(inner, f"{place}[{index}]", depth + 1) for index, inner in enumerate(item)]
        elif isinstance(item, int | float) and not abs(item) <= largest:
            # Also NaN. Python refuses to print very large integers.
            shown = item if isinstance(item, float) else f"an integer of {item.bit_length()} bits"
            raise CheckpointError(f"{place} is {shown}, expected a finite number, at most {largest:g}")


def is_file_name(name: Any) -> bool:
    """Whether a name of a file inside a folder: text that leads nowhere else."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def has_weights(folder: Path) -> bool:
    """Whether the folder holds a whole model, in one file or in shards."""
    return any((folder / name).exists() for name in WEIGHT_FILES)


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole model, each checked to be a file of the folder.

    Raises MissingFileError without weights, CheckpointError for an index that names other places.
    """
    whole, index = (folder / name for name in WEIGHT_FILES)
    if whole.exists() or whole.is_symlink():
        return [regular_file(whole)]
    if not index.exists():
        raise MissingFileError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}: not a complete checkpoint folder")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(map(is_file_name, shards.values())):
        raise CheckpointError(f"{index}: weight_map: expected the name of a file of {folder} for each tensor")
    return [regular_file(folder / name) for name in sorted(set(shards.values()))]
