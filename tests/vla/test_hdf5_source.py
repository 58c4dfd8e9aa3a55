import dataclasses
import json
import re

import h5py
import numpy as np
import pytest
from format_writers import HDF5_CAMERAS, HDF5_KEYS, make_smooth_episode, write_hdf5

from prismatic.vla.datasets.hdf5_source import HDF5Source, instruction_of
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError, SourceKeys

PLATE = "push_the_plate_demo.hdf5"


@pytest.fixture
def folder(tmp_path):
    return write_hdf5(tmp_path / "data", [make_smooth_episode(i, 9 + i, side=32) for i in range(2)])


def edit(folder, change):
    with h5py.File(folder / PLATE, "r+") as file:
        change(file["data/demo_1"])


@pytest.mark.parametrize(
    ("name", "instruction"),
    [
        ("push_the_plate_demo.hdf5", "push the plate"),
        ("KITCHEN_SCENE3_turn_on_the_stove_demo.hdf5", "turn on the stove"),
        ("LIVING_ROOM_SCENE10_a_b_demo.hdf5", "a b"),
    ],
)
def test_instruction_is_in_the_file_name(name, instruction):
    assert instruction_of(name) == instruction


def test_episodes_come_by_file_name_then_by_demo_number(tmp_path):
    texts = ["b second", "a first"]
    episodes = [make_smooth_episode(i, 3 + i, instruction=texts[i % 2], side=16) for i in range(24)]
    source = HDF5Source(write_hdf5(tmp_path, episodes), HDF5_KEYS)
    assert list(source.instructions) == ["a first"] * 12 + ["b second"] * 12
    assert source.lengths.tolist() == [*range(4, 27, 2), *range(3, 26, 2)]  # demo_10 after demo_9


def test_rotation_is_a_choice_of_the_keys(folder):
    plain = SourceKeys("hdf5", HDF5_KEYS.cameras, HDF5_KEYS.state, HDF5_KEYS.action)
    turned, stored = HDF5Source(folder, HDF5_KEYS), HDF5Source(folder, plain)
    camera = HDF5_CAMERAS["image"]
    np.testing.assert_array_equal(turned.frame(camera, 1, 4), stored.frame(camera, 1, 4)[::-1, ::-1])
    assert turned.fingerprint == stored.fingerprint


def test_compressed_files(folder, tmp_path):
    (tmp_path / "packed").mkdir()
    with h5py.File(folder / PLATE) as old, h5py.File(tmp_path / "packed" / PLATE, "w") as new:

        def copy(name, item):
            if isinstance(item, h5py.Dataset):
                new.create_dataset(name, data=item[:], compression="gzip", chunks=(1, *item.shape[1:]))

        old.visititems(copy)
    plain, packed = HDF5Source(folder, HDF5_KEYS), HDF5Source(tmp_path / "packed", HDF5_KEYS)
    assert plain.fingerprint == packed.fingerprint
    np.testing.assert_array_equal(plain.frame(HDF5_KEYS.cameras[1], 0, 5), packed.frame(HDF5_KEYS.cameras[1], 0, 5))


def test_wrong_arguments(folder):
    with pytest.raises(DataSetError, match=r"no split 'val', found splits \['train'\]"):
        HDF5Source(folder, HDF5_KEYS, "val")
    with pytest.raises(ValueError, match="format is 'rlds', expected 'hdf5'"):
        HDF5Source(folder, SourceKeys("rlds", ("a",), ("b",), "c"))
    source = HDF5Source(folder, HDF5_KEYS)
    with pytest.raises(MissingFeatureError, match="no camera 'side', opened with"):
        source.frame("side", 0, 0)
    with pytest.raises(IndexError, match="episode 0: step 9, expected 0 <= step < 9"):
        source.frame(HDF5_KEYS.cameras[0], 0, 9)
    with pytest.raises(IndexError):
        source.frame(HDF5_KEYS.cameras[0], 0, -1)


def test_no_files(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataSetError, match=r"no \*.hdf5, found \['notes.txt'\]"):
        HDF5Source(tmp_path, HDF5_KEYS)
    with pytest.raises(DataSetError, match="no such directory"):
        HDF5Source(tmp_path / "absent", HDF5_KEYS)


def test_no_demonstrations(folder):
    with h5py.File(folder / PLATE, "w") as file:
        file.create_group("data/other")
    with pytest.raises(DataSetError, match=rf"{PLATE}: no data/demo_<i>"):
        HDF5Source(folder, HDF5_KEYS)


def test_missing_keys_are_listed(folder):
    edit(folder, lambda demo: demo.pop("obs/ee_states"))
    message = rf"{PLATE}: data/demo_1: no 'obs/ee_states', found \['actions', 'obs', 'obs/agentview_rgb'"
    with pytest.raises(MissingFeatureError, match=message):
        HDF5Source(folder, HDF5_KEYS)


