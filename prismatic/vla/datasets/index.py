"""An index of a data set: built once beside the data, memory-mapped afterwards.

    {directory}/.craft_index/{label}/index.json        files it was built from, episodes, arrays, fingerprint
    {directory}/.craft_index/{label}/{array}.bin       one row per frame (steps of all episodes one after another)

Numbers (actions, states) are stored whole; of images the place in the data files. An index is rebuilt when one of the
data files has another size or modification time, and when its header or an array does not have the checksum it was
written with: opening reads the arrays once, some 100 bytes per frame. It is written under a temporary name and renamed;
what a killed process left is removed at the next opening. When the directory cannot be written, the index goes to the
user's cache directory.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import google_crc32c
import numpy as np

from prismatic.evidence.files import write_json
from prismatic.vla.datasets.source import DataSetError, EpisodeSource, MissingFeatureError

FOLDER = ".craft_index"
VERSION = 3  # 2: checksums; 3: problems, warnings and several texts per episode
MAX_STEPS = 1 << 20  # of one episode
_BLOCK = 1 << 20
_LOCK = "lock"
# Constant columns and repeated rows compress without limit: a small file must not fill the disk.
_ALWAYS_ALLOWED, _ALLOWED_RATIO = 1 << 30, 100
_MOST_WARNINGS = 5
_ABANDONED = 3600.0  # seconds after which a temporary folder without a lock is nobody's


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
                if entry["checksum"] == _checksum(entry["content"]):
                    return entry["content"]
        content = json.loads(json.dumps(compute()))
        with suppress(OSError):  # a folder that cannot be written: computed again the next time
            write_json(path, {"content": content, "checksum": _checksum(content)}, indent=None)
        return content

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_arrays": {}}  # workers map the files again instead of receiving copies


class IndexedSource(EpisodeSource):
    """A source that knows its episodes from an index, with their numbers in the arrays `actions` and `state`.

    Subclasses set `_index` and read the frames.
    """

    _index: EpisodeIndex

    @property
    def lengths(self) -> np.ndarray:
        """Steps of every episode, (E,) int64."""
        return self._index.lengths

    @property
    def instructions(self) -> Sequence[str]:
        """The instruction of every episode."""
        return self._index.instructions

    def instruction_at(self, episode: int, step: int) -> str:
        """The instruction at one step."""
        runs = self._index.runs.get(str(episode))
        if runs is None:
            return self._index.instructions[episode]
        return runs[bisect.bisect_right(runs, step, key=lambda run: run[0]) - 1][1]

    def texts(self, episode: int) -> list[str]:
        """The distinct instructions of one episode."""
        runs = self._index.runs.get(str(episode))
        return [self._index.instructions[episode]] if runs is None else list(dict.fromkeys(text for _, text in runs))

    @property
    def problems(self) -> dict[str, str]:
        """What could not be read, and why."""
        return self._index.problems

    @property
    def warnings(self) -> list[str]:
        """What contradicts itself without keeping the data from being read."""
        return self._index.warnings

    @property
    def fingerprint(self) -> str:
        """Hash of instructions, numbers and images."""
        return self._index.fingerprint

    def cached(self, name: str, compute: Callable[[], dict]) -> dict:
        """What `compute` gives, kept with the index."""
        return self._index.cached(name, compute)

    def forget_actions(self) -> None:
        """From now on only observations can be read."""
        self.keys = self.keys.without_action()

    def actions(self, episode: int) -> np.ndarray:
        """Actions as stored, (T, A) float32; MissingFeatureError when opened without actions."""
        self.require_actions()
        return self._index.rows("actions", episode)

    def state(self, episode: int) -> np.ndarray:
        """State as stored, (T, S) float32, the keys' values side by side."""
        return self._index.rows("state", episode)

    def require_actions(self) -> None:
        """MissingFeatureError when the source was opened without actions."""
        if self.keys.action is None:
            raise MissingFeatureError(f"{self.directory}: opened without actions, only its observations can be read")

    def require_frame(self, camera: str, episode: int, step: int) -> None:
        """MissingFeatureError for a camera that was not opened, IndexError for a step outside the episode."""
        if camera not in self.keys.cameras:
            raise MissingFeatureError(f"{self.directory}: no camera {camera!r}, opened with {list(self.keys.cameras)}")
        length = int(self._index.lengths[episode])
        if not 0 <= step < length:
            raise IndexError(f"{self.directory}: episode {episode}: step {step}, expected 0 <= step < {length}")


