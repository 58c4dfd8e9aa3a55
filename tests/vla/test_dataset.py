import dataclasses
import json
import pathlib

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from torch.utils.data import DataLoader

from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.registry import get_data_set_config, register_data_set
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_versions import find_version_directory
from prismatic.vla.datasets.sampler import EpochSampler
from prismatic.vla.datasets.selection import select_few_shot, select_validation
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.images import ImageSpec, decode_jpeg
from prismatic.vla.normalization import Normalizer

SMALL = DatasetSettings(image_spec=ImageSpec(size=16))
PLAIN = dataclasses.replace(SMALL, image_aug=False)


def keep_samples(samples):
    return samples


def assert_same(first, second):
    """Equal content; the key tells how often a sample was used before."""
    assert first.keys() == second.keys()
    for key in first.keys() - {"key"}:
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    texts = ["Open the drawer", "close the drawer", "push the plate"]
    episodes = [make_episode(i, length=10 + i % 3, instruction=texts[i % 3]) for i in range(12)]
    write_data_set(root, "libero_a_no_noops", episodes)
    write_data_set(root, "libero_b_no_noops", [make_episode(100 + i, length=9) for i in range(2)])
    return root


@pytest.fixture(scope="module")
def small(small_root):
    return VLADataset(small_root, "libero_a_no_noops", SMALL)


# Samples


def test_sample_layout(small):
    sample = small[3, 1]
    assert sample["images"].shape == (2, 16, 16, 3) and sample["images"].dtype == np.uint8
    assert sample["actions"].shape == (8, 7) and sample["proprio"].shape == (8,)
    assert sample["dataset_name"] == "libero_a_no_noops"
    assert sample["instruction"] == "Open the drawer"


def test_windows_drop_the_tail_and_follow_the_stride(small_root, small):
    lengths = [10 + i % 3 for i in range(12)]
    assert len(small) == sum(length - 7 for length in lengths)
    strided = VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, frame_stride=2))
    assert len(strided) == sum(-(-(length - 7) // 2) for length in lengths)
    assert [strided[0, i]["sample_id"] for i in range(4)] == [(0, 0), (0, 2), (1, 0), (1, 2)]


def test_one_camera(small_root):
    one = VLADataset(small_root, "libero_a", dataclasses.replace(PLAIN, num_images=1))
    two = VLADataset(small_root, "libero_a", PLAIN)
    np.testing.assert_array_equal(one[0, 7]["images"][0], two[0, 7]["images"][0])
    assert len(one[0, 7]["images"]) == 1


def test_without_augmentation_epochs_are_equal_and_frames_are_the_stored_ones(small_root):
    dataset = VLADataset(small_root, "libero_a", PLAIN)
    assert_same(dataset[0, 4], dataset[9, 4])
    episode, step = dataset[0, 4]["sample_id"]
    stored = RLDSReader(find_version_directory(small_root, "libero_a_no_noops")).episode(episode)
    np.testing.assert_array_equal(dataset[0, 4]["images"][1], decode_jpeg(stored.images["wrist_image"][step]))


def test_augmentation_depends_on_seed_epoch_and_index(small_root, small):
    first = small[0, 4]["images"]
    np.testing.assert_array_equal(first, small[0, 4]["images"])
    other_seed = VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, seed=8))
    for other in (small[1, 4], other_seed[0, 4]):
        assert (first != other["images"]).mean() > 0.3


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_gives_the_same_samples_with_any_number_of_workers(small, workers):
    loader = DataLoader(
        small, batch_size=4, sampler=EpochSampler(len(small), seed=1), num_workers=workers, collate_fn=keep_samples
    )
    keys = iter(EpochSampler(len(small), seed=1))
    for batch, _ in zip(loader, range(len(small) // 3), strict=False):
        for sample in batch:
            assert_same(sample, small[next(keys)])


def test_index_out_of_range(small):
    with pytest.raises(IndexError, match=str(len(small))):
        small[0, len(small)]


# Names, mixtures and statistics


def test_suite_name_without_suffix_finds_the_data(small_root, small):
    assert VLADataset(small_root, "libero_a", SMALL).statistics == small.statistics


def test_missing_data_set_lists_what_is_there(small_root):
    with pytest.raises(FileNotFoundError, match="'libero_c' not found.*libero_a_no_noops.*libero_b_no_noops"):
        VLADataset(small_root, "libero_c", SMALL)
    with pytest.raises(FileNotFoundError, match="data root .*absent"):
        VLADataset(small_root / "absent", "libero_a", SMALL)


def test_missing_split(small_root):
    with pytest.raises(ValueError, match="no split 'val'"):
        VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, split="val"))


