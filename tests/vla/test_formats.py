"""The same episodes in every storage format give the same numbers and images."""

import hashlib
import inspect
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from data_fixtures import ends, write_data_set
from format_writers import (
    CAMERAS,
    HDF5_CAMERAS,
    HDF5_KEYS,
    LEROBOT_KEYS,
    LOSSLESS,
    make_smooth_episode,
    write_hdf5,
    write_lerobot_v21,
    write_lerobot_v30,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prismatic import command_line
from prismatic.command_line import UsageError
from prismatic.vla.datasets import formats
from prismatic.vla.datasets.hdf5_source import HDF5Source
from prismatic.vla.datasets.lerobot_source import LeRobotSource
from prismatic.vla.datasets.registry import get_data_set_config
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.source import DataSetError, MissingFeatureError
from prismatic.vla.images import decode_image, decode_jpeg

WRITERS = {
    "v21-png": lambda root, episodes: write_lerobot_v21(root, episodes, "png"),
    "v21-jpeg": lambda root, episodes: write_lerobot_v21(root, episodes, "jpeg"),
    "v21-video": lambda root, episodes: write_lerobot_v21(root, episodes, "video"),
    "v21-lossless": lambda root, episodes: write_lerobot_v21(root, episodes, "video", LOSSLESS),
    "v30-png": lambda root, episodes: write_lerobot_v30(root, episodes, "png"),
    "v30-video": lambda root, episodes: write_lerobot_v30(root, episodes, "video"),
    "v30-lossless": lambda root, episodes: write_lerobot_v30(root, episodes, "video", LOSSLESS),
    "hdf5": write_hdf5,
}
# Measured with libx264 yuv444p crf 1 on these images: largest difference 7 of 255, mean below 0.8.
VIDEO_MAX, VIDEO_MEAN = 10, 1.0


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Episodes as the RLDS reader gives them, grouped by instruction (HDF5 has a file per instruction)."""
    texts = ["open the drawer", "open the drawer", "push the plate", "push the plate"]
    episodes = [make_smooth_episode(i, 9 + i, text) for i, text in enumerate(texts)]
    root = tmp_path_factory.mktemp("rlds")
    return list(RLDSReader(write_data_set(root, "libero_formats", episodes, side=32)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory, originals):
    root = tmp_path_factory.mktemp("formats")
    return {name: write(root / name, originals) for name, write in WRITERS.items()}


def open_source(name, folder):
    return HDF5Source(folder, HDF5_KEYS) if name == "hdf5" else LeRobotSource(folder, LEROBOT_KEYS)


def cameras_of(name):
    return HDF5_CAMERAS if name == "hdf5" else CAMERAS


def pixels(frame):
    return decode_image(frame) if isinstance(frame, bytes) else frame


def all_steps(source):
    for camera in source.keys.cameras:
        for episode, length in enumerate(source.lengths):
            for step in range(length):
                yield camera, episode, step


@pytest.mark.parametrize("name", WRITERS)
def test_numbers_equal_the_rlds_ones(name, folders, originals):
    source = open_source(name, folders[name])
    assert source.lengths.tolist() == [len(episode) for episode in originals]
    assert list(source.instructions) == [episode.instruction for episode in originals]
    assert source.metadata is None and len(source) == 4
    for number, episode in enumerate(originals):
        for found, expected in ((source.actions(number), episode.actions), (source.state(number), episode.state)):
            assert found.dtype == np.float32
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", WRITERS)
def test_images_equal_the_rlds_ones(name, folders, originals):
    source = open_source(name, folders[name])
    for camera, key in cameras_of(name).items():
        for number, episode in enumerate(originals):
            stored = np.stack([decode_jpeg(data) for data in episode.images[camera]]).astype(int)
            found = np.stack([pixels(source.frame(key, number, step)) for step in range(len(episode))])
            assert found.dtype == np.uint8
            difference = np.abs(found - stored)
            if name.endswith("-video"):
                assert difference.max() <= VIDEO_MAX and difference.mean() <= VIDEO_MEAN
            else:
                assert difference.max() == 0


@pytest.mark.parametrize("name", WRITERS)
def test_random_order_equals_sequence(name, folders):
    source, other = open_source(name, folders[name]), open_source(name, folders[name])
    steps = list(all_steps(source))
    frames = {place: pixels(source.frame(*place)) for place in steps}
    rng = np.random.default_rng(3)
    for number in rng.permutation(len(steps)):
        np.testing.assert_array_equal(pixels(other.frame(*steps[number])), frames[steps[number]])
    backwards = max(steps, key=lambda place: place[2])
    np.testing.assert_array_equal(pixels(other.frame(*backwards)), frames[backwards])
    np.testing.assert_array_equal(pixels(other.frame(*backwards)), frames[backwards])  # the same one again


def digest_of(source):
    digest = hashlib.sha256()
    for camera in source.keys.cameras:
        for episode in range(len(source)):
            frame = source.frame(camera, episode, 5)
            digest.update(frame if isinstance(frame, bytes) else frame.tobytes())
            digest.update(source.actions(episode).tobytes())
    return digest.hexdigest()


SCRIPT = f"""
import hashlib, pickle, sys
{inspect.getsource(digest_of)}
source = pickle.load(open(sys.argv[1], "rb"))
print(digest_of(source), len(source), source.fingerprint)
"""


@pytest.mark.parametrize("name", ["v21-png", "v30-video", "hdf5"])
def test_another_process_gives_the_same(name, folders, tmp_path):
    source = open_source(name, folders[name])
    expected = digest_of(source)  # files are open when it is pickled
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    assert (tmp_path / "source").stat().st_size < 20_000  # no frames inside
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "source")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert out.stderr == ""
    assert out.stdout.split() == [expected, "4", source.fingerprint]


@pytest.mark.parametrize("name", ["v21-png", "v30-video", "hdf5"])
def test_forked_worker_gives_the_same(name, folders):
    from torch.utils.data import DataLoader

    source = open_source(name, folders[name])
    expected = digest_of(source)
    loader = DataLoader(
        [source] * 2, batch_size=None, num_workers=2, collate_fn=digest_of, multiprocessing_context="fork"
    )
    assert list(loader) == [expected] * 2
    assert digest_of(source) == expected


@pytest.mark.parametrize("name", WRITERS)
def test_index_is_built_once(name, folders, monkeypatch):
    first = open_source(name, folders[name])
    for module in ("hdf5_source._add_file", "lerobot_index.Builder.build"):
        monkeypatch.setattr(f"prismatic.vla.datasets.{module}", lambda *_: pytest.fail("built again"))
    assert open_source(name, folders[name]).fingerprint == first.fingerprint


@pytest.mark.parametrize("name", ["v21-png", "v30-video", "hdf5"])
def test_fingerprint_is_that_of_the_content(name, folders, originals, tmp_path):
    source = open_source(name, folders[name])
    shutil.copytree(folders[name], tmp_path / "copy", ignore=shutil.ignore_patterns(".craft_index"))
    for path in (tmp_path / "copy").rglob("*"):
        path.touch()
    assert open_source(name, tmp_path / "copy").fingerprint == source.fingerprint
    episodes = list(originals)
    episodes[1] = make_smooth_episode(5, len(episodes[1]), episodes[1].instruction)
    episodes[1].actions, episodes[1].state = originals[1].actions, originals[1].state
    changed = open_source(name, WRITERS[name](tmp_path / "images", episodes))
    assert changed.fingerprint != source.fingerprint


def test_fingerprint_does_not_depend_on_how_episodes_share_files(originals, tmp_path):
    few = LeRobotSource(write_lerobot_v30(tmp_path / "few", originals, per_file=4), LEROBOT_KEYS)
    many = LeRobotSource(write_lerobot_v30(tmp_path / "many", originals, per_file=1), LEROBOT_KEYS)
    single = LeRobotSource(write_lerobot_v21(tmp_path / "single", originals), LEROBOT_KEYS)
    assert few.fingerprint == many.fingerprint == single.fingerprint


# Damage


def damage(content, kind, place, values):
    position = int(place * (len(content) - 1))
    if kind == "cut":
        return content[:position]
    return content[:position] + values + content[position + len(values) :]


def read_everything(name, folder):
    source = open_source(name, folder)
    for camera, episode, step in all_steps(source):
        if step in (0, source.lengths[episode] - 1):
            assert isinstance(source.frame(camera, episode, step), bytes | np.ndarray)


@pytest.mark.parametrize("name", ["rlds", "v21-png", "v21-video", "v30-video", "hdf5"])
def test_a_data_set_may_lie_in_a_folder_with_any_name(name, small, odd_folder):
    if name == "rlds":
        write_data_set(odd_folder, "libero_formats", [make_smooth_episode(0, 3, side=16)], side=16)
        keys = get_data_set_config("libero_").keys[0]
        assert formats.open_source(odd_folder / "libero_formats", keys).frame("image", 0, 2)
    else:
        read_everything(name, shutil.copytree(small[name], odd_folder / "data"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    root = tmp_path_factory.mktemp("small")
    episodes = [make_smooth_episode(i, 3, side=16) for i in range(2)]
    return {name: WRITERS[name](root / name, episodes) for name in ("v21-png", "v21-video", "v30-video", "hdf5")}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v21-png", "v21-video", "v30-video", "hdf5"])
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_damaged_files_give_the_documented_errors(name, small, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(small[name], folder, ignore=shutil.ignore_patterns(".craft_index"))
    path = data.draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    kind = data.draw(st.sampled_from(["cut", "overwrite"]))
    content = damage(path.read_bytes(), kind, data.draw(st.floats(0, 1)), data.draw(st.binary(min_size=1, max_size=8)))
    path.write_bytes(content)
    try:
        with ends():
            read_everything(name, folder)
    except (DataSetError, MissingFeatureError) as error:
        assert str(folder) in str(error)  # which file is named


@pytest.mark.parametrize(("name", "keys", "extra"), [("hdf5", HDF5_KEYS, "hdf5"), ("v30-png", LEROBOT_KEYS, "lerobot")])
def test_a_format_without_its_packages_names_the_extra(folders, monkeypatch, name, keys, extra):
    monkeypatch.setattr(command_line, "is_installed", lambda _: False)
    with pytest.raises(UsageError, match=rf"{folders[name]} is a data set in .*pip install 'craft-vla\[{extra}\]'"):
        formats.open_source(folders[name], keys)
