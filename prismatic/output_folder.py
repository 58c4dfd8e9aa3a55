"""Where programs write: whether they can, asked before any work, and one writer per folder.

The lock dies with its process. It is a record lock of the operating system on `.{name}.lock` beside the folder, so that
the folder itself may be replaced as a whole. Processes that a writer starts do not inherit it.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from prismatic.command_line import UsageError
from prismatic.evidence.files import remove_leftovers

_HELD: dict[Path, tuple[int, list[Path]]] = {}
"""Lock file -> descriptor, and the folders above it that were made for it, outermost first."""
# Some network file systems have no locks; there the check is left out.
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_FLOCK = "hhqqi0q"
"""`struct flock` of Linux: kind, whence, start, length, process."""
_LONGEST_NAME = 200
"""Bytes; file systems take 255, and programs add endings."""


def check_folder(folder: str | os.PathLike, flag: str) -> None:
    """UsageError unless files can be put into the folder, or it can be made. Nothing is written."""
    text = os.fspath(folder)
    if not text:
        raise UsageError(f"{flag}: expected a folder, found an empty text")
    _check_names(text, flag)
    _check_access(text, f"{flag} {text}")


def check_file(file: str | os.PathLike, flag: str) -> None:
    """UsageError unless the file can be written, or replaced by one of that name. Nothing is written."""
    if os.path.lexists(file) and not os.path.isfile(file):
        raise UsageError(f"{flag} {file}: expected the name of a file, found something else there")
    _check_names(os.fspath(file), flag)
    _check_access(os.path.dirname(file), f"{flag} {file}")


def _check_names(text: str, flag: str) -> None:
    if max(len(part.encode(errors="replace")) for part in os.path.abspath(text).split(os.sep)) > _LONGEST_NAME:
        raise UsageError(f"{flag} {text[:40]}...: a name in it is longer than {_LONGEST_NAME} bytes")


def _check_access(folder: str | os.PathLike, what: str) -> None:
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise UsageError(f"{what}: expected a folder, but {path} is none")
    if not os.access(path, os.W_OK | os.X_OK):
        raise UsageError(f"{what}: {path} cannot be written to; choose another folder")


def hold(folder: Path, flag: str) -> None:
    """Be the only writer of a folder until `release` or the end of the process; again in the same process is fine.

    What killed writers left half written in it, or of it, is removed.

    Raises UsageError naming the flag and the folder, which cannot be written to, or the process that writes to it.
    """
    path = _lock_file(folder)
    if path in _HELD:
        return
    try:
        _check_access(folder, f"{flag} {folder}")
        _hold(path, folder, flag)
    except OSError as error:
        raise UsageError(f"{flag} {folder}: cannot be written to: {error.strerror}; choose another folder") from error
    remove_leftovers(folder, held=True)
    remove_leftovers(path.parent, os.path.basename(os.path.abspath(folder)), held=True)


def _hold(path: Path, folder: Path, flag: str) -> None:
    made = [parent for parent in reversed(path.parents) if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UsageError(
                f"{flag} {folder}: {holder} writes to it at this moment; wait for its end, or choose another one"
            )
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # its holder ended, and deleted the file, in between
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"process": os.getpid(), "host": socket.gethostname()}).encode())
    if not _HELD:
        atexit.register(_release_all, os.getpid())
    _HELD[path] = descriptor, made


def is_held(folder: Path) -> bool:
    """Whether a process writes to the folder. The lock is only asked about: a writer that starts is not disturbed.

    Also True for the rest of a killed writer where locks cannot be asked about: other systems than Linux.
    """
    path = _lock_file(folder)
    if path in _HELD or sys.platform != "linux":
        return path.exists()  # closing a file that this process has locked would unlock it
    try:
        with path.open("rb") as file:
            import fcntl

            asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            return bool(struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)
    except FileNotFoundError:
        return False
    except OSError:
        return True


def release(folder: Path) -> None:
    """Let others write to a folder that this process holds; nothing happens when it does not.

    Folders that were made for the lock and are empty go with it.
    """
    _release(_lock_file(folder))


def _release(path: Path) -> None:
    descriptor, made = _HELD.pop(path, (None, []))
    if descriptor is None:
        return
    path.unlink(missing_ok=True)
    os.close(descriptor)
    for parent in reversed(made):
        with suppress(OSError):  # something was written there
            parent.rmdir()


def _release_all(owner: int) -> None:
    if os.getpid() == owner:  # not in a copy of the process that took them
        for path in list(_HELD):
            _release(path)


@contextmanager
def held(folder: Path, flag: str) -> Iterator[None]:
    """`hold` and `release`."""
    hold(folder, flag)
    try:
        yield
    finally:
        release(folder)


@contextmanager
def released_on_failure() -> Iterator[None]:
    """Let go of every folder when what was to be written to it cannot be begun."""
    try:
        yield
    except BaseException:
        _release_all(os.getpid())
        raise


def _lock_file(folder: Path) -> Path:
    folder = Path(os.path.abspath(folder))
    return folder.with_name(f".{folder.name}.lock")


def _lock(descriptor: int) -> bool:
    try:
        import fcntl
    except ModuleNotFoundError:
        return True
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _NO_LOCKS
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        holder = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {holder['process']} on host {holder['host']}"
    return "another process"
