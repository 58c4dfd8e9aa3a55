import json
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from hypothesis import given, settings
from hypothesis import strategies as st

from prismatic.vla.datasets import index as index_module
from prismatic.vla.datasets import rlds_source
from prismatic.vla.datasets.example_proto import build_example
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_features import libero_features
from prismatic.vla.datasets.rlds_source import RLDSSource
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
from prismatic.vla.datasets.tfrecord import write_records
from prismatic.vla.images import decode_jpeg

KEYS = SourceKeys("rlds", ("image", "wrist_image"), ("state",), "action")
EPISODES = [make_episode(i, length=8 + i, instruction=f"task {i % 2}") for i in range(5)]


@pytest.fixture()
def directory(tmp_path):
    return write_data_set(tmp_path, "demo", EPISODES, shards=2)


def build_count(monkeypatch):
    calls = []
    build = rlds_source._build
    monkeypatch.setattr(rlds_source, "_build", lambda *args: (calls.append(1), build(*args)))
    return calls


def all_frames(source):
    return {
        (camera, episode, step): source.frame(camera, episode, step)
        for camera in source.keys.cameras
        for episode in range(len(source))
        for step in range(source.lengths[episode])
    }


def test_every_number_and_frame_is_the_readers(directory):
    source, reader = RLDSSource(directory, KEYS), RLDSReader(directory)
    assert len(source) == 5 and source.lengths.tolist() == [len(e) for e in EPISODES]
    for number, episode in enumerate(reader):
        np.testing.assert_array_equal(source.actions(number), episode.actions)
        np.testing.assert_array_equal(source.state(number), episode.state)
        assert source.instructions[number] == episode.instruction
        for camera in KEYS.cameras:
            assert [source.frame(camera, number, step) for step in range(len(episode))] == episode.images[camera]


def test_rotated_frames_are_turned(directory):
    keys = SourceKeys("rlds", ("image",), ("state",), "action", rotated=True)
    np.testing.assert_array_equal(
        RLDSSource(directory, keys).frame("image", 2, 3), decode_jpeg(EPISODES[2].images["image"][3])[::-1, ::-1]
    )


def test_several_state_keys_lie_side_by_side(directory):
    keys = SourceKeys("rlds", ("image",), ("joint_state", "state"), "action")
    state = RLDSSource(directory, keys).state(3)
    np.testing.assert_array_equal(state, np.concatenate([EPISODES[3].joint_state, EPISODES[3].state], axis=1))


def test_the_index_is_built_once_and_again_when_a_file_changes(directory, monkeypatch):
    calls = build_count(monkeypatch)
    first = RLDSSource(directory, KEYS)
    second = RLDSSource(directory, KEYS)
    assert len(calls) == 1 and all_frames(first) == all_frames(second)
    shard = sorted(directory.glob("*tfrecord*"))[1]
    os.utime(shard, ns=(1, 1))
    assert RLDSSource(directory, KEYS).fingerprint == first.fingerprint
    assert len(calls) == 2


def test_the_fingerprint_follows_the_content_and_not_the_place(directory, tmp_path):
    moved = shutil.copytree(directory, tmp_path / "elsewhere" / "1.0.0", ignore=shutil.ignore_patterns(".craft_index"))
    assert RLDSSource(moved, KEYS).fingerprint == RLDSSource(directory, KEYS).fingerprint
    other = write_data_set(tmp_path, "other", [make_episode(9), *EPISODES[1:]], shards=2)
    assert RLDSSource(other, KEYS).fingerprint != RLDSSource(directory, KEYS).fingerprint


def test_a_damaged_index_is_built_again(directory, monkeypatch):
    calls = build_count(monkeypatch)
    expected = all_frames(RLDSSource(directory, KEYS))
    (folder,) = (directory / ".craft_index").iterdir()
    for damage in (
        lambda: (folder / "index.json").write_text("{"),
        lambda: (folder / "index.json").write_text("[]"),
        lambda: (folder / "0.bin").write_bytes(b"short"),
        lambda: (folder / "1.bin").unlink(),
    ):
        damage()
        before = len(calls)
        assert all_frames(RLDSSource(directory, KEYS)) == expected
        assert len(calls) == before + 1


def test_a_failed_build_leaves_nothing(directory, monkeypatch):
    shard = sorted(directory.glob("*tfrecord*"))[1]
    data = bytearray(shard.read_bytes())
    data[200] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(DataSetError, match=f"{shard.name}: record 0 .*checksum"):
        RLDSSource(directory, KEYS)
    assert list((directory / ".craft_index").iterdir()) == []


