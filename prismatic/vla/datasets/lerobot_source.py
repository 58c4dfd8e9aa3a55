"""LeRobot data sets v2.1 and v3.0 on the local disk, read with pyarrow and PyAV.

    v2.1  meta/{info.json, episodes.jsonl, tasks.jsonl}, data/chunk-000/episode_000000.parquet,
          videos/chunk-000/<key>/episode_000000.mp4                     one file per episode
    v3.0  meta/{info.json, tasks.parquet}, meta/episodes/chunk-000/file-000.parquet, data/chunk-000/file-000.parquet,
          videos/<key>/chunk-000/file-000.mp4                           many episodes per file

Cameras are videos or parquet columns {bytes, path} of PNG or JPEG. The index holds the numbers; of a video frame its
time stamp and that of the keyframe to start decoding at; images of parquet columns are copied to `images-<n>.blob` in
the folder of the index, because parquet cannot give one row without decompressing its whole row group.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from prismatic.vla.datasets.index import EpisodeIndex, IndexedSource, IndexWriter, open_index
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import (
    OpenFiles,
    as_float32,
    content_of,
    index_label,
    require_format,
    turn,
    turned_frame,
)

VERSIONS = ("v2.1", "v3.0")
_INFO = "meta/info.json"
_OPEN_VIDEOS = 8
_BATCH_ROWS = 32  # rows of a parquet file held at once: bounds memory


class LeRobotSource(IndexedSource):
    """Episodes of one split of a LeRobot data set, in the order of their numbers.

    Keys are column names, e.g. action "action", state ("observation.state",), cameras ("observation.images.image",).
    The first opening reads everything once (index, fingerprint).

    Raises:
        DataSetError: unknown version or split; missing, damaged or contradictory files; too short videos.
        MissingFeatureError: a key or a column that the data set does not have.
    """

    def __init__(self, directory: str | os.PathLike, keys: SourceKeys, split: str = "train") -> None:
        require_format(keys, "lerobot")
        self.directory, self.keys = Path(directory), keys
        info = _Info(self.directory, keys)
        read = _places_v21 if info.version == "v2.1" else _places_v30
        places, files = read(info)
        places = places[info.split(split, len(places))]
        tasks = _tasks_v21(info) if info.version == "v2.1" else _tasks_v30(info)
        files = [*files, *dict.fromkeys(file for place in places for file in (place.data, *place.video_files))]
        for file in files:
            _require_file(file)

        def build(writer: IndexWriter) -> None:
            _Builder(info, tasks).build(writer, places)

        label = index_label(keys, split)
        self._index = open_index(self.directory, label, files, build)
        if not _blobs_are_whole(self._index):
            (self._index.folder / "index.json").unlink(missing_ok=True)
            self._index = open_index(self.directory, label, files, build)
        self._shapes = {camera: info.image_shape(camera) for camera in keys.cameras}
        self._videos = OpenFiles(_OPEN_VIDEOS)
        self._blobs: dict[str, np.memmap] = {}

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
            if image.shape != self._shapes[camera]:
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
    """Where one episode lies. row: first row in `data`. videos: {camera: (file, seconds at which it begins)}."""

    number: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    row: int
    videos: Mapping[str, tuple[Path, float]]

    @property
    def video_files(self) -> list[Path]:
        return [file for file, _ in self.videos.values()]


class _Info:
    """`meta/info.json`, checked as far as the keys need it."""

    def __init__(self, directory: Path, keys: SourceKeys) -> None:
        self.directory, self.keys, self.path = directory, keys, directory / _INFO
        self.content = _json(self.path, _require_file(self.path).read_bytes())
        self.version = self.field("codebase_version", str)
        if self.version not in VERSIONS:
            raise DataSetError(f"{self.path}: codebase_version is {self.version!r}, expected {' or '.join(VERSIONS)}")
        fps = self.field("fps", (int, float))
        if not 0 < fps < 1e6:
            raise DataSetError(f"{self.path}: fps is {fps}, expected a positive number")
        self.fps = float(fps)
        self.features = self.field("features", dict)
        for key in (*keys.numbers, *keys.cameras):
            if key not in self.features:
                raise MissingFeatureError(f"{self.path}: no feature {key!r}, found {sorted(self.features)}")
        self.video_cameras = [camera for camera in keys.cameras if self._camera_kind(camera) == "video"]

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
        """Numbers per step of a vector feature."""
        shape = self._shape(key)
        if len(shape) != 1:
            raise DataSetError(f"{self.path}: feature {key!r} has shape {shape}, expected one dimension")
        return shape[0]

    def image_shape(self, camera: str) -> tuple[int, int, int]:
        """Declared (H, W, 3); data sets declare it as (3, H, W) as well."""
        shape = self._shape(camera)
        if len(shape) == 3 and shape[2] == 3:
            return shape
        if len(shape) == 3 and shape[0] == 3:
            return (*shape[1:], 3)
        raise DataSetError(f"{self.path}: feature {camera!r} has shape {shape}, expected (H, W, 3) or (3, H, W)")

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

    def split(self, split: str, episodes: int) -> slice:
        """Episodes of a split, declared like `0:100`."""
        splits = self.field("splits", dict)
        if split not in splits:
            raise DataSetError(f"{self.path}: no split {split!r}, found splits {sorted(splits)}")
        match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", str(splits[split]))
        if match is None or not int(match[1]) < int(match[2]) <= episodes:
            raise DataSetError(
                f"{self.path}: split {split!r} is {splits[split]!r}, expected first:last within 0:{episodes}"
            )
        return slice(int(match[1]), int(match[2]))

    def check_episodes(self, numbers: Sequence[int], path: Path) -> None:
        """Episodes must be numbered without gaps and as many as declared."""
        if list(numbers) != list(range(len(numbers))):
            raise DataSetError(f"{path}: episode_index {list(numbers)[:20]}, expected 0, 1, 2, ...")
        if "total_episodes" in self.content and self.field("total_episodes", int) != len(numbers):
            declared = self.content["total_episodes"]
            raise DataSetError(f"{path}: {len(numbers)} episodes, {_INFO} declares total_episodes {declared}")


def _require_file(path: Path) -> Path:
    if not os.path.isfile(path):
        raise DataSetError(f"{path} is missing")
    return path


def _json(path: Path, text: bytes, line: str = "") -> dict:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataSetError(f"{path}{line}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataSetError(f"{path}{line}: {type(content).__name__}, expected a JSON object")
    return content


def _json_lines(path: Path) -> list[tuple[dict, str]]:
    lines = _require_file(path).read_bytes().split(b"\n")
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


def _texts(value, where: str) -> tuple[str, ...]:
    """The `tasks` of an episode; absent is allowed, every frame names its task as well."""
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise DataSetError(f"{where}: tasks is {value!r}, expected a list of texts")


def _tasks_v21(info: _Info) -> dict[int, str]:
    lines = _json_lines(info.directory / "meta" / "tasks.jsonl")
    return {_field(line, "task_index", int, where): _field(line, "task", str, where) for line, where in lines}


def _tasks_v30(info: _Info) -> dict[int, str]:
    path = info.directory / "meta" / "tasks.parquet"
    found = _column_names(path)
    name = "task" if "task" in found else "__index_level_0__"  # written from a table indexed by the task
    rows = _table(path, ("task_index", name))
    return {
        _field(row, "task_index", int, str(path)): _field({"task": row[name]}, "task", str, str(path)) for row in rows
    }


def _places_v21(info: _Info) -> tuple[list[_Place], list[Path]]:
    path = info.directory / "meta" / "episodes.jsonl"
    lines = sorted(_json_lines(path), key=_number)
    info.check_episodes([_number(line) for line in lines], path)
    chunk = info.field("chunks_size", int)
    if chunk < 1:
        raise DataSetError(f"{info.path}: chunks_size is {chunk}, expected a positive integer")
    places = []
    for number, (line, where) in enumerate(lines):
        fields = {"episode_chunk": number // chunk, "episode_index": number}
        videos = {key: (info.file("video_path", video_key=key, **fields), 0.0) for key in info.video_cameras}
        length = _length(line, where)
        tasks = _texts(line.get("tasks"), where)
        places.append(_Place(number, length, tasks, info.file("data_path", **fields), 0, videos))
    return places, [info.path, path, info.directory / "meta" / "tasks.jsonl"]


def _places_v30(info: _Info) -> tuple[list[_Place], list[Path]]:
    folder = info.directory / "meta" / "episodes"
    files = sorted(folder.glob("*/*.parquet"))
    if not files:
        raise DataSetError(f"{folder} holds no chunk-<i>/file-<j>.parquet")
    columns = ["episode_index", "length", "data/chunk_index", "data/file_index", "dataset_from_index"]
    for key in info.video_cameras:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp", "to_timestamp")]
    columns += ["tasks", "dataset_to_index"]
    rows = sorted(((row, str(file)) for file in files for row in _table(file, columns)), key=_number)
    info.check_episodes([_number(row) for row in rows], folder)
    first_rows: dict[Path, int] = {}
    for row, where in rows:
        begin = _field(row, "dataset_from_index", int, where)
        data = _data_file(info, row, where)
        first_rows[data] = min(begin, first_rows.get(data, begin))
    places = [_place_v30(info, row, where, first_rows) for row, where in rows]
    return places, [info.path, *files, info.directory / "meta" / "tasks.parquet"]


def _data_file(info: _Info, row: Mapping, where: str) -> Path:
    chunk, file = (_field(row, f"data/{name}", int, where) for name in ("chunk_index", "file_index"))
    return info.file("data_path", chunk_index=chunk, file_index=file)


def _place_v30(info: _Info, row: Mapping, where: str, first_rows: Mapping[Path, int]) -> _Place:
    where = f"{where}: episode {row['episode_index']}"
    length, data = _length(row, where), _data_file(info, row, where)
    begin, end = (_field(row, f"dataset_{name}_index", int, where) for name in ("from", "to"))
    if end - begin != length:
        raise DataSetError(f"{where}: dataset_from_index {begin} to dataset_to_index {end}, but length is {length}")
    videos = {}
    for key in info.video_cameras:
        chunk, file = (_field(row, f"videos/{key}/{name}", int, where) for name in ("chunk_index", "file_index"))
        start, stop = (_field(row, f"videos/{key}/{name}_timestamp", (int, float), where) for name in ("from", "to"))
        if not abs((stop - start) * info.fps - length) <= 1:
            raise DataSetError(f"{where}: {key} from {start} s to {stop} s, expected {length} steps at {info.fps} fps")
        videos[key] = (info.file("video_path", video_key=key, chunk_index=chunk, file_index=file), start)
    tasks = _texts(row["tasks"], where)
    return _Place(row["episode_index"], length, tasks, data, begin - first_rows[data], videos)


def _number(entry: tuple[Mapping, str]) -> int:
    row, where = entry
    return _field(row, "episode_index", int, where)


def _length(row: Mapping, where: str) -> int:
    length = _field(row, "length", int, where)
    if length < 1:
        raise DataSetError(f"{where}: length is {length}, expected a positive integer")
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
        return pq.ParquetFile(_require_file(path), page_checksum_verification=True)


def _column_names(path: Path) -> list[str]:
    with _open_parquet(path) as file, _parquet(path):
        return file.schema_arrow.names


def _require_columns(path: Path, columns: Sequence[str], found: Sequence[str]) -> None:
    missing = sorted(set(columns) - set(found))
    if missing:
        raise MissingFeatureError(f"{path}: no columns {missing}, found {sorted(found)}")


def _table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Rows of a small table."""
    with _open_parquet(path) as file, _parquet(path):
        _require_columns(path, columns, file.schema_arrow.names)
        return file.read(columns=list(columns), use_threads=False).to_pylist()


