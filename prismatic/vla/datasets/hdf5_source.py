"""Folders of HDF5 files: LIBERO demonstrations as recorded or re-rendered, one file per task, and files laid out alike.

    <task>_demo.hdf5, or any *.hdf5 where there is none
        data.attrs["problem_info"]      JSON with language_instruction
        data/demo_<i>/actions (T, 7)
        data/demo_<i>/obs/agentview_rgb, obs/eye_in_hand_rgb (T, H, W, 3) uint8, as the simulator gives them
        data/demo_<i>/obs/ee_states (T, 6), obs/gripper_states (T, 2), obs/joint_states (T, 7)
        mask/<split>                    names of demonstrations

The instruction is what the file says. Without a word there it is the file name:
`KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5` is "turn on the stove".
"""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from prismatic.evidence.checks import FOREIGN, parse_object
from prismatic.progress import over
from prismatic.vla.datasets.index import open_index
from prismatic.vla.datasets.index_writer import MAX_STEPS, IndexWriter
from prismatic.vla.datasets.indexed_source import IndexedSource
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import (
    OpenFiles,
    as_float32,
    choose_split,
    content_of,
    flat_rows,
    index_label,
    regular_file,
    require_format,
    turn,
)
from prismatic.vla.images import MAX_PIXELS

SUFFIX = "_demo.hdf5"
_DEMO = re.compile(r"(?:.*\D)?(\d+)")
_HELD_OUT = ("valid", "val", "validation", "test")
_OPEN_FILES = 16
_BLOCK = 32  # frames read at once for the fingerprint: bounds memory
_MOST_VALUES = 1 << 26  # numbers of one array of one demonstration
_MOST_CHUNK_BYTES = 1 << 29  # a chunk is decompressed as a whole, whatever is read of it
_MOST_TEXT_BYTES = 1 << 26
_MOST_LISTED = 20


def instruction_of(file_name: str) -> str:
    """Instruction in the name of a task's file: words after the one with "SCENE" (all words if none has it)."""
    words = file_name.removesuffix(SUFFIX).removesuffix(".hdf5").split("_")
    scenes = [number for number, word in enumerate(words) if "SCENE" in word]
    return " ".join(words[scenes[0] + 1 if scenes else 0 :])


class HDF5Source(IndexedSource):
    """Episodes of a folder in the order of file names, then demo numbers.

    Keys are paths below `data/demo_<i>`, e.g. action "actions", state ("obs/ee_states", "obs/gripper_states"), cameras
    ("obs/agentview_rgb", "obs/eye_in_hand_rgb"). The first opening reads everything once (index, fingerprint). Splits
    are the groups of `mask`; `train` is also there without one and then holds all that no validation mask names.

    Raises:
        DataSetError: no files, unknown split, damaged files, wrong shapes or types.
        MissingFeatureError: a key that a demonstration does not have.
    """

    def __init__(
        self, directory: str | os.PathLike, keys: SourceKeys, split: str | None = None, skip_bad: bool = False
    ) -> None:
        require_format(keys, "hdf5")
        self.directory, self.keys = Path(directory), keys
        files = _files(self.directory)
        self.split = choose_split(split, _split_names(files, skip_bad), self.directory)
        label = index_label(keys, self.split)
        self._index = open_index(self.directory, label, files, lambda writer: self._build(writer, files), skip_bad)
        self._files = OpenFiles(_OPEN_FILES)

    def _build(self, writer: IndexWriter, files: list[Path]) -> None:
        rates = set()
        for file in over(files, "indexing", "files", leave=False):
            try:
                rates.add(_add_file(writer, file, self.keys, self.split))
            except _FileError as error:
                with writer.episode():
                    raise DataSetError(str(error)) from error
        writer.info = {"hz": rates.pop() if len(rates) == 1 else None}

    @property
    def recorded_hz(self) -> float | None:
        """Control rate in the files' description of the environment."""
        return self._index.info["hz"]

    def frame(self, camera: str, episode: int, step: int) -> np.ndarray:
        """One image, upright, uint8 (H, W, 3) RGB. DataSetError when it cannot be read."""
        self.require_frame(camera, episode, step)
        name, demo = self._index.records[episode]
        path = self.directory / name
        try:
            with _reading(path):
                file = self._files.get(name, lambda: _open(path))
                images = _dataset(file[f"data/{demo}"], camera, f"{path}: data/{demo}")
                length = int(self._index.lengths[episode])
                if len(images) != length:
                    raise DataSetError(f"{path}: data/{demo}/{camera} has {len(images)} steps, expected {length}")
                image = images[step]
        except DataSetError:
            self._files.drop(name)
            raise
        return turn(image) if self.keys.rotated else image


