"""The policy for Python: what goes in, what comes out, chunks executed one after another."""

import pydoc
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import craft_vla
from experiments.robot.policy import VLAPolicy
from prismatic.output_folder import is_held
from prismatic.training import loop
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.step import NonFiniteLossError, optimizer_step

ROOT = Path(__file__).parents[1]
START = "pretrained_models/tiny-libero-object"
NEW = "libero_spatial_scripted_no_noops"
SENTENCES = ["pick up the milk and place it in the basket", "open the drawer"]


@pytest.fixture(scope="module")
def loaded():
    return load_checkpoint(START)


@pytest.fixture
def policy(loaded):
    return craft_vla.Policy(loaded)


def scene(seed: int, size: int = 96) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    views = {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in ("image", "wrist_image")}
    return views, rng.normal(size=8) * 0.1


def test_names_order_and_kind_of_the_images_do_not_matter(policy):
    views, state = scene(0, 128)
    first = policy.predict(views, state, SENTENCES[0])
    assert first.shape == (8, 7) and first.dtype == np.float64
    swapped = dict(reversed(list(views.items())))
    pictures = [Image.fromarray(views[name]) for name in policy.cameras]
    tensors = {name: torch.tensor(view) for name, view in views.items()}
    mirrored = {name: np.ascontiguousarray(view[..., ::-1])[..., ::-1] for name, view in views.items()}  # BGR, turned
    stacked = np.stack(list(views.values()))
    kinds = (swapped, [views[name] for name in policy.cameras], pictures, stacked, torch.tensor(stacked), tensors)
    for images in (*kinds, mirrored):
        np.testing.assert_array_equal(policy.predict(images, list(state), SENTENCES[0]), first)
    robot = VLAPolicy.from_checkpoint(START)
    np.testing.assert_array_equal(robot.predict(*views.values(), state, SENTENCES[0]), first)
    assert (policy.predict(list(views.values())[::-1], state, SENTENCES[0]) != first).any()


