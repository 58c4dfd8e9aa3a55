"""Hashes of what files hold, wherever they lie: a record's fingerprint is made of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prismatic.progress import Progress

_BLOCK = 1 << 22
_SHOWN = 1 << 29


def files_hash(root: Path, files: Iterable[Path], replaced: Mapping[Path, bytes] | None = None) -> str:
    """16 hexadecimal digits of the names below `root`, sizes and contents of files, in the order given.

    Args:
        root: folder of the files; where it lies does not count.
        files: regular files.
        replaced: content to take instead of a file's own.
    """
    digest, files = hashlib.sha256(), list(files)
    with _progress(files) as progress:
        for path in files:
            content = (replaced or {}).get(path)
            size = path.stat().st_size if content is None else len(content)
            digest.update(f"{path.relative_to(root).as_posix()}:{size}\n".encode())
            if content is not None:
                digest.update(content)
                continue
            _take(digest, path, progress)
    return digest.hexdigest()[:16]


def folder_hash(folder: str) -> str | None:
    """:func:`files_hash` of all files of a data set but hidden ones (our index); None when there is no such folder."""
    root = Path(folder)
    return files_hash(root, _files(root)) if root.is_dir() else None


def _files(root: Path, without: str = "") -> list[Path]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return [p for p in files if not any(part.startswith(".") or part == without for part in p.relative_to(root).parts)]


def content_hash(path: str, without: str = "", but: Collection[str] = ()) -> str | None:
    """:func:`file_hash` or :func:`folder_hash`; None when there is neither file nor folder.

    A file is read again only when it has another size or time than before.

    Args:
        path: file or folder.
        without: name of folders in it that do not count.
        but: names of files directly in it that do not count.
    """
    root = Path(path)
    files = _files(root, without) if root.is_dir() else [root] * root.is_file()
    files = [file for file in files if file not in {root / name for name in but}]
    stamp = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    if not files:
        return None
    if _KNOWN.get(path, ((), ""))[0] != stamp:
        _KNOWN[path] = stamp, files_hash(root, files) if root.is_dir() else file_hash(path)
    return _KNOWN[path][1]


_KNOWN: dict[str, tuple[tuple[tuple[str, int, int], ...], str]] = {}


def file_hash(path: str) -> str:
    """16 hexadecimal digits of a file's content.  Raises OSError."""
    return sha256_of(path)[:16]


def sha256_of(*paths: str | os.PathLike[str]) -> str:
    """64 hexadecimal digits of the contents of files, one after the other.  Raises OSError."""
    digest = hashlib.sha256()
    with _progress(paths) as progress:
        for path in paths:
            _take(digest, path, progress)
    return digest.hexdigest()


def _progress(paths: Sequence[str | os.PathLike[str]]) -> Progress:
    """Of reading files, for those that take more than a moment."""
    size = sum(os.stat(path).st_size for path in paths)
    return Progress(size if size >= _SHOWN else 0, "hashing", "B", leave=False)


def _take(digest: Any, path: str | os.PathLike[str], progress: Progress) -> None:
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            progress.advance(len(block))
