"""An episode that cannot be used does not stop the others: what is left out always, what on request, who says so."""

import json
from dataclasses import replace

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from data_fixtures import make_episode, write_data_set
from format_writers import CAMERAS, make_smooth_episode, write_hdf5, write_lerobot_v21, write_lerobot_v30

from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.example_proto import build_example, parse_example
from prismatic.vla.datasets.formats import open_data_set
from prismatic.vla.datasets.registry import get_data_set_config
from prismatic.vla.datasets.source import DataSetError
from prismatic.vla.datasets.tfrecord import index_records, read_record, write_records
from prismatic.vla.images import ImageSpec

NAME = "libero_set"
STRICT = DatasetSettings(image_spec=ImageSpec(size=16), image_aug=False)
LENIENT = replace(STRICT, skip_bad_episodes=True)


def lines_about(data):
    return [line for line in data.warnings if "left out" in line]


def change_record(folder, number, change):
    """Rewrite one record of the only shard: `change` gets its features and gives them back."""
    (shard,) = folder.glob("*tfrecord*")
    records = [parse_example(read_record(shard, span)) for span in index_records(shard)]
    records[number] = change(records[number])
    write_records(shard, [build_example(record) for record in records])


def empty(record):
    return {
        name: np.empty(0, value.dtype) if isinstance(value, np.ndarray) else [] if name.startswith("steps") else value
        for name, value in record.items()
    }


def without_text(record):
    return record | {"steps/language_instruction": []}


# Without a sample


@pytest.mark.parametrize(
    ("episode", "change", "reason"),
    [
        (make_episode(1, 7), None, "episode 1 has 7 steps, expected at least one chunk of 8"),
        (make_episode(1, instruction=" "), None, "episode 1: the language instruction is empty"),
        (make_episode(1), without_text, "episode 1: the language instruction is empty"),
        (make_episode(1), empty, "episode 1 has 0 steps"),
    ],
)
@pytest.mark.parametrize("settings", [STRICT, LENIENT])
def test_episodes_without_a_sample_are_left_out_and_named(tmp_path, episode, change, reason, settings):
    folder = write_data_set(tmp_path, NAME, [make_episode(0), episode, make_episode(2)])
    if change is not None:
        change_record(folder, 1, change)
    data = VLADataset(tmp_path, NAME, settings)
    assert data.episode_ids == {NAME: [0, 2]} and len(data) == 10
    (line,) = lines_about(data)
    assert "1 of 3 episodes are left out" in line and reason in line
    left_out = json.loads(json.dumps(data.manifest()))[NAME]["left_out"]
    assert list(left_out) == ["1"] and reason in left_out["1"]
    assert {data[0, i]["sample_id"][0] for i in range(len(data))} == {0, 2}


def test_a_whole_data_set_leaves_nothing_out(tmp_path):
    write_data_set(tmp_path, NAME, [make_episode(0), make_episode(1)])
    data = VLADataset(tmp_path, NAME, LENIENT)
    assert lines_about(data) == [] and "left_out" not in data.manifest()[NAME]


def test_shots_are_counted_among_the_usable(tmp_path):
    write_data_set(tmp_path, NAME, [make_episode(i, 12 if i % 2 else 3) for i in range(6)])
    data = VLADataset(tmp_path, NAME, replace(STRICT, n_shot_episodes=3))
    assert data.episode_ids == {NAME: [1, 3, 5]}
    with pytest.raises(ValueError, match="has 3 demonstrations"):
        VLADataset(tmp_path, NAME, replace(STRICT, n_shot_episodes=4))


def test_many_are_counted_and_the_first_is_named(tmp_path):
    write_data_set(tmp_path, NAME, [make_episode(0), *(make_episode(i, 2) for i in range(1, 9))])
    data = VLADataset(tmp_path, NAME, STRICT)
    (line,) = lines_about(data)
    assert "8 of 9 episodes are left out: first: episode 1 has 2 steps" in line and "episode 2" not in line
    assert len(data.manifest()[NAME]["left_out"]) == 8


