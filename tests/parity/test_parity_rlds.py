"""The small RLDS data set against reference numbers: raw values, statistics, normalised windows, prompts, images."""

import hashlib
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from parity_fixtures import OTHER_DCT, assert_levels, read_json

from prismatic.vla.action_spec import ActionSpec, NormalizationType
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.registry import get_data_set_config, register_data_set
from prismatic.vla.datasets.rlds import RLDSReader, write_rlds
from prismatic.vla.datasets.rlds_versions import find_version_directory, list_data_sets
from prismatic.vla.image_resampling import center_crop, resize_lanczos3
from prismatic.vla.images import ImageSpec, decode_jpeg
from prismatic.vla.prompts import build_prompt

TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def golden(golden_dir):
    """Folder, data set name, reference values and images."""
    folder = golden_dir / "rlds_mini"
    (name,) = list_data_sets(folder)
    return SimpleNamespace(
        folder=folder,
        name=name,
        facts=read_json(folder / "expected.json"),
        values=dict(np.load(folder / "expected.npz")),
        images=dict(np.load(folder / "expected_images.npz")),
    )


@pytest.fixture(scope="module", autouse=True)
def config(golden):
    libero = get_data_set_config("libero_")  # the set may have any name; its README says whose conventions it has
    register_data_set(golden.name, libero)
    return libero


@pytest.fixture(scope="module")
def reader(golden):
    return RLDSReader(find_version_directory(golden.folder, golden.name))


@pytest.fixture(scope="module")
def make_dataset(golden, reader, config):
    """make_dataset(normalisation kind) -> windows of all frames at their stored size, without augmentation."""
    _, chunk_len, action_dim = golden.values["ep0/chunk_actions"].shape
    proprio_dim = golden.values["ep0/chunk_proprio"].shape[1]
    size = reader.require_camera(config.keys[0].cameras[0]).shape[0]

    def make(kind):
        spec = ActionSpec(chunk_len, action_dim, proprio_dim, kind)
        settings = DatasetSettings(action_spec=spec, image_spec=ImageSpec(size=size), image_aug=False)
        return VLADataset(golden.folder, golden.name, settings)

    return make


@pytest.fixture(scope="module")
def dataset(golden, make_dataset):
    return make_dataset(golden.facts["normalization_type"])


def samples_of(dataset):
    """{episode: its samples in order}."""
    found = {}
    for index in range(len(dataset)):
        sample = dataset[0, index]
        found.setdefault(sample["sample_id"][0], []).append(sample)
    return found


# What is stored


def test_raw_values(golden, reader):
    assert reader.num_episodes == len(golden.facts["episodes"])
    for episode in reader:
        pairs = {
            "raw_action": episode.actions,
            "raw_state": episode.state,
            "raw_joint_state": episode.joint_state,
            **{n: getattr(episode, n) for n in ("reward", "discount", "is_first", "is_last", "is_terminal")},
        }
        for name, value in pairs.items():
            reference = golden.values[f"ep{episode.index}/{name}"]
            assert value.dtype == reference.dtype, name
            np.testing.assert_array_equal(value, reference, err_msg=name)


def test_texts_and_jpeg_bytes(golden, reader):
    assert reader.shard_lengths == golden.facts["shard_lengths"]
    for episode, facts in zip(reader, golden.facts["episodes"], strict=True):
        assert (episode.index, len(episode)) == (facts["index"], facts["length"])
        assert (episode.instruction, episode.file_path) == (facts["instruction"], facts["file_path"])
        assert set(episode.images) == set(facts["jpeg_bytes"]) == set(facts["sha256_first_jpeg"])
        for key, jpegs in episode.images.items():
            assert [len(jpeg) for jpeg in jpegs] == facts["jpeg_bytes"][key]
            assert hashlib.sha256(jpegs[0]).hexdigest() == facts["sha256_first_jpeg"][key]


def test_prompts(golden):
    for facts in golden.facts["episodes"]:
        assert build_prompt(facts["instruction"]) == facts["prompt"]


def test_writer_reproduces_the_description_files(golden, reader, config, tmp_path):
    shape, shards = reader.require_camera(config.keys[0].cameras[0]).shape, len(reader.shard_lengths)
    version = reader.directory.name
    directory = write_rlds(tmp_path / golden.name / version, reader.name, list(reader), shards, shape)
    assert read_json(directory / "features.json") == read_json(reader.features_path)
    infos = [read_json(folder / "dataset_info.json") for folder in (directory, reader.directory)]
    for info in infos:
        (split,) = info["splits"]
        lengths = [int(length) for length in split.pop("shardLengths")]  # episodes may be dealt out differently
        assert (len(lengths), sum(lengths)) == (shards, reader.num_episodes)
    written, stored = ({k: info[k] for k in ("name", "version", "fileFormat", "splits")} for info in infos)
    assert json.dumps(written, sort_keys=True) == json.dumps(stored, sort_keys=True)


# Statistics and normalised values


