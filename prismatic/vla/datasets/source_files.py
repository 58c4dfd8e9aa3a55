"""What sources that read from open files share: files kept open per process, labels of indices, turning images."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.source import DataSetError, SourceKeys
from prismatic.vla.images import decode_image, image_size

_ABANDONED: list = []


class OpenFiles:
    """The files used last, at most `limit` of them, open in this process only.

    A pickled copy and a forked process start without open files: handles hold positions and decoder state, which two
    processes must not share.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._process = os.getpid()
        self._open: OrderedDict = OrderedDict()

    def get(self, key: str, opener: Callable):
        """The open file of `key`, by `opener()` when it is not open; it must have `close()`."""
        if self._process != os.getpid():
            # Kept, not closed: they belong to the parent process, whose threads and locks do not exist here.
            _ABANDONED.append(self._open)
            self._process, self._open = os.getpid(), OrderedDict()
        if key not in self._open:
            self._open[key] = opener()
            while len(self._open) > self.limit:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        return self._open[key]

    def drop(self, key: str) -> None:
        """Forget and close one file, e.g. after an error left it in an unknown state."""
        if self._process == os.getpid() and key in self._open:
            self._open.pop(key).close()

    def __len__(self) -> int:
        return len(self._open) if self._process == os.getpid() else 0

    def __getstate__(self) -> dict:
        return {"limit": self.limit}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]  # no subclass takes anything else


def content_of(arrays: dict[str, np.ndarray]) -> bytes:
    """What the numbers of an episode add to its content hash: shapes, then values."""
    return repr(tuple(values.shape for values in arrays.values())).encode() + b"".join(
        values.tobytes() for values in arrays.values()
    )


def regular_file(path: Path, folder: Path) -> Path:
    """`path`, which has to be a file inside `folder` after links are followed; DataSetError otherwise.

    A device or a pipe would be read for ever, and a link that leads out of a data set shows whatever lies there. The
    Hugging Face cache keeps the files of `snapshots/<revision>` as links into `blobs`, which are its own.
    """
    if not os.path.isfile(path):
        raise DataSetError(f"{path} is {'no regular file' if os.path.lexists(path) else 'missing'}")
    root = folder.resolve()
    root = next((above.parent for above in root.parents if above.name == "snapshots"), root)
    if not path.resolve().is_relative_to(root):
        raise DataSetError(
            f"{path} leads to {path.resolve()}, expected a file inside {root}: copy it there, or open the folder that "
            "the link leads to"
        )
    return path


def choose_split(wanted: str | None, found: Sequence[str], where: object) -> str:
    """The split to read: the wanted one, or `train`, or the only one there is; DataSetError otherwise."""
    if wanted is None:
        wanted = found[0] if len(found) == 1 else "train"
    if wanted not in found:
        raise DataSetError(
            f"{where}: no split {wanted!r}, found splits {sorted(found)}: name one with --split or as FOLDER:SPLIT"
        )
    return wanted


def check_image(data: object, declared: Sequence[int], where: str) -> None:
    """DataSetError unless `data` are JPEG or PNG bytes of the declared (H, W, 3), none or not positive is any size.

    Height and width may be exchanged, as many data sets declare them.
    """
    if not isinstance(data, bytes):
        raise DataSetError(f"{where}: {type(data).__name__}, expected the bytes of an image")
    try:
        found = image_size(data)
    except ValueError as error:
        raise DataSetError(f"{where}: {error}") from error
    sizes = [size if size > 0 else None for size in declared[:2]] or [None, None]
    if not any(
        all(want in (None, have) for want, have in zip(sizes, order, strict=True)) for order in (found, found[::-1])
    ):
        raise DataSetError(f"{where}: image {(*found, 3)}, but declared as {tuple(declared)}")


def index_label(keys: SourceKeys, split: str) -> str:
    """Folder name of the index of one split read with these keys, e.g. `lerobot-0f3a...`."""
    parts = [split, list(keys.cameras), list(keys.state), keys.action]
    text = json.dumps(parts if keys.instruction is None else [*parts, keys.instruction])
    return f"{keys.format}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def require_format(keys: SourceKeys, expected: str) -> None:
    """ValueError unless `keys` are those of format `expected`."""
    if keys.format != expected:
        raise ValueError(f"SourceKeys.format is {keys.format!r}, expected {expected!r}")


def flat_rows(values: np.ndarray) -> np.ndarray:
    """(T, ...) -> (T, D): what belongs to a step side by side, a scalar as one number."""
    return values.reshape(len(values), int(np.prod(values.shape[1:], dtype=np.int64)))


def turn(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) turned by 180 degrees, a contiguous copy."""
    return np.ascontiguousarray(image[::-1, ::-1])


def turned_frame(data: bytes, where: str) -> np.ndarray:
    """JPEG or PNG bytes -> uint8 (H, W, 3) turned by 180 degrees; DataSetError that begins with `where`."""
    try:
        return turn(decode_image(data))
    except ValueError as error:
        raise DataSetError(f"{where}: {error}") from error


def as_float32(values: np.ndarray) -> np.ndarray:
    """Numbers as float32; what does not fit becomes infinite, which the data set reports with its place."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(values, dtype=np.float32)
