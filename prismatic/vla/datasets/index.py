"""An index of a data set: built once beside the data, memory-mapped afterwards.

    {directory}/.craft_index/{label}/index.json        files it was built from, episodes, arrays, fingerprint
    {directory}/.craft_index/{label}/{array}.bin       one row per frame (steps of all episodes one after another)

Numbers (actions, states) are stored whole; of images the place in the data files. An index is rebuilt when one of the
data files has another size or modification time, and when its header or an array does not have the checksum it was
written with: opening reads the arrays once, some 100 bytes per frame. It is written under a temporary name and renamed;
what a killed process left is removed at the next opening. When the directory cannot be written, the index goes to the
user's cache directory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prismatic.vla.datasets.index_folder import install, remove_abandoned, temporary_folder
from prismatic.vla.datasets.index_reader import EpisodeIndex, read_header
from prismatic.vla.datasets.index_writer import IndexWriter, allowed_bytes
from prismatic.vla.datasets.source import DataSetError

FOLDER = ".craft_index"


def open_index(
    directory: Path,
    label: str,
    files: Sequence[Path],
    build: Callable[[IndexWriter], None],
    skip_bad: bool = False,
) -> EpisodeIndex:
    """The index of a data set, built when there is none or when it belongs to other files.

    Args:
        directory: the data set.
        label: which of several indices of this directory, e.g. a split; also names what it depends on beside the files.
        files: what it is built from.
        build: adds all episodes to a writer; whatever it raises leaves no index behind.
        skip_bad: see `IndexWriter`. DataSetError without it for an index that leaves something out.
    """
    stamp = [_stamp(file, directory) for file in files]
    for folder in _places(directory, label):
        remove_abandoned(folder.parent)
        if (header := read_header(folder, stamp)) is not None:
            if header["problems"] and not skip_bad:
                raise DataSetError(_left_out(directory, header))
            return EpisodeIndex(folder, header)
    size = sum(entry[1] for entry in stamp)
    for folder in _places(directory, label):
        if _is_writable(folder):
            return _build(folder, stamp, build, (skip_bad, allowed_bytes(size)))
    raise PermissionError(
        f"{directory}: neither {FOLDER}/ in it nor the user's cache directory can be written to; set XDG_CACHE_HOME to "
        "a folder that can"
    )


def _left_out(directory: Path, header: Mapping) -> str:
    problems = header["problems"]
    return (
        f"{directory}: {len(problems)} of {len(header['lengths'])} episodes cannot be read, first: "
        f"{next(iter(problems.values()))}; --skip_bad_episodes True leaves such episodes out"
    )


def _stamp(file: Path, directory: Path) -> list:
    try:
        found = file.stat()
    except OSError:  # missing: its episodes are left out, until it is there
        return [os.path.relpath(file, directory), 0, 0]
    return [os.path.relpath(file, directory), found.st_size, found.st_mtime_ns]


def _places(directory: Path, label: str) -> list[Path]:
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    caches = [cache / "craft-vla" / f"{digest}-{directory.name}" / label for cache in _caches()]
    return [directory / FOLDER / label, *caches]


def _caches() -> list[Path]:
    """The user's cache directory; none for a user without a home, as those of containers may be."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return [Path(given)]
    try:
        return [Path.home() / ".cache"]
    except RuntimeError:
        return []


def _is_writable(folder: Path) -> bool:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder.parent, os.W_OK)


def _build(folder: Path, stamp: list, build: Callable[[IndexWriter], None], writing: tuple[bool, int]) -> EpisodeIndex:
    with temporary_folder(folder) as temporary:
        writer = IndexWriter(temporary, *writing)
        try:
            build(writer)
            header = writer.close(stamp)
        finally:
            writer.abort()
        install(temporary, folder, stamp)
    return EpisodeIndex(folder, header)
