"""Folders of `<task>_demo.hdf5` files: LIBERO demonstrations as recorded or re-rendered, one file per task.

    <task>_demo.hdf5
        data/demo_<i>/actions (T, 7)
        data/demo_<i>/obs/agentview_rgb, obs/eye_in_hand_rgb (T, H, W, 3) uint8, as the simulator gives them
        data/demo_<i>/obs/ee_states (T, 6), obs/gripper_states (T, 2), obs/joint_states (T, 7)

The instruction is the file name: `KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5` is "turn on the stove".
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.index import IndexedSource, IndexWriter, open_index
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.source_files import OpenFiles, as_float32, content_of, index_label, require_format, turn

SUFFIX = "_demo.hdf5"
_DEMO = re.compile(r"demo_(\d+)")
_OPEN_FILES = 16
_BLOCK = 32  # frames read at once for the fingerprint: bounds memory


def instruction_of(file_name: str) -> str:
    """Instruction in the name of a task's file: words after the one with "SCENE" (all words if none has it)."""
    words = file_name.removesuffix(SUFFIX).split("_")
    scenes = [number for number, word in enumerate(words) if "SCENE" in word]
    return " ".join(words[scenes[0] + 1 if scenes else 0 :])


class HDF5Source(IndexedSource):
    """Episodes of a folder in the order of file names, then demo numbers.

    Keys are paths below `data/demo_<i>`, e.g. action "actions", state ("obs/ee_states", "obs/gripper_states"), cameras
    ("obs/agentview_rgb", "obs/eye_in_hand_rgb"). The first opening reads everything once (index, fingerprint).

    Raises:
        DataSetError: no files, another split than "train", damaged files, wrong shapes or types.
        MissingFeatureError: a key that a demonstration does not have.
    """

    def __init__(self, directory: str | os.PathLike, keys: SourceKeys, split: str = "train") -> None:
        require_format(keys, "hdf5")
        self.directory, self.keys = Path(directory), keys
        if split != "train":
            raise DataSetError(f"{self.directory}: no split {split!r}, found splits ['train']")
        files = sorted(self.directory.glob(f"*{SUFFIX}"))
        if not files:
            found = sorted(os.listdir(self.directory)) if self.directory.is_dir() else "no such directory"
            raise DataSetError(f"{self.directory}: no *{SUFFIX}, found {found or 'nothing'}")

        def build(writer: IndexWriter) -> None:
            for file in files:
                _add_file(writer, file, keys)

        self._index = open_index(self.directory, index_label(keys, split), files, build)
        self._files = OpenFiles(_OPEN_FILES)

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
    """The dataset `key` of one demonstration; images are checked to be uint8 (T, H, W, 3), others by `_numbers`."""
    import h5py

    found = demo.get(key)
    if found is None:
        raise MissingFeatureError(f"{where}: no {key!r}, found {_keys(demo)}")
    if not isinstance(found, h5py.Dataset):
        raise DataSetError(f"{where}/{key}: a group, expected a dataset")
    if found.size and not found.id.get_storage_size():
        raise DataSetError(f"{where}/{key}: {found.dtype} {found.shape} without content")
    return found


def _keys(demo) -> list[str]:
    names: list[str] = []
    demo.visit(names.append)
    return sorted(names)


def _add_file(writer: IndexWriter, path: Path, keys: SourceKeys) -> None:
    with _reading(path):
        file = _open(path)
    with file:
        with _reading(path):
            names = [name for name in file["data"] if _DEMO.fullmatch(name)] if "data" in file else []
        if not names:
            raise DataSetError(f"{path}: no data/demo_<i>, expected at least one demonstration")
        for name in sorted(names, key=lambda name: (int(_DEMO.fullmatch(name)[1]), name)):
            where = f"{path}: data/{name}"
            with _reading(path):
                arrays, content = _read_demo(file[f"data/{name}"], keys, where)
            try:
                writer.add(instruction_of(path.name), arrays, content, [path.name, name])
            # Another number of dimensions than the demonstrations before, or a file name that is not valid Unicode.
            except (DataSetError, UnicodeEncodeError) as error:
                raise DataSetError(f"{where}: {error}") from error


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
        digest.update(repr(images.shape).encode())
        for start in range(0, len(images), _BLOCK):
            digest.update(images[start : start + _BLOCK].tobytes())
    return arrays, digest.digest()


def _numbers(demo, key: str, where: str, length: int | None = None) -> np.ndarray:
    values = _dataset(demo, key, where)
    steps = "T" if length is None else length
    if values.ndim != 2 or values.dtype.kind not in "fiu" or 0 in values.shape or length not in (None, len(values)):
        raise DataSetError(f"{where}/{key}: {values.dtype} {values.shape}, expected numbers ({steps}, D), T and D > 0")
    return as_float32(values[:])
