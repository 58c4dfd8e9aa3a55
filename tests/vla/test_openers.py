"""Everything that opens data opens any split, refuses what contradicts the conventions, and says what stands out."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from data_fixtures import write_data_set
from test_conventions import episode_of, quaternions

from experiments.robot.doctor import demonstrations
from experiments.robot.doctor.data_checks import data_checks
from experiments.robot.doctor.findings import Status
from experiments.robot.libero.controls import Control
from experiments.robot.libero.eval_backend import LiberoBackend
from experiments.robot.libero.eval_config import EvalConfig
from prismatic.programs import measure_retention
from prismatic.training import representation
from prismatic.training.config import FinetuneConfig
from prismatic.training.memory.start_shape import empty_start
from prismatic.training.retention.methods import build_memories, monitored_batches
from prismatic.training.setup import build_setup
from prismatic.vla.datasets.format_table import folder_and_split
from prismatic.vla.datasets.inspect import format_report, inspect
from prismatic.vla.images import encode_jpeg

NAME, PLAIN = "libero_opened", "libero_plain"
PACKAGE = Path(__file__).parents[2] / "prismatic"


@pytest.fixture(scope="module")
def start():
    """A policy without weights."""
    return empty_start(FinetuneConfig(config_file_path="tiny"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set that is as it should be, as others are with other splits beside `train`."""
    root = tmp_path_factory.mktemp("data")
    write_data_set(root, PLAIN, [episode_of(0)])
    return root


def add_split(root, split, episodes):
    """The data set `NAME` with a split beside `train`, whose only episode is as it should be."""
    folder = write_data_set(root, NAME, [episode_of(0)])
    more = write_data_set(root / "more", NAME, episodes)
    (shard,) = more.glob("*tfrecord*")
    shard.rename(folder / shard.name.replace("-train.", f"-{split}."))
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"].append(info["splits"][0] | {"name": split, "shardLengths": [str(len(episodes))]})
    path.write_text(json.dumps(info))
    return root / NAME


class Opened(Exception):
    """Enough was seen."""


class Openers:
    """A way to open the split `other` of a data set each; what they return is said as well."""

    def __init__(self, start, root, folder, monkeypatch):
        self.start, self.root, self.folder, self.place = start, root, folder, f"{folder}:other"
        self.monkeypatch = monkeypatch

    def setup(self, **flags):
        plain = {"config_file_path": "tiny", "data_root_dir": str(self.root), "dataset_name": PLAIN, "batch_size": 1}
        cfg = FinetuneConfig(**plain | flags)
        return cfg, build_setup(cfg, lambda _: copy.copy(self.start))

    def training(self):
        self.setup(data_root_dir=str(self.folder.parent), dataset_name=NAME, split="other")

    def validation(self):
        own = {"data_root_dir": str(self.folder.parent), "dataset_name": NAME}
        self.setup(**own, use_val_set=True, val_split="other")

    def replay(self):
        self.setup(replay_data=self.place)

    def memory(self):
        cfg, setup = self.setup(use_craft=True, craft_memory="data", craft_memory_data=self.place)
        build_memories(cfg, setup, Accelerator(cpu=True), list)

    def probe(self):
        cfg, setup = self.setup(use_craft=True, craft_probe_data=self.place, craft_probe_size=1)
        monitored_batches(cfg, setup, lambda samples: {}, Accelerator(cpu=True))

    def measure_retention(self):
        _, setup = self.setup(data_root_dir=str(self.folder.parent), dataset_name=NAME)

        def load(path, **_):
            spec, image = setup.action_spec.to_dict(), setup.image_spec.to_dict()
            manifest = {"action_spec": spec, "image_spec": image}
            statistics = {NAME: setup.statistics[NAME]}
            return SimpleNamespace(
                path=Path(path), model=setup.model, processor=setup.processor, manifest=manifest, statistics=statistics
            )

        def stop():
            raise Opened

        self.monkeypatch.setattr(measure_retention, "load_checkpoint", load)
        self.monkeypatch.setattr(representation, "Record", stop)
        flags = {"checkpoint": "a", "start": "b", "data_root_dir": str(self.folder.parent), "dataset_name": NAME}
        with pytest.raises(Opened):
            measure_retention.measure(
                measure_retention.MeasureConfig(**flags, split="other", output=str(self.folder / "out.json"))
            )

    def inspect(self):
        return format_report(inspect(self.place, self.folder / "report")[0])

    def doctor(self):
        check = next(c for c in data_checks(demonstrations.open_data_set(self.place)) if c.name.startswith("conv"))
        finding = check.run()
        if finding.status is Status.FAIL:
            raise ValueError(finding.found)
        return finding.found

    def playback(self):
        LiberoBackend().check_policy(EvalConfig(control=Control.REPLAY, replay_dataset=self.place))


NAMES = [name for name in vars(Openers) if not name.startswith("_") and name != "setup"]


@pytest.fixture
def said(start, root, tmp_path, monkeypatch, capsys):
    """What an opener says about the split `other` with these episodes."""

    def opened(name, episodes):
        openers = Openers(start, root, add_split(tmp_path, "other", episodes), monkeypatch)
        capsys.readouterr()
        returned = getattr(openers, name)()
        printed = capsys.readouterr()
        return f"{returned}\n{printed.out}\n{printed.err}"

    return opened


@pytest.mark.parametrize("name", NAMES)
def test_contradictions_are_refused_or_reported_whoever_opens_them(said, name):
    episodes = [episode_of(index, quaternions) for index in range(2)]
    if name == "inspect":  # which is there to look at them
        assert "WARNING        rotation is a quaternion" in said(name, episodes)
        return
    with pytest.raises(ValueError, match="rotation is a quaternion") as caught:
        said(name, episodes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_out_and_what_is_left_out_is_said_whoever_opens_it(said, name):
    episodes = [episode_of(index) for index in range(3)]
    for episode in episodes:
        episode.images["image"] = [encode_jpeg(np.zeros((16, 16, 3), np.uint8))] * len(episode)
    episodes[1].instruction = " "
    text = said(name, episodes)
    assert text.count("constant images: found image: ") == 1
    left_out = {"inspect": "empty instruction: found 1 episodes", "playback": ""}  # which plays one
    assert left_out.get(name, "1 of 3 episodes are left out: episode 1: the language instruction is empty") in text


def test_training_and_measuring_open_data_in_one_place():
    files = {file.name for file in PACKAGE.rglob("*.py") if "VLADataset(" in file.read_text(encoding="utf-8")}
    assert files == {"data_sets.py", "dataset.py"}


def test_a_folder_with_a_colon_in_its_name_is_that_folder(tmp_path):
    (tmp_path / "a:b").mkdir()
    for place, expected in {
        f"{tmp_path}/a:b": (f"{tmp_path}/a:b", None),
        f"{tmp_path}/a:b:valid": (f"{tmp_path}/a:b", "valid"),
        f"{tmp_path}/a:c": (f"{tmp_path}/a", "c"),
        "no/folder": ("no/folder", None),
        "hf://some/where": ("hf://some/where", None),
        ":valid": (":valid", None),
        "a:": ("a:", None),
    }.items():
        assert folder_and_split(place) == expected
