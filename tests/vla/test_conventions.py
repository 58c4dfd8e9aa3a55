"""Stored values against the convention that a data set is registered with: refused, named in a warning, or silent."""

import re
from dataclasses import replace

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from format_writers import make_smooth_episode, write_hdf5, write_lerobot_v21, write_lerobot_v30

from prismatic.vla.datasets import inspect_checks
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.registry import get_data_set_config, libero_config, register_data_set
from prismatic.vla.datasets.source import DataSetError
from prismatic.vla.images import ImageSpec, encode_jpeg

PLAIN = DatasetSettings(image_spec=ImageSpec(size=16), image_aug=False)
SEEN = replace(PLAIN, observations_only=True)
OPEN_STEPS = 15


def episode_of(index, change=lambda actions, state: None, length=30):
    """Opens, then closes; the fingers follow, rotations lie on both sides of pi."""
    episode = make_episode(index, length)
    actions, state = episode.actions, episode.state
    actions[:, 6] = np.where(np.arange(length) < OPEN_STEPS, -1, 1)
    state[:, 3:6] = [[np.pi + 0.01 * (-1) ** t, 0, 0] for t in range(length)]
    width = 0.039 - np.cumsum(np.where(actions[:, 6] < 0, 0, 0.005)).clip(0, 0.03)
    lag = index - 1  # states are of before, of at and of after the action
    width = np.roll(width, lag)
    state[:, 6], state[:, 7] = width, -width
    change(actions, state)
    return episode


def open_with(root, change, settings=PLAIN, name="libero_set", **registered):
    episodes = [episode_of(index, change) for index in range(3)]
    write_data_set(root, name, episodes)
    return VLADataset(root, name, settings)


def commands(opens, closes):
    def change(actions, state):
        actions[:, 6] = np.where(actions[:, 6] < 0, opens, closes)

    return change


def test_what_libero_stores_says_nothing(tmp_path):
    assert open_with(tmp_path, lambda actions, state: None).warnings == []


@pytest.mark.parametrize(("opens", "closes"), [(1, 0), (0, 1), (1, -1), (0.08, 0.0), (255, 0), (0.5, 1)])
def test_another_gripper_is_refused_with_the_registration_that_fits(tmp_path, opens, closes):
    name = f"libero_gripper_{opens}_{closes}".replace(".", "_").replace("-", "m")
    with pytest.raises(DataSetError, match="gripper (convention|sign)") as caught:
        open_with(tmp_path, commands(opens, closes), name=name)
    line = str(caught.value)
    call = f"libero_config(opens={opens:g}, closes={closes:g})"
    assert call in line and "exchanged" not in line and name in line and "\n" not in line

    register_data_set(name, libero_config(opens=opens, closes=closes))
    data = VLADataset(tmp_path, name, PLAIN)
    assert data.warnings == []
    learned = data._parts[0].actions[:30, 6]
    np.testing.assert_allclose(learned, np.arange(30) < OPEN_STEPS)  # 1 = open, as the robot was


def test_without_fingers_to_look_at_both_registrations_are_named(tmp_path):
    def change(actions, state):
        commands(1, 0)(actions, state)
        state[:, 6:] = np.random.default_rng(0).normal(size=(len(state), 2))

    with pytest.raises(DataSetError, match=r"opens=1, closes=0\)\), or opens and closes exchanged"):
        open_with(tmp_path, change)


def degrees(actions, state):
    state[:, 3:6] = np.degrees(state[:, 3:6])


def quaternions(actions, state):
    angle = np.linspace(0.1, 1, len(state))
    state[:, 3:7] = np.stack([np.sin(angle), 0 * angle, 0 * angle, np.cos(angle)], axis=1)


def poses(actions, state):
    actions[:, 2] = 1.1 + 0.01 * np.arange(len(actions))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (degrees, "rotation is no axis-angle: found state 3:6 has norms up to 1"),
        (quaternions, "rotation is a quaternion"),
        (poses, "action convention: found dimension 2: 1.1 .. 1.39, 100% of the frames beyond"),
        (commands(0, 0), "gripper convention: found values from 0 to 0"),
    ],
)
def test_contradictions_are_not_trained_on(tmp_path, change, check):
    with pytest.raises(DataSetError, match=f"libero_set: .*{check}.*docs/datasets.md"):
        open_with(tmp_path, change)


def one_outlier(actions, state):
    actions[3, 0] = 1.4


def half_commands(actions, state):
    actions[3, 6] = 0.25


def metres(actions, state):
    actions[:, :6] *= 0.01


