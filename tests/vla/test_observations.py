"""Data sets as memory: observations without actions, statistics that are known already, folders that do not fit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from format_writers import make_smooth_episode, write_hdf5, write_lerobot_v21, write_lerobot_v30
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from test_collator import FakeImageProcessor, make_tokenizer

from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.example_proto import build_example, parse_example
from prismatic.vla.datasets.known_statistics import outside
from prismatic.vla.datasets.registry import get_data_set_config, register_data_set
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.datasets.source_files import content_of
from prismatic.vla.datasets.tfrecord import index_records, read_record, write_records
from prismatic.vla.images import ImageSpec
from prismatic.vla.normalization import Normalizer, StatisticsError, compute_statistics

SHIPPED = Path(__file__).parents[2] / "datasets" / "rlds"
NAME = "libero_set_no_noops"
PLAIN = DatasetSettings(image_spec=ImageSpec(size=32), image_aug=False)
SEEN = replace(PLAIN, observations_only=True)
SPATIAL, OBJECT = "libero_spatial_scripted_no_noops", "libero_object_scripted_no_noops"


def write_small(root: Path, kind: str) -> Path:
    episodes = [make_smooth_episode(i, length=9 + i) for i in range(3)]
    if kind == "rlds":
        return write_data_set(root, NAME, episodes, side=32)
    writer = {"v21": write_lerobot_v21, "v30": write_lerobot_v30, "hdf5": write_hdf5}[kind]
    return writer(root / NAME, episodes)


def remove_actions(folder: Path, kind: str) -> None:
    """What a folder of observations alone looks like."""
    if kind == "hdf5":
        import h5py

        for path in folder.glob("*.hdf5"):
            with h5py.File(path, "r+") as file:
                for demo in file["data"].values():
                    del demo["actions"]
    elif kind == "rlds":
        features = json.loads((folder / "features.json").read_text())
        del _step(features)["action"]
        (folder / "features.json").write_text(json.dumps(features))
        for shard in folder.glob("*.tfrecord-*"):
            records = [parse_example(read_record(shard, span)) for span in index_records(shard)]
            write_records(shard, [build_example({k: v for k, v in r.items() if k != "steps/action"}) for r in records])
    else:
        import pyarrow.parquet as pq

        info = json.loads((folder / "meta" / "info.json").read_text())
        del info["features"]["action"]
        (folder / "meta" / "info.json").write_text(json.dumps(info))
        for path in folder.glob("data/*/*.parquet"):
            pq.write_table(pq.read_table(path).drop_columns(["action"]), path)


def test_actions_of_another_size_are_refused_although_they_are_not_read(tmp_path):
    import h5py

    folder = write_small(tmp_path, "hdf5")
    for path in folder.glob("*.hdf5"):
        with h5py.File(path, "r+") as file:
            for demo in file["data"].values():
                length = len(demo["actions"])
                del demo["actions"]
                demo["actions"] = np.zeros((length, 9))
    with pytest.raises(DataSetError, match="9"):
        VLADataset(tmp_path, NAME, SEEN)


def _step(features: dict) -> dict:
    steps = features["featuresDict"]["features"]["steps"]
    return steps["sequence"]["feature"]["featuresDict"]["features"]


def all_samples(data: VLADataset) -> dict:
    return {sample["sample_id"]: sample for sample in (data[0, i] for i in range(len(data)))}


def assert_same_observation(first: dict, second: dict) -> None:
    for name in ("images", "proprio", "instruction"):
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


# Without actions


@pytest.mark.parametrize("kind", ["rlds", "v21", "v30", "hdf5"])
def test_every_frame_is_an_observation_with_and_without_actions_on_disk(tmp_path, kind):
    write_small(tmp_path / "whole", kind)
    acting, seen = (VLADataset(tmp_path / "whole", NAME, chosen) for chosen in (PLAIN, SEEN))
    observations = all_samples(seen)
    assert set(observations) == {(episode, step) for episode in range(3) for step in range(9 + episode)}
    assert not any("actions" in sample for sample in observations.values())
    for place, sample in all_samples(acting).items():
        assert_same_observation(sample, observations[place])

    remove_actions(write_small(tmp_path / "bare", kind), kind)
    bare = all_samples(VLADataset(tmp_path / "bare", NAME, SEEN))
    assert bare.keys() == observations.keys()
    for place, sample in bare.items():
        assert_same_observation(sample, observations[place])
    with pytest.raises((MissingFeatureError, DataSetError), match="action"):
        VLADataset(tmp_path / "bare", NAME, PLAIN)


@pytest.mark.parametrize("kind", ["rlds", "v21", "hdf5"])
def test_the_order_of_opening_does_not_matter(tmp_path, kind):
    def opened(order):
        root = tmp_path / "-".join(str(entry) for entry in order)
        write_small(root, kind)
        found = {only: VLADataset(root, NAME, replace(PLAIN, observations_only=only)) for only in order}
        return [(found[only].fingerprints, found[only][0, 1]) for only in (False, True)]

    for (print_a, a), (print_b, b) in zip(opened([False, True]), opened([True, False, True]), strict=True):
        assert print_a == print_b and a.keys() == b.keys()
        assert_same_observation(a, b)
        np.testing.assert_array_equal(a.get("actions", 0), b.get("actions", 0))


def test_the_fingerprint_of_data_with_actions_is_that_of_earlier_versions():
    actions, state = np.ones((3, 7), np.float32), np.zeros((3, 8), np.float32)
    earlier = repr((actions.shape, state.shape)).encode() + actions.tobytes() + state.tobytes()
    assert content_of({"actions": actions, "state": state}) == earlier
    assert content_of({"state": state}) != earlier


def test_actions_are_not_looked_at(tmp_path, monkeypatch):
    episode = make_episode(0)
    episode.actions[3, 2] = np.nan
    monkeypatch.setattr("prismatic.vla.datasets.rlds.np.isfinite", lambda values: np.ones_like(values, dtype=bool))
    write_data_set(tmp_path, NAME, [episode])
    monkeypatch.undo()
    seen = VLADataset(tmp_path, NAME, SEEN)
    assert len(seen) == 12
    with pytest.raises(MissingFeatureError, match="opened without actions"):
        seen._parts[0].source.actions(0)
    with pytest.raises(DataSetError, match="action is not finite"):
        VLADataset(tmp_path, NAME, PLAIN)


def test_short_episodes_and_the_stride(tmp_path):
    write_data_set(tmp_path, NAME, [make_episode(0, length=1), make_episode(1, length=5)])
    assert list(all_samples(VLADataset(tmp_path, NAME, SEEN))) == [(0, 0), *((1, step) for step in range(5))]
    strided = VLADataset(tmp_path, NAME, replace(SEEN, frame_stride=2))
    assert list(all_samples(strided)) == [(0, 0), (1, 0), (1, 2), (1, 4)]
    with pytest.raises(ValueError, match="has 1 steps"):
        VLADataset(tmp_path, NAME, PLAIN)


def test_a_configuration_without_actions_does_not_train(tmp_path):
    config = get_data_set_config("libero_")
    register_data_set("obs_no_action", replace(config, keys=tuple(keys.without_action() for keys in config.keys)))
    write_data_set(tmp_path, "obs_no_action", [make_episode(0)])
    assert len(VLADataset(tmp_path, "obs_no_action", SEEN)) == 12
    with pytest.raises(MissingFeatureError, match="obs_no_action: its configuration names no actions"):
        VLADataset(tmp_path, "obs_no_action", PLAIN)


# Statistics


def test_statistics_of_unread_actions_do_not_exist():
    seen, acting = (VLADataset(SHIPPED, OBJECT, replace(PLAIN, observations_only=only)) for only in (True, False))
    assert seen.statistics == {} and seen.normalizers == {} and seen.data_set_names == [OBJECT]
    with pytest.raises(ValueError, match=f"{OBJECT}.*no normalizer"):
        _ = seen.normalizer
    # The state is scaled as the same frames' would be with actions.
    first = {place: sample["proprio"] for place, sample in ((seen[0, i]["sample_id"], seen[0, i]) for i in range(3))}
    for i in range(3):
        np.testing.assert_array_equal(acting[0, i]["proprio"], first[acting[0, i]["sample_id"]])


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("spelling", [OBJECT, OBJECT.removesuffix("_no_noops")])
def test_a_known_data_set_keeps_its_statistics_and_others_have_their_own(only, spelling):
    own = VLADataset(SHIPPED, f"{OBJECT},{SPATIAL}", PLAIN)
    known = json.loads(json.dumps(own.statistics[OBJECT]))
    known["proprio"]["q99"][1] += 0.1
    chosen = replace(PLAIN, observations_only=only, known_statistics={spelling: known})
    data = VLADataset(SHIPPED, f"{OBJECT},{SPATIAL}", chosen)
    assert data.statistics == {OBJECT: known} | ({} if only else {SPATIAL: own.statistics[SPATIAL]})
    assert data[0, 0]["proprio"][1] < own[0, 0]["proprio"][1]
    np.testing.assert_array_equal(data[0, len(data) - 1]["proprio"][1] <= 1, True)
    assert data.warnings == []


def test_a_given_normalizer_comes_before_known_statistics():
    own = VLADataset(SHIPPED, OBJECT, PLAIN)
    far = shifted(own.statistics[OBJECT], "proprio", 0, 100.0)
    data = VLADataset(SHIPPED, OBJECT, replace(PLAIN, normalizer=own.normalizers, known_statistics={OBJECT: far}))
    assert data.statistics == own.statistics and data.warnings == []


def test_known_statistics_that_do_not_fit_are_named():
    statistics = VLADataset(SHIPPED, OBJECT, PLAIN).statistics[OBJECT]
    for broken in ({"action": statistics["action"]}, statistics | {"proprio": dict(statistics["proprio"], q01=[0.0])}):
        with pytest.raises(StatisticsError, match=f"statistics of '{OBJECT}'.*proprio"):
            VLADataset(SHIPPED, OBJECT, replace(SEEN, known_statistics={OBJECT: broken}))


def shifted(statistics: dict, group: str, dimension: int, by: float) -> dict:
    """Statistics of data whose values lie elsewhere in one dimension."""
    moved = json.loads(json.dumps(statistics))
    for name in ("mean", "max", "min", "q01", "q99"):
        moved[group][name][dimension] += by
    return moved


def test_a_contradiction_is_one_line_with_the_numbers():
    own = VLADataset(SHIPPED, OBJECT, PLAIN).statistics[OBJECT]

    def warnings(statistics, only=False):
        return VLADataset(
            SHIPPED, OBJECT, replace(PLAIN, observations_only=only, known_statistics={OBJECT: statistics})
        ).warnings

    far = shifted(own, "proprio", 2, 7.5)
    (line,) = warnings(far, only=True)
    low, high = far["proprio"]["q01"][2], far["proprio"]["q99"][2]
    found = own["proprio"]
    for text in (
        OBJECT,
        "state dimension 2",
        f"{low:.3g} to {high:.3g}",
        f"{found['min'][2]:.3g} to {found['max'][2]:.3g}",
    ):
        assert text in line
    assert "\n" not in line and "more dimension" not in line
    (line,) = warnings(shifted(far, "proprio", 0, -9.0))
    assert "1 more dimension" in line

    acts = shifted(own, "action", 6, 5.0)
    (line,) = warnings(acts)
    assert "action dimension 6" in line
    assert warnings(acts, only=True) == []  # they were not read


@pytest.mark.parametrize("name", [OBJECT, SPATIAL])
def test_data_never_contradict_their_own_statistics_nor_does_a_part_of_them(name):
    everything = VLADataset(SHIPPED, name, PLAIN)
    known = replace(PLAIN, known_statistics=everything.statistics)
    for change in ({}, {"n_shot_episodes": 1}, {"observations_only": True}):
        assert VLADataset(SHIPPED, name, replace(known, **change)).warnings == []


outliers = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(-1e4, 1e4, width=32))


@given(numpy_strategies.arrays(np.float32, st.tuples(st.integers(1, 150), st.just(2)), elements=outliers))
@settings(max_examples=150, deadline=None)
def test_no_values_contradict_the_statistics_computed_from_them(values):
    statistics = json.loads(json.dumps(compute_statistics([values], [values], [True, True])))
    assert outside("state", values, statistics["proprio"]) == []


@given(st.floats(-5, 5, width=32), st.floats(0.125, 10, width=32), st.booleans())
@settings(max_examples=50, deadline=None)
def test_another_range_and_another_constant_are_found(centre, width, constant):
    values = np.linspace(0, 0 if constant else width, 50, dtype=np.float32)[:, None] + np.float32(centre)
    known = compute_statistics([values], [values], [True])["proprio"]
    other = values + np.float32(2 * width + 0.1 * abs(centre))
    assert len(outside("state", other, known)) == 1


@pytest.mark.parametrize(("beyond", "share", "found"), [(0.4, 1.0, 0), (0.6, 1.0, 1), (0.6, 0.04, 0), (0.6, 0.06, 1)])
@pytest.mark.parametrize("side", [-1, 1])
def test_how_far_and_how_many_values_contradict(beyond, share, found, side):
    known = {"q01": [-1.0], "q99": [1.0]}
    values = np.zeros((100, 1), np.float32)
    values[: round(100 * share)] = side * (1 + 2 * beyond)
    assert len(outside("state", values, known)) == found


# Folders that do not fit


def register_sized(name: str, proprio: int, actions: int) -> None:
    config = get_data_set_config("libero_")
    keys = tuple(replace(keys, state=("state",)) for keys in config.keys if keys.format == "rlds")
    spec = ActionSpec(proprio_dim=proprio, action_dim=actions)

    def standardize(stored, state):
        return np.resize(stored, (len(stored), actions)), np.resize(state, (len(state), proprio))

    register_data_set(name, replace(config, standardize=standardize, keys=keys, action_mask=(True,) * actions,
                                    action_spec=spec))  # fmt: skip


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize(
    ("proprio", "actions", "message"), [(9, 7, "state of 9 .*expected 8"), (8, 14, "actions of 14 .*expected 7")]
)
def test_other_sizes_are_an_error_on_opening(tmp_path, only, proprio, actions, message):
    name = f"obs_sized_{proprio}_{actions}_{only}"
    register_sized(name, proprio, actions)
    write_data_set(tmp_path, name, [make_episode(0)])
    with pytest.raises(DataSetError, match=f"{name}: {message}") as caught:
        VLADataset(tmp_path, name, replace(PLAIN, observations_only=only))
    assert "\n" not in str(caught.value)


def test_a_stored_state_of_another_size_is_an_error_that_names_the_data_set(tmp_path):
    import h5py

    write_hdf5(tmp_path / NAME, [make_smooth_episode(0, 9)])
    (path,) = (tmp_path / NAME).glob("*.hdf5")
    with h5py.File(path, "r+") as file:
        del file["data/demo_0/obs/gripper_states"]
        file["data/demo_0/obs/gripper_states"] = np.zeros((9, 3))
    with pytest.raises(DataSetError, match=rf"{NAME}: episode 0: .*\(9, 9\), expected .*\(T, 8\)"):
        VLADataset(tmp_path, NAME, SEEN)


def test_missing_cameras(tmp_path):
    folder = write_data_set(tmp_path, NAME, [make_episode(0)])
    with pytest.raises(ValueError, match=rf"{NAME}: num_images is 3.*\['image', 'wrist_image'\]"):
        VLADataset(tmp_path, NAME, replace(SEEN, num_images=3))
    features = json.loads((folder / "features.json").read_text())
    observation = _step(features)["observation"]["featuresDict"]["features"]
    observation["side"] = observation.pop("wrist_image")
    (folder / "features.json").write_text(json.dumps(features))
    with pytest.raises(MissingFeatureError, match=rf"{NAME}.*no feature 'steps/observation/wrist_image', found .*side"):
        VLADataset(tmp_path, NAME, SEEN)


# Samples and batches


def test_a_sample_has_the_key_that_was_asked_for_and_a_batch_all_of_them():
    collate = VLACollator(make_tokenizer(), FakeImageProcessor(), 3)
    acting, seen = (VLADataset(SHIPPED, OBJECT, replace(PLAIN, observations_only=only)) for only in (False, True))
    keys = [(2, 5), (0, 1), (7, 5)]
    batches = [collate([data[np.int64(epoch), np.int64(i)] for epoch, i in keys]) for data in (acting, seen)]
    for batch in batches:
        assert batch["keys"] == keys
        assert all(type(value) is int for key in batch["keys"] for value in key)
        assert "is_replay" not in batch
    assert batches[0]["actions"].shape == (3, 8, 7)
    assert "actions" not in batches[1] and batches[0].keys() - batches[1].keys() == {"actions"}


def test_a_known_set_of_observations_can_be_acted_with(tmp_path):
    statistics = VLADataset(SHIPPED, OBJECT, PLAIN).statistics
    seen = VLADataset(SHIPPED, OBJECT, replace(SEEN, known_statistics=statistics))
    expected = Normalizer(statistics[OBJECT], PLAIN.action_spec).unnormalize_action(np.ones(7))
    np.testing.assert_array_equal(seen.normalizer.unnormalize_action(np.ones(7)), expected)
