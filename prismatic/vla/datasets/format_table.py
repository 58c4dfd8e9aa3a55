"""The storage formats. A new one is a file with its source, and a line in `FORMATS`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prismatic.vla.datasets.rlds_versions import version_directories


@dataclass(frozen=True)
class Format:
    """How a format is recognised and read.

    files: those that it is recognised by, in words. is_there: whether a folder is a data set of this format. source:
    `module:name` of what opens one, called with (folder, keys, split, skip_bad) for an `IndexedSource`. The module, one
    of this package, is imported when the first data set is opened. packages, extra: what it needs beyond this one's own
    dependencies, and the extra of this package that installs them.
    """

    files: str
    is_there: Callable[[Path], object]
    source: str
    packages: tuple[str, ...] = ()
    extra: str = ""


FORMATS = {
    "rlds": Format("<x.y.z>/dataset_info.json (RLDS)", version_directories, "rlds_source:open_highest_version"),
    "lerobot": Format(
        "meta/info.json (LeRobot)",
        lambda f: (f / "meta/info.json").is_file(),
        "lerobot_source:LeRobotSource",
        ("pyarrow", "av"),
        "lerobot",
    ),
    "hdf5": Format("*.hdf5", lambda f: any(f.glob("*.hdf5")), "hdf5_source:HDF5Source", ("h5py",), "hdf5"),
}
"""By the name in `SourceKeys`; a folder that could be several is the first."""
SPLIT = "of the data sets; None: train, or the only one there is"
SKIP_BAD_EPISODES = (
    "leave out what cannot be read or is not finite; episodes without a sample (short, no text) always are"
)
PLACE = "FOLDER:SPLIT for another split than train or the only one"
"""Help texts of the flags that programs with data sets have."""


def find_format(folder: Path) -> str | None:
    """Name of the format by the files of a folder, None when it is none of these."""
    try:
        if not folder.is_dir():
            return None
        return next((name for name, found in FORMATS.items() if found.is_there(folder)), None)
    except OSError:  # another user's
        return None


def is_data_set(folder: Path) -> bool:
    """Whether a folder is a data set, or one version of an RLDS one."""
    return find_format(folder) is not None or (folder / "dataset_info.json").is_file()


def folder_and_split(place: str) -> tuple[str, str | None]:
    """`FOLDER` or `FOLDER:SPLIT` as folder and split, None when the text names none.

    A text that is an existing path is that, colons and all.
    """
    folder, _, split = place.rpartition(":")
    if not folder or not split or "/" in split or os.path.exists(place):
        return place, None
    return folder, split


def expected_files() -> str:
    """What a data set is recognised by, for messages."""
    *first, last = (found.files for found in FORMATS.values())
    return f"{', '.join(first)} or {last}"
