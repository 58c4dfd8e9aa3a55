"""RLDS data sets with random access to single frames: numbers from the index, images at their place in the shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.index import IndexedSource, IndexWriter, open_index
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_features import FeatureSpec
from prismatic.vla.datasets.source import DataSetError, SourceKeys
from prismatic.vla.datasets.source_files import turned_frame
from prismatic.vla.datasets.tfrecord import HEADER_BYTES

_OBSERVATION = "steps/observation/"


class RLDSSource(IndexedSource):
    """One split of a version directory.

    The index is built by reading every record once, checksums included. Afterwards a frame is one read of its own
    bytes. They are read, not mapped: every mapped page that was touched counts as memory of the process.

    Raises the errors of `RLDSReader`, and DataSetError for a feature that is not one number array per step.
    """

    def __init__(self, directory: str | os.PathLike, keys: SourceKeys, split: str = "train") -> None:
        self.directory, self.keys = Path(directory), keys
        observations = (_OBSERVATION + key for key in (*keys.cameras, *keys.state))
        reader = RLDSReader(self.directory, split, (*_action(keys), *observations))
        _check_kinds(reader, keys)
        files = [self.directory / "features.json", self.directory / "dataset_info.json", *reader.shard_paths]
        # The index holds all numbers that features.json declares, so it serves with and without actions.
        self._index = open_index(self.directory, split, files, lambda writer: _build(reader, writer))
        self._shards = reader.shard_paths
        self._metadata = reader.metadata
        self._descriptors: dict[int, int] = {}
        self._owner = os.getpid()

    @property
    def metadata(self) -> dict | None:
        return self._metadata

    def actions(self, episode: int) -> np.ndarray:
        self.require_actions()
        return self._numbers(f"steps/{self.keys.action}", episode)

    def state(self, episode: int) -> np.ndarray:
        parts = [self._numbers(_OBSERVATION + key, episode) for key in self.keys.state]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def frame(self, camera: str, episode: int, step: int) -> bytes | np.ndarray:
        self.require_frame(camera, episode, step)
        offset, size = self._index.array(_OBSERVATION + camera)[self._index.starts[episode] + step].tolist()
        shard = self._index.records[episode]
        data = os.pread(self._descriptor(shard), size, offset)
        if len(data) != size:
            raise DataSetError(
                f"{self._shards[shard]}: {len(data)} bytes at offset {offset}, expected {size}: the file was changed"
            )
        return turned_frame(data, str(self._shards[shard])) if self.keys.rotated else data

    def _numbers(self, name: str, episode: int) -> np.ndarray:
        values = self._index.rows(name, episode)
        if values.ndim != 2:
            raise DataSetError(f"{self.directory}: {name} has shape {values.shape[1:]} per step, expected one axis")
        return values.astype(np.float32, copy=False)

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


def _action(keys: SourceKeys) -> list[str]:
    return [] if keys.action is None else [f"steps/{keys.action}"]


def _check_kinds(reader: RLDSReader, keys: SourceKeys) -> None:
    numbers = [*_action(keys), *(_OBSERVATION + key for key in keys.state)]
    for name in numbers:
        if not _is_indexed(reader.features[name]):
            raise DataSetError(
                f"{reader.features_path}: {name} is {reader.features[name]}, expected numbers of a fixed shape per step"
            )
    for key in keys.cameras:
        spec = reader.require_camera(key)
        if spec.kind != "image" or not spec.per_step:
            raise DataSetError(f"{reader.features_path}: {spec.name} is {spec}, expected an image per step")


def _is_indexed(spec: FeatureSpec) -> bool:
    return spec.per_step and spec.number_type is not None and -1 not in spec.shape


def _build(reader: RLDSReader, writer: IndexWriter) -> None:
    names = [name for name, spec in reader.features.items() if _is_indexed(spec)]
    for index in range(reader.num_episodes):
        record = reader.record(index)
        values, where = record.values(), record.where
        instruction, length = reader.instruction(values, where)
        arrays = {name: reader.numbers(values, name, length, where) for name in names}
        for camera, frames in reader.images(values, length, where).items():
            arrays[_OBSERVATION + camera] = _places(record.payload, frames, record.offset + HEADER_BYTES)
        writer.add(instruction, arrays, record.payload, record.shard)


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
