"""Damaged RLDS folders give data of the declared types or the errors of the documentation, nothing else."""

import io
import json
import resource
import struct
import tracemalloc
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import FUZZ, byte_damage, damage_bytes, damage_json, json_damage, quickly
from PIL import Image

from prismatic.vla.datasets.example_proto import build_example, parse_example
from prismatic.vla.datasets.rlds import Episode, RLDSReader, write_rlds
from prismatic.vla.datasets.rlds_source import RLDSSource
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.tfrecord import frame_record, index_records, iter_records, masked_crc32c

KEYS = SourceKeys("rlds", ("image", "wrist_image"), ("state",), "action")
ALLOWED = (DataSetError, MissingFeatureError, FileNotFoundError)
MEMORY = 64 << 20  # the whole data set has 12 kB
TIMES = settings(FUZZ, max_examples=60)


def encode(value):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 9, 9)).save(buffer, format="JPEG")
    return buffer.getvalue()


def make_files():
    episodes = [
        Episode(
            index=number,
            instruction=f"task {number}",
            actions=np.full((3, 7), number, np.float32),
            state=np.arange(24, dtype=np.float32).reshape(3, 8),
            joint_state=np.zeros((3, 7), np.float32),
            images={key: [encode(40 * t + number) for t in range(3)] for key in KEYS.cameras},
        )
        for number in range(2)
    ]
    with TemporaryDirectory() as folder:
        directory = write_rlds(Path(folder) / "demo" / "1.0.0", "demo", episodes, 1, (8, 8, 3), {"seed": 0})
        return {path.name: path.read_bytes() for path in directory.iterdir()}


FILES = make_files()
JSON_FILES = ["features.json", "dataset_info.json", "craft_metadata.json"]
(SHARD,) = (name for name in FILES if "tfrecord" in name)


def write_files(directory, changes):
    for name, content in (FILES | changes).items():
        (directory / name).write_bytes(content)


def read_reader(directory):
    for episode in RLDSReader(directory):
        length = len(episode)
        assert length > 0 and isinstance(episode.instruction, str) and isinstance(episode.file_path, str)
        for value in (episode.actions, episode.state):
            assert isinstance(value, np.ndarray) and len(value) == length
        for frames in episode.images.values():
            assert len(frames) == length and all(isinstance(frame, bytes) for frame in frames)


def read_source(directory):
    """Everything a source gives, checked for its types."""
    source = RLDSSource(directory, KEYS)
    content = [source.fingerprint, list(source.instructions), source.lengths.tolist(), source.metadata]
    for episode, length in enumerate(source.lengths):
        for values in (source.actions(episode), source.state(episode)):
            assert values.dtype == np.float32 and values.ndim == 2 and len(values) == length
            content.append(values.tolist())
        for camera in KEYS.cameras:
            frames = [source.frame(camera, episode, step) for step in range(length)]
            assert all(isinstance(frame, bytes) for frame in frames)
            content.append(frames)
    return content


def read_everything(directory):
    """The errors that were raised, which have to be of the allowed types."""
    errors = []
    for read in (read_reader, read_source):
        try:
            read(directory)
        except ALLOWED as error:
            assert str(error)
            errors.append(error)
    check_skipping(directory, errors)
    return errors


def check_skipping(directory, errors):
    """Leaving out what cannot be read changes nothing for a whole folder and never opens what declares nothing."""
    try:
        source = RLDSSource(directory, KEYS, skip_bad=True)
    except ALLOWED as error:
        assert str(error) and errors
        return
    assert bool(source.problems) <= bool(errors)
    assert sum(length > 0 for length in source.lengths) <= 2


def open_changed(changes):
    with TemporaryDirectory() as folder, quickly():
        write_files(Path(folder), changes)
        return read_everything(Path(folder))


def test_the_undamaged_folder_is_read():
    assert open_changed({}) == []