def test_concatenation_keeps_statistics_per_data_set(small_root, small):
    both = VLADataset(small_root, "libero_a,libero_b", PLAIN)
    alone = VLADataset(small_root, "libero_b", PLAIN)
    assert both.data_set_names == ["libero_a_no_noops", "libero_b_no_noops"]
    assert both.statistics == {**small.statistics, **alone.statistics}
    assert len(both) == len(small) + len(alone)
    assert_same(both[0, len(small)], alone[0, 0])
    assert both.group_sizes == [len(small), len(alone)] and both.weights == [1.0, 1.0]
    weighted = VLADataset(small_root, "libero_a:0.25,libero_b:2", PLAIN)
    assert weighted.weights == [0.25, 2.0] and len(weighted) == len(both)
    with pytest.raises(ValueError, match="several data sets"):
        _ = both.normalizer


def test_given_normalizer_replaces_the_statistics(small_root, small):
    statistics = json.loads(json.dumps(small.normalizer.statistics))
    statistics["proprio"]["q99"][0] += 10.0
    given = Normalizer(statistics, ActionSpec(), "libero_a_no_noops")
    dataset = VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, normalizer=given))
    assert dataset.statistics == {"libero_a_no_noops": statistics}
    assert dataset[0, 0]["proprio"][0] < small[0, 0]["proprio"][0]
    np.testing.assert_array_equal(dataset[0, 0]["proprio"][1:], small[0, 0]["proprio"][1:])


def test_statistics_of_another_data_set(small_root, small):
    wrong_key = dataclasses.replace(SMALL, normalizer=small.normalizer)
    with pytest.raises(ValueError, match=r"\['libero_a_no_noops'\].*missing \['libero_b_no_noops'\]"):
        VLADataset(small_root, "libero_b", wrong_key)
    other_kind = Normalizer(small.normalizer.statistics, ActionSpec(normalization="bounds"), "libero_a_no_noops")
    with pytest.raises(ValueError, match="BOUNDS_Q99"):
        VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, normalizer=other_kind))


def test_collection_metadata_is_passed_on(tmp_path, small):
    from prismatic.vla.datasets.rlds import write_rlds

    write_rlds(tmp_path / "libero_x" / "1.0.0", "x", [make_episode(0)], 1, (16, 16, 3), {"render_mode": "lazy"})
    assert VLADataset(tmp_path, "libero_x", SMALL).metadata == {"libero_x": {"render_mode": "lazy"}}
    assert small.metadata == {"libero_a_no_noops": None}


# Few-shot


def test_few_shot_keeps_n_per_instruction_nested_and_deterministic(small_root):
    kept = {}
    for shots in (1, 2, 4):
        settings = dataclasses.replace(SMALL, n_shot_episodes=shots)
        dataset = VLADataset(small_root, "libero_a", settings)
        kept[shots] = dataset.episode_ids["libero_a_no_noops"]
        assert kept[shots] == VLADataset(small_root, "libero_a", settings).episode_ids["libero_a_no_noops"]
        assert np.bincount(np.array(kept[shots]) % 3).tolist() == [shots] * 3
        assert {dataset[0, i]["sample_id"][0] for i in range(len(dataset))} == set(kept[shots])
        assert dataset.statistics["libero_a_no_noops"]["num_trajectories"] == 3 * shots
    assert set(kept[1]) < set(kept[2]) < set(kept[4])


def test_few_shot_five_in_ten_and_seeds_differ():
    instructions = ["a", "b"] * 25
    five, ten = (select_few_shot(instructions, n, 7, "demo") for n in (5, 10))
    assert (len(five), len(ten)) == (10, 20)
    assert set(five) < set(ten)
    assert five != select_few_shot(instructions, 5, 8, "demo")


def test_few_shot_choice_of_a_task_does_not_depend_on_other_tasks():
    alone = select_few_shot(["a"] * 10, 3, 7, "demo")
    assert alone == select_few_shot(["a"] * 10 + ["b"] * 10, 3, 7, "demo")[:3]


def test_more_shots_than_demonstrations(small_root):
    with pytest.raises(ValueError, match="libero_a_no_noops: n_shot_episodes is 5, but 'Open the drawer' has 4"):
        VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, n_shot_episodes=5))


def test_the_subset_seed_is_its_own(small_root):
    def kept(**change):
        settings = dataclasses.replace(SMALL, n_shot_episodes=2, **change)
        return VLADataset(small_root, "libero_a", settings).episode_ids

    assert kept(seed=1, subset_seed=7) == kept(seed=2, subset_seed=7) == kept(seed=7)
    assert kept(seed=7, subset_seed=8) != kept(seed=7)


