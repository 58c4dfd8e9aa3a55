"""An index of a data set: built once beside the data, memory-mapped afterwards.

    {directory}/.craft_index/{label}/index.json        files it was built from, episodes, arrays, fingerprint
    {directory}/.craft_index/{label}/{array}.bin       one row per frame (steps of all episodes one after another)

Numbers (actions, states) are stored whole; of images the place in the data files. An index is rebuilt when one of the
data files has another size or modification time, and when its header or an array does not have the checksum it was
written with: opening reads the arrays once, some 100 bytes per frame. It is written under a temporary name and renamed.
When the directory cannot be written, the index goes to the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import google_crc32c
import numpy as np

from prismatic.vla.datasets.source import DataSetError, EpisodeSource, MissingFeatureError

FOLDER = ".craft_index"
VERSION = 2  # 2: checksums
_BLOCK = 1 << 20


class EpisodeIndex:
    """An index on disk. `lengths` and `starts` (E,) int64, `instructions` and `records` (free JSON) per episode."""

    def __init__(self, folder: Path, header: Mapping) -> None:
        self.folder = folder
        self.fingerprint: str = header["fingerprint"]
        self.info: dict = header["info"]
        self.instructions: list[str] = header["instructions"]
        self.records: list = header["records"]
        self.lengths = np.array(header["lengths"], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self._declared: dict = header["arrays"]
        self._arrays: dict[str, np.ndarray] = {}

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return sorted(self._declared)

    def array(self, name: str) -> np.ndarray:
        """Read-only memory-mapped array (frames, ...) of all episodes; KeyError for an unknown name."""
        if name not in self._arrays:
            entry = self._declared[name]
            shape = (int(self.lengths.sum()), *entry["shape"])
            dtype = np.dtype(entry["dtype"])
            # An empty file cannot be mapped.
            empty = 0 in shape
            path = self.folder / entry["file"]
            self._arrays[name] = np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", shape=shape)
        return self._arrays[name]

    def rows(self, name: str, episode: int) -> np.ndarray:
        """The rows of one episode, (T, ...)."""
        start = self.starts[episode]
        return self.array(name)[start : start + self.lengths[episode]]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_arrays": {}}  # workers map the files again instead of receiving copies


class IndexedSource(EpisodeSource):
    """A source that knows its episodes from an index, with their numbers in the arrays `actions` and `state`.

    Subclasses set `_index` and read the frames.
    """

    _index: EpisodeIndex

    @property
    def lengths(self) -> np.ndarray:
        """Steps of every episode, (E,) int64."""
        return self._index.lengths

    @property
    def instructions(self) -> Sequence[str]:
        """The instruction of every episode."""
        return self._index.instructions

    @property
    def fingerprint(self) -> str:
        """Hash of instructions, numbers and images."""
        return self._index.fingerprint

    def actions(self, episode: int) -> np.ndarray:
        """Actions as stored, (T, A) float32; MissingFeatureError when opened without actions."""
        self.require_actions()
        return self._index.rows("actions", episode)

    def state(self, episode: int) -> np.ndarray:
        """State as stored, (T, S) float32, the keys' values side by side."""
        return self._index.rows("state", episode)

    def require_actions(self) -> None:
        """MissingFeatureError when the source was opened without actions."""
        if self.keys.action is None:
            raise MissingFeatureError(f"{self.directory}: opened without actions, only its observations can be read")

    def require_frame(self, camera: str, episode: int, step: int) -> None:
        """MissingFeatureError for a camera that was not opened, IndexError for a step outside the episode."""
        if camera not in self.keys.cameras:
            raise MissingFeatureError(f"{self.directory}: no camera {camera!r}, opened with {list(self.keys.cameras)}")
        length = int(self._index.lengths[episode])
        if not 0 <= step < length:
            raise IndexError(f"{self.directory}: episode {episode}: step {step}, expected 0 <= step < {length}")


