"""LeRobot data sets v2.0, v2.1 and v3.0 on the local disk, read with pyarrow and PyAV.

    v2.x  meta/{info.json, episodes.jsonl, tasks.jsonl}, data/chunk-000/episode_000000.parquet,
          videos/chunk-000/<key>/episode_000000.mp4                     one file per episode
    v3.0  meta/{info.json, tasks.parquet}, meta/episodes/chunk-000/file-000.parquet, data/chunk-000/file-000.parquet,
          videos/<key>/chunk-000/file-000.mp4                           many episodes per file

Only what is read has to be right: metadata that contradict each other without being needed are warnings.

Cameras are videos or parquet columns {bytes, path} of PNG or JPEG. The index holds the numbers; of a video frame its
time stamp and that of the keyframe to start decoding at; images of parquet columns are copied to `images-<n>.blob` in
the folder of the index, because parquet cannot give one row without decompressing its whole row group.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from prismatic.vla.datasets.index import (
    MAX_STEPS,
    EpisodeIndex,
    IndexedSource,
    IndexWriter,
    first_lines,
    open_index,
)
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import (
    OpenFiles,
    as_float32,
    check_image,
    choose_split,
    content_of,
    index_label,
    regular_file,
    require_format,
    turn,
    turned_frame,
)
from prismatic.vla.images import MAX_PIXELS

VERSIONS = ("v2.0", "v2.1", "v3.0")  # v2.0 differs from v2.1 in the statistics alone, which are not read
_INFO = "meta/info.json"
_OPEN_VIDEOS = 8
_BATCH_ROWS = 32  # rows of a parquet file held at once: bounds memory
_MOST_EPISODES = 1 << 22
_MOST_TABLE_BYTES = 1 << 30  # of a table of metadata, decompressed
# A column whose pages are larger after decompression, by this factor and this size, is a bomb.
_MOST_RATIO, _MOST_COLUMN_BYTES = 500, 1 << 28
_HELPERS = ("episode_index", "frame_index", "task_index")
_END_SLACK = 1.5  # steps by which the end of an episode's video may be stated wrong without a word


class LeRobotSource(IndexedSource):
    """Episodes of one split of a LeRobot data set, in the order of their numbers.

    Keys are column names, e.g. action "action", state ("observation.state",), cameras ("observation.images.image",).
    The first opening reads everything once (index, fingerprint).

    Raises:
        DataSetError: unknown version or split; missing, damaged or contradictory files; too short videos.
        MissingFeatureError: a key or a column that the data set does not have.
    """

    def __init__(
        self, directory: str | os.PathLike, keys: SourceKeys, split: str | None = None, skip_bad: bool = False
    ) -> None:
        require_format(keys, "lerobot")
        self.directory, self.keys = Path(directory), keys
        self._info = info = _Info(self.directory, keys)
        read = _places_v30 if info.version == "v3.0" else _places_v2
        places, files = read(info)
        self.split, first, last = info.split(split, places[-1].number + 1 if places else 0)
        places = [place for place in places if first <= place.number < last]
        tasks = _tasks_v30(info) if info.version == "v3.0" else _tasks_v2(info)
        parts = dict.fromkeys(file for place in places for file in (place.data, *place.video_files))
        for file in parts if not skip_bad else ():
            info.require(file)
        files = [*files, *parts]

        def build(writer: IndexWriter) -> None:
            _Builder(info, tasks).build(writer, places)

        label = index_label(keys, self.split)
        self._index = open_index(self.directory, label, files, build, skip_bad)
        if not _blobs_are_whole(self._index):
            (self._index.folder / "index.json").unlink(missing_ok=True)
            self._index = open_index(self.directory, label, files, build, skip_bad)
        self._shapes = {camera: info.image_shape(camera) for camera in info.video_cameras}
        self._videos = OpenFiles(_OPEN_VIDEOS)
        self._blobs: dict[str, np.memmap] = {}

    @property
    def warnings(self) -> list[str]:
        """What contradicts itself in metadata and files."""
        return [*first_lines(self._info.warnings), *super().warnings]

    @property
    def recorded_hz(self) -> float | None:
        """`fps` of the metadata."""
        return self._info.fps

    def frame(self, camera: str, episode: int, step: int) -> bytes | np.ndarray:
        """One image, upright: uint8 (H, W, 3) RGB, or PNG or JPEG bytes. DataSetError when it cannot be read."""
        self.require_frame(camera, episode, step)
        place = self._index.rows(f"place.{camera}", episode)[step]
        if camera not in self._index.info["blobs"]:
            image = self._video_frame(camera, episode, int(place[0]), int(place[1]))
            return turn(image) if self.keys.rotated else image
        data = self._blob(camera)[place[0] : place[0] + place[1]].tobytes()
        where = f"{self.directory}: episode {episode} step {step}: {camera}"
        return turned_frame(data, where) if self.keys.rotated else data

    def _blob(self, camera: str) -> np.memmap:
        if camera not in self._blobs:
            name, _ = self._index.info["blobs"][camera]
            self._blobs[camera] = np.memmap(self._index.folder / name, np.uint8, "r")
        return self._blobs[camera]

    def _video_frame(self, camera: str, episode: int, pts: int, seek: int) -> np.ndarray:
        name = self._index.records[episode][camera]
        path = self.directory / name
        try:
            with _decoding(path):
                image = self._videos.get(name, lambda: _VideoFile(path)).read(pts, seek)
            height, width, _ = self._shapes[camera]
            if image.shape not in ((height, width, 3), (width, height, 3)):
                raise DataSetError(f"{path}: frame {image.shape}, {_INFO} declares {self._shapes[camera]}")
        except DataSetError:
            self._videos.drop(name)  # the decoder is in an unknown state
            raise
        return image

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_blobs": {}}  # workers map the files again instead of receiving copies


# Metadata


@dataclass(frozen=True)
class _Place:
    """Where one episode lies. length: steps as declared. videos: {camera: (file, seconds at which it begins)}."""

    number: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    videos: Mapping[str, tuple[Path, float]]

    @property
    def video_files(self) -> list[Path]:
        return [file for file, _ in self.videos.values()]


class _Info:
    """`meta/info.json`, checked as far as the keys need it. warnings: what does not fit and is not needed."""

    def __init__(self, directory: Path, keys: SourceKeys) -> None:
        self.directory, self.keys, self.path = directory, keys, directory / _INFO
        self.content = _json(self.path, self.require(self.path).read_bytes())
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
        if not self.video_cameras and "fps" not in self.content:
            return None
        fps = self.field("fps", (int, float))
        if not 0 < fps < 1e6:
            raise DataSetError(f"{self.path}: fps is {fps}, expected a positive number")
        return float(fps)

    def require(self, path: Path) -> Path:
        """`path`, which has to be a file of this data set."""
        return regular_file(path, self.directory)

    def field(self, name: str, kind):
        return _field(self.content, name, kind, str(self.path))

    def _camera_kind(self, camera: str) -> str:
        kind = _field(self.features, camera, dict, f"{self.path}: features").get("dtype")
        if kind not in ("video", "image"):
            raise DataSetError(f"{self.path}: feature {camera!r} has dtype {kind!r}, expected 'video' or 'image'")
        return kind

    def _shape(self, key: str) -> tuple[int, ...]:
        feature = _field(self.features, key, dict, f"{self.path}: features")
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
            self.warnings.append(f"{path}: {len(numbers)} episodes, {_INFO} declares total_episodes {declared!r}")


def _json(path: Path, text: bytes, line: str = "") -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataSetError(f"{path}{line}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataSetError(f"{path}{line}: {type(content).__name__}, expected a JSON object")
    return content


def _json_lines(path: Path) -> list[tuple[dict, str]]:
    lines = path.read_bytes().split(b"\n")
    return [
        (_json(path, text, f": line {number}"), f"{path}: line {number}")
        for number, text in enumerate(lines, start=1)
        if text.strip()
    ]


def _field(content: Mapping, name: str, kind, where: str):
    value = content.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(entry.__name__ for entry in kinds)
        raise DataSetError(f"{where}: {name} is {value!r}, expected {expected}")
    return value


def _texts(value) -> tuple[str, ...]:
    """The `tasks` of an episode, of use only where its frames do not name theirs."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _tasks_v2(info: _Info) -> dict[int, str]:
    lines = _json_lines(info.require(info.directory / "meta" / "tasks.jsonl"))
    return {_field(line, "task_index", int, where): _field(line, "task", str, where) for line, where in lines}


