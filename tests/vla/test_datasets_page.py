"""The example of docs/own_data.md runs as printed, and the report in docs/datasets.md is of today."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set

from prismatic.vla.datasets import inspect as inspect_module
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.registry import get_data_set_config, load_data_set_file
from prismatic.vla.images import ImageSpec

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture()
def my_robot(tmp_path, monkeypatch):
    """The example loaded from a file, in a registry of its own."""
    page = (DOCS / "own_data.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    monkeypatch.setattr("prismatic.vla.datasets.registry._REGISTERED", {})
    monkeypatch.setattr("prismatic.vla.datasets.registry.MIXTURES", {})
    path = tmp_path / "my_robot.py"
    path.write_text(code, encoding="utf-8")
    load_data_set_file(path)
    return path


def test_a_sample_of_the_mixture_is_read(my_robot, tmp_path):
    episodes = [make_episode(number, instruction=f"task {number % 2}") for number in range(4)]
    write_data_set(tmp_path, "kitchen", episodes)
    write_data_set(tmp_path, "workshop", [replace(episode, instruction="other") for episode in episodes])
    spec = get_data_set_config("kitchen").action_spec
    settings = DatasetSettings(action_spec=spec, image_spec=ImageSpec(size=16), image_aug=False, n_shot_episodes=1)
    data = VLADataset(tmp_path, "my_robot", settings)
    assert data.weights == [1.0, 0.5] and data.group_sizes == [2 * 9, 9]
    sample = data[0, 3]
    assert sample["images"].shape == (2, 16, 16, 3) and sample["dataset_name"] == "kitchen"
    assert sample["actions"].shape == (4, 7) and sample["proprio"].shape == (7,)
    episode, step = sample["sample_id"]
    np.testing.assert_array_equal(sample["actions"][:, 6], (1 - episodes[episode].actions[step : step + 4, 6]) / 2)
    listed = VLADataset(tmp_path, "kitchen,workshop:0.5", settings)
    assert listed.weights == data.weights and listed.manifest() == data.manifest()


def test_inspection_uses_the_file(my_robot, tmp_path, capsys):
    write_data_set(tmp_path, "kitchen", [make_episode(0)])
    arguments = [str(tmp_path / "kitchen"), "--data_set_file", str(my_robot), "--output", str(tmp_path / "report")]
    assert inspect_module.main(arguments) == 0
    assert "control rate   10 Hz" in capsys.readouterr().out


def test_the_printed_report_has_the_lines_of_today(tmp_path):
    """Names of the lines only: numbers of the shipped data set are checked where they are computed."""
    write_data_set(tmp_path, "libero_demo", [make_episode(0)])
    report, _ = inspect_module.inspect(tmp_path / "libero_demo", tmp_path / "report")
    lines = inspect_module.format_report(report | {"warnings": []}).splitlines()
    page = (DOCS / "datasets.md").read_text(encoding="utf-8")
    (printed,) = re.findall(r"made by the command above -->\n```\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert [line[:14] for line in printed.splitlines()] == [line[:14] for line in lines]
