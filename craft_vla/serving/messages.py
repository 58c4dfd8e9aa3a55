"""Arrays in messages: openpi's msgpack and json-numpy. What is read is data; nothing in a message is run.

openpi: an array is a map `__ndarray__`, `data` (C order), `dtype`, `shape`, a numpy scalar `__npgeneric__`, `data`,
`dtype`; these keys are bytes. json-numpy: `__numpy__` (base64), `dtype`, `shape`; a scalar has the shape [].

A reader gives back maps, lists, text, numbers, bytes and arrays, or raises `MessageError`. Its memory is a small
multiple of the message's size: containers and the items of each are counted, and what is longer must be an array.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import msgpack
import numpy as np

MAX_CONTAINERS = 64
"""Maps and lists in a message, those of arrays included."""
MAX_ITEMS = 1024
"""Items of one list, keys of one map."""
_MAX_AXES = 8
_DTYPE = re.compile(r"[<>|=]?(?:b1|[iu][1248]|f[248])")
_NAME = re.compile(r"bool|u?int(?:8|16|32|64)|float(?:16|32|64)")
_OPENPI = (b"__ndarray__", b"__npgeneric__")


class MessageError(ValueError):
    """A message that cannot be used; says what was found and what was expected."""


# --------------------------------------------------------------------------------------------------- openpi's msgpack


def pack(value: Any) -> bytes:
    """Maps, lists, text, numbers, arrays and numpy scalars as msgpack. Raises ValueError for arrays of other dtypes."""
    return msgpack.packb(value, default=_packed)


def unpack(message: bytes) -> Any:
    """What `pack` packed. Arrays are in native byte order and may be read-only. Raises MessageError."""
    hooks = _Hooks(_openpi_array)
    try:
        return msgpack.unpackb(
            message,
            object_pairs_hook=hooks.pairs,
            list_hook=hooks.items,
            ext_hook=_no_extension,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_ext_len=0,  # a time stamp is an extension that no hook sees
        )
    except MessageError:
        raise
    # Its errors are ValueErrors; a text that is no UTF-8 is one as well.
    except ValueError as error:
        said = str(error) or type(error).__name__
        raise MessageError(f"message of {len(message)} bytes: found {said}, expected one msgpack map") from None


def _packed(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, np.ndarray | np.generic):
        raise ValueError(f"found {type(value).__name__}, expected text, numbers, arrays, maps or lists")
    if value.dtype.kind not in "biuf":
        raise ValueError(f"found an array of {value.dtype}, expected integers, floating-point numbers or booleans")
    if isinstance(value, np.ndarray):
        data = value.tobytes()
        return {b"__ndarray__": True, b"data": data, b"dtype": value.dtype.str, b"shape": list(value.shape)}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}


def _no_extension(code: int, data: bytes) -> Any:
    raise MessageError(f"found a msgpack extension of type {code}, expected none")


def _openpi_array(values: dict[Any, Any]) -> Any:
    kind = next((name for name in _OPENPI if name in values), None)
    if kind is None:
        return values
    expected = {kind, b"data", b"dtype"} | ({b"shape"} if kind == _OPENPI[0] else set())
    if set(values) != expected:
        raise MessageError(f"array with the keys {_listed(values)}, expected {_listed(expected)}")
    if kind == _OPENPI[0]:
        return _array(values[b"data"], values[b"dtype"], values[b"shape"])
    return _scalar(values[b"data"], values[b"dtype"])


# --------------------------------------------------------------------------------------------------------- json-numpy


def to_json(value: Any) -> str:
    """Maps, lists, text, numbers, arrays and numpy scalars as JSON. Raises ValueError for what JSON cannot hold."""
    return json.dumps(value, default=_json_packed, allow_nan=False)


def from_json(text: bytes | str) -> Any:
    """What `to_json` or `json_numpy.dumps` wrote. Raises MessageError."""
    # Counted before they are read: a list of empty lists takes 30 times its text. Base64 holds none of these.
    counts = [text.count(mark) for mark in "[{,"] if isinstance(text, str) else [text.count(mark) for mark in b"[{,"]
    containers, commas = counts[0] + counts[1], counts[2]
    if containers > 4 * MAX_CONTAINERS or commas > 4 * MAX_ITEMS:
        raise MessageError(
            f"JSON with {containers} brackets and {commas} commas, expected at most {4 * MAX_CONTAINERS} and "
            f"{4 * MAX_ITEMS}: send arrays as json-numpy packs them"
        )
    hooks = _Hooks(_json_array)
    try:
        return json.loads(text, object_pairs_hook=hooks.pairs)
    except MessageError:
        raise
    except ValueError as error:
        raise MessageError(f"message of {len(text)} bytes: found {error}, expected one JSON object") from None


def _json_packed(value: Any) -> dict[str, Any]:
    packed = _packed(np.asarray(value) if isinstance(value, np.generic) else value)
    text = base64.b64encode(packed[b"data"]).decode("ascii")
    return {"__numpy__": text, "dtype": packed[b"dtype"], "shape": packed[b"shape"]}


def _json_array(values: dict[Any, Any]) -> Any:
    if "__numpy__" not in values:
        return values
    if set(values) != {"__numpy__", "dtype", "shape"}:
        raise MessageError(f"array with the keys {_listed(values)}, expected __numpy__, dtype, shape")
    if not isinstance(values["__numpy__"], str):
        raise MessageError(f"array: __numpy__ is {type(values['__numpy__']).__name__}, expected base64 text")
    try:
        data = base64.b64decode(values["__numpy__"], validate=True)
    except ValueError as error:
        raise MessageError(f"array: __numpy__ is not base64: {error}") from None
    array = _array(data, values["dtype"], values["shape"])
    return array if array.ndim else array[()]


# ------------------------------------------------------------------------------------------------------------- arrays


class _Hooks:
    """Called for every map and list that a reader has finished: counts them and makes arrays of some."""

    def __init__(self, array: Callable[[dict[Any, Any]], Any]) -> None:
        self._array = array
        self._count = 0

    def pairs(self, pairs: Sequence[tuple[Any, Any]]) -> Any:
        """Of a map."""
        self._take()
        values = dict(pairs)
        if len(values) != len(pairs):
            raise MessageError(f"map with the keys {_listed(key for key, _ in pairs)}, expected each key once")
        return self._array(values)

    def items(self, items: list[Any]) -> list[Any]:
        """Of a list."""
        self._take()
        return items

    def _take(self) -> None:
        self._count += 1
        if self._count > MAX_CONTAINERS:
            raise MessageError(f"message with more than {MAX_CONTAINERS} maps and lists, expected at most these")


def _array(data: Any, dtype: Any, shape: Any) -> np.ndarray:
    kind = _dtype(dtype)
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(map(_is_size, shape)):
        raise MessageError(f"array of shape {_short(shape)}, expected a list of up to {_MAX_AXES} sizes")
    if not isinstance(data, bytes):
        raise MessageError(f"array: data is {type(data).__name__}, expected bytes")
    size = math.prod(shape) * kind.itemsize
    if size != len(data):
        raise MessageError(f"array: found {len(data)} bytes of data, expected {size} for {shape} {kind}")
    # A byte that is neither 0 nor 1 makes a boolean that is equal to neither.
    if kind.kind == "b":
        return (np.frombuffer(data, np.uint8) != 0).reshape(shape)
    return np.frombuffer(data, kind).reshape(shape).astype(kind.newbyteorder("="), copy=False)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _scalar(data: Any, dtype: Any) -> np.generic:
    kind = _dtype(dtype)
    expected = {"b": bool, "i": int, "u": int, "f": float}[kind.kind]
    try:
        if type(data) is not expected and not (expected is float and type(data) is int):
            raise ValueError
        with np.errstate(over="ignore"):
            return kind.newbyteorder("=").type(data)
    except (ValueError, OverflowError):
        raise MessageError(f"number: found {_short(data)}, expected one that fits {kind}") from None


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or not (_DTYPE.fullmatch(text) or _NAME.fullmatch(text)):
        found = _short(text)
        raise MessageError(f"array of dtype {found}, expected integers, floating-point numbers or booleans, like <f4")
    return np.dtype(text)


def _listed(keys: Any) -> str:
    names = sorted(key.decode("ascii", "replace") if isinstance(key, bytes) else str(key) for key in keys)
    return _short(", ".join(names), repr_=str)


def _short(value: Any, repr_: Callable[[Any], str] = repr) -> str:
    text = repr_(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
