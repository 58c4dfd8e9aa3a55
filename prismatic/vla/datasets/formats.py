"""Finds a data set below a data root and opens it in the format that its folder has."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

from prismatic.command_line import require_package
from prismatic.vla.datasets.format_table import FORMATS, expected_files, find_format
from prismatic.vla.datasets.registry import DataSetConfig
from prismatic.vla.datasets.source import EpisodeSource, MissingFeatureError, SourceKeys


def list_data_sets(data_root: str | os.PathLike) -> list[str]:
    """Names of the data sets of a known format below `data_root`, in its folders and in theirs, sorted."""
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"data root {root} is not a directory")
    found = []
    for child in _children(root):
        inner = [child] if find_format(child) is not None else [c for c in _children(child) if find_format(c)]
        found += [path.relative_to(root).as_posix() for path in inner]
    return sorted(found)


def _children(folder: Path) -> list[Path]:
    try:
        return [child for child in folder.iterdir() if child.is_dir()]
    except OSError:  # another user's
        return []


def find_data_set(data_root: str | os.PathLike, name: str) -> Path:
    """The folder `<data_root>/<name>`, `name` a folder or several with slashes between; or the only one in it.

    ValueError for a name that leaves the root and for a choice of several, FileNotFoundError, listing what is there,
    for an unknown data set.
    """
    root = Path(data_root)
    if any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name:
        raise ValueError(f"data set {name!r}: expected the name of a folder below {root}, or folder/folder")
    if find_format(root / name) is not None:
        return root / name
    inner = [child for child in _children(root / name) if find_format(child) is not None]
    if len(inner) == 1:
        return inner[0]
    if inner:
        choice = sorted(f"{name}/{child.name}" for child in inner)
        raise ValueError(f"data set {name!r} has several configurations: name one of {', '.join(choice)}")
    raise FileNotFoundError(
        f"data set {name!r} not found below {root}: expected {root / name}/{expected_files()}, "
        f"found data sets {list_data_sets(root) or 'none'}"
    )


def open_data_set(
    data_root: str | os.PathLike,
    name: str,
    config: DataSetConfig,
    split: str | None = None,
    num_images: int | None = None,
    skip_bad: bool = False,
) -> EpisodeSource:
    """Open the data set `name` (see `find_data_set`) with the first of the configuration's keys that the files have.

    split: None is `train`, or the only one there is. num_images: only this many cameras have to be there. skip_bad:
    episodes that cannot be read are `problems` of the source instead of errors. Raises also ValueError for a format
    without keys or too few cameras, MissingFeatureError when no keys fit, and what the source raises.
    """
    folder = find_data_set(data_root, name)
    format_name = find_format(folder)
    candidates = [keys for keys in config.keys if keys.format == format_name]
    if not candidates:
        known = sorted({keys.format for keys in config.keys})
        raise ValueError(f"{folder} is a data set in {format_name} format, its configuration has keys for {known}")
    problems: list[str] = []
    for keys in candidates:
        try:
            return open_source(folder, keys.with_cameras(num_images, name), split, skip_bad)
        except MissingFeatureError as error:
            problems.append(str(error))
    raise MissingFeatureError("; ".join(problems))


def open_source(folder: Path, keys: SourceKeys, split: str | None = None, skip_bad: bool = False) -> EpisodeSource:
    """Open a folder, of several RLDS versions the highest, or one RLDS version, with these keys.

    UsageError when the format needs a package that is not installed.
    """
    found = FORMATS[keys.format]
    for package in found.packages:
        require_package(f"{folder} is a data set in {keys.format} format, which", package, found.extra)
    module, name = found.source.split(":")
    return getattr(import_module(f"{__package__}.{module}"), name)(folder, keys, split, skip_bad)
