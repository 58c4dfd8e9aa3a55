"""What clients call cameras, state and instruction, and what they are told when something is missing."""

import numpy as np
import pytest

from craft_vla.serving.messages import MessageError
from craft_vla.serving.observations import MAX_CHARACTERS, MAX_PIXELS, read_observation

CAMERAS = ("image", "wrist_image")
FRONT, WRIST = np.zeros((2, 2, 3), np.uint8), np.ones((2, 2, 3), np.uint8)
STATE = np.arange(8.0)
SPELLINGS = {
    "openpi": {"observation/image": FRONT, "observation/wrist_image": WRIST, "observation/state": STATE, "prompt": "a"},
    "plain": {"image": FRONT, "wrist_image": WRIST, "state": STATE, "instruction": "a"},
    "nested": {"images": {"wrist_image": WRIST, "image": FRONT}, "state": STATE, "prompt": "a"},
    "nested below": {"observation/images": {"wrist_image": WRIST, "image": FRONT}, "state": STATE, "prompt": "a"},
    "OpenVLA-OFT": {"full_image": FRONT, "wrist_image": WRIST, "state": STATE, "instruction": "a"},
    "LeRobot": {
        "observation.images.image": FRONT,
        "observation.images.wrist_image": WRIST,
        "observation.state": STATE,
        "task": "a",
    },
    "with its data set": {"image": FRONT, "wrist_image": WRIST, "state": STATE, "prompt": "a", "unnorm_key": "d"},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_says_the_same(name):
    found = read_observation(SPELLINGS[name], CAMERAS, "d")
    assert found["images"]["image"] is FRONT and found["images"]["wrist_image"] is WRIST
    assert list(found["images"]) == list(CAMERAS) and found["state"] is STATE and found["instruction"] == "a"


def test_wrists_of_two_arms_come_in_the_order_of_the_message():
    message = {"left_wrist_image": WRIST, "full_image": FRONT, "right_wrist_image": FRONT, "instruction": "a"}
    images = read_observation(message, ("high", "left", "right"), "d")["images"]
    assert images["high"] is FRONT and images["left"] is WRIST and images["right"] is FRONT


GOOD = SPELLINGS["plain"]


def without(*names: str) -> dict:
    return {name: value for name, value in GOOD.items() if name not in names}


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ([1], "message: found list, expected a map"),
        ({b"image": FRONT}, "keys that are no text"),
        ({}, "camera image, wrist_image is missing, found nothing"),
        (without("wrist_image"), "camera wrist_image is missing, found image, instruction, state"),
        (without("wrist_image") | {"full_image": FRONT}, "found full_image, expected 2: image, wrist_image"),
        (GOOD | {"observation/image": FRONT}, "found 'image' twice"),
        (GOOD | {"images": {"image": FRONT}}, "found 'image' twice"),
        (GOOD | {"observation.images.image": FRONT}, "found 'image' twice"),
        (GOOD | {"imge": FRONT}, "found imge, which this policy does not read, expected image, wrist_image, state"),
        (GOOD | {"prompt": "b"}, "instruction: found prompt and instruction"),
        (without("instruction"), "instruction: found none"),
        (GOOD | {"instruction": 3}, "instruction is int, expected text"),
        (GOOD | {"instruction": "a" * (MAX_CHARACTERS + 1)}, "has 4001 characters, expected at most 4000"),
        (GOOD | {"image": [1, 2]}, "camera image: found list, expected an array"),
        (GOOD | {"image": np.zeros((1, MAX_PIXELS + 1, 3), np.uint8)}, "expected at most 4194304 pixels"),
        (GOOD | {"unnorm_key": "e"}, "unnorm_key is 'e', expected 'd'"),
        (GOOD | {"unnorm_key": np.zeros(3)}, "unnorm_key is "),
    ],
)
def test_what_does_not_fit_is_named(message, said):
    with pytest.raises(MessageError) as error:
        read_observation(message, CAMERAS, "d")
    assert said in str(error.value)


def test_the_message_is_left_as_it_was():
    message = dict(GOOD)
    read_observation(message, CAMERAS, "d")
    assert list(message) == list(GOOD)
