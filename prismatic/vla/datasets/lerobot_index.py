"""Builds the index of a LeRobot data set: reads every data file once, in order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from prismatic.progress import over
from prismatic.vla.datasets.index_writer import MAX_STEPS, IndexWriter
from prismatic.vla.datasets.lerobot_episodes import Place, read_tasks
from prismatic.vla.datasets.lerobot_images import Blob, embedded_images
from prismatic.vla.datasets.lerobot_info import Info
from prismatic.vla.datasets.lerobot_tables import RowStream, matrix, strings
from prismatic.vla.datasets.lerobot_video import VideoScan
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.datasets.source_files import as_float32, content_of

_HELPERS = ("episode_index", "frame_index", "task_index")


class Builder:
    """Adds episodes to the index: reads every data file once, in order."""

    def __init__(self, info: Info) -> None:
        self._info, self._keys = info, info.keys
        self._tasks: dict[int, str] | Exception | None = None
        self._widths = {key: info.width(key) for key in info.keys.numbers}
        self._embedded = [camera for camera in info.keys.cameras if camera not in info.video_cameras]
        self._shared = info.version == "v3.0"
        self._needed = list(self._widths)  # columns of numbers and texts
        self._needed += ["timestamp"] if info.video_cameras else []
        self._needed += ["episode_index"] if self._shared else []
        self._needed += [] if info.keys.instruction is None else [info.keys.instruction]
        self._stream: RowStream | None = None
        self._episodes: dict[int, tuple[int, int]] = {}
        self._scans: dict[str, VideoScan] = {}
        self._blobs: dict[str, Blob] = {}

    def build(self, writer: IndexWriter, places: Sequence[Place]) -> None:
        """Add all episodes, and the images of parquet columns to the folder of the index."""
        with ExitStack() as stack:
            for number, camera in enumerate(self._embedded):
                blob = Blob(writer.folder / f"images-{number}.blob", self._info.image_shape(camera))
                self._blobs[camera] = blob
                stack.callback(blob.close)
            stack.callback(self._close_stream)
            for place in over(places, "indexing", "episodes", leave=False):
                with writer.episode():
                    self._add(writer, place)
        writer.info = {"blobs": {camera: [blob.name, blob.size] for camera, blob in self._blobs.items()}}

    def _add(self, writer: IndexWriter, place: Place) -> None:
        where = f"{place.data}: episode {place.number}"
        first, rows = self._rows(place, where)
        if place.length is not None and rows != place.length:
            writer.warn(f"{where}: {rows} rows, meta declares length {place.length}")
        if rows == 0:
            writer.add_empty()
            return
        numbers, texts, images, content = self._read_rows(first, rows, where)
        self._check_order(numbers, place, where)
        arrays = {} if self._keys.action is None else {"actions": as_float32(numbers[self._keys.action])}
        arrays["state"] = np.concatenate([as_float32(numbers[key]) for key in self._keys.state], axis=1)
        content += content_of(arrays)
        texts = texts or self._instructions(writer, numbers, place, where)
        if place.tasks and not set(texts) <= set(place.tasks):
            writer.warn(f"{where}: its frames have the tasks {sorted(set(texts))}, meta has {list(place.tasks)}")
        arrays |= {f"place.{camera}": rows for camera, rows in images.items()}
        for camera, (file, start) in place.videos.items():
            scan = self._scan(camera, file)
            assert self._info.fps is not None  # videos have a rate
            at = scan.locate(start + numbers["timestamp"][:, 0], self._info.fps, f"{file}: episode {place.number}")
            arrays[f"place.{camera}"] = np.stack([scan.pts[at], scan.seeks[at]], axis=1)
            content += scan.digests[at].tobytes()
        record = {
            camera: file.relative_to(self._info.directory).as_posix() for camera, (file, _) in place.videos.items()
        }
        try:
            writer.add(texts, arrays, hashlib.sha256(content).digest(), record)
        except DataSetError as error:
            raise DataSetError(f"{where}: {error}") from error

    def _read_rows(self, first: int, count: int, where: str):
        """Numbers {key: (T, width)}, texts, places {camera: (T, 2)} of the embedded images and the images' hashes."""
        assert self._stream is not None  # `_rows` opened it
        widths = self._widths | {name: 1 for name in (*_HELPERS, "timestamp") if name in self._stream.columns}
        if self._keys.instruction is not None and self._keys.instruction not in widths:
            widths[self._keys.instruction] = 1
        pieces: dict[str, list[np.ndarray]] = {name: [] for name in widths}
        texts: list[str] = []
        images: dict[str, list] = {camera: [] for camera in self._embedded}
        digests = {camera: hashlib.sha256() for camera in self._embedded}
        for batch in self._stream.read(first, first + count):
            for name in list(pieces):
                column = batch.column(name)
                if name == self._keys.instruction and (found := strings(column)) is not None:
                    texts += found
                else:
                    self._take_numbers(pieces, name, column, widths[name], where)
            for camera, places in images.items():
                for image in embedded_images(batch.column(camera), f"{where}: {camera}"):
                    places.append(self._blobs[camera].append(image, f"{where} step {len(places)}: {camera}"))
                    digests[camera].update(len(image).to_bytes(8, "little") + image)
        numbers = {name: np.concatenate(parts) for name, parts in pieces.items() if parts}
        content = b"".join(digest.digest() for digest in digests.values())
        return numbers, texts, {camera: np.array(rows, dtype=np.int64) for camera, rows in images.items()}, content

    def _take_numbers(self, pieces: dict[str, list[np.ndarray]], name: str, column, width: int, where: str) -> None:
        try:
            pieces[name].append(matrix(column, width, f"{where}: {name}"))
        except DataSetError:
            if name in self._needed:
                raise
            del pieces[name]  # as if it were not there

    def _check_order(self, numbers: Mapping[str, np.ndarray], place: Place, where: str) -> None:
        """What the rows say of themselves: another episode's, or frames that do not follow each other."""
        episode, frames = numbers.get("episode_index"), numbers.get("frame_index")
        if episode is not None and not (episode == place.number).all():
            raise DataSetError(f"{where}: episode_index is {episode[:5, 0].tolist()}..., expected {place.number}")
        if frames is not None and not (np.diff(frames[:, 0]) > 0).all():
            raise DataSetError(f"{where}: frame_index is {frames[:5, 0].tolist()}..., expected rising numbers")

    def _rows(self, place: Place, where: str) -> tuple[int, int]:
        """First row and number of rows of an episode in its file, which is open afterwards."""
        if self._stream is None or self._stream.path != place.data:
            self._close_stream()
            self._info.require(place.data)
            columns = dict.fromkeys([*self._needed, *self._embedded])
            optional = [name for name in _HELPERS if name not in columns]
            widths = self._widths | dict.fromkeys((*_HELPERS, "timestamp"), 1)
            stream = RowStream(place.data, list(columns), optional, widths)
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
        self, writer: IndexWriter, numbers: Mapping[str, np.ndarray], place: Place, where: str
    ) -> list[str]:
        """The text of every step, by the number of its task or, without one, as that of the episode."""
        name = self._keys.instruction or "task_index"
        indices = numbers[name][:, 0] if name in numbers else None
        tasks = {} if indices is None else self._read_tasks(writer)
        if indices is None or isinstance(tasks, Exception):
            if len(place.tasks) != 1 or self._keys.instruction is not None:
                reason = "no column task_index with numbers" if indices is None else str(tasks)
                raise DataSetError(f"{where}: {reason}, and its episode has the tasks {list(place.tasks)}")
            return list(place.tasks) * len(next(iter(numbers.values())))
        if indices.dtype.kind not in "iu":
            raise DataSetError(f"{where}: {name} is {indices.dtype}, expected integers")
        for index in np.unique(indices).tolist():
            if index not in tasks:
                raise DataSetError(f"{where}: {name} {index} is not in the tasks of meta, found {len(tasks)}")
        return [tasks[index] for index in indices.tolist()]

    def _read_tasks(self, writer: IndexWriter) -> dict[int, str] | Exception:
        """The texts by number, or why there are none: read when the first episode needs them."""
        if self._tasks is None:
            try:
                self._tasks = read_tasks(self._info)
            except (DataSetError, MissingFeatureError) as error:
                self._tasks = error
                writer.warn(f"{error}; episodes with one task in meta have that text")
        return self._tasks

    def _scan(self, camera: str, file: Path) -> VideoScan:
        if camera not in self._scans or self._scans[camera].path != file:
            self._scans[camera] = VideoScan(
                self._info.require(file), self._info.image_shape(camera)
            )  # of the file that came last: many episodes share one in v3.0
        return self._scans[camera]
