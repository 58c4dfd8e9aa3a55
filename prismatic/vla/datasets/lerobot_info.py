"""`meta/info.json` of a LeRobot data set, checked as far as the keys need it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from prismatic.evidence.checks import FOREIGN, parse_object, read_object, read_text
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import choose_split, regular_file
from prismatic.vla.images import MAX_PIXELS

VERSIONS = ("v2.0", "v2.1", "v3.0")  # v2.0 differs from v2.1 in the statistics alone, which are not read
INFO = "meta/info.json"


class Info:
    """`meta/info.json`, checked as far as the keys need it. warnings: what does not fit and is not needed."""

    def __init__(self, directory: Path, keys: SourceKeys) -> None:
        self.directory, self.keys, self.path = directory, keys, directory / INFO
        with _as_data_set_error():
            self.content = read_object(self.require(self.path), finite=False, limits=FOREIGN)
        self.warnings: list[str] = []
        self.version = self.field("codebase_version", str)
        if self.version not in VERSIONS:
            raise DataSetError(
                f"{self.path}: codebase_version is {self.version!r}, expected {', '.join(VERSIONS)}: convert it with "
                "the lerobot package"
            )
        self.features = self.field("features", dict)
        columns = () if keys.instruction is None else (keys.instruction,)
        for key in (*keys.numbers, *keys.cameras, *columns):
            if key not in self.features:
                raise MissingFeatureError(f"{self.path}: no feature {key!r}, found {sorted(self.features)}")
        self.video_cameras = [camera for camera in keys.cameras if self._camera_kind(camera) == "video"]
        self.fps = self._rate()

    def _rate(self) -> float | None:
        """Steps per second. Frames of videos are found by it; without videos nobody needs it."""
        fps = self.content.get("fps")
        if isinstance(fps, int | float) and not isinstance(fps, bool) and 0 < fps < 1e6:
            return float(fps)
        problem = f"{self.path}: fps is {str(fps)[:40]!r}, expected a positive number"
        if self.video_cameras:
            raise DataSetError(problem)
        if fps is not None:
            self.warnings.append(problem)
        return None

    def require(self, path: Path) -> Path:
        """`path`, which has to be a file of this data set."""
        return regular_file(path, self.directory)

    def field(self, name: str, kind):
        return field(self.content, name, kind, str(self.path))

    def _camera_kind(self, camera: str) -> str:
        kind = field(self.features, camera, dict, f"{self.path}: features").get("dtype")
        if kind not in ("video", "image"):
            raise DataSetError(f"{self.path}: feature {camera!r} has dtype {kind!r}, expected 'video' or 'image'")
        return kind

    def _shape(self, key: str) -> tuple[int, ...]:
        feature = field(self.features, key, dict, f"{self.path}: features")
        shape = feature.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
            raise DataSetError(f"{self.path}: feature {key!r} has shape {shape!r}, expected positive integers")
        return tuple(shape)

    def width(self, key: str) -> int:
        """Numbers per step of a feature, whose axes are laid flat."""
        return math.prod(self._shape(key))

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        """Declared (H, W, 3); data sets declare it as (3, H, W) and with W before H as well."""
        shape = self._shape(camera)
        if len(shape) == 3 and shape[2] != 3 and shape[0] == 3:
            shape = (*shape[1:], 3)
        if len(shape) != 3 or shape[2] != 3:
            raise DataSetError(f"{self.path}: feature {camera!r} has shape {shape}, expected (H, W, 3) or (3, H, W)")
        if shape[0] * shape[1] > MAX_PIXELS:
            raise DataSetError(
                f"{self.path}: feature {camera!r} has shape {shape}, expected at most {MAX_PIXELS} pixels"
            )
        return shape

    def file(self, template: str, **fields) -> Path:
        """The file that one of the path templates means."""
        text = self.field(template, str)
        try:
            name = text.format(**fields)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError, MemoryError) as error:
            raise DataSetError(f"{self.path}: {template} {text!r} cannot be filled with {fields}: {error!r}") from error
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise DataSetError(f"{self.path}: {template} gives {name!r}, expected a path inside the data set")
        return self.directory / name

    def split(self, split: str | None, episodes: int) -> tuple[str, int, int]:
        """Name of a split, declared like `0:100`, and its episode numbers as first and last + 1."""
        splits = self.content.get("splits") or {"train": f"0:{episodes}"}
        if not isinstance(splits, dict):
            raise DataSetError(f"{self.path}: splits is {splits!r}, expected {{name: first:last}}")
        split = choose_split(split, list(splits), self.path)
        match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", str(splits[split]))
        first, last = (int(match[1]), int(match[2])) if match else (0, 0)
        if not first < min(last, episodes):
            raise DataSetError(
                f"{self.path}: split {split!r} is {splits[split]!r}, expected first:last within 0:{episodes}"
            )
        if last > episodes:
            self.warnings.append(
                f"{self.path}: split {split!r} is {splits[split]!r}, but there are {episodes} episodes"
            )
        return split, first, last

    def check_episodes(self, numbers: Sequence[int], path: Path) -> None:
        """Sorted episode numbers must be distinct; gaps and another number than declared are warnings."""
        if any(low >= high for low, high in zip(numbers[:-1], numbers[1:], strict=True)) or min(numbers, default=0) < 0:
            raise DataSetError(f"{path}: episode_index {list(numbers)[:20]}, expected distinct numbers from 0 on")
        if numbers and len(numbers) != numbers[-1] + 1:
            gone = numbers[-1] + 1 - len(numbers)
            self.warnings.append(
                f"{path}: {gone} of the episodes up to {numbers[-1]} are not listed; those that are count from 0 on"
            )
        declared = self.content.get("total_episodes", len(numbers))
        if declared != len(numbers):
            self.warnings.append(f"{path}: {len(numbers)} episodes, {INFO} declares total_episodes {declared!r}")


def json_lines(path: Path) -> list[tuple[dict, str]]:
    """The objects of a file of JSON lines, each with its place in words."""
    with _as_data_set_error():
        lines = [(text, f"{path}: line {number}") for number, text in enumerate(read_text(path).split("\n"), start=1)]
        return [(parse_object(text, place, False, FOREIGN), place) for text, place in lines if text.strip()]


@contextmanager
def _as_data_set_error() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise DataSetError(str(error)) from None


def field(content: Mapping, name: str, kind, where: str):
    """An entry of metadata, which has to be of this kind (or one of these): DataSetError otherwise."""
    value = content.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(entry.__name__ for entry in kinds)
        raise DataSetError(f"{where}: {name} is {value!r}, expected {expected}")
    return value
