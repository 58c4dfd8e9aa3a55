"""Arrays in messages: round trips, the bytes that others send, and whatever is no message."""

import contextlib
import json
import tracemalloc

import json_numpy
import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from serving_fixtures import openpi_array

from craft_vla.serving.messages import MAX_CONTAINERS, MAX_ITEMS, MessageError, from_json, pack, to_json, unpack

DTYPES = ("|b1", "|i1", "<i2", "<i4", "<i8", "|u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8", ">f4", ">i8")
ARRAYS = st.sampled_from(DTYPES).flatmap(lambda kind: arrays(kind, array_shapes(min_dims=0, max_dims=4, min_side=0)))
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
PLAIN = st.one_of(TEXTS, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), st.booleans(), st.none())
MESSAGES = st.dictionaries(TEXTS, st.one_of(PLAIN, ARRAYS, st.lists(PLAIN, max_size=5)), max_size=6)


def is_same(found, sent) -> bool:
    if isinstance(sent, dict):
        return set(found) == set(sent) and all(is_same(found[name], sent[name]) for name in sent)
    if not isinstance(sent, np.ndarray):
        return type(found) is type(sent) and found == sent
    native = sent.dtype.newbyteorder("=")
    same = found.dtype == native and found.shape == sent.shape
    return same and found.tobytes() == sent.astype(native).tobytes()


@given(MESSAGES)
def test_msgpack_comes_back_as_it_was(message):
    assert is_same(unpack(pack(message)), message)


@given(st.dictionaries(TEXTS.filter(lambda name: name != "__numpy__"), ARRAYS, max_size=4))
def test_json_comes_back_as_it_was_and_json_numpy_reads_and_writes_the_same(message):
    for text in (to_json(message), json_numpy.dumps(message)):
        for found in (from_json(text), from_json(text.encode()), json_numpy.loads(text)):
            assert is_same(native(found), native(message))


def native(message: dict) -> dict:
    """json-numpy itself leaves the byte order as it was sent."""
    arrays_of = {name: np.asarray(value) for name, value in message.items()}
    return {name: array.astype(array.dtype.newbyteorder("=")) for name, array in arrays_of.items()}


@given(st.sampled_from(DTYPES).flatmap(lambda kind: arrays(kind, ())))
def test_a_scalar_stays_one(array):
    scalar = array[()]
    found = unpack(pack({"a": scalar}))["a"]
    assert is_same(np.asarray(found), np.asarray(scalar))
    # A float64 is a Python float, which either format writes as the number it is.
    assert isinstance(found, float if array.dtype.name == "float64" else np.generic)


def test_what_openpi_sends_is_read_and_what_it_reads_is_sent():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    scalar = {b"__npgeneric__": True, b"data": 1.5, b"dtype": "<f4"}
    sent = msgpack.packb({"a": openpi_array(array), "s": scalar})
    found = unpack(sent)
    assert is_same(found["a"], array) and found["s"] == np.float32(1.5) and found["s"].dtype == np.float32
    assert pack({"a": array, "s": np.float32(1.5)}) == sent
    assert is_same(unpack(pack(array.T)), array.T.copy())


@pytest.mark.parametrize("value", [np.array(["a"], object), np.array(["a"]), np.zeros(1, complex), object(), {1, 2}])
@pytest.mark.parametrize("writer", [pack, to_json])
def test_what_is_no_number_is_not_sent(writer, value):
    with pytest.raises(ValueError, match="found .*expected"):
        writer({"a": value})