def test_a_batch_says_what_its_members_say(policy):
    scenes = [scene(seed) for seed in (1, 2)]
    images = {name: np.stack([views[name] for views, _ in scenes]) for name in policy.cameras}
    together = policy.predict(images, np.stack([state for _, state in scenes]), SENTENCES)
    alone = [policy.predict(*one, text) for one, text in zip(scenes, SENTENCES, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert policy.predict({name: [] for name in policy.cameras}, np.zeros((0, 8)), []).shape == (0, 8, 7)
    with pytest.raises(ValueError, match=r"batch of 2 instructions: found {'state': 1}, expected 2 of each"):
        policy.predict(images, np.zeros((1, 8)), SENTENCES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, s: ({"image": v["image"]}, s), r"cameras \['image'\], expected image, wrist_image"),
        (lambda v, s: ([v["image"]], s), "found 1 images, expected 2: image, wrist_image"),
        (lambda v, s: (v["image"], s), "found 1 images, expected 2: image, wrist_image"),
        (lambda v, s: (Image.fromarray(v["image"]), s), "found 1 images, expected 2"),
        (lambda v, s: (None, s), "images are NoneType, expected arrays of image, wrist_image"),
        (lambda v, s: ("front.png", s), "images are str, expected arrays of image, wrist_image"),
        (lambda v, s: ({0: v["image"], "wrist": v["image"]}, s), r"cameras \['0', 'wrist'\], expected image, wrist"),
        (lambda v, s: (v | {"image": "front.png"}, s), "camera image: found str, expected an array or a PIL image"),
        (lambda v, s: (v | {"image": [[1, 2], [3]]}, s), "camera image: found rows of different lengths"),
        (lambda v, s: (v | {"image": v["image"] / 255}, s), "found float64 .*expected uint8 .*scale those from 0 to 1"),
        (lambda v, s: (v | {"image": v["image"][..., 0]}, s), r"found uint8 \(96, 96\), expected.*three times"),
        (lambda v, s: (v | {"image": v["image"][..., :1]}, s), r"\(96, 96, 1\), expected.*three times"),
        (lambda v, s: (v | {"image": v["image"][..., [0, 1, 2, 0]]}, s), r"\(96, 96, 4\).*leave out the fourth"),
        (lambda v, s: (v | {"image": torch.tensor(v["image"]).permute(2, 0, 1)}, s), "channels last"),
        (lambda v, s: (v | {"image": v["image"][None]}, s), "a list of instructions makes a batch"),
        (lambda v, s: (v | {"image": Image.new("I;16", (96, 96))}, s), "a PIL image of mode I;16, expected RGB"),
        (lambda v, s: (v, s[:7]), r"state has shape \(7,\), expected \(8,\)"),
        (lambda v, s: (v, None), r"state has shape \(0,\), expected \(8,\)"),
        (lambda v, s: (v, s * np.nan), r"state\[0\] is nan, which is not finite"),
        (lambda v, s: (v, [*s[:7], 1e300]), r"state\[7\] is 1e\+300, which is not finite in float32"),
        (lambda v, s: (v, ["a"] * 8), "state is list of other things, expected 8 numbers"),
        (lambda v, s: (v, [[1], *s[:7]]), "state is list of other things, expected 8 numbers"),
        (lambda v, s: (v, {"joints": s}), "state is dict of other things, expected 8 numbers"),
        (lambda v, s: (v, s + 1j), "state is ndarray of other things, expected 8 numbers"),
        (lambda v, s: (v | {"image": v["image"][:0]}, s), r"camera image: found an image \(0, 96\), expected 1 to"),
        (
            lambda v, s: (v | {"image": np.broadcast_to(np.uint8(0), (6000, 6000, 3))}, s),
            r"camera image: found an image \(6000, 6000\), expected 1 to 33554432 pixels",
        ),
    ],
)
def test_what_does_not_fit_is_named(policy, change, message):
    with pytest.raises(ValueError, match=message):
        policy.predict(*change(*scene(3)), SENTENCES[0])
    with pytest.raises(ValueError, match=message):
        policy.check(craft_vla.Observation(*change(*scene(3)), SENTENCES[0]))


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("", "the instruction is '', expected a non-empty text"),
        (3, "instruction is int, expected text of whole characters"),
        ("\ud800", r"instruction is '\\ud800', expected text of whole characters"),
        ("far " * 4000, r"prompt of 'far far .* the tokenizer allows"),
    ],
)
def test_an_instruction_that_does_not_fit_is_named(policy, instruction, message):
    with pytest.raises(ValueError, match=message) as error:
        policy.check(craft_vla.Observation(*scene(3), instruction))
    assert len(str(error.value)) < 500


def test_a_check_asks_no_policy(policy, monkeypatch):
    monkeypatch.setattr(policy._model, "forward", None)
    policy.check(craft_vla.Observation(*scene(3), SENTENCES[0]))


def counted(policy, monkeypatch) -> list[int]:
    """Chunk n of the policy is 100 n + its row; the list grows by one with each."""
    asked: list[int] = []

    def predict(images, state, instruction):
        asked.append(len(asked))
        return 100.0 * asked[-1] + np.arange(8.0)[:, None] + np.zeros(7)

    monkeypatch.setattr(policy, "predict", predict)
    return asked


def test_chunks_are_executed_open_loop(loaded, monkeypatch):
    policy = craft_vla.Policy(loaded, execute=3)
    asked, observed = counted(policy, monkeypatch), []

    def observe():
        observed.append(1)
        return scene(len(observed)) if len(observed) < 4 else None

    actions = [action[0] for action in policy.run(observe, "a")]
    assert actions == [0, 1, 2, 100, 101, 102, 200, 201, 202] and len(observed) == 4
    assert policy.step(*scene(0), "a")[0] == 300 and policy.step(None, None, "a")[0] == 301
    assert policy.step(*scene(0), "b")[0] == 400  # another instruction takes effect at once
    policy.reset()
    assert policy.needs_observation and len(asked) == 5
    with pytest.raises(ValueError, match="images are None"):
        policy.step(None, None, "b")


