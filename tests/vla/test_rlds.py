import json

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set

from prismatic.vla.datasets.rlds import RLDSReader, write_rlds
from prismatic.vla.datasets.rlds_versions import find_version_directory
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.datasets.tfrecord import CorruptRecordError, index_records


def edit_json(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_written_data_read_back(tmp_path, shards):
    episodes = [make_episode(index, length=9 + index) for index in range(5)]
    directory = write_rlds(tmp_path / "demo" / "1.0.0", "other_name", episodes, shards, (16, 16, 3), {"seed": 3})
    reader = RLDSReader(directory)
    assert reader.metadata == {"seed": 3}
    assert len(reader.shard_paths) == shards
    assert reader.shard_paths[0].name == f"other_name-train.tfrecord-00000-of-{shards:05d}"
    for written, read in zip(episodes, reader, strict=True):
        np.testing.assert_array_equal(written.actions, read.actions)
        np.testing.assert_array_equal(written.state, read.state)
        np.testing.assert_array_equal(written.joint_state, read.joint_state)
        assert (written.images, written.instruction, written.file_path) == (
            read.images,
            read.instruction,
            read.file_path,
        )
        np.testing.assert_array_equal(np.flatnonzero(read.reward), [len(read) - 1])
        np.testing.assert_array_equal(np.flatnonzero(read.is_first), [0])
        np.testing.assert_array_equal(np.flatnonzero(read.is_terminal), [len(read) - 1])


def test_failing_collector_leaves_nothing(tmp_path):
    def episodes():
        yield make_episode(0)
        raise RuntimeError("simulator crashed")

    with pytest.raises(RuntimeError, match="simulator crashed"):
        write_rlds(tmp_path / "demo" / "1.0.0", "demo", episodes(), 1, (16, 16, 3))
    assert list((tmp_path / "demo").iterdir()) == []


def test_writer_does_not_overwrite(tmp_path):
    write_data_set(tmp_path, "demo", [make_episode(0)])
    with pytest.raises(FileExistsError, match="1.0.0"):
        write_data_set(tmp_path, "demo", [make_episode(1)])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("actions", np.zeros((12, 6), np.float32), r"steps/action has shape \(12, 6\)"),
        ("state", np.full((12, 8), np.nan, np.float32), "steps/observation/state.*not finite"),
        ("joint_state", None, "joint_state has shape"),
        ("images", {"image": []}, "camera 'image' has 0 images, expected 12"),
    ],
)
def test_writer_refuses_bad_episodes(tmp_path, field, value, message):
    episode = make_episode(4)
    setattr(episode, field, value)
    with pytest.raises(ValueError, match=f"episode 4 .*{message}"):
        write_data_set(tmp_path, "demo", [episode])


def test_writer_refuses_images_of_another_size(tmp_path):
    with pytest.raises(ValueError, match=r"image at step 0 is \('JPEG', 16, 16, 3\), expected \('JPEG', 32, 32, 3\)"):
        write_data_set(tmp_path, "demo", [make_episode(0)], side=32)


def test_missing_data_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_version_directory(tmp_path / "nowhere", "demo")


def test_missing_data_set_lists_what_is_there(tmp_path):
    write_data_set(tmp_path, "libero_there", [make_episode(0)])
    (tmp_path / "not_a_data_set").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'libero_missing' not found.*\['libero_there'\]"):
        find_version_directory(tmp_path, "libero_missing")


def test_highest_version_wins(tmp_path):
    for version in ("1.2.0", "1.10.0", "1.9.9"):
        write_rlds(tmp_path / "demo" / version, "demo", [make_episode(0)], 1, (16, 16, 3))
    assert find_version_directory(tmp_path, "demo").name == "1.10.0"


def test_missing_split_lists_splits(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0)])
    with pytest.raises(ValueError, match=r"dataset_info.json: no split 'val', found splits \['train'\]"):
        RLDSReader(directory, split="val")


def test_missing_shard(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0), make_episode(1)], shards=2)
    (directory / "demo-train.tfrecord-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing shards \['demo-train.tfrecord-00001-of-00002'\]"):
        RLDSReader(directory)


def test_record_count_other_than_declared(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0)])
    edit_json(directory / "dataset_info.json", lambda info: info["splits"][0].update(shardLengths=["3"]))
    with pytest.raises(ValueError, match="1 records, dataset_info.json declares 3"):
        RLDSReader(directory)


def test_broken_dataset_info(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0)])
    (directory / "dataset_info.json").write_text('{"name": "demo"}')
    with pytest.raises(ValueError, match=r"dataset_info.json.*'splits'"):
        RLDSReader(directory)


def test_feature_missing_from_features_json(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0)])

    def drop_state(tree):
        steps = tree["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
        del steps["observation"]["featuresDict"]["features"]["state"]

    edit_json(directory / "features.json", drop_state)
    with pytest.raises(MissingFeatureError, match=r"features.json: no feature 'steps/observation/state', found \["):
        RLDSReader(directory)


def test_features_of_unknown_types_are_nobodys_business_until_they_are_read(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0)])
    edit_json(directory / "features.json", lambda tree: tree["featuresDict"]["features"].update(audio={"waves": {}}))
    reader = RLDSReader(directory)
    assert reader.features["audio"].kind == "other" and len(reader.episode(0)) == 12
    with pytest.raises(DataSetError, match="audio is declared as other of .*waves"):
        reader.numbers(reader.record(0).values() | {"audio": np.zeros(12)}, "audio", 12, "here")


def test_truncated_and_corrupt_shards(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0), make_episode(1)])
    shard = next(directory.glob("*tfrecord*"))
    complete = shard.read_bytes()
    span = index_records(shard)[1]
    shard.write_bytes(complete[:-10])
    with pytest.raises(CorruptRecordError, match=rf"{shard.name}: record 1 at offset {span.offset} is truncated"):
        RLDSReader(directory)
    damaged = bytearray(complete)
    damaged[span.offset + 100] ^= 0xFF
    shard.write_bytes(bytes(damaged))
    reader = RLDSReader(directory)
    assert len(reader.episode(0)) == 12
    with pytest.raises(CorruptRecordError, match=rf"{shard.name}: record 1 at offset {span.offset}.*checksum"):
        reader.episode(1)


def test_declared_shape_disagrees_with_the_record(tmp_path):
    directory = write_data_set(tmp_path, "demo", [make_episode(0)])
    text = (directory / "features.json").read_text()
    (directory / "features.json").write_text(text.replace('"8"', '"9"'))
    with pytest.raises(CorruptRecordError, match=r"observation/state holds 96 values, expected shape \(12, 9\)"):
        RLDSReader(directory).episode(0)