# Broken


def nan_in_actions(folder):
    def change(record):
        record["steps/action"][9] = np.nan
        return record

    change_record(folder, 1, change)


def too_few_numbers(folder):
    change_record(folder, 1, lambda record: record | {"steps/observation/state": np.zeros(9, np.float32)})


def torn_image(folder):
    def change(record):
        record["steps/observation/image"][4] = record["steps/observation/image"][4][:-300]
        return record

    change_record(folder, 1, change)


def other_image_size(folder):
    wide = make_episode(5, 1, side=40).images["image"]

    def change(record):
        record["steps/observation/image"][4:5] = wide
        return record

    change_record(folder, 1, change)


def flipped_bit(folder):
    (shard,) = folder.glob("*tfrecord*")
    content = bytearray(shard.read_bytes())
    content[index_records(shard)[1].offset + 400] ^= 8
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (nan_in_actions, r"action is not finite at \(step, dim\) \(1, 2\)"),
        (too_few_numbers, "state holds 9 values"),
        (torn_image, "image step 4: not a complete JPEG"),
        (other_image_size, r"image step 4: image \(40, 40, 3\), but declared as \(16, 16, 3\)"),
        (flipped_bit, "corrupt payload"),
    ],
)
def test_a_broken_rlds_episode_is_refused_or_left_out(tmp_path, damage, reason):
    folder = write_data_set(tmp_path, NAME, [make_episode(i) for i in range(3)])
    damage(folder)
    with pytest.raises(DataSetError, match=f"{reason}.*--skip_bad_episodes True"):
        VLADataset(tmp_path, NAME, STRICT)
    for _ in range(2):  # built, and read from the index
        data = VLADataset(tmp_path, NAME, LENIENT)
        assert data.episode_ids == {NAME: [0, 2]} and list(data.manifest()[NAME]["left_out"]) == ["1"]
        np.testing.assert_array_equal(data[0, 5]["sample_id"], (2, 0))
        with pytest.raises(DataSetError, match="--skip_bad_episodes True"):
            VLADataset(tmp_path, NAME, STRICT)


def test_missing_and_torn_shards(tmp_path):
    folder = write_data_set(tmp_path, NAME, [make_episode(i) for i in range(6)], shards=3)
    first, second, third = sorted(folder.glob("*tfrecord*"))
    first.write_bytes(first.read_bytes()[:-20])
    second.unlink()
    with pytest.raises((DataSetError, FileNotFoundError), match="--skip_bad_episodes True"):
        VLADataset(tmp_path, NAME, STRICT)
    data = VLADataset(tmp_path, NAME, LENIENT)
    left_out = data.manifest()[NAME]["left_out"]
    assert len(data.episode_ids[NAME]) == 3 and set(left_out) == {first.name, second.name}
    assert "truncated" in left_out[first.name] and "missing" in left_out[second.name]
    np.testing.assert_array_equal(data._parts[0].source.actions(2), make_episode(5).actions)


def test_nothing_left_is_an_error_about_the_first(tmp_path):
    folder = write_data_set(tmp_path, NAME, [make_episode(0), make_episode(1)])
    for number in range(2):
        change_record(folder, number, lambda record: record | {"steps/action": np.zeros(3, np.float32)})
    with pytest.raises(DataSetError, match="record 0 .*action holds 3 values"):
        VLADataset(tmp_path, NAME, LENIENT)


def open_lenient(root):
    return open_data_set(root, NAME, get_data_set_config(NAME), skip_bad=True)