class IndexWriter:
    """Takes in episodes one after another; memory does not grow with their number of frames.

    skip_bad: episodes that cannot be read are noted and get no steps. limit: bytes that the arrays may have.
    """

    def __init__(self, folder: Path, skip_bad: bool = False, limit: int = _ALWAYS_ALLOWED) -> None:
        self.folder = folder
        self.info: dict = {}
        self.warnings: list[str] = []
        self.problems: dict[str, str] = {}
        self._skip_bad, self._room = skip_bad, limit
        self._first_problem: Exception | None = None
        self._episodes: list[tuple[str, int, object]] = []
        self._runs: dict[str, list] = {}
        self._arrays: dict[str, dict] = {}
        self._digest = hashlib.sha256()
        self._stack = ExitStack()
        self._files: dict = {}

    @contextmanager
    def episode(self) -> Iterator[None]:
        """Around reading and adding one episode: what is wrong with it is raised, or noted with `skip_bad`."""
        count = len(self._episodes)
        try:
            yield
        except (DataSetError, MissingFeatureError) as error:
            if not self._skip_bad:
                if isinstance(error, DataSetError):
                    error.args = (f"{error}; --skip_bad_episodes True leaves such episodes out",)
                raise
            self._first_problem = self._first_problem or error
            self.problems[str(count)] = str(error)
            self._append_episode("", 0, b"unreadable", None)

    def note(self, name: str, error: Exception) -> None:
        """Files that hold episodes nobody can count."""
        self._first_problem = self._first_problem or error
        self.problems[name] = str(error)

    def warn(self, line: str) -> None:
        """Something that contradicts itself and is not needed."""
        self.warnings.append(line)

    def add_empty(self) -> None:
        """An episode without steps."""
        self._append_episode("", 0, b"", None)

    def add(
        self, texts: str | Sequence[str], arrays: Mapping[str, np.ndarray], content: bytes, record: object = None
    ) -> None:
        """Append an episode.

        Args:
            texts: its instruction, or the one of every step.
            arrays: {name: (T, ...)}, the same names, dtypes and trailing shapes in every episode, one T.
            content: what identifies the episode's content, for the fingerprint.
            record: anything JSON can hold.

        Raises DataSetError, before anything is written, for arrays that do not fit, text that is not valid Unicode and
        sizes that no demonstration has.
        """
        (length,) = self._checked_lengths(arrays)
        runs = [[0, texts]] if isinstance(texts, str) else text_runs(texts)
        for _, text in runs:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise DataSetError(
                    f"episode {len(self._episodes)}: its instruction is no valid text: {error}"
                ) from error
        for name, values in arrays.items():
            self._append(name, np.ascontiguousarray(values))
            self._room -= values.nbytes
        if len(runs) > 1:
            self._runs[str(len(self._episodes))] = runs
            content += json.dumps(runs).encode()
        self._append_episode(runs[0][1], length, content, record)

    def _checked_lengths(self, arrays: Mapping[str, np.ndarray]) -> set[int]:
        where = f"episode {len(self._episodes)}"
        lengths = {len(values) for values in arrays.values()}
        if len(lengths) != 1 or (self._arrays and self._arrays.keys() != arrays.keys()):
            raise DataSetError(
                f"{where}: arrays {sorted(arrays)} of lengths {sorted(lengths)}, expected one "
                f"length and the arrays {sorted(self._arrays) or 'of the first episode'}"
            )
        if max(lengths) > MAX_STEPS:
            raise DataSetError(f"{where} has {max(lengths)} steps, expected at most {MAX_STEPS}")
        for name, values in arrays.items():
            entry, known = _entry(values), {key: self._arrays.get(name, {}).get(key) for key in ("dtype", "shape")}
            if name in self._arrays and known != entry:
                raise DataSetError(f"{where}: {name} is {entry}, earlier episodes have {known}")
        if sum(values.nbytes for values in arrays.values()) > self._room:
            raise DataSetError(
                f"{where}: the numbers of the data set take more than {_ALLOWED_RATIO} times the size of its files"
            )
        return lengths

    def _append_episode(self, text: str, length: int, content: bytes, record: object) -> None:
        self._episodes.append((text, length, record))
        for part in (text.encode(), str(length).encode(), content):
            self._digest.update(len(part).to_bytes(8, "little") + part)

    def _append(self, name: str, values: np.ndarray) -> None:
        if name not in self._arrays:
            file = f"{len(self._arrays)}.bin"
            self._arrays[name] = _entry(values) | {"file": file, "crc32c": 0}
            self._files[name] = self._stack.enter_context((self.folder / file).open("wb"))
        data = values.tobytes()
        self._arrays[name]["crc32c"] = google_crc32c.extend(self._arrays[name]["crc32c"], data)
        self._files[name].write(data)

    def close(self, stamp: list) -> dict:
        """Write the header; returns it. What is wrong with the first episode is raised when no other can be read."""
        self._stack.close()
        if self._first_problem is not None and not self._arrays:
            raise self._first_problem
        instructions, lengths, records = zip(*self._episodes, strict=True) if self._episodes else ((), (), ())
        header = {
            "version": VERSION,
            "files": stamp,
            "fingerprint": self._digest.hexdigest(),
            "info": self.info,
            "arrays": self._arrays,
            "lengths": lengths,
            "instructions": instructions,
            "records": records,
            "problems": self.problems,
            "warnings": first_lines(self.warnings),
            "runs": self._runs,
        }
        with (self.folder / "index.json").open("w", encoding="utf-8") as stream:
            json.dump(header | {"checksum": _checksum(header)}, stream)
        return header

    def abort(self) -> None:
        """Close the files."""
        self._stack.close()