class IndexWriter:
    """Takes in episodes one after another; memory does not grow with their number of frames."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.info: dict = {}
        self._episodes: list[tuple[str, int, object]] = []
        self._arrays: dict[str, dict] = {}
        self._digest = hashlib.sha256()
        self._stack = ExitStack()
        self._files: dict = {}

    def add(self, instruction: str, arrays: Mapping[str, np.ndarray], content: bytes, record: object = None) -> None:
        """Append an episode.

        Args:
            instruction: its text.
            arrays: {name: (T, ...)}, the same names, dtypes and trailing shapes in every episode, one T.
            content: what identifies the episode's content, for the fingerprint.
            record: anything JSON can hold.
        """
        lengths = {len(values) for values in arrays.values()}
        if len(lengths) != 1 or (self._arrays and self._arrays.keys() != arrays.keys()):
            raise DataSetError(
                f"episode {len(self._episodes)}: arrays {sorted(arrays)} of lengths {sorted(lengths)}, expected one "
                f"length and the arrays {sorted(self._arrays) or 'of the first episode'}"
            )
        for name, values in arrays.items():
            self._append(name, np.ascontiguousarray(values))
        (length,) = lengths
        self._episodes.append((instruction, length, record))
        for part in (instruction.encode(), str(length).encode(), content):
            self._digest.update(len(part).to_bytes(8, "little") + part)

    def _append(self, name: str, values: np.ndarray) -> None:
        entry = {"dtype": values.dtype.str, "shape": list(values.shape[1:])}
        if name not in self._arrays:
            file = f"{len(self._arrays)}.bin"
            self._arrays[name] = entry | {"file": file, "crc32c": 0}
            self._files[name] = self._stack.enter_context((self.folder / file).open("wb"))
        known = {key: self._arrays[name][key] for key in entry}
        if known != entry:
            raise DataSetError(f"episode {len(self._episodes)}: {name} is {entry}, earlier episodes have {known}")
        data = values.tobytes()
        self._arrays[name]["crc32c"] = google_crc32c.extend(self._arrays[name]["crc32c"], data)
        self._files[name].write(data)

    def close(self, stamp: list) -> dict:
        """Write the header; returns it."""
        self._stack.close()
        instructions, lengths, records = zip(*self._episodes, strict=True) if self._episodes else ((), (), ())
        header = {
            "version": VERSION,
            "files": stamp,
            "fingerprint": self._digest.hexdigest(),
            "info": self.info,
            "arrays": self._arrays,
            "lengths": lengths,
            "instructions": instructions,
            "records": records,
        }
        with (self.folder / "index.json").open("w", encoding="utf-8") as stream:
            json.dump(header | {"checksum": _checksum(header)}, stream)
        return header

    def abort(self) -> None:
        """Close the files."""
        self._stack.close()


def open_index(
    directory: Path, label: str, files: Sequence[Path], build: Callable[[IndexWriter], None]
) -> EpisodeIndex:
    """The index of a data set, built when there is none or when it belongs to other files.

    Args:
        directory: the data set.
        label: which of several indices of this directory, e.g. a split; also names what it depends on beside the files.
        files: what it is built from.
        build: adds all episodes to a writer; whatever it raises leaves no index behind.
    """
    stamp = [[os.path.relpath(file, directory), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    for folder in _places(directory, label):
        if (header := _read_header(folder, stamp)) is not None:
            return EpisodeIndex(folder, header)
    for folder in _places(directory, label):
        if _is_writable(folder):
            return _build(folder, stamp, build)
    raise PermissionError(f"{directory}: neither {FOLDER}/ nor the user's cache directory can be written")


def _places(directory: Path, label: str) -> list[Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    return [directory / FOLDER / label, cache / "craft-vla" / f"{digest}-{directory.name}" / label]


def _is_writable(folder: Path) -> bool:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder.parent, os.W_OK)


def _read_header(folder: Path, stamp: list) -> dict | None:
    try:
        header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if header["version"] != VERSION or header["files"] != stamp or header.pop("checksum") != _checksum(header):
            return None
        frames = sum(header["lengths"])
        for entry in header["arrays"].values():
            expected = frames * int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
            path = folder / entry["file"]
            if path.stat().st_size != expected or _file_crc(path) != entry["crc32c"]:
                return None
        return header
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # absent or damaged: it is only a cache


def _checksum(header: Mapping) -> str:
    return hashlib.sha256(json.dumps(header).encode()).hexdigest()


def _file_crc(path: Path) -> int:
    # Read, not mapped: touched pages of a mapping count as memory of the process.
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = google_crc32c.extend(crc, block)
    return crc


def _build(folder: Path, stamp: list, build: Callable[[IndexWriter], None]) -> EpisodeIndex:
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    writer = IndexWriter(temporary)
    try:
        build(writer)
        header = writer.close(stamp)
        _install(temporary, folder, stamp)
    finally:
        writer.abort()
        shutil.rmtree(temporary, ignore_errors=True)
    return EpisodeIndex(folder, header)


def _install(temporary: Path, folder: Path, stamp: list) -> None:
    # Several processes may build at once, each a complete index of the same content: the first one stays.
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    for _ in range(100):
        if _read_header(folder, stamp) is not None:
            return
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
        except OSError as error:
            last = error
            continue
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise last
