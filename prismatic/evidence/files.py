"""Files and folders that are there whole or not at all, and what a killed writer left of them.

A temporary is named after what it becomes, its machine and its process: `.results.json.1f0c93ab-4711.tmp`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

# Those of earlier versions do not name their machine.
_TEMPORARY = re.compile(r"\..+\.(?:([0-9a-f]{8})-)?([0-9]{1,10})\.tmp", re.DOTALL)


@contextmanager
def temporary_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name for a file or folder beside `path`, whose folder is made; whatever has it at the end of the body goes.

    What dead processes left of `path` goes first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{writer()}.tmp")
    try:
        yield temporary
    finally:
        _remove(temporary)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside `path`, whose folder is made: it becomes `path` when the body ends well, else it goes."""
    with temporary_beside(path) as temporary:
        yield temporary
        os.replace(temporary, path)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file in one go."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text with its line ends as they are, in one go."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 2, **options: Any) -> None:
    """Write JSON and a line end in one go. `options`: of `json.dumps`; ValueError for NaN with `allow_nan=False`."""
    write_text(path, json.dumps(value, indent=indent, **options) + "\n")


# --- What a kill leaves -------------------------------------------------------------------------------------------


def writer() -> str:
    """This process, for the names of temporaries: machine and number."""
    return f"{_machine()}-{os.getpid()}"


@cache
def _machine() -> str:
    """Where the number of a process says something: a host, and of its containers this one."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


def remove_leftovers(folder: str | os.PathLike[str], name: str | None = None, held: bool = False) -> None:
    """Remove the temporaries in a folder whose writer is dead.

    Args:
        folder: which need not exist. What is in its folders stays.
        name: only temporaries of what has this name there.
        held: nobody but this process writes there, so those of other machines are nobody's, too.
    """
    pattern = ".*.tmp" if name is None else f".{glob.escape(name)}.*.tmp"
    with suppress(OSError):  # a folder that cannot be read
        for path in Path(folder).glob(pattern):
            if _is_left(path.name, held):
                _remove(path)


def _is_left(name: str, held: bool) -> bool:
    found = _TEMPORARY.fullmatch(name)
    if found is None:
        return False
    if found[1] not in (_machine(), None):
        return held
    # Without its machine the name may be another program's: only in a folder of ours.
    return (held or found[1] is not None) and not _is_alive(int(found[2]))


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # there the call below would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
