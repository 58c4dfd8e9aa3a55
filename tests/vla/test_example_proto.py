import numpy as np
import pytest

from prismatic.vla.datasets.example_proto import build_example, parse_example


def test_round_trip_of_the_three_kinds():
    example = {
        "a/bytes": [b"\x00\xff", b""],
        "b/float": np.array([[1.5, -2.25], [np.float32(0.1), 3e30]], dtype=np.float32),
        "c/int": np.array([-1, 2**40], dtype=np.int64),
        "d/bool": np.array([True, False]),
    }
    parsed = parse_example(build_example(example))
    assert parsed["a/bytes"] == example["a/bytes"]
    np.testing.assert_array_equal(parsed["b/float"], example["b/float"].ravel())
    np.testing.assert_array_equal(parsed["c/int"], example["c/int"])
    np.testing.assert_array_equal(parsed["d/bool"], [1, 0])
    assert parsed["b/float"].dtype == np.float32
    assert parsed["c/int"].dtype == np.int64


def test_wire_bytes_of_a_hand_encoded_message():
    # Example{features{feature{key "x", value{float_list{value: [1.0] packed}}}}}
    float_list = b"\x0a\x04" + np.float32(1.0).tobytes()
    feature = b"\x12" + bytes([len(float_list)]) + float_list
    entry = b"\x0a\x01x\x12" + bytes([len(feature)]) + feature
    features = b"\x0a" + bytes([len(entry)]) + entry
    payload = b"\x0a" + bytes([len(features)]) + features
    assert build_example({"x": np.array([1.0])}) == payload
    np.testing.assert_array_equal(parse_example(payload)["x"], [1.0])


def test_equal_input_gives_equal_bytes_in_any_order():
    features = {name: np.arange(3) for name in "zyxwv"}
    assert build_example(features) == build_example(dict(reversed(features.items())))


def test_not_an_example():
    with pytest.raises(ValueError, match="not a tf.train.Example"):
        parse_example(b"\xff\xff\xff")


def test_unsupported_dtype_names_the_feature():
    with pytest.raises(ValueError, match="'name'.*complex"):
        build_example({"name": np.array([1j])})
