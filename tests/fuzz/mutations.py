"""Damage to bytes and to JSON values, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
import time
from contextlib import contextmanager

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples every time. No deadline, which would be wall time: `quickly` counts processor time.
FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)


@contextmanager
def quickly(seconds: float = 60.0):
    """Fail when the block takes more processor time: something is read again and again, or backtracks."""
    start = time.process_time()
    yield
    assert time.process_time() - start < seconds


_FRACTION = st.integers(0, 2**32 - 1)
_PIECE = st.one_of(
    st.binary(min_size=1, max_size=12), st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\n", b'"', b"}", b"-1"])
)

byte_damage = st.lists(
    st.tuples(st.sampled_from(["flip", "insert", "delete", "truncate", "overwrite", "repeat"]), _FRACTION, _PIECE),
    min_size=1,
    max_size=3,
)


def damage_bytes(data: bytes, operations) -> bytes:
    """Apply (kind, place, piece) one after another."""
    for kind, place, piece in operations:
        at = place % (len(data) + 1)
        size = len(piece)
        if kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << (place % 8))]) + data[at + 1 :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "truncate":
            data = data[:at]
        elif kind == "overwrite":
            data = data[:at] + piece + data[at + size :]
        elif kind == "repeat":
            data = data[: at + 4 * size] + data[at:]
    return data


_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, 2**63, -(2**63) - 1, 10**30, 1e308, float("nan"), float("inf"), -0.5]),
    st.sampled_from(["", "-1", "7", "8", "1e3", "float32", "uint8", "int64", "bool", "string", "object", "S4", "V0"]),
    st.sampled_from(["{", "{0}", "{DATASET.x}", "../x", "a\0b", "x" * 300, "\ud800", "99999999999999999999", "M8[s]"]),
    st.text(max_size=6),
)
_VALUES = st.recursive(
    _SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3)
)
json_damage = st.lists(
    st.tuples(st.sampled_from(["replace", "delete", "duplicate", "rename", "swap"]), _FRACTION, _VALUES),
    min_size=1,
    max_size=3,
)


def damage_json(text: str, operations) -> str:
    """Change, remove, repeat, rename or exchange parts of a JSON document."""
    document = {"root": json.loads(text)}
    for kind, place, value in operations:
        places = list(_places(document))
        container, key = places[place % len(places)]
        if kind == "replace":
            container[key] = value
        elif kind == "delete":
            del container[key]
        elif kind == "duplicate" and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif kind == "rename" and isinstance(container, dict) and container is not document:
            container[str(value)] = container.pop(key)
        elif kind == "swap":
            other, name = places[(place // 7) % len(places)]
            # Copies, because one of the two may lie inside the other.
            container[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(container[key])
        if "root" not in document:
            return ""
    return json.dumps(document["root"])


def _places(node):
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    for key, child in items:
        yield node, key
        yield from _places(child)
