import copy
import json

import numpy as np
import pytest

from prismatic.vla.action_spec import ActionSpec, NormalizationType
from prismatic.vla.normalization import (
    Normalizer,
    compute_statistics,
    load_statistics,
    resolve_statistics_key,
    save_statistics,
)

MASK = [True] * 6 + [False]


@pytest.fixture
def statistics():
    rng = np.random.default_rng(0)
    actions = [rng.normal(size=(length, 7)).astype(np.float32) for length in (40, 25)]
    proprios = [rng.normal(size=(length, 8)).astype(np.float32) for length in (40, 25)]
    for trajectory in actions:
        trajectory[:, 6] = rng.integers(0, 2, len(trajectory))
    return compute_statistics(actions, proprios, MASK)


@pytest.mark.parametrize("kind", list(NormalizationType))
def test_round_trip(statistics, kind):
    normalizer = Normalizer(statistics, ActionSpec(normalization=kind))
    low, high = (np.array(statistics["action"][key]) for key in ("q01", "q99"))
    actions = np.random.default_rng(1).uniform(low, high, (50, 7))
    restored = normalizer.unnormalize_action(normalizer.normalize_action(actions))
    np.testing.assert_allclose(restored, actions, atol=1e-6)


@pytest.mark.parametrize("kind", list(NormalizationType))
def test_unmasked_dimension_passes_unchanged(statistics, kind):
    normalizer = Normalizer(statistics, ActionSpec(normalization=kind))
    actions = np.linspace(-3, 3, 70).reshape(10, 7)
    np.testing.assert_array_equal(normalizer.normalize_action(actions)[:, 6], actions[:, 6])
    np.testing.assert_array_equal(normalizer.unnormalize_action(actions)[:, 6], actions[:, 6])


@pytest.mark.parametrize("kind", ["bounds", "bounds_q99"])
def test_bounds_clip_and_hit_the_ends(statistics, kind):
    normalizer = Normalizer(statistics, ActionSpec(normalization=kind))
    low, high = (np.array(statistics["proprio"][key]) for key in {"bounds": ("min", "max")}.get(kind, ("q01", "q99")))
    np.testing.assert_allclose(normalizer.normalize_proprio(np.stack([low, high])), [[-1] * 8, [1] * 8], atol=1e-6)
    np.testing.assert_array_equal(normalizer.normalize_proprio(np.stack([low - 9, high + 9])), [[-1] * 8, [1] * 8])


def test_constant_masked_dimension_becomes_zero_and_constant_gripper_stays():
    actions = np.random.default_rng(0).normal(size=(30, 7)).astype(np.float32)
    actions[:, 2], actions[:, 6] = 0.25, 1.0
    statistics = compute_statistics([actions], [np.ones((30, 8), np.float32)], MASK)
    normalized = Normalizer(statistics, ActionSpec()).normalize_action(actions)
    assert np.all(normalized[:, 2] == 0)
    assert np.all(normalized[:, 6] == 1)


def test_float32_in_float32_out(statistics):
    normalizer = Normalizer(statistics, ActionSpec())
    assert normalizer.normalize_action(np.zeros((2, 7), np.float32)).dtype == np.float32
    assert normalizer.normalize_proprio(np.zeros(8)).dtype == np.float64


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite(statistics, bad):
    normalizer = Normalizer(statistics, ActionSpec())
    values = np.zeros((3, 7))
    values[1, 4] = bad
    for method in (normalizer.normalize_action, normalizer.unnormalize_action):
        with pytest.raises(ValueError, match=r"action .*not finite.*\(1, 4\)"):
            method(values)