def replace(key, value):
    def change(demo):
        del demo[key]
        demo[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace("obs/ee_states", np.zeros((9, 6))), r"ee_states: float64 \(9, 6\), expected numbers \(10, D\)"),
        (replace("actions", np.zeros(10)), r"actions is .*'shape': \[1\].*, earlier episodes have .*\[7\]"),
        (replace("actions", np.zeros(())), r"actions: float64 \(\), expected numbers \(T, D\)"),
        (replace("actions", np.zeros((10, 0))), r"actions: float64 \(10, 0\), expected numbers \(T, D\), D > 0"),
        (replace("actions", np.zeros((0, 7))), r"ee_states: float64 \(10, 6\), expected numbers \(0, D\)"),
        (replace("actions", np.full((10, 7), b"text")), r"actions: \|S4 \(10, 7\), expected numbers"),
        (
            replace("obs/agentview_rgb", np.zeros((10, 4, 4, 3))),
            r"float64 \(10, 4, 4, 3\), expected uint8 \(10, H, W, 3",
        ),
        (replace("obs/agentview_rgb", np.zeros((10, 4, 4, 1), np.uint8)), r"expected uint8 \(10, H, W, 3\)"),
        (replace("obs/agentview_rgb", np.zeros((8, 4, 4, 3), np.uint8)), r"expected uint8 \(10, H, W, 3\)"),
        (replace("actions", np.zeros((10, 6))), r"actions is .*'shape': \[6\].*, earlier episodes have .*\[7\]"),
        (
            lambda demo: (demo.pop("actions"), demo.create_dataset("actions", (10, 7), "f4")),
            r"\(10, 7\) without content",
        ),
        (lambda demo: (demo.pop("actions"), demo.create_group("actions")), "actions: a group, expected a dataset"),
    ],
)
def test_wrong_shapes_and_types(folder, change, message):
    edit(folder, change)
    with pytest.raises(DataSetError, match=f"{PLATE}: data/demo_1.*{message}"):
        HDF5Source(folder, HDF5_KEYS)


def test_not_hdf5(folder):
    (folder / PLATE).write_bytes(b"something else")
    with pytest.raises(DataSetError, match=f"{PLATE}: cannot be read"):
        HDF5Source(folder, HDF5_KEYS)


def test_file_damaged_after_opening(folder):
    source = HDF5Source(folder, HDF5_KEYS)
    content = (folder / PLATE).read_bytes()
    (folder / PLATE).write_bytes(content[:1000])
    with pytest.raises(DataSetError, match=PLATE):
        source.frame(HDF5_KEYS.cameras[0], 0, 0)
    (folder / PLATE).write_bytes(content)
    assert source.frame(HDF5_KEYS.cameras[0], 0, 0).shape == (32, 32, 3)


def test_steps_changed_after_opening(folder):
    source = HDF5Source(folder, HDF5_KEYS)
    edit(folder, replace("obs/agentview_rgb", np.zeros((8, 32, 32, 3), np.uint8)))
    with pytest.raises(DataSetError, match="agentview_rgb has 8 steps, expected 10"):
        source.frame(HDF5_KEYS.cameras[0], 1, 0)


# What the file says


def tell(folder, name, value, path=PLATE):
    with h5py.File(folder / path, "r+") as file:
        file["data"].attrs[name] = value


@pytest.mark.parametrize(
    ("told", "instruction"),
    [
        ("Open the top drawer", "Open the top drawer"),
        (' "open it" ', "open it"),
        (["open", "the", "door"], "open the door"),
        (list("open it"), "open it"),
        ("push the plate", "push the plate"),
        ("", "push the plate"),
        (None, "push the plate"),
        (7, "push the plate"),
    ],
)
def test_the_instruction_in_the_file_comes_before_its_name(folder, told, instruction):
    tell(folder, "problem_info", json.dumps({"domain_name": "robosuite", "language_instruction": told}))
    source = HDF5Source(folder, HDF5_KEYS)
    assert list(source.instructions) == [instruction] * 2
    assert len(source.warnings) == (instruction != "push the plate")
    assert all(PLATE in line and repr(instruction) in line and "'push the plate'" in line for line in source.warnings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("language_instruction", "fold it"), ("language_instruction", b"fold it"), ("ep_meta", '{"lang": "fold it"}')],
)
def test_a_demonstration_may_have_an_instruction_of_its_own(folder, name, value):
    edit(folder, lambda demo: demo.attrs.create(name, value))
    assert list(HDF5Source(folder, HDF5_KEYS).instructions) == ["push the plate", "fold it"]


@pytest.mark.parametrize("value", ["{", "[]", "\xff", b"{}", 3])
def test_a_description_that_says_nothing_is_not_read(folder, value):
    tell(folder, "problem_info", value)
    assert HDF5Source(folder, HDF5_KEYS).instructions[0] == "push the plate"


def test_the_control_rate_of_the_file(folder):
    assert HDF5Source(folder, HDF5_KEYS).recorded_hz is None
    tell(folder, "env_args", json.dumps({"env_kwargs": {"control_freq": 10}}))
    assert HDF5Source(folder, HDF5_KEYS).recorded_hz == 10


