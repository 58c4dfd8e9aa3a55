"""Actors: gripper convention, what the policy sees, open-loop replay."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_libero_world import FakePolicy

from experiments.robot.libero.controls import (
    Control,
    PolicyActor,
    ReplayActor,
    find_demonstration,
    to_simulator_actions,
)


def observation(level: int = 50):
    image = np.full((4, 4, 3), level, np.uint8)
    return SimpleNamespace(image=image, wrist_image=image + 1, state=np.arange(8.0))


def test_gripper_processing_leaves_its_input_and_does_not_clip():
    actions = np.full((2, 7), 3.0, np.float32)
    processed = to_simulator_actions(actions)
    assert (actions == 3.0).all() and (processed[:, :6] == 3.0).all() and (processed[:, 6] == -1.0).all()


def test_policy_actor_keeps_the_first_steps_of_the_chunk():
    policy = FakePolicy()
    actor = PolicyActor(policy, 5)
    actor.reset("open the drawer")
    assert actor.act(observation()).shape == (5, 7)
    image, wrist, state, instruction = policy.seen[0]
    assert (image == 50).all() and (wrist == 51).all() and instruction == "open the drawer"
    np.testing.assert_array_equal(state, np.arange(8.0))


@pytest.mark.parametrize("bad", [np.zeros((4, 7)), np.zeros((8, 6)), np.zeros(7), np.full((8, 7), np.nan)])
def test_policy_actor_refuses_malformed_chunks(bad):
    actor = PolicyActor(SimpleNamespace(predict=lambda *a: bad), 8)
    actor.reset("x")
    with pytest.raises(ValueError, match="policy.predict"):
        actor.act(observation())


def test_grey_images_hide_both_cameras_but_not_the_state():
    policy = FakePolicy()
    actor = PolicyActor(policy, 8, Control.GREY_IMAGES)
    actor.reset("x")
    actor.act(observation())
    image, wrist, state, _ = policy.seen[0]
    assert (image == 128).all() and (wrist == 128).all() and image.dtype == np.uint8 and state[3] == 3.0


def test_frozen_image_keeps_the_first_view_of_each_episode():
    policy = FakePolicy()
    actor = PolicyActor(policy, 8, Control.FROZEN_IMAGE)
    actor.reset("x")
    first = observation(10)
    actor.act(first)
    first.image[:] = 99  # the environment may reuse its buffer
    actor.act(observation(20))
    actor.reset("x")
    actor.act(observation(30))
    assert [seen[0][0, 0, 0] for seen in policy.seen] == [10, 10, 30]
    assert [seen[1][0, 0, 0] for seen in policy.seen] == [11, 11, 31]


def test_replay_returns_the_recording_then_rests_with_the_last_gripper_command():
    recording = np.arange(35.0).reshape(5, 7)
    actor = ReplayActor(recording, 2)
    for _ in range(2):  # a reset starts it again
        actor.reset("x")
        np.testing.assert_array_equal(np.concatenate([actor.act(None) for _ in range(3)]), recording)
        np.testing.assert_array_equal(actor.act(None), [[0, 0, 0, 0, 0, 0, 34.0]])
    assert not actor.needs_observation


class Demonstrations:
    def __init__(self, *instructions: str) -> None:
        self.instructions, self.num_episodes = instructions, len(instructions)

    def episode(self, index: int):
        return SimpleNamespace(instruction=self.instructions[index], actions=np.full((3, 7), float(index)))


def test_demonstration_is_found_by_instruction_or_index():
    reader = Demonstrations("open the drawer", "Stack the bowls", "stack the bowls")
    assert find_demonstration(reader, "stack the bowls", None)[0, 0] == 1.0
    assert find_demonstration(reader, "stack the bowls", 2)[0, 0] == 2.0
    with pytest.raises(KeyError, match="push"):
        find_demonstration(reader, "push", None)
    with pytest.raises(IndexError, match="0..2"):
        find_demonstration(reader, "stack the bowls", 3)
    with pytest.raises(ValueError, match="open the drawer"):
        find_demonstration(reader, "stack the bowls", 0)