def test_a_directory_that_cannot_be_written_uses_the_cache(directory, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    writable = index_module._is_writable
    monkeypatch.setattr(index_module, "_is_writable", lambda f: ".craft_index" not in f.parts and writable(f))
    calls = build_count(monkeypatch)
    frames = [all_frames(RLDSSource(directory, KEYS)) for _ in range(2)]
    assert frames[0] == frames[1] and len(calls) == 1
    assert not (directory / ".craft_index").exists() and any(cache.iterdir())
    monkeypatch.setattr(index_module, "_is_writable", lambda folder: False)
    shutil.rmtree(cache)
    with pytest.raises(PermissionError, match="neither .* set XDG_CACHE_HOME"):
        RLDSSource(directory, KEYS)


def test_a_user_without_a_home_can_name_a_cache(directory, tmp_path, monkeypatch, homeless):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    writable = index_module._is_writable
    monkeypatch.setattr(index_module, "_is_writable", lambda f: ".craft_index" not in f.parts and writable(f))
    with pytest.raises(PermissionError, match="set XDG_CACHE_HOME"):
        RLDSSource(directory, KEYS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert len(all_frames(RLDSSource(directory, KEYS))) and any((tmp_path / "cache").iterdir())


def open_and_read(directory):
    return all_frames(RLDSSource(directory, KEYS))


def read_all(source):
    return all_frames(source)


def test_processes_that_build_at_once_all_read_the_same(directory):
    with ProcessPoolExecutor(4, get_context("fork")) as pool:
        results = list(pool.map(open_and_read, [directory] * 4))
    assert all(result == results[0] for result in results)
    assert len(list((directory / ".craft_index").iterdir())) == 1


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.slow
def test_workers_reopen_the_files(directory, method):
    source = RLDSSource(directory, KEYS)
    expected = all_frames(source)
    with ProcessPoolExecutor(2, get_context(method)) as pool:
        assert all(result == expected for result in pool.map(read_all, [source] * 2))
    assert all_frames(pickle.loads(pickle.dumps(source))) == expected


def test_a_shard_that_shrinks_while_open(directory):
    source = RLDSSource(directory, KEYS)
    shard = sorted(directory.glob("*tfrecord*"))[1]
    os.truncate(shard, 100)
    with pytest.raises(DataSetError, match=f"{shard.name}.*the file was changed"):
        source.frame("image", 4, 5)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"cameras": ("front",)}, "steps/observation/front"),
        ({"state": ("pose",)}, "steps/observation/pose"),
        ({"action": "delta"}, "steps/delta"),
    ],
)
def test_keys_that_are_not_there(directory, change, name):
    keys = {"format": "rlds", "cameras": ("image",), "state": ("state",), "action": "action"} | change
    with pytest.raises(MissingFeatureError, match=f"no feature '{name}', found"):
        RLDSSource(directory, SourceKeys(**keys))


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_places_hold_the_bytes_wherever_they_are(values, random):
    gaps = [random.choice([b"", b"\n\x02", b"filler"]) for _ in values]
    payload = b"".join(gap + value for gap, value in zip(gaps, values, strict=True))
    for (offset, size), value in zip(rlds_source._places(payload, values, 100), values, strict=True):
        assert payload[offset - 100 :][:size] == value


# What is declared, and where


def write_tree(root, features, values, observation=None, splits=("train",), name="demo", length=6):
    """An RLDS folder with cameras, state, action and text, and further features; one episode per split."""
    steps = libero_features((16, 16, 3))["featuresDict"]["features"]["steps"]
    tree = steps["sequence"]["feature"]["featuresDict"]["features"]
    tree |= features
    tree["observation"]["featuresDict"]["features"] |= observation or {}
    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": {"steps": steps}}}))
    entries = [{"name": split, "shardLengths": ["1"]} for split in splits]
    info = {"name": name, "fileFormat": "tfrecord", "splits": entries}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for number, split in enumerate(splits):
        episode = make_episode(number, length)
        record = {
            "steps/action": episode.actions,
            "steps/observation/state": episode.state,
            "steps/language_instruction": [b"push"] * length,
        }
        record |= {f"steps/observation/{key}": frames for key, frames in episode.images.items()}
        record = {name: value for name, value in (record | values).items() if value is not None}
        write_records(folder / f"{name}-{split}.tfrecord-00000-of-00001", [build_example(record)])
    return folder


def tensor(shape, dtype="float32", **more):
    return {"tensor": {"shape": {"dimensions": [str(size) for size in shape]}, "dtype": dtype} | more}


SEQUENCE = {"sequence": {"feature": tensor((7,)), "length": "-1"}}
STRANGE = {
    "a video": {"pythonClassName": "video_feature.Video", "video": {"shape": {}}},
    "an encoded tensor": tensor((4, 4), encoding="zlib"),
    "a list in every step": SEQUENCE,
    "lists of lists": {"sequence": {"feature": SEQUENCE, "length": "-1"}},
    "texts in every step": {"sequence": {"feature": {"text": {}}, "length": "2"}},
    "a type of the future": tensor((2,), dtype="float8"),
    "no description": {"tensor": []},
    "a name": {"text": {}},
}


@pytest.mark.parametrize("what", STRANGE)
def test_only_what_is_read_has_to_be_understood(tmp_path, what):
    folder = write_tree(tmp_path, {"odd": STRANGE[what]}, {})
    source = RLDSSource(folder, KEYS)
    np.testing.assert_array_equal(source.actions(0), make_episode(0, 6).actions)
    if what != "a name":
        with pytest.raises(DataSetError, match="features.json: steps/odd is .*expected numbers of a fixed shape"):
            RLDSSource(folder, replace(KEYS, action="odd"))


