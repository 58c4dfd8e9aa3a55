import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from PIL import Image

from prismatic.vla.datasets import inspect as inspect_module
from prismatic.vla.datasets.inspect_measures import chosen_frames, find_noops
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.images import decode_image, encode_jpeg

ROOT = inspect_module.__file__.rsplit("/prismatic/", 1)[0]
SHIPPED = ("libero_object_scripted_no_noops", "libero_spatial_scripted_no_noops")


@pytest.fixture(autouse=True)
def index_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def good_episode(index):
    """An episode with what LIBERO's have: rotations on both sides of pi."""
    episode = make_episode(index)
    episode.state[:, 3:6] = [[np.pi + 0.01 * (-1) ** t, 0, 0] for t in range(len(episode))]
    return episode


def run(root, name="libero_demo", **kwargs):
    report, output = inspect_module.inspect(root / name, root / "report", **kwargs)
    assert json.loads((output / "report.json").read_text())["warnings"] == report["warnings"]
    return report


def checks(report):
    return {entry["check"]: entry["found"] for entry in report["warnings"]}


def test_a_good_data_set_has_no_warnings(tmp_path):
    episodes = [good_episode(i) for i in range(3)]
    write_data_set(tmp_path, "libero_demo", episodes)
    report = run(tmp_path)
    assert report["warnings"] == []
    assert report["episodes"] == 3 and report["frames"] == 36 and report["control_hz"] == 20
    assert report["instructions"] == {"push the plate": 3}
    actions = np.concatenate([episode.actions for episode in episodes]).astype(float)
    np.testing.assert_allclose(report["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    assert sum(report["gripper"].values()) == 36 and set(report["gripper"]) == {"-1", "1"}
    assert report["cameras"]["image"]["sizes"] == {"16x16": 36}
    for name in report["strips"]:
        assert Image.open(tmp_path / "report" / name).size[0] > 1000


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.slow
def test_the_shipped_data_sets_have_no_warnings(name, tmp_path):
    report, _ = inspect_module.inspect(f"{ROOT}/datasets/rlds/{name}", tmp_path, max_images=50)
    assert report["warnings"] == []
    assert report["rotation"]["share_above_pi"] > 0.3 and report["rotation"]["largest_step"] < 0.1


def spoil_actions(episode, change):
    actions = episode.actions.copy()
    change(actions)
    return replace(episode, actions=actions)


def spoil_images(episode, change):
    return replace(episode, images=episode.images | {"image": change(list(episode.images["image"]))})


def fold(episode):
    """Quaternions with w >= 0: angles of more than pi become smaller ones about the opposite axis."""
    state = episode.state.copy()
    norms = np.linalg.norm(state[:, 3:6], axis=1, keepdims=True)
    state[:, 3:6] = np.where(norms > np.pi, state[:, 3:6] * (norms - 2 * np.pi) / norms, state[:, 3:6])
    return replace(episode, state=state)


def gripper_half(actions):
    actions[3, 6] = 0.5


def too_large(actions):
    actions[2, 1] = -1.5


def stand_still(actions):
    actions[4:8, :6] = 0
    actions[3:8, 6] = 1


PROBLEMS = {
    "empty instruction": (lambda e: replace(e, instruction=" "), "1 episodes with ' '"),
    "instruction ends in digits": (lambda e: replace(e, instruction="push the plate 12"), "12"),
    "gripper values": (lambda e: spoil_actions(e, gripper_half), "0.5"),
    "action range": (lambda e: spoil_actions(e, too_large), "dimension 1: -1.5"),
    "no-ops": (lambda e: spoil_actions(e, stand_still), "4 steps"),
    "rotation looks folded": (fold, "above pi"),
    "short episodes": (lambda e: replace(make_episode(7, length=5), state=e.state[:5]), "1 episodes, first 1"),
    "constant images": (
        lambda e: spoil_images(e, lambda f: [encode_jpeg(np.full((16, 16, 3), 9, np.uint8)), *f[1:]]),
        "image: 1 images of one colour, first at (episode, step) (1, 0)",
    ),
    "camera stands still": (lambda e: spoil_images(e, lambda f: f[:1] * len(f)), "image: all"),
}


@pytest.mark.parametrize("check", PROBLEMS)
def test_each_problem_is_named(check, tmp_path):
    change, found = PROBLEMS[check]
    write_data_set(tmp_path, "libero_demo", [good_episode(0), change(good_episode(1))])
    report = run(tmp_path)
    assert set(checks(report)) == {check}
    assert found in checks(report)[check]


def test_episodes_that_cannot_be_read_do_not_hide_the_others(tmp_path, capsys):
    directory = write_data_set(tmp_path, "libero_demo", [good_episode(0), good_episode(1)])
    (shard,) = directory.glob("*tfrecord*")
    content = bytearray(shard.read_bytes())
    content[300] ^= 1
    shard.write_bytes(content)
    report = run(tmp_path)
    assert "1, first: " in checks(report)["unreadable episodes"] and report["frames"] == 12
    assert inspect_module.main([str(tmp_path / "libero_demo")]) == 0
    assert "record 0 at offset 0 has a corrupt payload" in capsys.readouterr().out


def test_duplicates(tmp_path):
    write_data_set(tmp_path, "libero_demo", [good_episode(0), good_episode(1), good_episode(0)])
    assert checks(run(tmp_path)) == {"duplicate episodes": "episodes [0, 2] have equal actions and states"}


def test_what_the_writer_refuses(tmp_path, monkeypatch):
    """NaN, broken images and other sizes cannot be written, so the source is changed."""
    write_data_set(tmp_path, "libero_demo", [good_episode(0), good_episode(1)])
    opened = inspect_module.open_folder

    def open_spoiled(*args):
        name, source, config = opened(*args)
        frame, state = source.frame, source.state
        small = np.random.default_rng(0).integers(0, 255, (8, 4, 3), dtype=np.uint8)
        spoiled = {("image", 0, 3): b"no image", ("wrist_image", 1, 2): small}
        source.frame = lambda *place: spoiled[place] if place in spoiled else frame(*place)
        source.state = lambda episode: np.where(np.arange(8) == 6, np.nan, state(episode))
        return name, source, config

    monkeypatch.setattr(inspect_module, "open_folder", open_spoiled)
    report = run(tmp_path)
    assert set(checks(report)) == {"state not finite", "images do not decode", "image sizes differ"}
    assert "24 values, first at (episode, step, dim) (0, 0, 6)" in checks(report)["state not finite"]
    assert "episode 0, step 3" in checks(report)["images do not decode"]
    assert "4x8" in checks(report)["image sizes differ"]
    assert report["state"]["max"][6] is None


def test_noops_are_those_of_the_sequential_rule():
    rng = np.random.default_rng(0)
    for _ in range(50):
        actions = rng.normal(size=(20, 7)) * (rng.random((20, 1)) < 0.4)
        actions[:, 6] = rng.choice([-1, 1], 20)
        expected, last = [], None
        for action in actions:
            noop = np.linalg.norm(action[:6]) < 1e-4 and (last is None or action[6] == last)
            expected.append(noop)
            last = last if noop else action[6]
        assert find_noops(actions).tolist() == expected


def test_chosen_frames_are_spread():
    lengths = np.array([3, 4, 5])
    everything = [(e, s) for e, n in enumerate(lengths) for s in range(n)]
    assert list(chosen_frames(lengths, 0)) == list(chosen_frames(lengths, 100)) == everything
    assert list(chosen_frames(lengths, 3)) == [(0, 0), (1, 3), (2, 4)]
    assert list(chosen_frames(np.array([], np.int64), 5)) == []


def test_a_version_directory_and_an_unregistered_name(tmp_path):
    version = write_data_set(tmp_path, "kitchen", [make_episode(0)])
    write_data_set(tmp_path, "libero_demo", [good_episode(0)])
    name, source, config = inspect_module.open_folder(version)
    assert name == "kitchen" and source.keys.cameras == ("image", "wrist_image")
    report = run(tmp_path, "kitchen")
    assert report["conventions"] == "own" and report["noops"] is None and report["warnings"] == []
    assert inspect_module.open_folder(tmp_path / "libero_demo" / "1.0.0")[1].directory.name == "1.0.0"


def test_command_line(tmp_path, capsys):
    write_data_set(tmp_path, "libero_demo", [good_episode(0), fold(good_episode(1))])
    assert inspect_module.main([str(tmp_path / "libero_demo")]) == 0
    text = capsys.readouterr().out
    assert "episodes       2, 24 frames" in text and "WARNING        rotation looks folded: found norm" in text
    assert (tmp_path / "runs" / "inspect" / "libero_demo" / "report.json").is_file()
    assert inspect_module.main([str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err


class FakeTfds(ModuleType):
    """Stands for tensorflow_datasets: the package's own reader behind its interface, with a change to find.

    It shows that differences are found and reported, not that TensorFlow agrees: the suite has no TensorFlow.
    """

    def __init__(self, change=lambda number, example: example):
        super().__init__("tensorflow_datasets")
        self.change = change
        self.decode = SimpleNamespace(SkipDecoding=lambda: "skip")
        self.ReadConfig = SimpleNamespace
        self.as_numpy = lambda data_set: data_set

    def builder_from_directory(self, directory):
        camera = SimpleNamespace(decode_example=decode_image)
        features = {"steps": {"observation": {"image": camera, "wrist_image": camera}}}

        def as_dataset(split, decoders, read_config, shuffle_files):
            assert decoders == {"steps": {"observation": {"image": "skip", "wrist_image": "skip"}}}
            assert read_config.interleave_cycle_length == 1 and not shuffle_files
            examples = map(self.example, RLDSReader(directory, split))
            return filter(None, (self.change(number, example) for number, example in enumerate(examples)))

        return SimpleNamespace(info=SimpleNamespace(features=features), as_dataset=as_dataset)

    @staticmethod
    def example(episode):
        def step(t):
            observation = {key: frames[t] for key, frames in episode.images.items()}
            observation |= {"state": episode.state[t], "joint_state": episode.joint_state[t]}
            flags = {n: getattr(episode, n)[t] for n in ("reward", "discount", "is_first", "is_last", "is_terminal")}
            text = episode.instruction.encode()
            return flags | {"observation": observation, "action": episode.actions[t], "language_instruction": text}

        steps = [step(t) for t in range(len(episode))]
        return {"steps": steps, "episode_metadata": {"file_path": episode.file_path.encode()}}


def change_action(number, example):
    if number == 1:
        action = example["steps"][2]["action"] = example["steps"][2]["action"].copy()
        action[4] = np.nextafter(action[4], np.float32(9))
    return example


def change_image(number, example):
    if number == 0:
        example["steps"][3]["observation"]["wrist_image"] += b"\0"
    return example


def change_text(number, example):
    if number == 0:
        example["steps"][1]["language_instruction"] = b"other"
    return example


@pytest.mark.parametrize(
    ("change", "feature", "place"),
    [
        (change_action, "steps/action", "(2, 4)"),
        (change_image, "steps/observation/wrist_image", "step 3"),
        (change_text, "steps/language_instruction", "step 1"),
        (lambda number, example: None if number else example, "episodes", ""),
    ],
)
def test_differences_to_tfds_are_listed(change, feature, place, tmp_path, monkeypatch, capsys):
    write_data_set(tmp_path, "libero_demo", [good_episode(0), good_episode(1)])
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", FakeTfds(change))
    assert inspect_module.main([str(tmp_path / "libero_demo"), "--backend", "tfds"]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("DIFFERENCE")]
    assert feature in line and place in line
    report = json.loads((tmp_path / "runs" / "inspect" / "libero_demo" / "report.json").read_text())
    assert report["tfds"]["count"] == 1


def test_no_difference_to_tfds(tmp_path, monkeypatch, capsys):
    write_data_set(tmp_path, "libero_demo", [good_episode(0), good_episode(1)], shards=2)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", FakeTfds())
    assert inspect_module.main([str(tmp_path / "libero_demo"), "--backend", "tfds"]) == 0
    assert "2 episodes" in capsys.readouterr().out


def test_without_tfds_the_extra_is_named(tmp_path, monkeypatch, capsys):
    write_data_set(tmp_path, "libero_demo", [good_episode(0)])
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    assert inspect_module.main([str(tmp_path / "libero_demo"), "--backend", "tfds"]) == 2
    assert "craft-vla[tfds]" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_tfds_agrees(golden_dir, tmp_path):
    pytest.importorskip("tensorflow_datasets", reason="extra tfds, in an environment of its own")
    directory = str(golden_dir / "rlds_mini" / "libero_mini_no_noops")
    assert inspect_module.main([directory, "--backend", "tfds", "--output", str(tmp_path)]) == 0
