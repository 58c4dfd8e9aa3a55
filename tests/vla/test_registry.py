from dataclasses import replace

import numpy as np
import pytest

from prismatic.vla.datasets.registry import (
    MIXTURES,
    alternative_name,
    expand_data_set_names,
    get_data_set_config,
    register_data_set,
    standardize_libero,
)


def test_gripper_of_a_hand_made_trajectory():
    actions = np.zeros((3, 7), np.float32)
    actions[:, 6] = [-1, 1, -1]  # open, close, open
    actions[:, 0] = [0.1, 0.2, 0.3]
    state = np.arange(24, dtype=np.float32).reshape(3, 8)
    standard, proprio = standardize_libero(actions, state)
    np.testing.assert_array_equal(standard[:, 6], [1, 0, 1])
    np.testing.assert_array_equal(standard[:, :6], actions[:, :6])
    np.testing.assert_array_equal(proprio, state)
    np.testing.assert_array_equal(actions[:, 6], [-1, 1, -1])
    assert standard.dtype == np.float32


def test_wrong_shapes():
    with pytest.raises(ValueError, match=r"\(3, 6\)"):
        standardize_libero(np.zeros((3, 6)), np.zeros((3, 8)))


@pytest.mark.parametrize("name", ["libero_spatial_no_noops", "libero_spatial", "libero_90", "libero_mini_no_noops"])
def test_libero_names_are_registered(name):
    config = get_data_set_config(name)
    assert config.standardize is standardize_libero
    assert config.cameras == ("image", "wrist_image")
    assert config.action_mask == (True,) * 6 + (False,)


def test_unknown_data_set():
    with pytest.raises(KeyError, match="bridge_orig.*libero_"):
        get_data_set_config("bridge_orig")


def test_a_registered_data_set_is_known_and_cannot_change(monkeypatch):
    monkeypatch.setattr("prismatic.vla.datasets.registry._REGISTERED", {})
    libero = get_data_set_config("libero_spatial")
    register_data_set("kitchen", libero)
    register_data_set("kitchen", libero)
    assert get_data_set_config("kitchen") is libero
    with pytest.raises(ValueError, match="kitchen"):
        register_data_set("kitchen", replace(libero, cameras=("image",)))


def test_lists_and_mixtures():
    assert expand_data_set_names("libero_a, libero_b") == ["libero_a", "libero_b"]
    suites = expand_data_set_names("libero_4_task_suites_no_noops")
    assert suites == list(MIXTURES["libero_4_task_suites_no_noops"])
    assert len(suites) == 4 and "libero_90_no_noops" not in suites


@pytest.mark.parametrize(
    "name", ["", "libero_a,", "libero_a,libero_a", "libero_4_task_suites_no_noops,libero_10_no_noops"]
)
def test_empty_or_repeated_names(name):
    with pytest.raises(ValueError, match="distinct"):
        expand_data_set_names(name)


def test_alternative_name_is_an_involution():
    assert alternative_name("libero_goal") == "libero_goal_no_noops"
    assert alternative_name("libero_goal_no_noops") == "libero_goal"
