"""An index on disk: its arrays mapped into memory, and whether it is whole and of the files that are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np

from prismatic.evidence.files import write_json

VERSION = 3  # 2: checksums; 3: problems, warnings and several texts per episode
_BLOCK = 1 << 20


class EpisodeIndex:
    """An index on disk. `lengths` and `starts` (E,) int64, `instructions` and `records` (free JSON) per episode.

    problems: {episode number or file name: why it could not be read}; such episodes have length 0. warnings: lines.
    runs: {episode number: [[first step, text], ...]} of the episodes whose text changes.
    """

    def __init__(self, folder: Path, header: Mapping) -> None:
        self.folder = folder
        self.fingerprint: str = header["fingerprint"]
        self.info: dict = header["info"]
        self.instructions: list[str] = list(header["instructions"])
        self.records: list = header["records"]
        self.problems: dict[str, str] = header["problems"]
        self.warnings: list[str] = header["warnings"]
        self.runs: dict[str, list] = header["runs"]
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

    def cached(self, name: str, compute: Callable[[], dict]) -> dict:
        """What `compute` gives, JSON-ready, kept beside the arrays: computed once for an index."""
        path = self.folder / f"{name}.json"
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            if path.is_file():
                entry = json.loads(path.read_text(encoding="utf-8"))
                if entry["checksum"] == checksum(entry["content"]):
                    return entry["content"]
        content = json.loads(json.dumps(compute()))
        with suppress(OSError):  # a folder that cannot be written: computed again the next time
            write_json(path, {"content": content, "checksum": checksum(content)}, indent=None)
        return content

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_arrays": {}}  # workers map the files again instead of receiving copies


def read_header(folder: Path, stamp: list) -> dict | None:
    """The header of a whole index of the files in `stamp`, None when there is none."""
    try:
        if not (folder / "index.json").is_file():
            return None
        header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if header["version"] != VERSION or header["files"] != stamp or header.pop("checksum") != checksum(header):
            return None
        frames = sum(header["lengths"])
        for entry in header["arrays"].values():
            expected = frames * int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
            path = folder / entry["file"]
            if not path.is_file() or path.stat().st_size != expected or _file_crc(path) != entry["crc32c"]:
                return None
        return header
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # absent or damaged: it is only a cache


def checksum(content: Mapping) -> str:
    """Of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_crc(path: Path) -> int:
    # Read, not mapped: touched pages of a mapping count as memory of the process.
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = google_crc32c.extend(crc, block)
    return crc