@pytest.mark.slow
@given(byte_damage)
@TIMES
def test_damaged_shard(operations):
    open_changed({SHARD: damage_bytes(FILES[SHARD], operations)})


@pytest.mark.slow
@given(st.sampled_from(JSON_FILES), byte_damage)
@TIMES
def test_damaged_json_bytes(name, operations):
    open_changed({name: damage_bytes(FILES[name], operations)})


@pytest.mark.slow
@given(st.sampled_from(JSON_FILES), json_damage)
@settings(TIMES, max_examples=120)
def test_damaged_json_values(name, operations):
    open_changed({name: damage_json(FILES[name].decode(), operations).encode()})


@pytest.mark.slow
@given(byte_damage)
@TIMES
def test_damaged_payload_with_a_fitting_checksum(operations):
    payloads = list(read_records(FILES[SHARD]))
    payloads[1] = damage_bytes(payloads[1], operations)
    open_changed({SHARD: b"".join(map(frame_record, payloads))})


def read_records(shard):
    with TemporaryDirectory() as folder:
        path = Path(folder) / "shard"
        path.write_bytes(shard)
        return list(iter_records(path))


FEATURES = parse_example(read_records(FILES[SHARD])[1])
_COLUMN = st.one_of(
    st.lists(st.binary(max_size=5), max_size=4),
    st.lists(st.floats(width=32), max_size=25).map(lambda v: np.array(v, np.float32)),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=25).map(lambda v: np.array(v, np.int64)),
    st.none(),
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from([*FEATURES, "other"]), _COLUMN, min_size=1, max_size=3))
@TIMES
def test_records_with_other_features(columns):
    changed = {name: value for name, value in (FEATURES | columns).items() if value is not None}
    first = read_records(FILES[SHARD])[0]
    open_changed({SHARD: frame_record(first) + frame_record(build_example(changed))})


