"""The same episodes in every storage format make the same training windows."""

from pathlib import Path

import numpy as np
import pytest
from format_writers import LOSSLESS, write_hdf5, write_lerobot_v21, write_lerobot_v30

from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.inspect import inspect
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.datasets.rlds_versions import find_version_directory
from prismatic.vla.images import ImageSpec

GOLDEN = Path(__file__).parents[1] / "golden" / "rlds_mini"
NAME = "libero_mini_no_noops"
FORMATS = {
    "lerobot_v21_png": lambda root, episodes: write_lerobot_v21(root, episodes, "png"),
    "lerobot_v30_png": lambda root, episodes: write_lerobot_v30(root, episodes, "png"),
    "lerobot_v30_video": lambda root, episodes: write_lerobot_v30(root, episodes, "video"),
    "lerobot_v30_lossless_video": lambda root, episodes: write_lerobot_v30(root, episodes, "video", LOSSLESS),
    "hdf5": write_hdf5,
}
SETTINGS = DatasetSettings(image_spec=ImageSpec(size=64), image_aug=False)


@pytest.fixture(scope="module")
def episodes():
    return list(RLDSReader(find_version_directory(GOLDEN, NAME)))


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_windows_statistics_and_images(tmp_path, episodes, name):
    FORMATS[name](tmp_path / NAME, episodes)
    rlds, other = VLADataset(GOLDEN, NAME, SETTINGS), VLADataset(tmp_path, NAME, SETTINGS)
    assert len(other) == len(rlds)
    windows = {key(sample): sample for sample in (rlds[0, i] for i in range(len(rlds)))}
    assert len(windows) == len(rlds)
    differences = []
    for i in range(len(other)):
        sample = other[0, i]
        same = windows.pop(key(sample))
        np.testing.assert_array_equal(sample["proprio"], same["proprio"])
        np.testing.assert_array_equal(sample["actions"], same["actions"])
        assert sample["instruction"] == same["instruction"]
        differences.append(np.abs(sample["images"].astype(int) - same["images"]))
    assert not windows
    lossy = name == "lerobot_v30_video"
    assert np.max(differences) <= (12 if lossy else 0)
    assert np.mean(differences) <= (1.0 if lossy else 0.0)
    assert_close(other.statistics[NAME], rlds.statistics[NAME])


def key(sample):
    """HDF5 orders episodes by task, so windows are found by their numbers."""
    return sample["instruction"], sample["actions"].tobytes(), sample["proprio"].tobytes()


def assert_close(first, second):
    for group in ("action", "proprio"):
        for name, values in first[group].items():
            np.testing.assert_allclose(values, second[group][name], rtol=1e-5, atol=1e-7, err_msg=f"{group} {name}")
    assert first["num_transitions"] == second["num_transitions"]


@pytest.mark.parametrize("name", ["lerobot_v30_video", "hdf5"])
def test_inspection_reads_the_other_formats(tmp_path, episodes, name):
    FORMATS[name](tmp_path / "libero_other", episodes)
    report, _ = inspect(tmp_path / "libero_other", output=tmp_path / "out")
    assert report["format"] == name.split("_")[0]
    assert (report["episodes"], report["frames"]) == (len(episodes), sum(len(episode) for episode in episodes))
    actions = np.concatenate([episode.actions for episode in episodes])
    np.testing.assert_allclose(report["action"]["max"], actions.max(axis=0))
    assert len(list((tmp_path / "out").glob("frames_*.png"))) == 2
