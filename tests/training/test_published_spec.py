"""What a published folder does not say (chunk length, normalisation) comes from a name or a flag, or is asked for."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from published_fixtures import make_published_folder

from experiments.robot.policy import VLAPolicy
from prismatic.model_files import CheckpointError
from prismatic.models.presets import build_vla
from prismatic.training import setup
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.config import FinetuneConfig
from prismatic.training.published_spec import HeadSizes, published_spec
from prismatic.training.setup import load_start_model
from prismatic.vla.action_spec import ACTION_SPECS, ActionSpec, NormalizationType
from prismatic.vla.datasets import registry
from prismatic.vla.datasets.registry import DataSetConfig, load_data_set_file
from prismatic.vla.datasets.source import SourceKeys

LIBERO = HeadSizes(7, 8)
ARM = ActionSpec(chunk_len=12, action_dim=5, proprio_dim=6, normalization=NormalizationType.BOUNDS)
BOUNDS = {"mean": 0.0, "std": 0.5, "max": 1.0, "min": -1.0, "q01": -0.9, "q99": 0.9}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """The data set `arm`; the registry is as before afterwards."""
    monkeypatch.setattr(registry, "_REGISTERED", {})
    keys = (SourceKeys("lerobot", ("front",), ("state",), "action"),)
    config = DataSetConfig(lambda a, s: (a, s), keys, (True,) * 5, ARM)
    registry.register_data_set("arm", config)


def spec(sizes=LIBERO, names=("my_robot",), robot=None, data_set=None) -> ActionSpec:
    return published_spec(sizes, names, "folder", robot, data_set)


@pytest.fixture
def head_of(tmp_path):
    """A published folder for a robot of given sizes; `name` of its statistics."""

    def make(name: str, sizes: HeadSizes, statistics_dim: int | None = None):
        folder = make_published_folder(tmp_path / name)
        options = {"use_pro_version": True, "chunk_start": "zeros", "rope_mode": "legacy", "published_layout": True}
        proprio = sizes.proprio_dim or 1
        _, head, projector = build_vla("tiny", proprio_dim=proprio, action_dim=sizes.action_dim, **options)
        torch.save(head.state_dict(), folder / "action_head--checkpoint.pt")
        torch.save(projector.state_dict(), folder / "proprio_projector--checkpoint.pt")
        if sizes.proprio_dim is None:
            (folder / "proprio_projector--checkpoint.pt").unlink()
        statistics = {"action": {k: [v] * sizes.action_dim for k, v in BOUNDS.items()}}
        if statistics_dim is not None:
            statistics["proprio"] = {k: [0.0] * statistics_dim for k in BOUNDS}
        (folder / "dataset_statistics.json").write_text(json.dumps({name: statistics}))
        return folder

    return make


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        ("libero_spatial_no_noops", "libero"),
        ("libero_10", "libero"),
        ("calvin_abc", "calvin"),
        ("calvin_abc_rlds", "calvin"),
        ("aloha_scoop_x_into_bowl", "aloha"),
        ("aloha1_fold_shirt_30_demos", "aloha"),
        ("aloha1_put_X_into_pot_300_demos", "aloha"),
        ("bridge_orig", "bridge"),
        ("bridge", "bridge"),
    ],
)
def test_names_of_published_data_sets_identify_the_robot(name, platform):
    expected = ACTION_SPECS[platform]
    assert spec(HeadSizes(expected.action_dim, expected.proprio_dim), [name]) == expected


@pytest.mark.parametrize(
    "name", ["my_robot", "bridgeport", "liberty_arm", "not_libero", "aloha_mine", "bridge_v3", "calvin_d", "libero10"]
)
@pytest.mark.parametrize("sizes", [LIBERO, HeadSizes(7, 7), HeadSizes(14, 14), HeadSizes(7, None)])
def test_sizes_and_names_like_those_of_others_identify_nothing(name, sizes):
    with pytest.raises(CheckpointError, match=f"folder.*{name}.*--data_set_file.*--robot_platform"):
        spec(sizes, [name])


def test_a_registered_data_set_says_it_by_its_name_by_the_flag_or_as_the_data_of_the_run():
    sizes = HeadSizes(5, 6)
    for answer in (spec(sizes, ["arm"]), spec(sizes, robot="arm"), spec(sizes, data_set="arm")):
        assert answer == ARM
    assert spec(LIBERO, ["libero_goal_no_noops"], data_set="arm") == ACTION_SPECS["libero"]  # trained on other data
    with pytest.raises(CheckpointError, match="5 action and 6 proprio numbers as of data set arm"):
        spec(LIBERO, data_set="arm")
    with pytest.raises(CheckpointError, match="--robot_platform"):  # every LIBERO name has that configuration
        spec(LIBERO, data_set="libero_goal_no_noops")


def test_the_flag_takes_numbers_and_platforms_and_nothing_else():
    assert spec(HeadSizes(7, 9), robot="10,bounds") == ActionSpec(10, 7, 9, NormalizationType.BOUNDS)
    assert spec(HeadSizes(14, 14), robot="aloha").chunk_len == 25
    for text in ("10", "10,sideways", "0,bounds", "9999999999,bounds", "Franka", "", "8,bounds_q99,3"):
        with pytest.raises(CheckpointError, match="--robot_platform is"):
            spec(robot=text)
    with pytest.raises(CheckpointError, match="14 action and 14 proprio"):
        spec(LIBERO, robot="aloha")


def test_names_that_contradict_each_other_or_the_sizes_are_refused():
    with pytest.raises(CheckpointError, match="different robots"):
        spec(HeadSizes(7, None), ["libero_10", "bridge_orig"])
    assert spec(LIBERO, ["libero_10", "my_robot"]).chunk_len == 8
    with pytest.raises(CheckpointError, match="7 action and 7 proprio numbers, expected 7 action and 8"):
        spec(HeadSizes(7, 7), ["libero_10"])


def test_a_folder_of_ones_own_robot_loads_with_the_data_set_file(head_of, tmp_path):
    folder = head_of("kitchen", HeadSizes(5, 6), 6)
    with pytest.raises(CheckpointError, match="kitchen"):
        load_checkpoint(folder)
    file = tmp_path / "robots.py"
    file.write_text(
        "from prismatic.vla.datasets.registry import get_data_set_config, register_data_set\n"
        'register_data_set("kitchen", get_data_set_config("arm"))\n'
    )
    load_data_set_file(file)
    manifest = load_checkpoint(folder).manifest
    assert manifest["action_spec"] == ARM.to_dict() and manifest["action_head"]["chunk_len"] == 12


def test_training_takes_the_data_set_of_the_run_and_a_checkpoint_of_ours_contradicts(head_of):
    flags = {"config_file_path": str(head_of("unknown", HeadSizes(5, 6), 6)), "dataset_name": "arm"}
    assert load_start_model(FinetuneConfig(**flags)).action_spec == ARM
    with pytest.raises(CheckpointError, match="--config_file_path.*--robot_platform"):
        load_start_model(FinetuneConfig(**flags | {"dataset_name": "libero_10"}))
    ours = "pretrained_models/tiny-libero-object"
    load_checkpoint(ours, robot="libero")
    with pytest.raises(CheckpointError, match="--robot_platform bridge.*states"):
        load_checkpoint(ours, robot="bridge")


@pytest.mark.parametrize("statistics_dim", [None, 7, 8])
def test_a_policy_without_robot_state_runs_whatever_its_statistics_hold_there(head_of, statistics_dim):
    folder = head_of("libero_spatial_no_noops", HeadSizes(7, None), statistics_dim)
    policy = VLAPolicy.from_checkpoint(folder, unnorm_key="libero_spatial")
    assert policy.action_spec == ACTION_SPECS["libero"]
    image = np.zeros((96, 96, 3), np.uint8)
    chunk = policy.predict(image, image, np.ones(8), "open the drawer")
    assert chunk.shape == (8, 7) and np.isfinite(chunk).all()
    assert np.array_equal(chunk, policy.predict(image, image, np.full(8, 1e3), "open the drawer"))


def test_a_start_that_keeps_another_specification_than_the_data_are_registered_with_is_said(capsys):
    cfg = FinetuneConfig(config_file_path="tiny", dataset_name="arm")
    setup._compare_specs(cfg, ARM)
    assert capsys.readouterr().out == ""
    setup._compare_specs(cfg, replace(ARM, chunk_len=8))
    said = capsys.readouterr().out
    assert "arm is registered with chunks of 12 actions and bounds; the start model keeps its own, 8 and bounds" in said