def pauses(actions, state):
    actions[5:8, :6] = 0


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (one_outlier, "action range"),
        (half_commands, "gripper values"),
        (metres, "action range: found nothing beyond 0.00.* metres"),
        (pauses, "no-ops"),
        (commands(-1, -1), "gripper values: found -1 in every frame"),
    ],
)
def test_oddities_are_one_line_and_trained_on(tmp_path, change, check):
    data = open_with(tmp_path, change)
    (line,) = data.warnings
    assert line.startswith("libero_set: ") and "\n" not in line
    assert re.search(check, line)
    assert len(data) > 0


@pytest.mark.parametrize(
    ("picture", "check"),
    [
        (lambda rng: np.zeros((16, 16, 3), np.uint8), "constant images"),
        (lambda rng: np.repeat(rng.integers(0, 255, (16, 16, 1), dtype=np.uint8), 3, axis=2), "grey images"),
    ],
)
def test_a_camera_that_shows_nothing_is_named(tmp_path, picture, check):
    episode, rng = episode_of(0), np.random.default_rng(0)
    episode.images["wrist_image"] = [encode_jpeg(picture(rng), 100) for _ in range(30)]
    write_data_set(tmp_path, "libero_set", [episode])
    assert any(f"{check}: found wrist_image" in line for line in VLADataset(tmp_path, "libero_set", SEEN).warnings)


def test_actions_that_are_not_read_contradict_nothing(tmp_path):
    assert len(open_with(tmp_path, commands(1, 0), SEEN)) == 90
    with pytest.raises(DataSetError, match="rotation"):
        open_with(tmp_path / "other", degrees, SEEN)


def test_conventions_of_your_own_are_not_libero_s(tmp_path):
    config = get_data_set_config("libero_")
    register_data_set("conventions_own", replace(config, standardize=lambda actions, state: (actions, state)))
    assert open_with(tmp_path, commands(1, 0), name="conventions_own").warnings == []


@pytest.mark.parametrize("write", [write_lerobot_v21, write_lerobot_v30, write_hdf5])
def test_every_format_is_checked(tmp_path, write):
    episode = make_smooth_episode(0, 30)
    episode.actions[:, 6] = np.arange(30) < 15
    write(tmp_path / "libero_set", [episode])
    with pytest.raises(DataSetError, match="gripper convention"):
        VLADataset(tmp_path, "libero_set", PLAIN)


def test_the_rate_of_the_files_is_compared_with_the_registered_one(tmp_path):
    write_lerobot_v21(tmp_path / "libero_set", [make_smooth_episode(0, 30)])
    lines = [line for line in VLADataset(tmp_path, "libero_set", SEEN).warnings if "control rate" in line]
    assert lines == ["libero_set: control rate: found 10 Hz in the files; expected 20 Hz, as registered"]
    register_data_set("rate_of_ten", replace(get_data_set_config("libero_"), control_hz=10.0))
    write_lerobot_v21(tmp_path / "rate_of_ten", [make_smooth_episode(0, 30)])
    assert not any("control rate" in line for line in VLADataset(tmp_path, "rate_of_ten", SEEN).warnings)


def test_the_images_are_looked_at_once(tmp_path, monkeypatch):
    first = open_with(tmp_path, one_outlier).warnings
    monkeypatch.setattr(inspect_checks, "measure_content", lambda *_: pytest.fail("measured again"))
    assert VLADataset(tmp_path, "libero_set", PLAIN).warnings == first


@pytest.mark.parametrize("damage", [b"", b"{", b'{"content": {}, "checksum": "0"}'])
def test_a_damaged_measurement_is_made_again(tmp_path, damage):
    first = open_with(tmp_path, one_outlier).warnings
    (kept,) = tmp_path.glob("libero_set/1.0.0/.craft_index/*/measures-*.json")
    kept.write_bytes(damage)
    assert VLADataset(tmp_path, "libero_set", PLAIN).warnings == first


@pytest.mark.parametrize(("opens", "closes"), [(1.0, 1.0), (float("nan"), 0.0), (1.0, float("inf"))])
def test_gripper_commands_have_to_differ(opens, closes):
    with pytest.raises(ValueError, match="libero_config: opens is"):
        libero_config(opens, closes)


def test_random_numbers_show_no_direction_of_the_gripper():
    from prismatic.vla.datasets.inspect_measures import measure_gripper

    rng = np.random.default_rng(0)
    for _ in range(50):
        actions = rng.choice([-1.0, 1.0], (40, 7))
        states = 0.04 * rng.random((40, 8))
        assert measure_gripper([actions], [states], -1.0, 1.0)["opens_when_high"] is None
