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

import os
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.index import open_index
from prismatic.vla.datasets.index_writer import IndexWriter, first_lines
from prismatic.vla.datasets.indexed_source import IndexedSource
from prismatic.vla.datasets.lerobot_episodes import places_v2, places_v30
from prismatic.vla.datasets.lerobot_images import blobs_are_whole
from prismatic.vla.datasets.lerobot_index import Builder
from prismatic.vla.datasets.lerobot_info import INFO, Info
from prismatic.vla.datasets.lerobot_video import VideoFile, decoding
from prismatic.vla.datasets.source import DataSetError, SourceKeys
from prismatic.vla.datasets.source_files import OpenFiles, index_label, require_format, turn, turned_frame

_OPEN_VIDEOS = 8


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
        self._info = info = Info(self.directory, keys)
        read = places_v30 if info.version == "v3.0" else places_v2
        places, files = read(info)
        self.split, first, last = info.split(split, places[-1].number + 1 if places else 0)
        places = [place for place in places if first <= place.number < last]
        parts = dict.fromkeys(file for place in places for file in (place.data, *place.video_files))
        for file in parts if not skip_bad else ():
            info.require(file)
        files = [*files, *parts]

        def build(writer: IndexWriter) -> None:
            Builder(info).build(writer, places)

        label = index_label(keys, self.split)
        self._index = open_index(self.directory, label, files, build, skip_bad)
        if not blobs_are_whole(self._index):
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
            with decoding(path):
                image = self._videos.get(name, lambda: VideoFile(path)).read(pts, seek)
            height, width, _ = self._shapes[camera]
            if image.shape not in ((height, width, 3), (width, height, 3)):
                raise DataSetError(f"{path}: frame {image.shape}, {INFO} declares {self._shapes[camera]}")
        except DataSetError:
            self._videos.drop(name)  # the decoder is in an unknown state
            raise
        return image

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_blobs": {}}  # workers map the files again instead of receiving copies