GOOD = {b"__ndarray__": True, b"data": bytes(8), b"dtype": "<f4", b"shape": [2]}
SCALAR = {b"__npgeneric__": True, b"data": 1, b"dtype": "|u1"}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (GOOD | {b"dtype": "|O"}, "dtype '|O', expected integers"),
        (GOOD | {b"dtype": "<f4,<f4"}, "dtype '<f4,<f4'"),
        (GOOD | {b"dtype": "<c8"}, "dtype '<c8'"),
        (GOOD | {b"dtype": [["a", "<f4"]]}, "dtype [['a', '<f4']]"),
        (GOOD | {b"dtype": "M8[s]"}, "dtype 'M8[s]'"),
        (GOOD | {b"shape": [3]}, "found 8 bytes of data, expected 12 for [3] float32"),
        (GOOD | {b"shape": [-2, -1]}, "shape [-2, -1]"),
        (GOOD | {b"shape": [True, 2]}, "shape [True, 2]"),
        (GOOD | {b"shape": 2}, "shape 2"),
        (GOOD | {b"shape": [1] * 9}, "shape [1, 1"),
        (GOOD | {b"shape": [0, 2**40]}, "shape [0"),
        (GOOD | {b"data": "text"}, "data is str, expected bytes"),
        (GOOD | {b"more": 1}, "keys __ndarray__, data, dtype, more, shape, expected"),
        ({b"__ndarray__": True}, "keys __ndarray__, expected __ndarray__, data, dtype, shape"),
        (SCALAR | {b"data": 300}, "number: found 300, expected one that fits uint8"),
        (SCALAR | {b"data": "1"}, "number: found '1'"),
        (SCALAR | {b"data": 1.5}, "number: found 1.5"),
        (SCALAR | {b"data": None, b"dtype": "<f4"}, "number: found None"),
        (msgpack.ExtType(4, b"x"), "expected one msgpack map"),
        (msgpack.Timestamp(1, 0), "expected one msgpack map"),
        ([[]] * (MAX_CONTAINERS + 1), "more than 64 maps and lists"),
        ([0] * (MAX_ITEMS + 1), "expected one msgpack map"),
    ],
)
def test_a_part_that_cannot_be_used_is_named(value, said):
    with pytest.raises(MessageError) as error:
        unpack(msgpack.packb({"a": value}))
    assert said in str(error.value)


@pytest.mark.parametrize(
    "message", [b"", b"\xc1", b"\x81", msgpack.packb({}) * 2, b"\xa1\xff", b"\x82\xa1a\x01\xa1a\x02", b"\x81\x01\x01"]
)
def test_what_is_no_message_is_said_so(message):
    with pytest.raises(MessageError, match="found|with the keys"):
        unpack(message)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected one JSON object"),
        ("{", "expected one JSON object"),
        (b"\xff\xfe\x00", "expected one JSON object"),
        ('{"a": 1, "a": 2}', "map with the keys a, a"),
        ("[" * 100_000, "brackets"),
        ("[" * 200 + "]" * 200, None),
        ('{"a": %s}' % ("9" * 5000), "expected one JSON object"),
        ('{"__numpy__": "AA==", "dtype": "|u1"}', "expected __numpy__, dtype, shape"),
        ('{"__numpy__": 1, "dtype": "|u1", "shape": []}', "__numpy__ is int, expected base64 text"),
        ('{"__numpy__": "A", "dtype": "|u1", "shape": []}', "not base64"),
        ('{"__numpy__": "\\u00e4", "dtype": "|u1", "shape": []}', "not base64"),
        ('{"__numpy__": "AA==", "dtype": "|O", "shape": []}', "dtype '|O'"),
        ('{"__numpy__": "AA==", "dtype": [["a", "|u1"]], "shape": []}', "dtype [['a', '|u1']]"),
        ('{"__numpy__": "AA==", "dtype": "|u1", "shape": [2]}', "found 1 bytes of data, expected 2"),
    ],
)
def test_json_that_cannot_be_used_is_named(text, said):
    if said is None:
        assert isinstance(from_json(text), list)
        return
    with pytest.raises(MessageError) as error:
        from_json(text)
    assert said in str(error.value)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_a_message_error(data):
    for reader in (unpack, from_json):
        try:
            reader(data)
        except MessageError as error:
            assert "found" in str(error) or "expected" in str(error)


@given(st.data())
def test_a_damaged_message_is_a_message_or_a_message_error(data):
    message = bytearray(pack({"a": np.arange(6.0), "s": np.float32(2), "l": [1, "b"]}))
    for place in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=4)):
        message[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        unpack(bytes(message[: data.draw(st.integers(0, len(message)))]))


EMPTY_LISTS = 200_000
BOMBS = {
    "msgpack, empty lists": (unpack, b"\xdd" + EMPTY_LISTS.to_bytes(4, "big") + b"\x90" * EMPTY_LISTS),
    "msgpack, lists in lists": (unpack, (b"\xdc\x04\x00" + b"\x90" * 1023) * 200),
    "msgpack, nested": (unpack, b"\x91" * EMPTY_LISTS),
    "json, empty lists": (from_json, json.dumps([[]] * EMPTY_LISTS)),
    "json, numbers": (from_json, json.dumps([1.5] * EMPTY_LISTS)),
    "json in json": (lambda text: from_json(from_json(text)["encoded"]), json.dumps({"encoded": "[]," * EMPTY_LISTS})),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_small_message_does_not_take_much_memory(kind):
    reader, message = BOMBS[kind]
    tracemalloc.start()
    try:
        with pytest.raises(MessageError):
            reader(message)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(message) + 100_000
    finally:
        tracemalloc.stop()
