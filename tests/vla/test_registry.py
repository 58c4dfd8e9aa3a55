from dataclasses import replace

import numpy as np
import pytest

from prismatic.vla.datasets.registry import (
    MIXTURES,
    alternative_name,
    expand_data_set_names,
    get_data_set_config,
    libero_config,
    load_data_set_file,
    register_data_set,
    register_mixture,
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
    assert config.keys[0].cameras == ("image", "wrist_image")
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
        register_data_set("kitchen", replace(libero, control_hz=5.0))


def test_lists_mixtures_and_weights():
    assert expand_data_set_names("libero_a, libero_b") == {"libero_a": 1.0, "libero_b": 1.0}
    assert expand_data_set_names("libero_a:0.5,libero_b") == {"libero_a": 0.5, "libero_b": 1.0}
    suites = expand_data_set_names("libero_4_task_suites_no_noops:2")
    assert suites == {name: 2.0 for name in MIXTURES["libero_4_task_suites_no_noops"]}
    assert len(suites) == 4 and "libero_90_no_noops" not in suites


@pytest.mark.parametrize(
    "name", ["", "libero_a,", "libero_a,libero_a", "libero_4_task_suites_no_noops,libero_10_no_noops"]
)
def test_empty_or_repeated_names(name):
    with pytest.raises(ValueError, match="twice or not at all"):
        expand_data_set_names(name)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "much"])
def test_weights_are_positive_numbers(weight, monkeypatch):
    with pytest.raises(ValueError, match="weight of 'libero_a' is not a positive number"):
        expand_data_set_names(f"libero_a:{weight}")


def test_a_registered_mixture_keeps_its_weights(monkeypatch):
    monkeypatch.setattr("prismatic.vla.datasets.registry.MIXTURES", {})
    register_mixture("kitchens", {"libero_a": 1, "libero_b": 0.25})
    register_mixture("kitchens", {"libero_a": 1, "libero_b": 0.25})
    assert expand_data_set_names("kitchens:2") == {"libero_a": 2.0, "libero_b": 0.5}
    with pytest.raises(ValueError, match="other weights"):
        register_mixture("kitchens", {"libero_a": 1})
    with pytest.raises(ValueError, match="positive"):
        register_mixture("garages", {"libero_a": 0})


def test_a_users_file_registers_data_sets_once(tmp_path, monkeypatch):
    monkeypatch.setattr("prismatic.vla.datasets.registry._REGISTERED", {})
    file = tmp_path / "my_arm.py"
    file.write_text(
        "from prismatic.vla.datasets.registry import get_data_set_config, register_data_set\n"
        "register_data_set('my_arm', get_data_set_config('libero_'))\n"
    )
    for _ in range(2):
        load_data_set_file(file)
    assert get_data_set_config("my_arm").standardize is standardize_libero
    with pytest.raises(FileNotFoundError, match="your_arm.py is no file"):
        load_data_set_file(tmp_path / "your_arm.py")


@pytest.mark.parametrize(
    ("change", "message"), [({"keys": ()}, "keys is empty"), ({"action_mask": (True,)}, "1 entries.*7")]
)
def test_a_configuration_is_checked(change, message):
    with pytest.raises(ValueError, match=message):
        replace(get_data_set_config("libero_"), **change)


@pytest.mark.parametrize("change", [{"format": "zip"}, {"cameras": ()}, {"state": "state"}])
def test_source_keys_are_checked(change):
    with pytest.raises(ValueError, match=f"SourceKeys.{next(iter(change))}"):
        replace(get_data_set_config("libero_").keys[0], **change)


def test_alternative_name_is_an_involution():
    assert alternative_name("libero_goal") == "libero_goal_no_noops"
    assert alternative_name("libero_goal_no_noops") == "libero_goal"


def test_cameras_of_ones_own_in_liberos_conventions():
    config = libero_config(cameras=("scene", "hand"))
    assert config.standardize == get_data_set_config("libero_").standardize
    assert [keys.cameras for keys in config.keys] == [
        ("scene", "hand"),
        ("observation.images.scene", "observation.images.hand"),
        ("scene", "hand"),
        ("obs/scene", "obs/hand"),
    ]


def test_a_slip_in_a_registered_name_is_named(monkeypatch):
    monkeypatch.setattr("prismatic.vla.datasets.registry._REGISTERED", {})
    register_data_set("bowl_of_the_lab", libero_config())
    with pytest.raises(KeyError, match="did you mean bowl_of_the_lab?"):
        get_data_set_config("bowl_of_the_lb")
