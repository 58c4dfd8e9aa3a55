"""A storage format costs one file and one line in the table: everything that opens data takes it from there."""

import re
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
from data_fixtures import make_episode

from experiments.robot.doctor import demonstrations
from prismatic.training.data_sets import open_old_data
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.format_table import FORMATS, Format, find_format
from prismatic.vla.datasets.index import open_index
from prismatic.vla.datasets.indexed_source import IndexedSource
from prismatic.vla.datasets.inspect import inspect
from prismatic.vla.datasets.registry import get_data_set_config, register_data_set
from prismatic.vla.datasets.source import SourceKeys
from prismatic.vla.datasets.source_files import index_label, require_format
from prismatic.vla.images import ImageSpec

NAMES = "<x.y.z>/dataset_info.json (RLDS), meta/info.json (LeRobot), *.hdf5 or *.toy"
SETTINGS = DatasetSettings(image_spec=ImageSpec(size=16), num_images=1)


class ToySource(IndexedSource):
    """One episode for each file, which holds its seed; its pictures get lighter."""

    def __init__(self, directory, keys, split=None, skip_bad=False):
        require_format(keys, "toy")
        self.directory, self.keys = directory, keys
        files = sorted(directory.glob("*.toy"))
        label = index_label(keys, self.split)
        self._index = open_index(directory, label, files, lambda writer: self._build(writer, files), skip_bad)

    def _build(self, writer, files):
        for file in files:
            with writer.episode():
                episode = make_episode(int(file.read_text()))
                arrays = {"actions": episode.actions, "state": episode.state}
                writer.add(episode.instruction, arrays, file.read_bytes())

    def frame(self, camera, episode, step):
        self.require_frame(camera, episode, step)
        return np.full((16, 16, 3), 10 * step, np.uint8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    module = ModuleType("prismatic.vla.datasets.toy_source")
    module.ToySource = ToySource
    monkeypatch.setitem(sys.modules, module.__name__, module)
    line = Format("*.toy", lambda folder: any(folder.glob("*.toy")), "toy_source:ToySource")
    monkeypatch.setitem(FORMATS, "toy", line)
    monkeypatch.setattr("prismatic.vla.datasets.registry._REGISTERED", {})
    keys = (SourceKeys("toy", ("front",), ("state",), "action"),)
    register_data_set("toys", replace(get_data_set_config("libero_"), keys=keys))
    (tmp_path / "toys").mkdir()
    for seed in range(3):
        (tmp_path / "toys" / f"{seed}.toy").write_text(str(seed))
    return tmp_path / "toys"


def test_everything_that_opens_data_opens_it(folder, tmp_path):
    assert find_format(folder) == "toy"
    data = VLADataset(tmp_path, "toys", SETTINGS)
    assert len(data) == 15 and data.manifest()["toys"]["episodes"] == {"push the plate": [0, 1, 2]}
    assert data[(0, 3)]["sample_id"] == (0, 3) and data[(0, 3)]["images"].shape == (1, 16, 16, 3)
    assert open_old_data("--replay_data", str(folder), SETTINGS).fingerprints == data.fingerprints
    report, _ = inspect(folder, tmp_path / "report")
    assert (report["format"], report["episodes"]) == ("toy", 3)
    assert len(demonstrations.open_data_set(folder)) == 3


def test_everything_that_finds_no_data_names_it(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    for opens in (
        lambda: VLADataset(tmp_path, "libero_empty", SETTINGS),
        lambda: open_old_data("--replay_data", str(tmp_path / "empty"), SETTINGS),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(NAMES)):
            opens()
    with pytest.raises(FileNotFoundError, match=re.escape(NAMES.removeprefix("<x.y.z>/"))):
        demonstrations.open_data_set(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected one of rlds, lerobot, hdf5, toy"):
        SourceKeys("zip", ("front",), ("state",), "action")