def _files(directory: Path) -> list[Path]:
    files = sorted(directory.glob(f"*{SUFFIX}")) or sorted(directory.glob("*.hdf5"))
    if not files:
        found = sorted(os.listdir(directory)) if directory.is_dir() else "no such directory"
        raise DataSetError(f"{directory}: no *.hdf5, found {found or 'nothing'}")
    return [regular_file(file, directory) for file in files]


def _split_names(files: list[Path], skip_bad: bool) -> list[str]:
    names = {"train"}
    for path in files:
        try:
            with _opened(path) as file:
                names |= set(_mask_names(file))
        except DataSetError:
            if not skip_bad:
                raise
    # All that is there is `train`, unless somebody says otherwise.
    return ["train", *sorted(names - {"train"})]


class _FileError(DataSetError):
    """A file none of whose demonstrations can be counted."""


@contextmanager
def _opened(path: Path) -> Iterator:
    with _reading(path):
        file = _open(path)
    with file, _reading(path):
        yield file


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Whatever HDF5 raises on damaged content becomes a DataSetError with the file's name."""
    try:
        yield
    except (DataSetError, MissingFeatureError):
        raise
    # h5py has no exception of its own: it raises these, RuntimeError and SystemError for errors inside the library.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SystemError, MemoryError) as error:
        raise DataSetError(f"{path}: cannot be read, expected a complete HDF5 file: {error}") from error


def _open(path: Path):
    import h5py

    return h5py.File(path, "r", locking=False)  # nothing is written, and some network file systems cannot lock


def _dataset(demo, key: str, where: str):
    """The dataset `key` of one demonstration, whose data lie in this file."""
    import h5py

    _check_links(demo, key, where)
    found = demo.get(key)
    if found is None:
        raise MissingFeatureError(f"{where}: no {key!r}, found {_keys(demo)}")
    if not isinstance(found, h5py.Dataset):
        raise DataSetError(f"{where}/{key}: a group, expected a dataset")
    if found.external or found.is_virtual:
        raise DataSetError(f"{where}/{key}: its data lie in another file, expected them in this one (h5repack)")
    if found.size and not found.id.get_storage_size():
        raise DataSetError(f"{where}/{key}: {found.dtype} {found.shape} without content")
    chunk = math.prod(found.chunks) * found.dtype.itemsize if found.chunks else 0
    if chunk > _MOST_CHUNK_BYTES:
        raise DataSetError(f"{where}/{key}: chunks of {chunk} bytes, expected at most {_MOST_CHUNK_BYTES} (h5repack)")
    return found


def _check_links(demo, key: str, where: str) -> None:
    import h5py

    group = demo
    for part in key.split("/"):
        if not isinstance(group, h5py.Group):
            return
        if isinstance(group.get(part, getlink=True), h5py.ExternalLink):
            raise DataSetError(f"{where}/{key}: a link to another file, expected the data in this one (h5copy)")
        group = group.get(part)


def _keys(demo) -> list[str]:
    names: list[str] = []

    def note(name: str) -> bool | None:
        names.append(name)
        return True if len(names) == _MOST_LISTED else None

    demo.visit(note)
    return sorted(names) + ["..."] * (len(names) == _MOST_LISTED)


def _mask_names(file) -> list[str]:
    """Splits of one file. Nobody has to understand those that are not read."""
    import h5py

    groups = file.get("mask")
    return list(groups) if isinstance(groups, h5py.Group) else []


