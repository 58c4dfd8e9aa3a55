"""RLDS data sets with random access to single frames: numbers from the index, images at their place in the shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prismatic.progress import over
from prismatic.vla.datasets.index import open_index
from prismatic.vla.datasets.index_writer import IndexWriter
from prismatic.vla.datasets.indexed_source import IndexedSource
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_record import EpisodeRecord, flat_name
from prismatic.vla.datasets.rlds_versions import version_directories
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import check_image, flat_rows, index_label, turned_frame
from prismatic.vla.datasets.tfrecord import HEADER_BYTES, CorruptRecordError

_OBSERVATION = "steps/observation/"


class RLDSSource(IndexedSource):
    """One split of a version directory.

    The index is built by reading every record once, checksums included. Afterwards a frame is one read of its own
    bytes. They are read, not mapped: every mapped page that was touched counts as memory of the process.

    Raises the errors of `RLDSReader`, and DataSetError for a feature that is not one number array per step.
    """

    def __init__(
        self, directory: str | os.PathLike, keys: SourceKeys, split: str | None = None, skip_bad: bool = False
    ) -> None:
        self.directory, self.keys = Path(directory), keys
        self._features = _features_of(keys)
        reader = RLDSReader(
            self.directory, split, [name for names in self._features.values() for name in names], skip_bad
        )
        _check_kinds(reader, self._features)
        self._features["instruction"] = [reader.find_instruction(keys.instruction)]
        files = [self.directory / "features.json", self.directory / "dataset_info.json", *reader.shard_paths]
        self.split, label = reader.split, index_label(keys, reader.split)
        self._index = open_index(
            self.directory, label, files, lambda writer: _build(reader, self._features, writer), skip_bad
        )
        self._shards = reader.shard_paths
        self._metadata = reader.metadata
        self._descriptors: dict[int, int] = {}
        self._owner = os.getpid()

    @property
    def metadata(self) -> dict | None:
        return self._metadata

    def actions(self, episode: int) -> np.ndarray:
        self.require_actions()
        return self._flat("action", episode)

    def state(self, episode: int) -> np.ndarray:
        return self._flat("state", episode)

    def frame(self, camera: str, episode: int, step: int) -> bytes | np.ndarray:
        self.require_frame(camera, episode, step)
        name = flat_name(_OBSERVATION, camera)
        offset, size = self._index.array(name)[self._index.starts[episode] + step].tolist()
        shard = self._index.records[episode]
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise DataSetError(
                f"{self._shards[shard]}: {len(data)} bytes at offset {offset}, expected {size}: the file was changed"
            )
        return turned_frame(data, str(self._shards[shard])) if self.keys.rotated else data

    def _flat(self, group: str, episode: int) -> np.ndarray:
        parts = [flat_rows(self._index.rows(name, episode)) for name in self._features[group]]
        return np.concatenate(parts, axis=1).astype(np.float32, copy=False)

    def _descriptor(self, shard: int) -> int:
        if self._owner != os.getpid():  # a forked worker: the parent's descriptors may be closed under it
            self._descriptors, self._owner = {}, os.getpid()
        if shard not in self._descriptors:
            self._descriptors[shard] = os.open(self._shards[shard], os.O_RDONLY)
        return self._descriptors[shard]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_descriptors": {}}

    def __del__(self) -> None:
        if getattr(self, "_owner", None) == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)


def open_highest_version(
    folder: Path, keys: SourceKeys, split: str | None = None, skip_bad: bool = False
) -> RLDSSource:
    """Open a folder, of several versions the highest, or one version."""
    versions = version_directories(folder)
    return RLDSSource(versions[-1] if versions else folder, keys, split, skip_bad)


def _features_of(keys: SourceKeys) -> dict[str, list[str]]:
    """Flat names of the features that are read, by what they are."""
    return {
        "action": [] if keys.action is None else [flat_name("steps/", keys.action)],
        "state": [flat_name(_OBSERVATION, key) for key in keys.state],
        "cameras": [flat_name(_OBSERVATION, key) for key in keys.cameras],
    }


def _check_kinds(reader: RLDSReader, features: dict[str, list[str]]) -> None:
    for name in (*features["action"], *features["state"]):
        spec = reader.features[name]
        if not spec.per_step or spec.number_type is None or -1 in spec.shape:
            raise DataSetError(f"{reader.features_path}: {name} is {spec}, expected numbers of a fixed shape per step")
    for name in features["cameras"]:
        spec = reader.require(name)
        if spec.kind != "image" or not spec.per_step:
            raise DataSetError(f"{reader.features_path}: {name} is {spec}, expected an image per step")


def _build(reader: RLDSReader, features: dict[str, list[str]], writer: IndexWriter) -> None:
    for name, error in reader.problems.items():
        writer.note(name, error)
    for index in over(range(reader.num_episodes), "indexing", "episodes", leave=False):
        with writer.episode():
            _add(reader, features, reader.record(index), writer)


def _add(reader: RLDSReader, features: dict[str, list[str]], record: EpisodeRecord, writer: IndexWriter) -> None:
    numbers, cameras, (instruction,) = (
        (*features["action"], *features["state"]), features["cameras"], features["instruction"]
    )  # fmt: skip
    values, where = record.values({*numbers, *cameras, instruction}), record.where
    length = _length(values, cameras[0], where)
    if length == 0:
        writer.add_empty()
        return
    texts = reader.instruction(values, where, instruction) or [""]
    if len(texts) not in (1, length):
        raise CorruptRecordError(f"{where}: {instruction} has {len(texts)} texts, expected one or {length}")
    arrays = {name: reader.numbers(values, name, length, where) for name in numbers}
    for name in cameras:
        frames = reader.images(values, name, length, where)
        for step, frame in enumerate(frames):
            check_image(frame, reader.features[name].shape, f"{where}: {name} step {step}")
        arrays[name] = _places(record.payload, frames, record.offset + HEADER_BYTES)
    writer.add(texts if len(texts) == length else texts[0], arrays, record.payload, record.shard)


def _length(values: dict, camera: str, where: str) -> int:
    if camera not in values:
        raise MissingFeatureError(f"{where}: no feature {camera!r}, found {sorted(values)}")
    return len(values[camera])


def _places(payload: bytes, values: list[bytes], base: int) -> np.ndarray:
    """(T, 2) int64: offset in the file and size of each byte string of a message."""
    return np.array([(base + offset, len(value)) for offset, value in _offsets(payload, values)], dtype=np.int64)


def _offsets(payload: bytes, values: list[bytes]) -> Iterator[tuple[int, bytes]]:
    # A repeated bytes field is `tag, length, value` over and over, so the next value is nearly always a few bytes on.
    # Where it is not, any place that holds the same bytes will do.
    end = 0
    for value in values:
        offset = end + 1 + max(1, -(-len(value).bit_length() // 7))
        if not payload.startswith(value, offset):
            offset = payload.find(value, end)
        if offset < 0:
            offset = payload.index(value)
        yield offset, value
        end = offset + len(value)
