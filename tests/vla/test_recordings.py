"""The replay control executes what a policy trained on the same files would learn, in every format."""

import dataclasses

import numpy as np
import pytest
from data_fixtures import write_data_set
from format_writers import make_smooth_episode, write_hdf5, write_lerobot_v21, write_lerobot_v30
from test_conventions import commands, episode_of

from experiments.robot.libero.controls import Control, find_demonstration
from experiments.robot.libero.eval_backend import LiberoBackend
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_fingerprint import run_fingerprint
from experiments.robot.libero.recordings import Recordings
from prismatic.vla.datasets.registry import libero_config, register_data_set

TEXT = "push the plate"
WRITERS = {"rlds": write_data_set, "v21": write_lerobot_v21, "v30": write_lerobot_v30, "hdf5": write_hdf5}


def write(root, name, format_name, episodes):
    if format_name == "rlds":
        return write_data_set(root, name, episodes, side=32)
    return WRITERS[format_name](root / name, episodes)


def episode(index):
    """LIBERO's numbers with pictures that every format can hold."""
    numbers = episode_of(index)
    return dataclasses.replace(make_smooth_episode(index, 30), actions=numbers.actions, state=numbers.state)


@pytest.mark.parametrize("format_name", WRITERS)
def test_what_libero_stores_is_executed_as_it_is(tmp_path, format_name):
    place = write(tmp_path, "libero_played", format_name, [episode(0), episode(1)])
    recordings = Recordings(str(place))
    assert recordings.num_episodes == 2
    np.testing.assert_array_equal(find_demonstration(recordings, TEXT, 1), episode(1).actions)


def test_a_name_that_nobody_registered_counts_as_libero_and_is_checked(tmp_path):
    place = write(tmp_path, "someones_demos", "rlds", [episode(0)])
    np.testing.assert_array_equal(Recordings(str(place)).episode(0).actions, episode(0).actions)
    standardised = episode_of(0, commands(1, 0))
    other = write_data_set(tmp_path, "other_demos", [standardised])
    cfg = EvalConfig(control=Control.REPLAY, replay_dataset=str(other))
    with pytest.raises(
        EvalInputError, match=r"--replay_dataset .*gripper convention.*libero_config\(opens=1, closes=0"
    ):
        LiberoBackend().check_policy(cfg)
    register_data_set("other_demos", libero_config(opens=1, closes=0))
    np.testing.assert_array_equal(Recordings(str(other)).episode(0).actions, episode_of(0).actions)


def test_broken_and_short_ones_do_not_keep_another_from_being_played(tmp_path):
    place = write(tmp_path, "libero_played", "v21", [episode(0), episode(1)])
    (place / "data/chunk-000/episode_000000.parquet").write_bytes(b"gone")
    np.testing.assert_array_equal(find_demonstration(Recordings(str(place)), TEXT, None), episode(1).actions)


def test_the_primary_camera_is_enough(tmp_path):
    place = write(tmp_path, "libero_played", "hdf5", [episode(0)])
    import h5py

    with h5py.File(next(place.glob("*.hdf5")), "r+") as file:
        del file["data/demo_0/obs/eye_in_hand_rgb"]
    assert Recordings(str(place)).num_episodes == 1


def test_the_split_is_part_of_what_was_played(tmp_path):
    place = write(tmp_path, "libero_played", "rlds", [episode(0)])

    def fingerprint(named):
        return run_fingerprint(EvalConfig(control=Control.REPLAY, replay_dataset=named))[0]

    assert fingerprint(f"{place}:valid") != fingerprint(str(place)) == fingerprint(str(place))