@pytest.mark.parametrize(
    ("node", "values", "width"),
    [
        (tensor(()), np.arange(6, dtype=np.float32), 1),
        (tensor((2, 2)), np.arange(24, dtype=np.float32), 4),
        ({"classLabel": {"numClasses": "9"}}, np.arange(6), 1),
        ({"boundingBox": {"shape": {"dimensions": ["4"]}, "dtype": "float32"}}, np.arange(24, dtype=np.float32), 4),
        ({"sequence": {"feature": tensor((2,)), "length": "3"}}, np.arange(36, dtype=np.float32), 6),
        ({"featuresDict": {"features": {"deep": tensor((3,), "int32")}}}, None, 3),
    ],
)
def test_numbers_of_any_fixed_shape_are_laid_flat(tmp_path, node, values, width):
    nested = values is None
    values = np.arange(18) if nested else values
    name = "extra/deep" if nested else "extra"
    folder = write_tree(tmp_path, {}, {f"steps/observation/{name}": values}, observation={"extra": node})
    source = RLDSSource(folder, replace(KEYS, state=(name, "state")))
    np.testing.assert_array_equal(source.state(0)[:, :width], values.reshape(6, width))
    assert source.state(0).shape == (6, width + 8)


def test_whole_names_reach_everywhere(tmp_path):
    extra = {"proprio": tensor((2,)), "moves": {"featuresDict": {"features": {"arm": tensor((7,))}}}}
    arm = np.arange(42, dtype=np.float32).reshape(6, 7)
    folder = write_tree(tmp_path, extra, {"steps/proprio": np.ones((6, 2), np.float32), "steps/moves/arm": arm})
    source = RLDSSource(folder, replace(KEYS, state=("steps/proprio",), action="moves/arm"))
    np.testing.assert_array_equal(source.state(0), np.ones((6, 2)))
    np.testing.assert_array_equal(source.actions(0), arm)


@pytest.mark.parametrize(
    ("key", "name", "node"),
    [
        (None, "steps/observation/natural_language_instruction", {"text": {}}),
        ("ask", "steps/ask", {"text": {}}),
        ("observation/ask", "steps/observation/ask", tensor((), "string")),
        ("episode_metadata/ask", "episode_metadata/ask", {"text": {}}),
    ],
)
def test_where_the_instruction_is(tmp_path, key, name, node):
    texts = [b"fold it"] * (1 if name.startswith("episode") else 6)
    folder = write_tree(tmp_path, {}, {name: texts, "steps/language_instruction": None})
    content = json.loads((folder / "features.json").read_text())
    root = content["featuresDict"]["features"]
    root["episode_metadata"] = {"featuresDict": {"features": {}}}
    steps = root["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    del steps["language_instruction"]
    *above, last = name.split("/")
    inner = {"steps": steps, "episode_metadata": root["episode_metadata"]["featuresDict"]["features"]}[above[0]]
    for part in above[1:]:
        inner = inner[part]["featuresDict"]["features"]
    inner[last] = node
    (folder / "features.json").write_text(json.dumps(content))
    source = RLDSSource(folder, replace(KEYS, instruction=key))
    assert source.instructions[0] == "fold it" and source.lengths.tolist() == [6]


def test_an_instruction_that_is_no_text(tmp_path):
    folder = write_tree(tmp_path, {}, {})
    with pytest.raises(DataSetError, match="steps/action is tensor of 'float32', expected text"):
        RLDSSource(folder, replace(KEYS, instruction="action"))
    with pytest.raises(MissingFeatureError, match="no feature 'steps/ask', found"):
        RLDSSource(folder, replace(KEYS, instruction="ask"))


def test_the_split_is_train_or_the_only_one_or_named(tmp_path):
    only = write_tree(tmp_path, {}, {}, splits=("valid",), name="only")
    assert RLDSSource(only, KEYS).split == "valid"
    several = write_tree(tmp_path, {}, {}, splits=("val", "train", "test"), name="several")
    assert RLDSSource(several, KEYS).split == "train"
    np.testing.assert_array_equal(RLDSSource(several, KEYS, "test").actions(0), make_episode(2, 6).actions)
    none = write_tree(tmp_path, {}, {}, splits=("a", "b"), name="none")
    with pytest.raises(DataSetError, match=r"no split 'train', found splits \['a', 'b'\]: name one with --split"):
        RLDSSource(none, KEYS)


def test_shards_in_another_format_and_with_other_templates(tmp_path):
    folder = write_tree(tmp_path, {}, {})
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}-of-{NUM_SHARDS}"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert len(RLDSSource(folder, KEYS)) == 1
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "array_record"}))
    with pytest.raises(DataSetError, match="fileFormat is 'array_record', expected 'tfrecord'"):
        RLDSSource(folder, KEYS)
