"""Checks of recorded JSON as data: size, depth, finite numbers, and the types of an episode's fields.

Every reader of records uses these; a message begins with the place and says what was found. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

MAX_FILE_BYTES, MAX_LINE, MAX_DEPTH, MAX_DIGITS = 1 << 30, 1 << 24, 16, 18


def read_text(path: Path, errors: str = "strict") -> str:
    """Content of a UTF-8 file.

    Args:
        path: the file.
        errors: as of `bytes.decode`.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no regular file, one of more than 1 GiB, or no UTF-8; names it.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: found {'a folder' if path.is_dir() else 'no regular file'}, expected a file")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(f"{path}: found {path.stat().st_size >> 20} MiB, expected at most {MAX_FILE_BYTES >> 20}")
    data = path.read_bytes()
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}: line {line}: found bytes that are no UTF-8 ({error.reason})") from None


def parse_object(text: str, where: str, finite: bool = True) -> dict[str, Any]:
    """One JSON object.

    Args:
        text: the object, at most 16 MiB.
        where: place for messages.
        finite: refuse NaN and infinities.

    Raises:
        ValueError: no JSON object, one nested deeper than 16 levels, a number out of range, or too long.
    """
    if len(text) > MAX_LINE:
        raise ValueError(f"{where}: found {len(text)} characters, expected at most {MAX_LINE}")

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise ValueError(f"{where}: found the number {digits[:20]}, expected finite numbers")
        return value

    def integer(digits: str) -> int:
        if len(digits.lstrip("-")) > MAX_DIGITS:
            raise ValueError(f"{where}: found a number of {len(digits)} digits, expected at most {MAX_DIGITS}")
        return int(digits)

    try:
        found = json.loads(text, parse_float=number, parse_int=integer, parse_constant=number)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected JSON, one object, found {text[:60]!r} ({error.msg})") from None
    except RecursionError:
        raise ValueError(f"{where}: found values nested too deeply, expected at most {MAX_DEPTH} levels") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: expected an object, found {type(found).__name__}")
    _check_values(found, where, MAX_DEPTH)
    return found


def _check_values(value: Any, where: str, levels: int) -> None:
    if isinstance(value, str):
        # Undecodable bytes of the file, or half of an escaped pair: it could not be written again.
        if not value.isascii() and _SURROGATE.search(value):
            raise ValueError(f"{where}: found text that is no UTF-8")
    elif isinstance(value, (dict, list)):
        if levels < 0:
            raise ValueError(f"{where}: found values nested too deeply, expected at most {MAX_DEPTH} levels")
        for part in (*value, *value.values()) if isinstance(value, dict) else value:
            _check_values(part, where, levels - 1)


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
_FIELD_KINDS = {name: _KINDS[kind] for kind, names in _EPISODE.items() for name in names.split()}


def check_episode(row: Mapping[str, Any], where: str) -> None:
    """Types and ranges of the known fields of an episode that are there.

    Raises:
        ValueError: names place and field.
    """
    for name, value in row.items():
        test, expected = _FIELD_KINDS.get(name, (None, ""))
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
