"""The policy for Python: what goes in, what comes out, chunks executed one after another."""

import numpy as np
import pytest
from PIL import Image

import craft_vla
from experiments.robot.policy import VLAPolicy
from prismatic.training.checkpoints import load_checkpoint

START = "pretrained_models/tiny-libero-object"
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
    for images in (swapped, [views[name] for name in policy.cameras], pictures, np.stack(list(views.values()))):
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
        (lambda v, s: (v["image"], s), "found 96 images, expected 2"),
        (lambda v, s: (v | {"image": v["image"] / 255}, s), "camera image: found float64 .*expected uint8"),
        (lambda v, s: (v | {"image": v["image"][..., 0]}, s), r"camera image: found uint8 \(96, 96\), expected"),
        (lambda v, s: (v, s[:7]), r"state has shape \(7,\), expected \(8,\)"),
        (lambda v, s: (v, None), r"state has shape \(0,\), expected \(8,\)"),
        (lambda v, s: (v, s * np.nan), r"state\[0\] is nan, which is not finite"),
        (lambda v, s: (v, [*s[:7], 1e300]), r"state\[7\] is 1e\+300, which is not finite in float32"),
        (lambda v, s: (v, ["a"] * 8), "state is list of other things, expected 8 numbers"),
        (lambda v, s: (v, [[1], *s[:7]]), "state is list of other things, expected 8 numbers"),
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


@pytest.mark.parametrize("given", [{"execute": 0}, {"execute": 9}, {"ensemble": -1.0}, {"ensemble": 0.1, "execute": 2}])
def test_settings_out_of_range_are_refused(loaded, given):
    with pytest.raises(ValueError, match="expected"):
        craft_vla.Policy(loaded, **given)