@pytest.mark.parametrize("place", ["attribute", "above", "scalar", "per step", "one"])
def test_an_instruction_key_of_your_own(folder, place):
    def change(demo):
        if place == "attribute":
            demo.attrs["ask"] = "fold it"
        elif place == "above":
            demo.parent.attrs["ask"] = "fold it"
        else:
            value = {"scalar": "fold it", "one": ["fold it"], "per step": ["fold it"] * 4 + ["drop it"] * 6}[place]
            demo["ask"] = value

    edit(folder, change)
    keys = dataclasses.replace(HDF5_KEYS, instruction="ask")
    if place == "above":
        assert list(HDF5Source(folder, keys).instructions) == ["fold it"] * 2
        return
    source = HDF5Source(folder, keys, skip_bad=True)
    assert list(source.problems) == ["0"] and "no dataset or attribute 'ask'" in source.problems["0"]
    assert source.instructions[1] == "fold it"
    assert source.instruction_at(1, 5) == ("drop it" if place == "per step" else "fold it")


def mask(folder, path=PLATE, **groups):
    with h5py.File(folder / path, "r+") as file:
        for name, demos in groups.items():
            file[f"mask/{name}"] = np.array(demos, dtype="S")


def test_masks_are_splits(tmp_path):
    texts = ["a first"] * 3 + ["b second"] * 2
    episodes = [make_smooth_episode(i, 3 + i, texts[i], side=16) for i in range(5)]
    folder = write_hdf5(tmp_path, episodes)
    mask(folder, "a_first_demo.hdf5", train=["demo_2", "demo_0"], valid=["demo_1"], few=["demo_0"])
    lengths = {split: HDF5Source(folder, HDF5_KEYS, split).lengths.tolist() for split in (None, "valid", "few")}
    # The second file says nothing, so all of it is for training.
    assert lengths == {None: [3, 5, 6, 7], "valid": [4], "few": [3]}
    with pytest.raises(DataSetError, match=r"no split 'test', found splits \['few', 'train', 'valid'\]"):
        HDF5Source(folder, HDF5_KEYS, "test")


def test_what_is_held_out_is_not_trained_on(folder):
    mask(folder, valid=["demo_0"])
    assert HDF5Source(folder, HDF5_KEYS).lengths.tolist() == [10]


@pytest.mark.parametrize("name", ["train", "valid", "few"])
@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (lambda file, name: file.create_dataset(name, data=np.array(["demo_1", "demo_8"], "S")), r"names \['demo_8'\]"),
        (lambda file, name: file.create_dataset(name, data=np.arange(2)), r"int64 \(2,\), expected names of"),
        (lambda file, name: file.create_group(name), "a group, expected a dataset"),
        (lambda file, name: file.update({name: h5py.SoftLink("/nowhere")}), "no '"),
        (lambda file, name: file.update({name: h5py.ExternalLink("gone.hdf5", "/x")}), "a link to another file"),
    ],
)
def test_an_odd_mask_stops_only_who_asks_for_it(folder, name, odd, said):
    with h5py.File(folder / PLATE, "r+") as file:
        odd(file.require_group("mask"), name)
    source = HDF5Source(folder, HDF5_KEYS)
    # Without a mask that can be understood all is trained on, but for what another one holds out.
    expected = {"train": [10], "valid": [9]}.get(name, [9, 10]) if "demo_8" in said else [9, 10]
    assert source.lengths.tolist() == expected
    assert len(source.warnings) == (name != "few")
    assert all(PLATE in line and re.search(said, line) for line in source.warnings)
    if name != "train":
        with pytest.raises(DataSetError, match=rf"{PLATE}.*{said}"):
            HDF5Source(folder, HDF5_KEYS, name)


def test_other_names_of_files_and_demonstrations(tmp_path):
    folder = write_hdf5(tmp_path, [make_smooth_episode(i, 3 + i, side=16) for i in range(12)])
    with h5py.File(folder / PLATE, "r+") as file:
        for number in range(12):
            file.move(f"data/demo_{number}", f"data/episode-{number}")
    (folder / PLATE).rename(folder / "push_the_plate.hdf5")
    source = HDF5Source(folder, HDF5_KEYS)
    assert source.lengths.tolist() == list(range(3, 15)) and source.instructions[0] == "push the plate"
    assert source.frame(HDF5_KEYS.cameras[0], 11, 13).shape == (16, 16, 3)


def test_scalars_and_matrices_are_laid_flat(folder):
    for number in range(2):
        with h5py.File(folder / PLATE, "r+") as file:
            demo = file[f"data/demo_{number}"]
            length = len(demo["actions"])
            demo["obs/grip"] = np.arange(length)
            demo["obs/pose"] = np.arange(6 * length).reshape(length, 2, 3)
    keys = dataclasses.replace(HDF5_KEYS, state=("obs/grip", "obs/pose"))
    np.testing.assert_array_equal(HDF5Source(folder, keys).state(0)[2], [2, 12, 13, 14, 15, 16, 17])
