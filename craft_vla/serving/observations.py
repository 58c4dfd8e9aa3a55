"""A client's message -> `craft_vla.Observation`: cameras, state and instruction under the names that clients use.

    cameras      `observation/NAME`, `NAME`, or NAME in a map `images` (`observation/images`); LeRobot's
                 `observation.images.NAME`; or, by order, OpenVLA-OFT's `full_image` and the keys with `wrist` in them
    state        `observation/state`, `observation.state`, `state`
    instruction  `prompt`, `instruction`, LeRobot's `task`

Names are those of the metadata. A key that nothing reads is refused: it may be a camera with a slip in its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from craft_vla.serving.messages import MessageError

MAX_PIXELS = 1 << 22
"""Of one image: 2048 x 2048."""
MAX_CHARACTERS = 4000
"""Of an instruction."""
_PREFIXES = ("observation/", "observation.images.", "observation.")
"""Of openpi's and LeRobot's names; the longer of two that fit comes first."""
_INSTRUCTIONS = ("prompt", "instruction", "task")
_FIRST = "full_image"


def read_observation(message: Any, cameras: Sequence[str], unnorm_key: str) -> dict[str, Any]:
    """The arguments of `Observation`: images by camera, state and instruction. What they hold the policy checks.

    Args:
        message: what a client sent, unpacked.
        cameras: names of the policy's cameras.
        unnorm_key: data set whose statistics the policy uses; a message may name it.

    Raises MessageError for a message that is no map, for what is missing, there twice, too large, or read by nothing.
    """
    if not isinstance(message, Mapping) or not all(isinstance(key, str) for key in message):
        found = "keys that are no text" if isinstance(message, Mapping) else type(message).__name__
        raise MessageError(f"message: found {found}, expected a map of observations with text as keys")
    values = _flat(message)
    asked = values.pop("unnorm_key", unnorm_key)
    if not isinstance(asked, str) or asked != unnorm_key:
        raise MessageError(f"unnorm_key is {str(asked)[:100]!r}, expected {unnorm_key!r}, that of this server")
    images = _images(values, cameras)
    state = values.pop("state", None)
    instruction = _instruction(values)
    if values:
        names = ", ".join(sorted(values))[:200]
        expected = ", ".join((*cameras, "state", "prompt"))
        raise MessageError(f"message: found {names}, which this policy does not read, expected {expected}")
    return {"images": images, "state": state, "instruction": instruction}


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    """The values by name without their prefix, those of `images` among them."""
    found: dict[str, Any] = {}
    for key, value in message.items():
        name = key.removeprefix(next((prefix for prefix in _PREFIXES if key.startswith(prefix)), ""))
        inner = value if name == "images" and isinstance(value, Mapping) else {name: value}
        for each, content in inner.items():
            if not isinstance(each, str) or each in found:
                raise MessageError(f"message: found {str(each)[:100]!r} twice, expected each camera and value once")
            found[each] = content
    return found


def _images(values: dict[str, Any], cameras: Sequence[str]) -> dict[str, np.ndarray]:
    if _FIRST in values and _FIRST not in cameras:
        names = [_FIRST, *(name for name in values if "wrist" in name and name != _FIRST)]
        if len(names) != len(cameras):
            raise MessageError(f"images: found {', '.join(names)[:200]}, expected {len(cameras)}: {', '.join(cameras)}")
    else:
        names = list(cameras)
        if missing := [name for name in names if name not in values]:
            found = ", ".join(sorted(values))[:200] or "nothing"
            raise MessageError(f"images: camera {', '.join(missing)} is missing, found {found}")
    images = {camera: values.pop(name) for camera, name in zip(cameras, names, strict=True)}
    for camera, image in images.items():
        if not isinstance(image, np.ndarray):
            found = type(image).__name__
            raise MessageError(f"camera {camera}: found {found}, expected an array (height, width, 3) uint8")
        if image.size > 3 * MAX_PIXELS:
            raise MessageError(f"camera {camera}: found {image.size} numbers, expected at most {MAX_PIXELS} pixels")
    return images


def _instruction(values: dict[str, Any]) -> str:
    given = [name for name in _INSTRUCTIONS if name in values]
    if len(given) != 1:
        found, expected = " and ".join(given) or "none", " or ".join(_INSTRUCTIONS)
        raise MessageError(f"instruction: found {found}, expected {expected}")
    text = values.pop(given[0])
    if not isinstance(text, str):
        raise MessageError(f"{given[0]} is {type(text).__name__}, expected text")
    if len(text) > MAX_CHARACTERS:
        raise MessageError(f"{given[0]} has {len(text)} characters, expected at most {MAX_CHARACTERS}")
    return text