def test_temporal_ensembling_averages_what_was_said_of_this_moment(loaded, monkeypatch):
    policy = craft_vla.Policy(loaded, ensemble=0.5)
    counted(policy, monkeypatch)
    for now in range(12):
        action = policy.step(*scene(0), "a")
        asked = np.arange(max(0, now - 7), now + 1)  # oldest first: a chunk speaks of 8 moments
        weights = np.exp(-0.5 * np.arange(len(asked)))
        expected = (weights * (100 * asked + now - asked)).sum() / weights.sum()
        np.testing.assert_allclose(action, expected)


def test_numbers_of_torch_are_taken_as_they_are(policy):
    views, state = scene(4)
    expected = policy.predict(views, np.float32(state), SENTENCES[0])
    tensor = torch.tensor(np.float32(state), requires_grad=True)
    np.testing.assert_array_equal(policy.predict(views, tensor, SENTENCES[0]), expected)
    rough = policy.predict(views, tensor.bfloat16(), SENTENCES[0])
    np.testing.assert_array_equal(rough, policy.predict(views, tensor.bfloat16().tolist(), SENTENCES[0]))


def test_a_batch_that_is_none_is_named(policy):
    views, state = scene(5)
    pictures = {name: Image.fromarray(view) for name, view in views.items()}
    with pytest.raises(ValueError, match="found {'image': 'one', 'wrist_image': 'one'}, expected 8 of each"):
        policy.predict(pictures, state, SENTENCES[:1] * 8)
    for instruction in (None, b"open", {"open"}):
        with pytest.raises(ValueError, match=f"instruction is {type(instruction).__name__}, expected text, or a list"):
            policy.predict(views, state, instruction)
    with pytest.raises(ValueError, match="instruction is list, expected the text of one robot's task"):
        policy.step(views, state, SENTENCES)


def test_what_observes_returns_images_and_state(policy):
    views, state = scene(6)
    for seen in (views, list(views.values()), (views, state, SENTENCES[0])):
        with pytest.raises(ValueError, match=rf"observe returned {type(seen).__name__}, expected \(images, state\)"):
            next(policy.run(lambda seen=seen: seen, "a"))


@pytest.mark.parametrize("given", [{"execute": 0}, {"execute": 9}, {"ensemble": -1.0}, {"ensemble": 0.1, "execute": 2}])
def test_settings_out_of_range_are_refused(loaded, given):
    with pytest.raises(ValueError, match="expected"):
        craft_vla.Policy(loaded, **given)


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "cuda:-1", 3.5])
def test_a_device_that_is_not_there_is_named_before_anything_is_read(device):
    with pytest.raises(ValueError, match=f"device is '{device}', expected one of cpu"):
        craft_vla.load_policy("no/such/folder", device)


def test_the_statistics_to_name_are_listed():
    with pytest.raises(KeyError, match="unnorm_key is None: statistics of 2 data sets .*libero_object_start_no_noops"):
        craft_vla.load_policy("pretrained_models/tiny-libero-displaced", "cpu")


def test_a_folder_of_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "start").symlink_to(ROOT / START)
    assert craft_vla.load_policy("~/start", torch.device("cpu")).cameras == ("image", "wrist_image")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/none does not exist"):
        craft_vla.load_policy("~/none", "cpu")


