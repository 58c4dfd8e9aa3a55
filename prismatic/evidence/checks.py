"""Checks of JSON as data: size, depth, finite numbers, and the types of the fields of episodes and collections.

Every reader of a file that somebody else may have written uses these; a message begins with the place and says what was
found. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True)
class Limits:
    """Of a JSON object: characters, levels, digits of a whole number, and whether text must be UTF-8.

    Escapes can make text that is none, and cannot be written again: halves of a pair.
    """

    characters: int
    levels: int
    digits: int
    utf8: bool = True


RECORD = Limits(1 << 24, 16, 18)
"""Of what our programs record."""
FOREIGN = Limits(1 << 26, 64, 40, utf8=False)
"""Of trees of features, descriptions of tokenizers, states of random generators. Who reads a text looks at it."""


def read_text(path: Path, errors: str = "strict", largest: int = MAX_FILE_BYTES) -> str:
    """Content of a UTF-8 file.

    Args:
        path: the file.
        errors: as of `bytes.decode`.
        largest: bytes that the file may have.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no regular file, a larger one, or no UTF-8; names it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: found {'a folder' if path.is_dir() else 'no regular file'}, expected a file")
    if path.stat().st_size > largest:
        raise ValueError(f"{path}: found {path.stat().st_size >> 20} MiB, expected at most {largest >> 20}")
    data = path.read_bytes()
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: found bytes that are no UTF-8 ({error.reason})") from None


def read_object(path: Path, finite: bool = True, limits: Limits = RECORD) -> dict[str, Any]:
    """The JSON object that a file holds: :func:`read_text` and :func:`parse_object`."""
    return parse_object(read_text(path, largest=limits.characters), str(path), finite, limits)


def parse_object(text: str, where: str, finite: bool = True, limits: Limits = RECORD) -> dict[str, Any]:
    """One JSON object.

    Args:
        text: the object.
        where: place for messages.
        finite: refuse NaN and infinities.
        limits: what the object may be.

    Raises:
        ValueError: no JSON object, or one beyond the limits.
    """
    if len(text) > limits.characters:
        raise ValueError(f"{where}: found {len(text)} characters, expected at most {limits.characters}")

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise ValueError(f"{where}: found the number {digits[:20]}, expected finite numbers")
        return value

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > limits.digits:
            raise ValueError(f"{where}: found a number of {len(digits)} digits, expected at most {limits.digits}")
        return int(digits)

    try:
        found = json.loads(text, parse_float=number, parse_int=integer, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, one object, found {text[:60]!r} ({error.msg})") from None
    except RecursionError:
        raise ValueError(_too_deep(where, limits.levels)) from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, found {type(found).__name__}")
    _check_values(found, where, limits.levels, limits)
    return found


def _check_values(value: Any, where: str, levels: int, limits: Limits) -> None:
    if isinstance(value, str):
        # Undecodable bytes of the file, or half of an escaped pair.
        if limits.utf8 and not value.isascii() and _SURROGATE.search(value):
            raise ValueError(f"{where}: found text that is no UTF-8")
    elif isinstance(value, (dict, list)):
        if levels < 0:
            raise ValueError(_too_deep(where, limits.levels))
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_values(part, where, levels - 1, limits)


def _too_deep(where: str, levels: int) -> str:
    return f"{where}: found values nested too deeply, expected at most {levels} levels"


_SURROGATE = re.compile("[\ud800-\udfff]")


# --- Fields -------------------------------------------------------------------------------------------------------


def is_count(value: Any) -> bool:
    """A whole number >= 0."""
    return is_integer(value) and value >= 0


def is_integer(value: Any) -> TypeGuard[int]:
    """A whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_amounts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_amount, value))


def _is_offsets(value: Any) -> bool:
    pairs = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) for pair in pairs)


_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "text": (_is_text, "text"),
    "text or null": (lambda value: value is None or _is_text(value), "text or null"),
    "integer": (is_integer, "a whole number"),
    "count": (is_count, "a whole number >= 0"),
    "amount": (_is_amount, "a number >= 0"),
    "amount or null": (lambda value: value is None or _is_amount(value), "a number >= 0 or null"),
    "amounts": (lambda value: value is None or _is_amounts(value), "a list of numbers >= 0"),
    "texts": (lambda value: value is None or _is_texts(value), "an object of texts"),
    "pixels": (lambda value: is_count(value) and 1 <= value <= 4096, "a whole number of 1 to 4096"),
    "percent": (lambda value: is_count(value) and 1 <= value <= 100, "a whole number of 1 to 100"),
    "offsets": (lambda value: value is None or _is_offsets(value), "an object of pairs of numbers, or null"),
}
_EPISODE = {
    "text": "run_id fingerprint checkpoint suite control task_name instruction status render_mode language_source "
    "checkpoint_hash perturbation gl_renderer",
    "text or null": "error video traceback",
    "integer": "seed",
    "count": "task_id init_idx steps n_queries attempts",
    "amount": "wall_s setup_s",
    "amount or null": "policy_wait_share",
    "amounts": "query_latency_s",
    "texts": "versions",
    "offsets": "init_offsets_mm",
}
_COLLECTION = {
    "text": "task_suite_name initial_states render_mode reset_mode",
    "amount": "init_noise_mm noise_std noise_fraction",
    "count": "seed max_attempts steps_after_success",
    "pixels": "image_size",
    "percent": "jpeg_quality",
}


def check_episode(row: Mapping[str, Any], where: str) -> None:
    """Types and ranges of the known fields of an episode that are there.

    Raises:
        ValueError: names place and field.
    """
    _check_known(row, _EPISODE, where)


def check_collection(facts: Mapping[str, Any], where: str) -> None:
    """Types and ranges of the known fields of a record of how demonstrations were collected.

    Raises:
        ValueError: names place and field.
    """
    _check_known(facts, _COLLECTION, where)
    check_fields(facts, {"tasks": dict}, where)
    for task, counts in facts.get("tasks", {}).items():
        numbers = [counts.get(name, 0) for name in ("episodes", "unsolved")] if isinstance(counts, dict) else [None]
        if not task.isdigit() or not all(map(is_count, numbers)):
            raise ValueError(f"{where}: tasks: found {_shown({task: counts})}, expected counts by number of the task")


def _check_known(row: Mapping[str, Any], kinds: Mapping[str, str], where: str) -> None:
    known = {name: _KINDS[kind] for kind, names in kinds.items() for name in names.split()}
    for name, value in row.items():
        test, expected = known.get(name, (None, ""))
        if test is not None and not test(value):
            raise ValueError(f"{where}: {name}: found {_shown(value)}, expected {expected}")


def check_fields(found: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Types of the named entries that are there.  Raises ValueError, which names place and entry."""
    for name, kind in kinds.items():
        value, kinds_of = found.get(name), kind if isinstance(kind, tuple) else (kind,)
        if name in found and (not isinstance(value, kinds_of) or (isinstance(value, bool) and bool not in kinds_of)):
            names = " or ".join(k.__name__ for k in kinds_of)
            raise ValueError(f"{where}: {name}: found {_shown(value)}, expected {names}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