def test_wrong_last_dimension(statistics):
    with pytest.raises(ValueError, match=r"proprio has shape \(7,\), expected \(..., 8\)"):
        Normalizer(statistics, ActionSpec()).normalize_proprio(np.zeros(7))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda s: s.pop("proprio"), "no entry 'proprio'"),
        (lambda s: s["action"].pop("q99"), "no entry 'q99'"),
        (lambda s: s["action"].update(mean=[0.0] * 14), r"action.mean is \[0.0.*, expected 7 numbers"),
        (lambda s: s["action"].update(mask=[True] * 6), "mask"),
        (lambda s: s["action"].update(mask=[1] * 7), "mask"),
        (lambda s: s["action"].update(q01=s["action"]["q99"], q99=s["action"]["q01"]), "q01 > action.q99"),
        (lambda s: s["proprio"].update(std=[float("nan")] * 8), "proprio.std.*not finite"),
    ],
)
def test_statistics_that_do_not_fit(statistics, edit, message):
    broken = copy.deepcopy(statistics)
    edit(broken)
    with pytest.raises(ValueError, match=f"'some_data': ?.*{message}|{message}"):
        Normalizer(broken, ActionSpec(), "some_data")


def test_statistics_against_numpy_definition():
    values = np.arange(202, dtype=np.float32)
    actions = np.repeat(values[:, None], 7, axis=1)
    statistics = compute_statistics([actions[:50], actions[50:]], [actions[:50, :1], actions[50:, :1]], MASK)
    action = statistics["action"]
    assert (action["min"][0], action["max"][0], action["mean"][0]) == (0.0, 201.0, 100.5)
    assert action["q01"][3] == pytest.approx(2.01)
    assert action["std"][0] == pytest.approx(np.sqrt((202**2 - 1) / 12))
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (202, 2)
    assert "mask" not in statistics["proprio"]


def test_nan_in_a_trajectory_is_located():
    actions = [np.zeros((5, 7)), np.zeros((6, 7))]
    actions[1][3, 2] = np.nan
    with pytest.raises(ValueError, match=r"trajectory 1: action is not finite at \(step, dim\) \(3, 2\)"):
        compute_statistics(actions, [np.zeros((5, 8)), np.zeros((6, 8))], MASK)


def test_trajectories_of_different_lengths():
    with pytest.raises(ValueError, match="trajectory 0: 5 actions, 4 proprios"):
        compute_statistics([np.zeros((5, 7))], [np.zeros((4, 8))], MASK)


def test_json_round_trip(tmp_path, statistics):
    path = tmp_path / "dataset_statistics.json"
    Normalizer(statistics, ActionSpec(), "libero_goal_no_noops").to_json(path)
    restored = Normalizer.from_json(path, "libero_goal", ActionSpec())
    assert restored.statistics == statistics
    assert restored.dataset_name == "libero_goal_no_noops"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_statistics_are_a_private_copy(statistics):
    normalizer = Normalizer(statistics, ActionSpec())
    statistics["action"]["q01"][0] = -100.0
    assert normalizer.statistics["action"]["q01"][0] != -100.0


def test_key_resolution():
    both = {"libero_goal_no_noops": {}, "libero_10": {}}
    assert resolve_statistics_key(both, "libero_goal") == "libero_goal_no_noops"
    assert resolve_statistics_key(both, "libero_goal_no_noops") == "libero_goal_no_noops"
    assert resolve_statistics_key(both, "libero_10") == "libero_10"
    assert resolve_statistics_key({"only": {}}, None) == "only"
    with pytest.raises(KeyError, match="libero_object.*libero_10.*libero_goal_no_noops"):
        resolve_statistics_key(both, "libero_object")
    with pytest.raises(KeyError, match="2 data sets.*libero_10"):
        resolve_statistics_key(both, None)


def test_statistics_of_another_data_set(tmp_path, statistics):
    path = tmp_path / "dataset_statistics.json"
    save_statistics(path, {"libero_goal_no_noops": statistics})
    with pytest.raises(KeyError, match="dataset_statistics.json.*libero_object.*libero_goal_no_noops"):
        Normalizer.from_json(path, "libero_object", ActionSpec())


@pytest.mark.parametrize("content", ["{", json.dumps([1]), json.dumps({"x": {"proprio": 1}})])
def test_file_that_holds_no_statistics(tmp_path, content):
    path = tmp_path / "dataset_statistics.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="dataset_statistics.json"):
        load_statistics(path)
