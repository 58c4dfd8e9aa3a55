"""`tf.train.Example` messages without TensorFlow.

The message classes are described here and built by the protobuf runtime in a private pool, so that an installed
TensorFlow (which registers the same file names in the default pool) does not clash. Only field numbers and types
matter on the wire.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_PACKAGE = "craft.example"


def parse_example(payload: bytes, names: Iterable[str] | None = None) -> dict[str, list[bytes] | np.ndarray]:
    """Flat features of a serialised Example, all or those of these names that it has.

    Returns {name: list of bytes | float32 (n,) | int64 (n,)}; a feature without a kind becomes an empty float32
    array. Raises ValueError when the bytes are not an Example.
    """
    message = _example_class()()
    try:
        message.ParseFromString(payload)
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example message of {len(payload)} bytes: {error}") from error
    features = message.features.feature
    return {name: _feature_value(features[name]) for name in (features if names is None else names) if name in features}


def build_example(features: Mapping[str, Sequence[bytes] | np.ndarray]) -> bytes:
    """Serialise flat features: sequences of bytes, floating arrays (float32) or integer/bool arrays (int64).

    Arrays are flattened in C order. Map entries are written sorted by name, so equal input gives equal bytes.
    """
    message = _example_class()()
    for name, value in features.items():
        feature = message.features.feature[name]
        if not isinstance(value, np.ndarray):
            feature.bytes_list.value.extend(value)
        elif np.issubdtype(value.dtype, np.floating):
            feature.float_list.value.extend(np.ravel(value).astype(np.float32).tolist())
        elif np.issubdtype(value.dtype, np.integer) or value.dtype == np.bool_:
            feature.int64_list.value.extend(np.ravel(value).astype(np.int64).tolist())
        else:
            raise ValueError(f"feature {name!r} has dtype {value.dtype}, expected floating, integer, bool or bytes")
    return message.SerializeToString(deterministic=True)


def _feature_value(feature) -> list[bytes] | np.ndarray:
    kind = feature.WhichOneof("kind")
    if kind == "bytes_list":
        return list(feature.bytes_list.value)
    if kind == "int64_list":
        return np.array(feature.int64_list.value, dtype=np.int64)
    return np.array(feature.float_list.value, dtype=np.float32)


@lru_cache(maxsize=1)
def _example_class():
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_describe_file())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.Example"))


def _describe_file() -> descriptor_pb2.FileDescriptorProto:
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="craft/example.proto", package=_PACKAGE, syntax="proto3")
    lists = (("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT), ("Int64List", field.TYPE_INT64))
    for name, scalar_type in lists:
        file.message_type.add(name=name).field.add(name="value", number=1, type=scalar_type, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, (name, member) in enumerate(
        (("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")), start=1
    ):
        feature.field.add(
            name=name,
            number=number,
            type=field.TYPE_MESSAGE,
            label=field.LABEL_OPTIONAL,
            type_name=f".{_PACKAGE}.{member}",
            oneof_index=0,
        )
    _describe_map_messages(file)
    return file


def _describe_map_messages(file: descriptor_pb2.FileDescriptorProto) -> None:
    field = descriptor_pb2.FieldDescriptorProto
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value",
        number=2,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_OPTIONAL,
        type_name=f".{_PACKAGE}.Feature",
    )
    features.field.add(
        name="feature",
        number=1,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=f".{_PACKAGE}.Features.FeatureEntry",
    )
    example = file.message_type.add(name="Example")
    example.field.add(
        name="features",
        number=1,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_OPTIONAL,
        type_name=f".{_PACKAGE}.Features",
    )