def _mask(file, path: Path, name: str) -> list[str]:
    """Names of the demonstrations of one split."""
    with _reading(path):
        values = _dataset(file["mask"], name, f"{path}: mask")
        if values.ndim != 1 or values.dtype.kind not in "SO" or values.nbytes > _MOST_TEXT_BYTES:
            raise DataSetError(f"{path}: mask/{name}: {values.dtype} {values.shape}, expected names of demonstrations")
        return [_text(value) for value in values[:]]


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _chosen(file, path: Path, split: str, warn: Callable[[str], None]) -> list[str]:
    """Names of the demonstrations of a split, by number."""
    names = {name for name in file["data"] if _DEMO.fullmatch(name)} if "data" in file else set()
    if not names:
        raise _FileError(f"{path}: no data/demo_<i>, expected at least one demonstration")
    if split == "train":
        chosen = _training(file, path, names, warn)
    else:  # a file without this mask has only training data
        chosen = set(_mask(file, path, split)) if split in _mask_names(file) else set()
        if gone := _gone(chosen, names, split):
            raise _FileError(f"{path}: {gone}")
    return sorted(chosen, key=lambda name: (_number(name), name))


def _training(file, path: Path, names: set[str], warn: Callable[[str], None]) -> set[str]:
    """What a file is trained on unless somebody asks for a split: what it can be understood to say."""
    listed: dict[str, set[str]] = {}
    for mask in ("train", *_HELD_OUT):
        if mask in _mask_names(file) and "train" not in listed:
            try:
                listed[mask] = set(_mask(file, path, mask))
            except (DataSetError, MissingFeatureError) as error:
                warn(f"{error}: not used")
    for mask, members in listed.items():
        if gone := _gone(members, names, mask):
            warn(f"{path}: {gone}")
    return names & listed["train"] if "train" in listed else names.difference(*listed.values())


def _gone(members: set[str], names: set[str], mask: str) -> str:
    gone = sorted(members - names)
    return f"mask/{mask} names {gone[:5]}, which are not among {len(names)} demonstrations" if gone else ""


def _number(name: str) -> int:
    match = _DEMO.fullmatch(name)
    assert match is not None  # other names are left out or refused
    return int(match[1])


def _add_file(writer: IndexWriter, path: Path, keys: SourceKeys, split: str) -> float | None:
    """Add the demonstrations of a file; returns its control rate."""
    try:
        with _opened(path) as file:
            names, told = _chosen(file, path, split, writer.warn), _told(file["data"])
            rate = _rate(file["data"])
    except (DataSetError, MissingFeatureError) as error:
        raise _FileError(str(error)) from error
    named = instruction_of(path.name)
    if told and keys.instruction is None and told.casefold() != named.casefold():
        writer.warn(
            f"{path.name}: the instruction in the file is {told!r}, by its name {named!r}: the file's is used "
            "(evaluate on LIBERO with --language_source bddl to be asked the same way)"
        )
    with _opened(path) as file:
        for name in names:
            with writer.episode():
                demo = file[f"data/{name}"]
                _add_demo(writer, path, keys, demo, _told(demo) or told or named)
    return rate


def _add_demo(writer: IndexWriter, path: Path, keys: SourceKeys, demo, instruction: str) -> None:
    name = demo.name.rpartition("/")[2]
    where = f"{path}: data/{name}"
    with _reading(path):
        arrays, content = _read_demo(demo, keys, where)
        length = len(arrays["state"])
        texts = instruction if keys.instruction is None else _texts_at(demo, keys.instruction, length, where)
    if length == 0:
        writer.add_empty()
        return
    try:
        path.name.encode()
        writer.add(texts, arrays, content, [path.name, name])
    # Another number of dimensions than the demonstrations before, or a file name that is not valid Unicode.
    except (DataSetError, UnicodeEncodeError) as error:
        raise DataSetError(f"{where}: {error}") from error


