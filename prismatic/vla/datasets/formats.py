"""Which storage format a folder has, and the source that reads it."""

from __future__ import annotations

import os
from pathlib import Path

from prismatic.vla.datasets.registry import DataSetConfig
from prismatic.vla.datasets.rlds import version_directories
from prismatic.vla.datasets.rlds_source import RLDSSource
from prismatic.vla.datasets.source import EpisodeSource, MissingFeatureError


def list_data_sets(data_root: str | os.PathLike) -> list[str]:
    """Names of the folders below `data_root` that hold a data set of a known format, sorted."""
    root = Path(data_root)
    if not root.is_dir():
        raise FileNotFoundError(f"data root {root} is not a directory")
    return sorted(child.name for child in root.iterdir() if find_format(child) is not None)


def find_format(folder: Path) -> str | None:
    """`rlds`, `lerobot` or `hdf5` by the files of a folder, None when it is none of these."""
    if not folder.is_dir():
        return None
    if version_directories(folder):
        return "rlds"
    if (folder / "meta" / "info.json").is_file():
        return "lerobot"
    if any(folder.glob("*.hdf5")):
        return "hdf5"
    return None


def open_data_set(
    data_root: str | os.PathLike,
    name: str,
    config: DataSetConfig,
    split: str = "train",
    num_images: int | None = None,
    observations_only: bool = False,
) -> EpisodeSource:
    """Open `<data_root>/<name>` with the first of the configuration's keys that the files have.

    num_images: only this many cameras have to be there. observations_only: nor do actions. Raises FileNotFoundError for
    an unknown data set, listing what is there, ValueError for a format without keys or too few cameras,
    MissingFeatureError when no keys fit.
    """
    root = Path(data_root)
    available = list_data_sets(root)
    if name not in available:
        raise FileNotFoundError(
            f"data set {name!r} not found below {root}: expected {root / name}/<x.y.z>/dataset_info.json (RLDS), "
            f"meta/info.json (LeRobot) or *.hdf5, found data sets {available or 'none'}"
        )
    format_name = find_format(root / name)
    candidates = [keys for keys in config.keys if keys.format == format_name]
    if not candidates:
        known = sorted({keys.format for keys in config.keys})
        raise ValueError(f"{root / name} is a data set in {format_name} format, its configuration has keys for {known}")
    problems: list[str] = []
    for keys in candidates:
        try:
            keys = keys.without_action() if observations_only else keys
            return _open(root / name, keys.with_cameras(num_images, name), split)
        except MissingFeatureError as error:
            problems.append(str(error))
    raise MissingFeatureError("; ".join(problems))


def _open(folder: Path, keys, split: str) -> EpisodeSource:
    if keys.format == "rlds":
        return RLDSSource(version_directories(folder)[-1], keys, split)
    if keys.format == "lerobot":
        from prismatic.vla.datasets.lerobot_source import LeRobotSource  # its libraries are an extra

        return LeRobotSource(folder, keys, split)
    from prismatic.vla.datasets.hdf5_source import HDF5Source  # its library is an extra

    return HDF5Source(folder, keys, split)