def test_a_policy_shows_what_it_takes_and_gives(policy, loaded):
    shown = repr(policy)
    facts = (START, "step 3,600", "cpu", "image, wrist_image", "8 numbers", "chunks of 8, each 7", policy.unnorm_key)
    assert [fact for fact in facts if fact not in shown] == []
    assert len(policy.instructions) == 4 and all(sentence in shown for sentence in policy.instructions)
    assert shown.count("\n") < 12 and "\n\n" not in shown
    assert "3 actions of a chunk" in repr(craft_vla.Policy(loaded, execute=3))
    assert "the mean of all chunks" in repr(craft_vla.Policy(loaded, ensemble=0.1))


def test_help_lists_what_there_is_and_names_nothing_else(policy):
    assert set(craft_vla.__all__) <= set(dir(craft_vla))
    page = pydoc.plain(pydoc.render_doc(craft_vla))
    assert all(f"{name}(" in page for name in craft_vla.__all__)
    said = pydoc.plain(pydoc.render_doc(craft_vla.load_policy))
    options = ("path", "device", "unnorm_key", "execute", "ensemble", "num_images", "robot", "data_set", "base")
    assert [name for name in options if not re.search(rf"\b{name}\b", said)] == []


def test_nothing_heavy_is_imported_until_it_is_asked_for():
    code = "import craft_vla, sys; dir(craft_vla); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_the_lines_of_the_package_do_what_they_say(tmp_path, monkeypatch, capsys):
    """Fine-tune, load, predict: with fewer steps, and twice in one process, which lets go of the folder."""
    code = craft_vla.__doc__.split("\n\n", 1)[1].split("\n\n`")[0]
    flags = f'"run_root_dir": {str(tmp_path)!r}, "run_id_override": "run", "max_steps": 2'
    code = code.replace('"batch_size": 16', '"batch_size": 2').replace('"max_steps": 800', flags)
    views, state = scene(7)
    names = {"front": views["image"], "wrist": views["wrist_image"], "state": state}
    exec(code, names)
    assert names["actions"].shape == (8, 7) and names["folder"] == tmp_path / "run--2_chkpt"
    assert (names["folder"] / "README.md").is_file() and sorted(tmp_path.iterdir())[0].name == "run"  # and no lock
    assert (names["actions"] != craft_vla.load_policy(START).predict(views, state, "put the bowl on the plate")).any()
    capsys.readouterr()
    again = {"run_root_dir": tmp_path, "run_id_override": "run", "max_steps": 2, "config_file_path": START}
    again |= {"dataset_name": NEW, "batch_size": 2}
    with pytest.raises(ValueError, match="run run is in .*already"):
        craft_vla.finetune(**again)
    with pytest.raises(ValueError, match="--max_step: no such flag; did you mean --max_steps"):
        craft_vla.finetune(max_step=3)
    with pytest.raises(ValueError, match="--max_steps is 'many', expected a whole number"):
        craft_vla.finetune(max_steps="many")
    # Other precision: the first run's device and precision are not kept.
    assert craft_vla.finetune(**again, overwrite=True, mixed_precision="bf16") == names["folder"]
    assert craft_vla.finetune(**again | {"run_id_override": "dry"}, dry_run=True) is None


@pytest.mark.slow
def test_an_interrupted_or_failed_training_leaves_the_process_as_it_was(tmp_path, monkeypatch):
    flags = {"config_file_path": "tiny", "data_root_dir": ROOT / "tests/golden/rlds_mini", "max_steps": 50}
    flags |= {"dataset_name": "libero_mini_no_noops", "batch_size": 2, "run_root_dir": tmp_path}
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(*words):
        signal.raise_signal(signal.SIGINT)
        return optimizer_step(*words)

    def failed(*words):
        raise NonFiniteLossError("the loss is nan")

    monkeypatch.setattr(loop, "optimizer_step", interrupted)
    assert craft_vla.finetune(**flags, run_id_override="stopped") == tmp_path / "stopped--1_chkpt"
    monkeypatch.setattr(loop, "optimizer_step", failed)
    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        craft_vla.finetune(**flags, run_id_override="failed")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not is_held(tmp_path / "stopped") and not is_held(tmp_path / "failed")