def first_lines(lines: list[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = len(lines) - _MOST_WARNINGS
    return lines[:_MOST_WARNINGS] + [f"and {more} more such lines"] * (more > 0)


def _entry(values: np.ndarray) -> dict:
    return {"dtype": values.dtype.str, "shape": list(values.shape[1:])}


def text_runs(texts: Sequence[str]) -> list[list]:
    """[[first step, text], ...] of the text of every step, at least one."""
    return [[step, text] for step, text in enumerate(texts) if step == 0 or text != texts[step - 1]]


def open_index(
    directory: Path,
    label: str,
    files: Sequence[Path],
    build: Callable[[IndexWriter], None],
    skip_bad: bool = False,
) -> EpisodeIndex:
    """The index of a data set, built when there is none or when it belongs to other files.

    Args:
        directory: the data set.
        label: which of several indices of this directory, e.g. a split; also names what it depends on beside the files.
        files: what it is built from.
        build: adds all episodes to a writer; whatever it raises leaves no index behind.
        skip_bad: see `IndexWriter`. DataSetError without it for an index that leaves something out.
    """
    stamp = [_stamp(file, directory) for file in files]
    for folder in _places(directory, label):
        _remove_abandoned(folder.parent)
        if (header := _read_header(folder, stamp)) is not None:
            if header["problems"] and not skip_bad:
                raise DataSetError(_left_out(directory, header))
            return EpisodeIndex(folder, header)
    size = sum(entry[1] for entry in stamp)
    for folder in _places(directory, label):
        if _is_writable(folder):
            return _build(folder, stamp, build, (skip_bad, max(_ALWAYS_ALLOWED, _ALLOWED_RATIO * size)))
    raise PermissionError(
        f"{directory}: neither {FOLDER}/ in it nor the user's cache directory can be written to; set XDG_CACHE_HOME to "
        "a folder that can"
    )


def _left_out(directory: Path, header: Mapping) -> str:
    problems = header["problems"]
    return (
        f"{directory}: {len(problems)} of {len(header['lengths'])} episodes cannot be read, first: "
        f"{next(iter(problems.values()))}; --skip_bad_episodes True leaves such episodes out"
    )


def _stamp(file: Path, directory: Path) -> list:
    try:
        found = file.stat()
    except OSError:  # missing: its episodes are left out, until it is there
        return [os.path.relpath(file, directory), 0, 0]
    return [os.path.relpath(file, directory), found.st_size, found.st_mtime_ns]


def _places(directory: Path, label: str) -> list[Path]:
    digest = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    caches = [cache / "craft-vla" / f"{digest}-{directory.name}" / label for cache in _caches()]
    return [directory / FOLDER / label, *caches]


def _caches() -> list[Path]:
    """The user's cache directory; none for a user without a home, as those of containers may be."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return [Path(given)]
    try:
        return [Path.home() / ".cache"]
    except RuntimeError:
        return []


def _is_writable(folder: Path) -> bool:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder.parent, os.W_OK)


def _read_header(folder: Path, stamp: list) -> dict | None:
    try:
        if not (folder / "index.json").is_file():
            return None
        header = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if header["version"] != VERSION or header["files"] != stamp or header.pop("checksum") != _checksum(header):
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


def _checksum(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _file_crc(path: Path) -> int:
    # Read, not mapped: touched pages of a mapping count as memory of the process.
    crc = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            crc = google_crc32c.extend(crc, block)
    return crc


def _build(folder: Path, stamp: list, build: Callable[[IndexWriter], None], writing: tuple[bool, int]) -> EpisodeIndex:
    with _temporary(folder) as temporary:
        writer = IndexWriter(temporary, *writing)
        try:
            build(writer)
            header = writer.close(stamp)
        finally:
            writer.abort()
        _install(temporary, folder, stamp)
    return EpisodeIndex(folder, header)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder to build in, marked as somebody's by a lock that ends with its process."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        # Named after it is locked: under its name it is never seen unlocked while its process lives.
        unnamed = temporary / f"{_LOCK}.new"
        with unnamed.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(unnamed, temporary / _LOCK)
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Temporary folders of processes that are no more."""
    with suppress(OSError):
        for path in parent.glob(".*.tmp"):
            if path.is_dir() and not path.is_symlink():
                _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    # Young ones may be about to be locked, or be renamed at this moment. A clock that jumps back makes all young.
    if time.time() - path.stat().st_mtime < _ABANDONED and not (path / _LOCK).is_file():
        return
    try:
        with (path / _LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
    except FileNotFoundError:
        shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return  # somebody is building


def _install(temporary: Path, folder: Path, stamp: list) -> None:
    # Several processes may build at once, each a complete index of the same content: the first one stays.
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    (temporary / _LOCK).unlink()
    for _ in range(100):
        if _read_header(folder, stamp) is not None:
            return
        try:
            if folder.exists():
                os.replace(folder, old)
            os.replace(temporary, folder)
        except OSError as error:
            last = error
            continue
        finally:
            shutil.rmtree(old, ignore_errors=True)
        return
    raise last
