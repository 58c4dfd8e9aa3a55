"""One record of an RLDS shard: its flat features by name, checked against what is declared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from prismatic.vla.datasets.example_proto import parse_example
from prismatic.vla.datasets.rlds_features import FeatureSpec
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.datasets.tfrecord import CorruptRecordError


@dataclass(frozen=True)
class EpisodeRecord:
    """One record: number of its shard, byte offset of the record there, payload, and its place in words."""

    shard: int
    offset: int
    payload: bytes
    where: str

    def values(self, names: Iterable[str] | None = None) -> dict[str, list[bytes] | np.ndarray]:
        """Flat features, of all or of these names; CorruptRecordError when the payload is no Example."""
        try:
            return parse_example(self.payload, names)
        except ValueError as error:
            raise CorruptRecordError(f"{self.where}: {error}") from error


def flat_name(prefix: str, key: str) -> str:
    """Name in the Example of a key of `SourceKeys`: below `prefix`, unless it is a whole one."""
    return key if key.startswith(("steps/", "episode_metadata/")) else prefix + key


def get(values: Mapping, name: str, where: str):
    """The values of a feature; MissingFeatureError with the names that are there."""
    if name not in values:
        raise MissingFeatureError(f"{where}: no feature {name!r}, found {sorted(values)}")
    return values[name]


def text(value: bytes, name: str, where: str) -> str:
    """Bytes as text; CorruptRecordError when they are none."""
    try:
        return value.decode("utf-8")
    except (UnicodeDecodeError, AttributeError) as error:
        raise CorruptRecordError(f"{where}: {name} is not text: {error}") from error


def step_array(value, spec: FeatureSpec, length: int, where: str) -> np.ndarray:
    """The numbers of a feature, (length, ...) as declared."""
    if spec.number_type is None:
        raise DataSetError(f"{where}: {spec.name} is declared as {spec.kind} of {spec.dtype!r}, expected numbers")
    expected = (length, *spec.shape)
    # Not np.prod, which overflows to a size that may fit.
    if not isinstance(value, np.ndarray) or value.size != math.prod(expected) or min(expected) < 0:
        found = value.size if isinstance(value, np.ndarray) else f"{len(value)} byte strings"
        raise CorruptRecordError(f"{where}: {spec.name} holds {found} values, expected shape {expected}")
    try:
        return value.reshape(expected).astype(spec.number_type, copy=False)
    except (ValueError, OverflowError) as error:  # shapes that numpy does not have, e.g. (0, 10**30)
        raise DataSetError(f"{where}: {spec.name} is declared with shape {spec.shape}: {error}") from error
