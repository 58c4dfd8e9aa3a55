"""Folders of indices: built under a temporary name that is locked, renamed when whole, removed when abandoned."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prismatic.vla.datasets.index_reader import read_header

_LOCK = "lock"
_ABANDONED = 3600.0  # seconds after which a temporary folder without a lock is nobody's


@contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
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


def remove_abandoned(parent: Path) -> None:
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


def install(temporary: Path, folder: Path, stamp: list) -> None:
    """Give a whole index its name, unless another process was faster."""
    # Several processes may build at once, each a complete index of the same content: the first one stays.
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old.tmp")
    (temporary / _LOCK).unlink()
    for _ in range(100):
        if read_header(folder, stamp) is not None:
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
