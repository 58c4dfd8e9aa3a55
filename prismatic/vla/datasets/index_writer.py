"""Writes an index: episodes one after another, checked, with a fingerprint of their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from prismatic.vla.datasets.index_reader import VERSION, checksum
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError

MAX_STEPS = 1 << 20  # of one episode
# Constant columns and repeated rows compress without limit: a small file must not fill the disk.
_ALWAYS_ALLOWED, _ALLOWED_RATIO = 1 << 30, 100
_MOST_WARNINGS = 5


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
        runs: list[list[Any]] = [[0, texts]] if isinstance(texts, str) else text_runs(texts)
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
            json.dump(header | {"checksum": checksum(header)}, stream)
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


def allowed_bytes(size: int) -> int:
    """What the arrays of a data set may take whose files have `size` bytes."""
    return max(_ALWAYS_ALLOWED, _ALLOWED_RATIO * size)
