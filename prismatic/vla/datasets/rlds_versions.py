"""RLDS folders below a data root, and their versions."""

from __future__ import annotations

import os
import re
from pathlib import Path

VERSION = re.compile(r"\d+\.\d+\.\d+")


def list_data_sets(data_root: str | os.PathLike) -> list[str]:
    """Names of the folders below `data_root` that hold a version directory, sorted."""
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"data root {root} is not a directory")
    return sorted(child.name for child in root.iterdir() if child.is_dir() and version_directories(child))


def find_version_directory(data_root: str | os.PathLike, name: str) -> Path:
    """`<data_root>/<name>/<highest version>`; FileNotFoundError lists the data sets that are there."""
    root = Path(data_root)
    available = list_data_sets(root)
    versions = version_directories(root / name)
    if not versions:
        raise FileNotFoundError(
            f"data set {name!r} not found below {root}: expected {root / name}/<x.y.z>/dataset_info.json, "
            f"found data sets {available or 'none'}"
        )
    return versions[-1]


def version_directories(folder: Path) -> list[Path]:
    """The `x.y.z` directories with a `dataset_info.json`, lowest version first."""
    try:
        children = list(folder.iterdir()) if folder.is_dir() else []
    except OSError:  # another user's
        children = []
    found = [child for child in children if VERSION.fullmatch(child.name) and (child / "dataset_info.json").is_file()]
    return sorted(found, key=lambda path: tuple(int(part) for part in path.name.split(".")))