def test_the_manifest_lists_the_used_episodes_by_instruction(small_root):
    dataset = VLADataset(small_root, "libero_a,libero_b", dataclasses.replace(SMALL, n_shot_episodes=2))
    manifest = json.loads(json.dumps(dataset.manifest()))
    assert manifest.keys() == {"libero_a_no_noops", "libero_b_no_noops"}
    entry = manifest["libero_a_no_noops"]
    assert entry["fingerprint"] == dataset.fingerprints["libero_a_no_noops"] and entry["seed"] == 7
    assert {text: len(ids) for text, ids in entry["episodes"].items()} == {
        "Open the drawer": 2, "close the drawer": 2, "push the plate": 2,
    }  # fmt: skip
    assert sorted(sum(entry["episodes"].values(), [])) == dataset.episode_ids["libero_a_no_noops"]


# Validation


def test_validation_takes_episodes_of_every_instruction_and_shares_none(small_root):
    parts = {}
    for part in ("train", "val"):
        settings = dataclasses.replace(SMALL, val_fraction=0.3, part=part)
        dataset = VLADataset(small_root, "libero_a", settings)
        parts[part] = dataset.episode_ids["libero_a_no_noops"]
        assert {dataset[0, i]["sample_id"][0] for i in range(len(dataset))} == set(parts[part])
    assert sorted(parts["train"] + parts["val"]) == list(range(12))
    assert np.bincount(np.array(parts["val"]) % 3).tolist() == [1, 1, 1]


def test_few_shot_episodes_come_from_the_training_part(small_root):
    train = dataclasses.replace(SMALL, val_fraction=0.25, n_shot_episodes=3)
    val = dataclasses.replace(SMALL, val_fraction=0.25, part="val")
    kept, held_out = (VLADataset(small_root, "libero_a", s).episode_ids["libero_a_no_noops"] for s in (train, val))
    assert len(kept) == 9 and not set(kept) & set(held_out)


def test_an_instruction_keeps_at_least_one_episode_for_training():
    assert select_validation(["a", "b", "b", "c"], 0.9, 7) in ([1], [2])
    assert len(select_validation(["a"] * 100, 0.05, 7)) == 5
    assert select_validation(["a"] * 100, 0.05, 7) != select_validation(["a"] * 100, 0.05, 8)


def test_nothing_to_hold_out(tmp_path):
    write_data_set(tmp_path, "libero_single", [make_episode(0)])
    with pytest.raises(ValueError, match="libero_single: no instruction has two demonstrations"):
        VLADataset(tmp_path, "libero_single", dataclasses.replace(SMALL, val_fraction=0.5, part="val"))


@pytest.mark.parametrize("change", [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"part": "val"}, {"part": "test"}])
def test_bad_validation_settings(change):
    with pytest.raises(ValueError, match="DatasetSettings"):
        DatasetSettings(**change)


# Bad data


def test_an_image_that_does_not_decode_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("prismatic.vla.datasets.rlds._image_features", lambda episode, *_: {
        f"steps/observation/{key}": frames for key, frames in episode.images.items()
    })  # fmt: skip
    episode = make_episode(0)
    episode.images["wrist_image"][3] = episode.images["wrist_image"][3][:-200]
    write_data_set(tmp_path, "libero_torn", [episode])
    with pytest.raises(DataSetError, match="record 0 .*wrist_image step 3: not a complete JPEG"):
        VLADataset(tmp_path, "libero_torn", SMALL)


def write_unchecked(root, episode, monkeypatch):
    monkeypatch.setattr("prismatic.vla.datasets.rlds.np.isfinite", lambda values: np.ones_like(values, dtype=bool))
    write_data_set(root, "libero_bad", [make_episode(0), episode])
    monkeypatch.undo()


@pytest.mark.parametrize(("field", "group", "dim"), [("actions", "action", 2), ("state", "state", 7)])
def test_nan_is_located(tmp_path, monkeypatch, field, group, dim):
    episode = make_episode(1)
    getattr(episode, field)[5, dim] = np.nan
    write_unchecked(tmp_path, episode, monkeypatch)
    with pytest.raises(ValueError, match=rf"libero_bad: episode 1: {group} is not finite .*\(5, {dim}\)"):
        VLADataset(tmp_path, "libero_bad", SMALL)


def test_only_episodes_shorter_than_a_chunk(tmp_path):
    write_data_set(tmp_path, "libero_short", [make_episode(i, length=7) for i in range(2)])
    with pytest.raises(ValueError, match="libero_short: episode 0 has 7 steps.*none of 2 episodes"):
        VLADataset(tmp_path, "libero_short", SMALL)