def spoil_lerobot(folder, version, what):
    if what == "missing video":
        next(folder.glob(f"videos/**/{'episode_000001' if version == 'v21' else 'file-001'}.mp4")).unlink()
        return
    path = next(folder.glob(f"data/**/{'episode_000001' if version == 'v21' else 'file-001'}.parquet"))
    if what == "missing data":
        path.unlink()
    elif what == "torn data":
        path.write_bytes(path.read_bytes()[:-50])
    else:
        table = pq.read_table(path)
        pq.write_table(table.drop_columns([what]), path)


@pytest.mark.parametrize("what", ["missing data", "torn data", "missing video", "action"])
@pytest.mark.parametrize("version", ["v21", "v30"])
def test_a_broken_lerobot_episode_is_left_out(tmp_path, version, what):
    episodes = [make_smooth_episode(i, 9 + i, side=16) for i in range(3)]
    write = write_lerobot_v21 if version == "v21" else lambda *args: write_lerobot_v30(*args, per_file=1)
    folder = write(tmp_path / NAME, episodes, "video")
    spoil_lerobot(folder, version, what)
    source = open_lenient(tmp_path)
    assert source.lengths.tolist() == [9, 0, 11] and list(source.problems) == ["1"]
    np.testing.assert_array_equal(source.actions(2), episodes[2].actions)
    assert source.frame(CAMERAS["image"], 2, 10).shape == (16, 16, 3)
    assert list(VLADataset(tmp_path, NAME, LENIENT).manifest()[NAME]["left_out"]) == ["1"]


def test_a_missing_file_that_comes_back_is_read(tmp_path):
    folder = write_lerobot_v21(tmp_path / NAME, [make_smooth_episode(i, 9, side=16) for i in range(2)])
    path = folder / "data/chunk-000/episode_000001.parquet"
    content = path.read_bytes()
    path.unlink()
    assert open_lenient(tmp_path).lengths.tolist() == [9, 0]
    path.write_bytes(content)
    assert open_lenient(tmp_path).lengths.tolist() == [9, 9]


def test_broken_hdf5_demonstrations_and_files_are_left_out(tmp_path):
    texts = ["open it", "open it", "shut it"]
    folder = write_hdf5(tmp_path / NAME, [make_smooth_episode(i, 9, texts[i], side=16) for i in range(3)])
    with h5py.File(folder / "open_it_demo.hdf5", "r+") as file:
        del file["data/demo_0/obs/ee_states"]
    (folder / "torn_demo.hdf5").write_bytes((folder / "shut_it_demo.hdf5").read_bytes()[:900])
    source = open_lenient(tmp_path)
    assert source.lengths.tolist() == [0, 9, 9, 0] and list(source.problems) == ["0", "3"]
    assert source.instructions[1:3] == ["open it", "shut it"] and "torn_demo.hdf5" in source.problems["3"]


# Texts that change


def test_a_window_has_the_text_of_its_first_frame(tmp_path):
    texts = ["reach"] * 3 + ["lift"] * 9
    folder = write_data_set(tmp_path, NAME, [make_episode(0), make_episode(1)])
    change_record(folder, 1, lambda r: r | {"steps/language_instruction": [text.encode() for text in texts]})
    data = VLADataset(tmp_path, NAME, STRICT)
    samples = [data[0, i] for i in range(5, 10)]
    assert [sample["instruction"] for sample in samples] == ["reach"] * 3 + ["lift"] * 2
    assert data.manifest()[NAME]["episodes"] == {"push the plate": [0], "reach": [1], "lift": [1]}
    again = VLADataset(tmp_path, NAME, STRICT)
    assert again[0, 9]["instruction"] == "lift" and again.fingerprints == data.fingerprints


def test_an_episode_that_is_unlabelled_in_part_is_left_out(tmp_path):
    folder = write_data_set(tmp_path, NAME, [make_episode(0), make_episode(1)])
    change_record(folder, 1, lambda r: r | {"steps/language_instruction": [b"reach"] * 5 + [b""] * 7})
    assert VLADataset(tmp_path, NAME, STRICT).episode_ids == {NAME: [0]}