def _tasks_v30(info: _Info) -> dict[int, str]:
    path = info.require(info.directory / "meta" / "tasks.parquet")
    found = _column_names(path)
    name = "task" if "task" in found else "__index_level_0__"  # written from a table indexed by the task
    rows = _table(path, ("task_index", name))
    return {
        _field(row, "task_index", int, str(path)): _field({"task": row[name]}, "task", str, str(path)) for row in rows
    }


def _places_v2(info: _Info) -> tuple[list[_Place], list[Path]]:
    path = info.require(info.directory / "meta" / "episodes.jsonl")
    lines = sorted(_json_lines(path), key=_number)
    info.check_episodes([_number(line) for line in lines], path)
    chunk = info.field("chunks_size", int) if "chunks_size" in info.content else 1000
    if chunk < 1:
        raise DataSetError(f"{info.path}: chunks_size is {chunk}, expected a positive integer")
    places = []
    for line, where in lines:
        number = _number((line, where))
        fields = {"episode_chunk": number // chunk, "episode_index": number}
        videos = {key: (info.file("video_path", video_key=key, **fields), 0.0) for key in info.video_cameras}
        places.append(
            _Place(number, _length(line, where), _texts(line.get("tasks")), info.file("data_path", **fields), videos)
        )
    return places, [info.path, path, info.directory / "meta" / "tasks.jsonl"]


def _places_v30(info: _Info) -> tuple[list[_Place], list[Path]]:
    folder = info.directory / "meta" / "episodes"
    files = [info.require(file) for file in sorted(folder.glob("*/*.parquet"))]
    if not files:
        raise DataSetError(f"{folder} holds no chunk-<i>/file-<j>.parquet")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index"]
    for key in info.video_cameras:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    optional = ["tasks", *(f"videos/{key}/to_timestamp" for key in info.video_cameras)]
    rows = sorted(((row, str(file)) for file in files for row in _table(file, columns, optional)), key=_number)
    info.check_episodes([_number(row) for row in rows], folder)
    places = [_place_v30(info, row, where) for row, where in rows]
    _check_overlaps(info, places, folder)
    return places, [info.path, *files, info.directory / "meta" / "tasks.parquet"]


def _place_v30(info: _Info, row: Mapping, where: str) -> _Place:
    where = f"{where}: episode {row['episode_index']}"
    length = _length(row, where)
    chunk, file = (_field(row, f"data/{name}", int, where) for name in ("chunk_index", "file_index"))
    data = info.file("data_path", chunk_index=chunk, file_index=file)
    videos = {}
    for key in info.video_cameras:
        chunk, file = (_field(row, f"videos/{key}/{name}", int, where) for name in ("chunk_index", "file_index"))
        start = float(_field(row, f"videos/{key}/from_timestamp", (int, float), where))
        if not 0 <= start < 1e9:
            raise DataSetError(f"{where}: {key} from {start} s, expected a time in the video")
        stop = row.get(f"videos/{key}/to_timestamp")
        # Not needed: some tools write the time of the last frame, others that of its end.
        if isinstance(stop, float) and not abs((stop - start) * info.fps - length) <= _END_SLACK:
            info.warnings.append(
                f"{where}: {key} from {start} s to {stop} s, but it has {length} steps at {info.fps} fps"
            )
        videos[key] = (info.file("video_path", video_key=key, chunk_index=chunk, file_index=file), start)
    return _Place(row["episode_index"], length, _texts(row.get("tasks")), data, videos)


def _check_overlaps(info: _Info, places: Sequence[_Place], folder: Path) -> None:
    """Episodes of one video follow each other: one that begins within another has frames that are not its own."""
    for key in info.video_cameras:
        spans = sorted(
            (str(place.videos[key][0]), place.videos[key][1], place.length, place.number) for place in places
        )
        for (file, start, length, number), (other, begin, _, later) in zip(spans[:-1], spans[1:], strict=True):
            if file == other and start + (length - _END_SLACK) / info.fps > begin + 1e-6:
                end = start + length / info.fps
                raise DataSetError(
                    f"{folder}: {key} of episode {number} goes from {start} s to {end:.4f} s of {file}, but episode "
                    f"{later} begins at {begin} s, expected one after the other"
                )


def _number(entry: tuple[Mapping, str]) -> int:
    row, where = entry
    return _field(row, "episode_index", int, where)


def _length(row: Mapping, where: str) -> int:
    length = _field(row, "length", int, where)
    if length < 0:
        raise DataSetError(f"{where}: length is {length}, expected 0 or more")
    return length


# Parquet


@contextmanager
def _parquet(where: str | Path) -> Iterator[None]:
    """Whatever pyarrow raises on damaged content becomes a DataSetError that begins with `where`."""
    import pyarrow as pa

    try:
        yield
    except (DataSetError, MissingFeatureError):
        raise
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataSetError(f"{where}: cannot be read, expected a complete parquet file: {error}") from error


def _open_parquet(path: Path):
    import pyarrow.parquet as pq

    with _parquet(path):
        return pq.ParquetFile(path, page_checksum_verification=True)


def _column_names(path: Path) -> list[str]:
    with _open_parquet(path) as file, _parquet(path):
        return file.schema_arrow.names


def _require_columns(path: Path, columns: Sequence[str], found: Sequence[str]) -> None:
    missing = sorted(set(columns) - set(found))
    if missing:
        raise MissingFeatureError(f"{path}: no columns {missing}, found {sorted(found)}")


def _table(path: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> list[dict]:
    """Rows of a small table, with the optional columns that it has."""
    with _open_parquet(path) as file, _parquet(path):
        found = file.schema_arrow.names
        _require_columns(path, columns, found)
        if file.metadata.num_rows > _MOST_EPISODES:
            raise DataSetError(f"{path}: {file.metadata.num_rows} rows, expected at most {_MOST_EPISODES}")
        columns = [*columns, *(name for name in optional if name in found)]
        _check_compression(file, columns, path)
        rows, size = [], 0
        for batch in file.iter_batches(1000, columns=columns, use_threads=False):
            size += batch.nbytes
            if size > _MOST_TABLE_BYTES:
                raise DataSetError(f"{path}: more than {_MOST_TABLE_BYTES} bytes in {columns}, expected a small table")
            rows += batch.to_pylist()
        return rows


def _check_compression(file, columns: Sequence[str], path: Path) -> None:
    """DataSetError for a column that a small file blows up to a large one."""
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            size, stored = column.total_uncompressed_size, max(1, column.total_compressed_size)
            if (
                column.path_in_schema.split(".")[0] in {name.split(".")[0] for name in columns}
                and size > _MOST_COLUMN_BYTES
                and size / stored > _MOST_RATIO
            ):
                raise DataSetError(
                    f"{path}: {column.path_in_schema} has {size} bytes compressed to {stored}, expected at most "
                    f"{_MOST_RATIO} times"
                )


class _RowStream:
    """Rows of one parquet file in order, a few at a time: memory does not grow with the file.

    widths: values per row of number columns, which the file must not exceed: a row may hold any number of values in a
    few bytes.
    """

    def __init__(self, path: Path, columns: Sequence[str], optional: Sequence[str], widths: Mapping[str, int]) -> None:
        self.path = path
        self._file = _open_parquet(path)
        with _parquet(path):
            found = self._file.schema_arrow.names
            _require_columns(path, columns, found)
            self.columns = [*columns, *(name for name in optional if name in found)]
            self.rows = self._file.metadata.num_rows
            _check_compression(self._file, self.columns, path)
            self._check_values(widths)
        self._start()

    def _check_values(self, widths: Mapping[str, int]) -> None:
        metadata = self._file.metadata
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group)
            for number in range(metadata.num_columns):
                column = rows.column(number)
                width = widths.get(column.path_in_schema.split(".")[0])
                # Twice: lists of another length than declared are reported with their place.
                if width is not None and column.num_values > max(2 * width, 1 << 10) * rows.num_rows:
                    raise DataSetError(
                        f"{self.path}: {column.path_in_schema} holds {column.num_values} values in {rows.num_rows} "
                        f"rows, expected {width} per row"
                    )

    def episodes(self) -> dict[int, tuple[int, int]]:
        """{episode number: (first row, rows)} by the column `episode_index`, -1 rows for one that lies in pieces."""
        found: dict[int, tuple[int, int]] = {}
        row, before = 0, None
        with _parquet(self.path):
            for batch in self._file.iter_batches(1 << 14, columns=["episode_index"], use_threads=False):
                values = _matrix(batch.column(0), 1, f"{self.path}: episode_index")[:, 0]
                starts = np.flatnonzero(np.diff(values, prepend=values[0] - 1 if before is None else before))
                if before is not None and (not len(starts) or starts[0] > 0):
                    grown = int(starts[0]) if len(starts) else len(values)
                    first, count = found[int(before)]
                    found[int(before)] = (first, count + grown if count > 0 else count)
                for start, stop in zip(starts, [*starts[1:], len(values)], strict=True):
                    number = int(values[start])
                    found[number] = (row, -1) if number in found else (row + int(start), int(stop - start))
                if len(found) > _MOST_EPISODES:
                    raise DataSetError(f"{self.path}: more than {_MOST_EPISODES} episodes")
                row, before = row + len(values), values[-1] if len(values) else before
        return found

    def _start(self) -> None:
        self._batches = self._file.iter_batches(_BATCH_ROWS, columns=self.columns, use_threads=False)
        self._rest, self._position = None, 0

    def read(self, start: int, stop: int) -> Iterator:
        """Record batches that together are the rows start to stop."""
        if start < self._position:
            self._start()
        while self._position < stop:
            if self._rest is None or self._rest.num_rows == 0:
                with _parquet(self.path):
                    self._rest = next(self._batches, None)
            if self._rest is None:
                raise DataSetError(f"{self.path}: {self._position} rows, expected at least {stop}")
            skip = max(start - self._position, 0)
            take = min(self._rest.num_rows, stop - self._position)
            if skip < take:
                yield self._rest.slice(skip, take - skip)
            self._rest = self._rest.slice(take)
            self._position += take

    def close(self) -> None:
        self._file.close()


def _matrix(column, width: int, where: str) -> np.ndarray:
    """Numbers, or lists (of lists) of them, as (rows, width)."""
    import pyarrow as pa

    with _parquet(where):
        column.validate(full=True)  # offsets of a damaged file may point anywhere
        flat = column.storage if isinstance(column, pa.ExtensionArray) else column
        sizes, missing = np.ones(len(flat), dtype=np.int64), flat.null_count
        while isinstance(flat, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            inner = flat.value_lengths().to_numpy(zero_copy_only=False)
            if missing:
                break
            ends = np.cumsum(inner)[np.cumsum(sizes) - 1] if len(inner) else inner
            sizes = np.diff(ends, prepend=0) if len(inner) else sizes
            flat = flat.flatten()
            missing = flat.null_count
        if missing:
            raise DataSetError(f"{where}: missing values")
        if pa.types.is_boolean(flat.type):
            flat = flat.cast(pa.int8())
        if not (pa.types.is_floating(flat.type) or pa.types.is_integer(flat.type)):
            raise DataSetError(f"{where}: {column.type}, expected numbers or lists of numbers")
        if not np.all(sizes == width):
            raise DataSetError(f"{where}: {sorted(set(sizes.tolist()))[:5]} values per step, expected {width}")
        return flat.to_numpy(zero_copy_only=False).reshape(-1, width)


def _embedded_images(column, where: str) -> list[bytes]:
    """Bytes of the images of a struct column {bytes, path}."""
    import pyarrow as pa

    with _parquet(where):
        column.validate(full=True)
        if not isinstance(column, pa.StructArray) or column.type.get_field_index("bytes") < 0:
            raise DataSetError(f"{where}: {column.type}, expected struct<bytes: binary, path: string>")
        data = column.field("bytes").to_pylist()
    if not all(isinstance(entry, bytes) for entry in data):
        raise DataSetError(f"{where}: images without bytes, expected them in the column (not as separate files)")
    return data


def _strings(column) -> list[str] | None:
    """Texts of a column, None for one of another type; a missing text is an empty one."""
    import pyarrow as pa

    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        return None
    column.validate(full=True)
    return [text or "" for text in column.to_pylist()]


# Building the index


class _Blob:
    """The images of one camera one after another in a file."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.name, self.size, self._shape = path.name, 0, shape
        self._file = path.open("wb")

    def append(self, image: bytes, where: str) -> tuple[int, int]:
        """Offset and size of the image, which is checked as far as possible without decoding it."""
        check_image(image, self._shape, where)
        self._file.write(image)
        self.size += len(image)
        return self.size - len(image), len(image)

    def close(self) -> None:
        self._file.close()


class _Builder:
    """Adds episodes to the index: reads every data file once, in order."""

    def __init__(self, info: _Info, tasks: Mapping[int, str]) -> None:
        self._info, self._tasks, self._keys = info, tasks, info.keys
        self._widths = {key: info.width(key) for key in info.keys.numbers}
        self._embedded = [camera for camera in info.keys.cameras if camera not in info.video_cameras]
        self._shared = info.version == "v3.0"
        self._stream: _RowStream | None = None
        self._episodes: dict[int, tuple[int, int]] = {}
        self._scans: dict[str, _VideoScan] = {}
        self._blobs: dict[str, _Blob] = {}

    def build(self, writer: IndexWriter, places: Sequence[_Place]) -> None:
        """Add all episodes, and the images of parquet columns to the folder of the index."""
        with ExitStack() as stack:
            for number, camera in enumerate(self._embedded):
                blob = _Blob(writer.folder / f"images-{number}.blob", self._info.image_shape(camera))
                self._blobs[camera] = blob
                stack.callback(blob.close)
            stack.callback(self._close_stream)
            for place in places:
                with writer.episode():
                    self._add(writer, place)
        writer.info = {"blobs": {camera: [blob.name, blob.size] for camera, blob in self._blobs.items()}}

    def _add(self, writer: IndexWriter, place: _Place) -> None:
        where = f"{place.data}: episode {place.number}"
        first, rows = self._rows(place, where)
        if rows != place.length:
            writer.warn(f"{where}: {rows} rows, meta declares length {place.length}")
        if rows == 0:
            writer.add_empty()
            return
        numbers, texts, images, content = self._read_rows(first, rows, where)
        self._check_order(numbers, place, where)
        arrays = {} if self._keys.action is None else {"actions": as_float32(numbers[self._keys.action])}
        arrays["state"] = np.concatenate([as_float32(numbers[key]) for key in self._keys.state], axis=1)
        content += content_of(arrays)
        texts = self._instructions(numbers, texts, place, where)
        if place.tasks and not set(texts) <= set(place.tasks):
            writer.warn(f"{where}: its frames have the tasks {sorted(set(texts))}, meta has {list(place.tasks)}")
        arrays |= {f"place.{camera}": rows for camera, rows in images.items()}
        for camera, (file, start) in place.videos.items():
            scan = self._scan(camera, file)
            rows = scan.locate(start + numbers["timestamp"][:, 0], self._info.fps, f"{file}: episode {place.number}")
            arrays[f"place.{camera}"] = np.stack([scan.pts[rows], scan.seeks[rows]], axis=1)
            content += scan.digests[rows].tobytes()
        record = {
            camera: file.relative_to(self._info.directory).as_posix() for camera, (file, _) in place.videos.items()
        }
        try:
            writer.add(texts, arrays, hashlib.sha256(content).digest(), record)
        except DataSetError as error:
            raise DataSetError(f"{where}: {error}") from error

    def _read_rows(self, first: int, count: int, where: str):
        """Numbers {key: (T, width)}, texts, places {camera: (T, 2)} of the embedded images and the images' hashes."""
        widths = self._widths | {name: 1 for name in (*_HELPERS, "timestamp") if name in self._stream.columns}
        if self._keys.instruction is not None and self._keys.instruction not in widths:
            widths[self._keys.instruction] = 1
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in widths}
        texts: list[str] = []
        images: dict[str, list] = {camera: [] for camera in self._embedded}
        digests = {camera: hashlib.sha256() for camera in self._embedded}
        for batch in self._stream.read(first, first + count):
            for name, width in list(widths.items()):
                column = batch.column(name)
                if name == self._keys.instruction and (found := _strings(column)) is not None:
                    texts += found
                else:
                    pieces[name].append(_matrix(column, width, f"{where}: {name}"))
            for camera, found in images.items():
                for image in _embedded_images(batch.column(camera), f"{where}: {camera}"):
                    found.append(self._blobs[camera].append(image, f"{where} step {len(found)}: {camera}"))
                    digests[camera].update(len(image).to_bytes(8, "little") + image)
        numbers = {name: np.concatenate(parts) for name, parts in pieces.items() if parts}
        content = b"".join(digest.digest() for digest in digests.values())
        return numbers, texts, {camera: np.array(rows, dtype=np.int64) for camera, rows in images.items()}, content

    def _check_order(self, numbers: Mapping[str, np.ndarray], place: _Place, where: str) -> None:
        """What the rows say of themselves: another episode's, or frames that do not follow each other."""
        episode, frames = numbers.get("episode_index"), numbers.get("frame_index")
        if episode is not None and not (episode == place.number).all():
            raise DataSetError(f"{where}: episode_index is {episode[:5, 0].tolist()}..., expected {place.number}")
        if frames is not None and not (np.diff(frames[:, 0]) > 0).all():
            raise DataSetError(f"{where}: frame_index is {frames[:5, 0].tolist()}..., expected rising numbers")

    def _rows(self, place: _Place, where: str) -> tuple[int, int]:
        """First row and number of rows of an episode in its file, which is open afterwards."""
        if self._stream is None or self._stream.path != place.data:
            self._close_stream()
            self._info.require(place.data)
            needed = ["timestamp"] if self._info.video_cameras else []
            needed += ["episode_index"] if self._shared else []
            columns = dict.fromkeys([*self._widths, *needed, *self._embedded])
            if self._keys.instruction is not None:
                columns |= {self._keys.instruction: None}
            optional = [name for name in _HELPERS if name not in columns]
            widths = self._widths | dict.fromkeys((*_HELPERS, "timestamp"), 1)
            stream = _RowStream(place.data, list(columns), optional, widths)
            self._episodes = stream.episodes() if self._shared else {}
            self._stream = stream
        if not self._shared:
            return self._checked_count(0, self._stream.rows, where)
        if place.number not in self._episodes and place.length == 0:
            return 0, 0
        first, count = self._episodes.get(place.number, (0, 0))
        if count < 1:
            found = "its rows are not in one piece" if count < 0 else f"no such rows among {self._stream.rows}"
            raise DataSetError(f"{where}: {found}")
        return self._checked_count(first, count, where)

    def _checked_count(self, first: int, count: int, where: str) -> tuple[int, int]:
        if count > MAX_STEPS:
            raise DataSetError(f"{where}: {count} rows, expected at most {MAX_STEPS}")
        return first, count

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _instructions(
        self, numbers: Mapping[str, np.ndarray], texts: list[str], place: _Place, where: str
    ) -> list[str]:
        """The text of every step."""
        if texts:
            return texts
        name = self._keys.instruction or "task_index"
        if name not in numbers:
            if len(place.tasks) != 1:
                raise DataSetError(f"{where}: no column task_index, and meta has the tasks {list(place.tasks)}")
            return list(place.tasks) * len(next(iter(numbers.values())))
        indices = numbers[name][:, 0]
        if indices.dtype.kind not in "iu":
            raise DataSetError(f"{where}: {name} is {indices.dtype}, expected integers")
        for index in np.unique(indices).tolist():
            if index not in self._tasks:
                raise DataSetError(f"{where}: {name} {index} is not in the tasks of meta, found {len(self._tasks)}")
        return [self._tasks[index] for index in indices.tolist()]

    def _scan(self, camera: str, file: Path) -> _VideoScan:
        if camera not in self._scans or self._scans[camera].path != file:
            self._scans[camera] = _VideoScan(
                self._info.require(file), self._info.image_shape(camera)
            )  # of the file that came last: many episodes share one in v3.0
        return self._scans[camera]


def _blobs_are_whole(index: EpisodeIndex) -> bool:
    for name, size in index.info["blobs"].values():
        if not os.path.isfile(index.folder / name) or (index.folder / name).stat().st_size != size:
            return False
    return True


# Video


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Whatever PyAV raises on damaged content becomes a DataSetError with the file's name."""
    import av

    try:
        yield
    except DataSetError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataSetError(f"{path}: cannot be read, expected a complete video: {error}") from error


def _open_video(path: Path):
    import av

    # A file may hold a play list that names addresses elsewhere: only local files are followed.
    container = av.open(str(path), options={"protocol_whitelist": "file"}, metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise DataSetError(f"{path}: no video stream")
    context = container.streams.video[0].codec_context
    context.options = context.options | {"max_pixels": str(MAX_PIXELS)}
    return container


class _VideoScan:
    """The frames of a video in the order of display, without decoding them.

    pts (N,) int64: time stamps in units of the stream. seeks (N,) int64: where to begin decoding. digests (N, 16).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        with _decoding(path), _open_video(path) as container:
            stream = container.streams.video[0]
            size = (stream.height, stream.width)
            if size not in (shape[:2], shape[1::-1]):
                raise DataSetError(f"{path}: frames of {size}, {_INFO} declares {shape}")
            rows, keys = _packets(container, stream, path)
            self._unit = float(stream.time_base or 0)
        rows.sort()
        keys.sort()
        self.pts = np.array([pts for pts, _ in rows], dtype=np.int64)
        self.digests = np.array([np.frombuffer(digest, np.uint8) for _, digest in rows]).reshape(-1, 16)
        # The last keyframe displayed no later than the frame, by its time of decoding: that is what files are
        # searched by, and it is not later than its time of display.
        before = np.searchsorted([pts for pts, _ in keys], self.pts, side="right") - 1
        if not rows:
            raise DataSetError(f"{path}: no frames that are displayed")
        if not keys or (before < 0).any():
            raise DataSetError(f"{path}: no keyframe before the first of {len(rows)} frames")
        self.seeks = np.array([dts for _, dts in keys], dtype=np.int64)[before]

    def locate(self, times: np.ndarray, fps: float, where: str) -> np.ndarray:
        """Rows of the frames at `times` (T,) seconds; DataSetError if one is further than half a step away."""
        seconds = self.pts * self._unit
        rows = np.searchsorted((seconds[1:] + seconds[:-1]) / 2, times)  # nearest frames
        slack = 1e-4 + 1e-6 * np.abs(times)  # time stamps are float32
        bad = ~(np.abs(seconds[rows] - times) <= 0.5 / fps + slack)
        bad[1:] |= np.diff(rows) < 1
        if bad.any():
            step = int(np.argmax(bad))
            raise DataSetError(
                f"{where}: no frame for step {step} at {times[step]:.4f} s, found {len(seconds)} frames from "
                f"{seconds[0]:.4f} to {seconds[-1]:.4f} s, expected one for every step of {1 / fps:.4f} s"
            )
        return rows


def _packets(container, stream, path: Path) -> tuple[list[tuple[int, bytes]], list[tuple[int, int]]]:
    """(pts, digest) of all displayed frames, and (pts, dts) of all keyframes."""
    rows: list[tuple[int, bytes]] = []
    keys: list[tuple[int, int]] = []
    limit = path.stat().st_size
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the end of the stream
        if packet.pts is None or packet.is_corrupt or len(rows) > limit:
            raise DataSetError(f"{path}: frame {len(rows)} is damaged or has no time stamp")
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if not packet.is_discard:
            rows.append((packet.pts, hashlib.blake2b(bytes(packet), digest_size=16).digest()))
    return rows, keys


class _VideoFile:
    """An open video: exact frames by time stamp, cheap when they follow each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = _open_video(path)
        self._stream = self._container.streams.video[0]
        # One thread: several delay the first frame after a jump, and data loading has its own processes.
        self._stream.codec_context.thread_count = 1
        self._frames: Iterator = iter(())
        self._last = None
        self._began: int | None = None

    def read(self, pts: int, seek: int) -> np.ndarray:
        """The frame with time stamp `pts`, uint8 (H, W, 3) RGB; decoding begins at the keyframe at `seek`."""
        if self._last is None or self._last.pts != pts:
            if self._last is None or seek != self._began or self._last.pts > pts:
                self._container.seek(seek, stream=self._stream, backward=True, any_frame=False)
                self._frames, self._began = self._container.decode(self._stream), seek
            self._last = next((frame for frame in self._frames if frame.pts is not None and frame.pts >= pts), None)
        if self._last is None or self._last.pts != pts or self._last.is_corrupt:
            raise DataSetError(f"{self.path}: the frame at time stamp {pts} cannot be decoded")
        return self._last.to_ndarray(format="rgb24")

    def close(self) -> None:
        """Close the file."""
        self._container.close()