@contextmanager
def little_memory():
    """Peak of Python's allocations below MEMORY, and an address space that a wild allocation does not fit in."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (512 << 20), hard))
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("length", [2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 16, 2**64 - 1])
def test_an_absurd_record_length_with_a_fitting_checksum_allocates_nothing(length, tmp_path):
    header = struct.pack("<Q", length)
    record = header + struct.pack("<I", masked_crc32c(header)) + b"payload"
    path = tmp_path / "shard"
    path.write_bytes(FILES[SHARD] + record)
    with little_memory(), pytest.raises(DataSetError, match="record 2 .*truncated"):
        index_records(path)
    with little_memory():
        assert open_changed({SHARD: record})


@pytest.mark.parametrize("size", ["1000000000000", str(2**32), str(2**63), str(10**40), "-1", "-8", "0"])
def test_absurd_shapes_allocate_nothing(size):
    for name in ("state", "joint_state"):
        features = json.loads(FILES["features.json"])
        observation = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"][
            "observation"
        ]["featuresDict"]["features"]
        for shape in ([size], [size, size], [size, size, size]):
            observation[name]["tensor"]["shape"]["dimensions"] = shape
            with little_memory():
                assert open_changed({"features.json": json.dumps(features).encode()}), shape


INDEX_FILES = ["index.json", *(f"{number}.bin" for number in range(4))]


@pytest.fixture(scope="module")
def indexed(tmp_path_factory):
    """A folder with an index, and what it holds; a damaged index is replaced by reading."""
    directory = tmp_path_factory.mktemp("indexed")
    write_files(directory, {})
    return directory, read_source(directory)


def check_damaged_index(indexed, name, change):
    directory, expected = indexed
    (folder,) = (directory / ".craft_index").iterdir()
    path = folder / name
    path.write_bytes(change(path.read_bytes()))
    with quickly():
        assert read_source(directory) == expected


@pytest.mark.slow
@given(st.sampled_from(INDEX_FILES), byte_damage)
@TIMES
def test_a_damaged_index_is_rebuilt_or_correct(indexed, name, operations):
    check_damaged_index(indexed, name, lambda data: damage_bytes(data, operations))


@pytest.mark.slow
@given(json_damage)
@TIMES
def test_a_damaged_index_header_is_rebuilt_or_correct(indexed, operations):
    check_damaged_index(indexed, "index.json", lambda data: damage_json(data.decode(), operations).encode())


# Defects the tests above found, each once by name.


def change_info(change):
    info = json.loads(FILES["dataset_info.json"])
    change(info["splits"][0])
    return {"dataset_info.json": json.dumps(info).encode()}


def change_feature(name, change):
    features = json.loads(FILES["features.json"])
    steps = features["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    nodes = steps | steps["observation"]["featuresDict"]["features"]
    change(nodes[name]["tensor"])
    return {"features.json": json.dumps(features).encode()}


@pytest.mark.parametrize(
    "template",
    ["{SPLHT}", "{0}", "{", "{DATASET:>99999999999}", "{DATASET.x}", "../demo", "/etc/passwd", "", 7, None, "x" * 300],
)
def test_a_damaged_shard_template(template):
    (first, second) = open_changed(change_info(lambda split: split.update(filepathTemplate=template)))
    assert str(first) == str(second) and "dataset_info.json" in str(first) or isinstance(first, FileNotFoundError)


@pytest.mark.parametrize("dtype", [[None], {}, None, "float99", "object", "S4", "bfloat16", "string"])
def test_a_damaged_type_of_numbers(dtype):
    for name in ("state", "action"):
        errors = open_changed(change_feature(name, lambda tensor: tensor.update(dtype=dtype)))
        assert len(errors) == 2 and all(isinstance(error, DataSetError) for error in errors)
    # Other features of a type that numpy lacks do not matter to those who do not read them.
    changed = change_feature("reward", lambda tensor: tensor.update(dtype=dtype))
    with TemporaryDirectory() as folder:
        write_files(Path(folder), changed)
        assert read_source(Path(folder))


@pytest.mark.parametrize("shape", [["-1"], ["-1", "-8"], [1e999], ["2" * 30, "0"]])
def test_a_damaged_shape_of_numbers(shape):
    errors = open_changed(change_feature("state", lambda tensor: tensor.update(shape={"dimensions": shape})))
    assert len(errors) == 2 and all(isinstance(error, DataSetError) for error in errors)


def test_a_camera_that_is_no_image():
    with TemporaryDirectory() as folder, pytest.raises(DataSetError, match="state.*expected an image"):
        write_files(Path(folder), {})
        RLDSSource(folder, SourceKeys("rlds", ("state",), ("state",), "action"))


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[]", b"{"])
def test_json_that_is_too_deep_or_no_text(name, content):
    assert any(name in str(error) for error in open_changed({name: content}))


def test_a_feature_without_values():
    """Its array is an empty file, which cannot be mapped."""
    first = read_records(FILES[SHARD])[0]
    changed = build_example(parse_example(first) | {"steps/observation/state": np.empty(0, np.float32)})
    features = change_feature("state", lambda tensor: tensor.update(shape={"dimensions": ["0"]}))
    shard = frame_record(changed) * 2
    with TemporaryDirectory() as folder:
        write_files(Path(folder), features | {SHARD: shard})
        assert RLDSSource(folder, KEYS).state(1).shape == (3, 0)


@pytest.mark.parametrize(
    "key", ["fingerprint", "records", "instructions", "lengths", "info", "problems", "warnings", "runs"]
)
def test_an_index_header_with_a_wrong_entry(indexed, key):
    def change(data):
        header = json.loads(data)
        header[key] = header[key][::-1] if isinstance(header[key], list) and len(set(map(str, header[key]))) > 1 else 0
        return json.dumps(header).encode()

    check_damaged_index(indexed, "index.json", change)


def test_an_index_array_with_a_flipped_bit(indexed):
    check_damaged_index(indexed, "0.bin", lambda data: bytes([data[0] ^ 1]) + data[1:])