def test_empty_instruction(tmp_path):
    write_data_set(tmp_path, "libero_mute", [make_episode(0, instruction=" ")])
    with pytest.raises(ValueError, match="libero_mute: episode 0: the language instruction is empty"):
        VLADataset(tmp_path, "libero_mute", SMALL)


def test_more_cameras_than_the_data_set_has(small_root):
    with pytest.raises(ValueError, match=r"num_images is 3.*\['image', 'wrist_image'\]"):
        VLADataset(small_root, "libero_a", dataclasses.replace(SMALL, num_images=3))


def test_camera_missing_from_features(tmp_path):
    directory = write_data_set(tmp_path, "libero_one", [make_episode(0)])
    text = (directory / "features.json").read_text()
    (directory / "features.json").write_text(text.replace('"wrist_image"', '"image"', 1))
    tree = json.loads((directory / "features.json").read_text())
    assert "wrist_image" not in json.dumps(tree)
    with pytest.raises(MissingFeatureError, match="no feature 'steps/observation/wrist_image'"):
        VLADataset(tmp_path, "libero_one", SMALL)
    assert len(VLADataset(tmp_path, "libero_one", dataclasses.replace(SMALL, num_images=1))) == 5


@pytest.mark.parametrize("name", ["num_images", "frame_stride", "n_shot_episodes"])
def test_settings_must_be_positive(name):
    with pytest.raises(ValueError, match=name):
        DatasetSettings(**{name: 0})


# Folders and splits


def test_folders_of_configurations(tmp_path):
    for name in ("libero_a/one", "libero_a/two", "libero_b/only", "someone/libero_c"):
        write_data_set(tmp_path / name / "..", name.rpartition("/")[2], [make_episode(0)])
    for name in ("libero_a/one", "libero_b", "libero_b/only"):
        data = VLADataset(tmp_path, name, SMALL)
        assert data.data_set_names == [name] and data[0, 0]["dataset_name"] == name
    both = VLADataset(tmp_path, "libero_a/one,libero_a/two:2", SMALL)
    assert list(both.statistics) == ["libero_a/one", "libero_a/two"] and both.weights == [1, 2]
    with pytest.raises(
        ValueError, match="'libero_a' has several configurations: name one of libero_a/one, libero_a/two"
    ):
        VLADataset(tmp_path, "libero_a", SMALL)
    with pytest.raises(FileNotFoundError, match=r"libero_x.*found data sets \['libero_a/one', .*'someone/libero_c'\]"):
        VLADataset(tmp_path, "libero_x", SMALL)
    register_data_set("someone/libero_c", get_data_set_config("libero_"))
    assert len(VLADataset(tmp_path, "someone/libero_c", SMALL)) == 5


@pytest.mark.parametrize("name", ["libero_a/../libero_a", "libero_a/..", "libero_a//b", "libero_a/.", "libero_\0"])
def test_names_are_names(small_root, name):
    with pytest.raises(ValueError, match="expected the name of a folder below"):
        VLADataset(small_root, name, SMALL)


def test_a_split_that_nobody_named_is_said(tmp_path):
    directory = write_data_set(tmp_path, "libero_late", [make_episode(0)])
    info = json.loads((directory / "dataset_info.json").read_text())
    info["splits"][0]["name"] = "valid"
    (directory / "dataset_info.json").write_text(json.dumps(info))
    next(directory.glob("*tfrecord*")).rename(directory / "libero_late-valid.tfrecord-00000-of-00001")
    data, named = (VLADataset(tmp_path, "libero_late", dataclasses.replace(SMALL, split=s)) for s in (None, "valid"))
    assert [line for line in data.warnings if "split" in line] == [
        "libero_late: split 'valid' is read, the only one (--split)"
    ]
    assert not any("split" in line for line in named.warnings)
    assert data.manifest()["libero_late"]["split"] == "valid"


def test_a_folder_of_somebody_else_does_not_matter(tmp_path, monkeypatch):
    write_data_set(tmp_path, "libero_mine", [make_episode(0)])
    (tmp_path / "theirs").mkdir()
    iterdir = pathlib.Path.iterdir

    def guarded(path):
        if path.name == "theirs":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(pathlib.Path, "iterdir", guarded)
    assert len(VLADataset(tmp_path, "libero_mine", SMALL)) == 5
    with pytest.raises(FileNotFoundError, match="libero_mine"):
        VLADataset(tmp_path, "libero_other", SMALL)
