"""Where the episodes of a LeRobot data set lie, and their tasks: metadata beside `info.json`, by version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prismatic.vla.datasets.lerobot_info import Info, field, json_lines
from prismatic.vla.datasets.lerobot_tables import column_names, table
from prismatic.vla.datasets.source import DataSetError

_END_SLACK = 1.5  # steps by which the end of an episode's video may be stated wrong without a word


@dataclass(frozen=True)
class Place:
    """Where one episode lies. length: steps as declared, None where that cannot be understood and nobody needs it.
    videos: {camera: (file, seconds at which it begins)}."""

    number: int
    length: int | None
    tasks: tuple[str, ...]
    data: Path
    videos: Mapping[str, tuple[Path, float]]

    @property
    def video_files(self) -> list[Path]:
        return [file for file, _ in self.videos.values()]


def _texts(value) -> tuple[str, ...]:
    """The `tasks` of an episode, of use only where its frames do not name theirs."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def read_tasks(info: Info) -> dict[int, str]:
    """{task index: text}; DataSetError naming the file that is missing or damaged."""
    return _tasks_v30(info) if info.version == "v3.0" else _tasks_v2(info)


def _tasks_v2(info: Info) -> dict[int, str]:
    lines = json_lines(info.require(info.directory / "meta" / "tasks.jsonl"))
    return {field(line, "task_index", int, where): field(line, "task", str, where) for line, where in lines}


def _tasks_v30(info: Info) -> dict[int, str]:
    path = info.require(info.directory / "meta" / "tasks.parquet")
    found = column_names(path)
    name = "task" if "task" in found else "__index_level_0__"  # written from a table indexed by the task
    rows = table(path, ("task_index", name))
    return {
        field(row, "task_index", int, str(path)): field({"task": row[name]}, "task", str, str(path)) for row in rows
    }


def places_v2(info: Info) -> tuple[list[Place], list[Path]]:
    """The episodes of v2.x by number, and the files of metadata that say so."""
    path = info.require(info.directory / "meta" / "episodes.jsonl")
    lines = sorted(json_lines(path), key=_number)
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
            Place(
                number, _length(info, line, where), _texts(line.get("tasks")), info.file("data_path", **fields), videos
            )
        )
    return places, [info.path, path, info.directory / "meta" / "tasks.jsonl"]


def places_v30(info: Info) -> tuple[list[Place], list[Path]]:
    """The episodes of v3.0 by number, and the files of metadata that say so."""
    folder = info.directory / "meta" / "episodes"
    files = [info.require(file) for file in sorted(folder.glob("*/*.parquet"))]
    if not files:
        raise DataSetError(f"{folder} holds no chunk-<i>/file-<j>.parquet")
    columns = ["episode_index", "data/chunk_index", "data/file_index"]
    for key in info.video_cameras:
        columns += [f"videos/{key}/{name}" for name in ("chunk_index", "file_index", "from_timestamp")]
    optional = ["length", "tasks", *(f"videos/{key}/to_timestamp" for key in info.video_cameras)]
    rows = sorted(((row, str(file)) for file in files for row in table(file, columns, optional)), key=_number)
    info.check_episodes([_number(row) for row in rows], folder)
    places = [_place_v30(info, row, where) for row, where in rows]
    _check_overlaps(info, places, folder)
    return places, [info.path, *files, info.directory / "meta" / "tasks.parquet"]


def _place_v30(info: Info, row: Mapping, where: str) -> Place:
    where = f"{where}: episode {row['episode_index']}"
    length = _length(info, row, where)
    chunk, file = (field(row, f"data/{name}", int, where) for name in ("chunk_index", "file_index"))
    data = info.file("data_path", chunk_index=chunk, file_index=file)
    videos = {}
    for key in info.video_cameras:
        chunk, file = (field(row, f"videos/{key}/{name}", int, where) for name in ("chunk_index", "file_index"))
        start = float(field(row, f"videos/{key}/from_timestamp", (int, float), where))
        if not 0 <= start < 1e9:
            raise DataSetError(f"{where}: {key} from {start} s, expected a time in the video")
        stop = row.get(f"videos/{key}/to_timestamp")
        # Not needed: some tools write the time of the last frame, others that of its end.
        assert info.fps is not None  # videos have a rate
        assert length is not None  # what videos need
        if isinstance(stop, float) and not abs((stop - start) * info.fps - length) <= _END_SLACK:
            info.warnings.append(
                f"{where}: {key} from {start} s to {stop} s, but it has {length} steps at {info.fps} fps"
            )
        videos[key] = (info.file("video_path", video_key=key, chunk_index=chunk, file_index=file), start)
    return Place(row["episode_index"], length, _texts(row.get("tasks")), data, videos)


def _check_overlaps(info: Info, places: Sequence[Place], folder: Path) -> None:
    """Episodes of one video follow each other: one that begins within another has frames that are not its own."""
    for key in info.video_cameras:
        assert info.fps is not None  # videos have a rate
        spans = sorted(
            (str(place.videos[key][0]), place.videos[key][1], place.length or 0, place.number) for place in places
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
    return field(row, "episode_index", int, where)


def _length(info: Info, row: Mapping, where: str) -> int | None:
    """Steps as declared. The rows say how many there are; only episodes that share a video are told apart by it."""
    length = row.get("length")
    if isinstance(length, int) and not isinstance(length, bool) and length >= 0:
        return length
    problem = f"{where}: length is {str(length)[:40]!r}, expected 0 or more"
    if info.version == "v3.0" and info.video_cameras:
        raise DataSetError(problem)
    info.warnings.append(problem)
    return None