class _RowStream:
    """Rows of one parquet file in order, a few at a time: memory does not grow with the file."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self._columns = path, list(columns)
        self._file = _open_parquet(path)
        with _parquet(path):
            _require_columns(path, columns, self._file.schema_arrow.names)
            self.rows = self._file.metadata.num_rows
        self._start()

    def _start(self) -> None:
        self._batches = self._file.iter_batches(_BATCH_ROWS, columns=self._columns, use_threads=False)
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
    """Numbers or lists of numbers as (rows, width)."""
    import pyarrow as pa

    with _parquet(where):
        column.validate(full=True)  # offsets of a damaged file may point anywhere
        flat = column
        if isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
            flat = column.flatten()
            sizes = column.value_lengths().to_numpy(zero_copy_only=False)
        else:
            sizes = np.ones(len(column))
        if column.null_count or flat.null_count:
            raise DataSetError(f"{where}: missing values")
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


# Building the index


class _Blob:
    """The images of one camera one after another in a file."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.name, self.size, self._shape = path.name, 0, shape
        self._file = path.open("wb")

    def append(self, image: bytes, where: str) -> tuple[int, int]:
        """Offset and size of the image, which is checked as far as possible without decoding it."""
        try:
            with Image.open(io.BytesIO(image), formats=("JPEG", "PNG")) as header:
                found = (header.height, header.width, 3)
                header.verify()
        except (OSError, ValueError, SyntaxError) as error:  # Pillow: SyntaxError for damaged PNG chunks
            raise DataSetError(f"{where}: not a complete JPEG or PNG image ({len(image)} bytes): {error}") from error
        if found != self._shape:
            raise DataSetError(f"{where}: image {found}, {_INFO} declares {self._shape}")
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
        self._helpers = {name: 1 for name in ("episode_index", "frame_index", "task_index")}
        if info.video_cameras:
            self._helpers["timestamp"] = 1
        self._embedded = [camera for camera in info.keys.cameras if camera not in info.video_cameras]
        self._stream: _RowStream | None = None
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
                self._add(writer, place)
        writer.info = {"blobs": {camera: [blob.name, blob.size] for camera, blob in self._blobs.items()}}

    def _add(self, writer: IndexWriter, place: _Place) -> None:
        where = f"{place.data}: episode {place.number}"
        numbers, images, content = self._read_rows(place, where)
        arrays = {} if self._keys.action is None else {"actions": as_float32(numbers[self._keys.action])}
        arrays["state"] = np.concatenate([as_float32(numbers[key]) for key in self._keys.state], axis=1)
        content += content_of(arrays)
        instruction = self._instruction(numbers, place, where)
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
            writer.add(instruction, arrays, hashlib.sha256(content).digest(), record)
        except (DataSetError, UnicodeEncodeError) as error:  # the latter: a task that is not valid Unicode
            raise DataSetError(f"{where}: {error}") from error

    def _read_rows(self, place: _Place, where: str):
        """Numbers {key: (T, width)}, places of the embedded images {camera: (T, 2)} and the images' hashes."""
        widths = self._widths | self._helpers
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in widths}
        images: dict[str, list] = {camera: [] for camera in self._embedded}
        digests = {camera: hashlib.sha256() for camera in self._embedded}
        for batch in self._rows(place).read(place.row, place.row + place.length):
            for name, width in widths.items():
                pieces[name].append(_matrix(batch.column(name), width, f"{where}: {name}"))
            for camera, found in images.items():
                for image in _embedded_images(batch.column(camera), f"{where}: {camera}"):
                    found.append(self._blobs[camera].append(image, f"{where} step {len(found)}: {camera}"))
                    digests[camera].update(len(image).to_bytes(8, "little") + image)
        numbers = {name: np.concatenate(parts) for name, parts in pieces.items()}
        for name, expected in (("episode_index", place.number), ("frame_index", np.arange(place.length))):
            if not np.array_equal(numbers[name][:, 0], np.broadcast_to(expected, place.length)):
                expected = f"0 to {place.length - 1}" if name == "frame_index" else expected
                raise DataSetError(f"{where}: {name} is {numbers[name][:5, 0].tolist()}..., expected {expected}")
        content = b"".join(digest.digest() for digest in digests.values())
        return numbers, {camera: np.array(rows, dtype=np.int64) for camera, rows in images.items()}, content

    def _rows(self, place: _Place) -> _RowStream:
        if self._stream is None or self._stream.path != place.data:
            self._close_stream()
            self._stream = _RowStream(place.data, [*self._widths, *self._helpers, *self._embedded])
        if self._info.version == "v2.1" and self._stream.rows != place.length:
            raise DataSetError(f"{place.data}: {self._stream.rows} rows, meta/episodes.jsonl declares {place.length}")
        return self._stream

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _instruction(self, numbers: Mapping[str, np.ndarray], place: _Place, where: str) -> str:
        indices = np.unique(numbers["task_index"])
        if indices.dtype.kind not in "iu":
            raise DataSetError(f"{where}: task_index is {indices.dtype}, expected integers")
        if len(indices) != 1:
            raise DataSetError(f"{where}: task_index changes within the episode: {indices.tolist()[:10]}")
        task = self._tasks.get(int(indices[0]))
        if task is None:
            raise DataSetError(
                f"{where}: task_index {indices[0]} is not in the tasks of meta, found {len(self._tasks)}"
            )
        if place.tasks and task not in place.tasks:
            raise DataSetError(f"{where}: task {task!r}, the episode's entry in meta has {list(place.tasks)}")
        return task

    def _scan(self, camera: str, file: Path) -> _VideoScan:
        if camera not in self._scans or self._scans[camera].path != file:
            self._scans[camera] = _VideoScan(file)  # of the file that came last: many episodes share one in v3.0
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
    return container


class _VideoScan:
    """The frames of a video in the order of display, without decoding them.

    pts (N,) int64: time stamps in units of the stream. seeks (N,) int64: where to begin decoding. digests (N, 16).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _decoding(_require_file(path)), _open_video(path) as container:
            stream = container.streams.video[0]
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
        bad = ~(np.abs(seconds[rows] - times) <= 0.5 / fps)
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