def _told(group) -> str:
    """The instruction that a file states for a demonstration or for all of them, or an empty text."""
    found = _json_attribute(group, "problem_info").get("language_instruction")
    found = found or _json_attribute(group, "ep_meta").get("lang") or group.attrs.get("language_instruction")
    if isinstance(found, list) and found and all(isinstance(part, str) for part in found):
        found = ("" if all(len(part) == 1 for part in found) else " ").join(found)
    found = found.decode("utf-8", "replace") if isinstance(found, bytes) else found
    return found.strip().strip("\"'").strip() if isinstance(found, str) else ""


def _rate(data) -> float | None:
    kwargs = _json_attribute(data, "env_args").get("env_kwargs")
    rate = kwargs.get("control_freq") if isinstance(kwargs, dict) else None
    return float(rate) if isinstance(rate, int | float) and 0 < rate < 1e6 else None


def _json_attribute(group, name: str) -> dict:
    try:
        return parse_object(_text(group.attrs[name]), name, finite=False, limits=FOREIGN)
    except (KeyError, ValueError):
        return {}


def _texts_at(demo, key: str, length: int, where: str) -> str | list[str]:
    """The text at a key of `SourceKeys`: a dataset or an attribute of the demonstration, or an attribute above it."""
    _check_links(demo, key, where)
    if key not in demo:
        for group in (demo, demo.parent, demo.file):
            if key in group.attrs:
                return _text(group.attrs[key])
        raise MissingFeatureError(f"{where}: no dataset or attribute {key!r}, found {_keys(demo)}")
    values = _dataset(demo, key, where)
    shapes = (), (1,), (length,)
    if values.shape not in shapes or values.dtype.kind not in "SO" or values.nbytes > _MOST_TEXT_BYTES:
        raise DataSetError(f"{where}/{key}: {values.dtype} {values.shape}, expected one text or {length}")
    texts = [_text(value) for value in np.atleast_1d(values[()])]
    return texts if values.shape == (length,) else texts[0]


def _read_demo(demo, keys: SourceKeys, where: str) -> tuple[dict[str, np.ndarray], bytes]:
    """Numbers of one demonstration, and what identifies its content."""
    arrays, length = {}, None
    if keys.action is not None:
        arrays["actions"] = _numbers(demo, keys.action, where)
        length = len(arrays["actions"])
    states = [_numbers(demo, keys.state[0], where, length)]
    length = len(states[0])
    states += [_numbers(demo, key, where, length) for key in keys.state[1:]]
    arrays["state"] = np.concatenate(states, axis=1)
    digest = hashlib.sha256(content_of(arrays))
    for camera in keys.cameras:
        images = _dataset(demo, camera, where)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) != length:
            expected = f"uint8 ({length}, H, W, 3)"
            raise DataSetError(f"{where}/{camera}: {images.dtype} {images.shape}, expected {expected}")
        pixels = images.shape[1] * images.shape[2]
        if pixels > MAX_PIXELS:
            raise DataSetError(f"{where}/{camera}: images of {pixels} pixels, expected at most {MAX_PIXELS}")
        digest.update(repr(images.shape).encode())
        block = min(_BLOCK, max(1, MAX_PIXELS // max(1, pixels)))
        for start in range(0, len(images), block):
            digest.update(images[start : start + block].tobytes())
    return arrays, digest.digest()


def _numbers(demo, key: str, where: str, length: int | None = None) -> np.ndarray:
    values = _dataset(demo, key, where)
    steps = "T" if length is None else length
    if values.ndim < 1 or values.dtype.kind not in "fiub" or 0 in values.shape[1:] or length not in (None, len(values)):
        raise DataSetError(f"{where}/{key}: {values.dtype} {values.shape}, expected numbers ({steps}, D), D > 0")
    if len(values) > MAX_STEPS or values.size > _MOST_VALUES:
        raise DataSetError(
            f"{where}/{key}: {values.shape}, expected at most {MAX_STEPS} steps and {_MOST_VALUES} numbers"
        )
    return as_float32(flat_rows(values[:]))