def test_statistics(golden, dataset):
    expected = golden.facts["dataset_statistics"]
    assert dataset.statistics.keys() == expected.keys() == {golden.name}
    actual, reference = dataset.statistics[golden.name], expected[golden.name]
    lengths = [facts["length"] for facts in golden.facts["episodes"]]
    for name, total in (("num_transitions", sum(lengths)), ("num_trajectories", len(lengths))):
        assert actual[name] == reference[name] == total
    assert actual["action"]["mask"] == reference["action"]["mask"]
    for group in ("action", "proprio"):
        assert actual[group].keys() == reference[group].keys()
        for name in reference[group].keys() - {"mask"}:
            np.testing.assert_allclose(
                actual[group][name], reference[group][name], rtol=0, atol=TOLERANCE, err_msg=f"{group} {name}"
            )


def test_standardised_values(golden, reader, config):
    for episode in reader:
        action, proprio = config.standardize(episode.actions, episode.state)
        np.testing.assert_array_equal(action, golden.values[f"ep{episode.index}/standardised_action"])
        np.testing.assert_array_equal(proprio, golden.values[f"ep{episode.index}/standardised_proprio"])


def normalised(golden, kind, episode):
    """Reference (actions, proprio) of all frames of an episode; the default kind carries no suffix."""
    suffix = "" if kind.value == golden.facts["normalization_type"] else f"_{kind.value}"
    return [golden.values[f"ep{episode}/normalised_{group}{suffix}"] for group in ("action", "proprio")]


@pytest.mark.parametrize("kind", list(NormalizationType))
def test_normalised_frames(golden, reader, config, make_dataset, kind):
    normalizer = make_dataset(kind).normalizer
    for episode in reader:
        action, proprio = config.standardize(episode.actions, episode.state)
        pairs = zip(
            (normalizer.normalize_action(action), normalizer.normalize_proprio(proprio)),
            normalised(golden, kind, episode.index),
            strict=True,
        )
        for found, reference in pairs:
            assert found.dtype == reference.dtype == np.float32
            np.testing.assert_allclose(found, reference, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", list(NormalizationType))
def test_normalised_windows(golden, make_dataset, kind):
    for episode, samples in samples_of(make_dataset(kind)).items():
        actions, proprio = normalised(golden, kind, episode)
        for sample in samples:
            step = sample["sample_id"][1]
            window = actions[step : step + len(sample["actions"])]
            np.testing.assert_allclose(sample["actions"], window, rtol=0, atol=TOLERANCE)
            np.testing.assert_allclose(sample["proprio"], proprio[step], rtol=0, atol=TOLERANCE)


def test_chunks_frames_and_order(golden, dataset):
    assert len(dataset) == golden.facts["total_usable_frames"]
    samples = samples_of(dataset)
    assert list(samples) == [facts["index"] for facts in golden.facts["episodes"]]
    for facts in golden.facts["episodes"]:
        mine, key = samples[facts["index"]], f"ep{facts['index']}"
        assert len(mine) == facts["usable_frames"]
        assert {s["instruction"] for s in mine} == {facts["instruction"]}
        assert [s["sample_id"][1] for s in mine] == golden.values[f"{key}/chunk_frame_ids"].tolist()
        for name, field in (("chunk_actions", "actions"), ("chunk_proprio", "proprio")):
            found = np.stack([s[field] for s in mine])
            np.testing.assert_allclose(found, golden.values[f"{key}/{name}"], rtol=0, atol=TOLERANCE)


# Images


def stored_images(golden, pattern):
    """(frame key `epI_tT_CAMERA`, match of the name, reference image) of all stored images of one kind."""
    found = []
    for key, image in golden.images.items():
        frame, name = key.split("/")
        if match := re.fullmatch(pattern, name):
            found.append((frame, match, image))
    assert found, pattern
    return found


def frame_position(config, frame):
    """`epI_tT_CAMERA` -> (episode, step, position of the camera in a sample, its key)."""
    episode, step, camera = re.fullmatch(r"ep(\d+)_t(\d+)_(primary|wrist)", frame).groups()
    position = ("primary", "wrist").index(camera)
    return int(episode), int(step), position, config.keys[0].cameras[position]


def test_decoded_images(golden, reader, config):
    for frame, _, reference in stored_images(golden, "decoded"):
        episode, step, _, camera = frame_position(config, frame)
        decoded = decode_jpeg(reader.episode(episode).images[camera][step])
        np.testing.assert_array_equal(decoded, golden.images[f"{frame}/decoded_accurate_dct"], err_msg=frame)
        assert_levels(decoded, reference, **OTHER_DCT, what=frame)


def test_resized_images(golden):
    for frame, match, reference in stored_images(golden, r"resized_(\d+)"):
        size = int(match[1])
        resized = resize_lanczos3(golden.images[f"{frame}/decoded"], (size, size))
        assert_levels(resized, reference, most=1, fraction=1e-3, what=frame)


def test_center_crops(golden):
    for frame, match, reference in stored_images(golden, r"(resized_\d+)_center_crop"):
        cropped = center_crop(golden.images[f"{frame}/{match[1]}"], ImageSpec().crop_area)
        assert_levels(cropped, reference, most=1, fraction=1e-3, what=frame)


def test_samples_hold_primary_then_wrist_image_of_their_frame(golden, config, dataset):
    samples = {sample["sample_id"]: sample for group in samples_of(dataset).values() for sample in group}
    checked = 0
    for frame, _, reference in stored_images(golden, "decoded_accurate_dct"):
        episode, step, position, _ = frame_position(config, frame)
        if (episode, step) in samples:
            np.testing.assert_array_equal(samples[episode, step]["images"][position], reference, err_msg=frame)
            checked += 1
    assert checked
