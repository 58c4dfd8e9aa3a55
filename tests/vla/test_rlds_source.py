import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from hypothesis import given, settings
from hypothesis import strategies as st

from prismatic.vla.datasets import index as index_module
from prismatic.vla.datasets import rlds_source
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_source import RLDSSource
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys
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
    with pytest.raises(PermissionError, match="neither"):
        RLDSSource(directory, KEYS)


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
