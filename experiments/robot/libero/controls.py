"""Who acts in an episode: the policy, the policy with blinded eyes, or the replay of one demonstration.

A success rate on the standard initial states does not show that a policy looks at the scene (replaying one recorded
demonstration succeeds on many of them), so every table carries these controls.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Protocol

import numpy as np

from prismatic.vla.images import GREY_LEVEL

WAIT_ACTION = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])


class Control(str, Enum):
    """What the policy is given instead of the true observation. `blind` and `frozen` are short for the image ones."""

    NONE = "none"
    GREY_IMAGES = "grey_images"  # both cameras constant grey; the robot state is true
    FROZEN_IMAGE = "frozen_image"  # both cameras as at the first query; the robot state is true
    REPLAY = "replay"  # no policy: one demonstration's actions, open loop

    @classmethod
    def _missing_(cls, value: object) -> Control | None:
        short: dict[object, Control] = {"blind": cls.GREY_IMAGES, "frozen": cls.FROZEN_IMAGE}
        return short.get(value)


class Actor(Protocol):
    """Source of action chunks."""

    needs_observation: bool

    def reset(self, instruction: str) -> None:
        """Forget the last episode."""

    def act(self, observation: Any | None) -> np.ndarray:
        """Next (n, 7) float64 actions in the simulator's convention (gripper -1 open, +1 close), n >= 1."""


def to_simulator_actions(actions: np.ndarray) -> np.ndarray:
    """Published gripper post-processing: g in [0, 1], 1 = open -> sign(2g - 1), then times -1 (+1 = close).

    The six arm dimensions pass through; nothing is clipped. g = 0.5 exactly gives 0 (the gripper keeps its state).

    Args:
        actions: (..., 7) as predicted.

    Returns:
        (..., 7) float64, a copy.
    """
    processed = np.array(actions, dtype=np.float64)
    processed[..., -1] = -np.sign(2.0 * processed[..., -1] - 1.0)
    return processed


class PolicyActor:
    """The policy under test, seeing what `control` lets it see.

    Args:
        policy: object with `predict(image, wrist_image, state, instruction) -> (K, 7)`.
        num_open_loop_steps: actions kept of each chunk, <= K.
        control: NONE, GREY_IMAGES or FROZEN_IMAGE.
    """

    needs_observation = True

    def __init__(self, policy: Any, num_open_loop_steps: int, control: Control = Control.NONE) -> None:
        if control is Control.REPLAY:
            raise ValueError("PolicyActor: control: expected none, grey_images or frozen_image, found replay")
        self.policy, self.num_open_loop_steps, self.control = policy, num_open_loop_steps, control
        self._instruction = ""
        self._frozen: tuple[np.ndarray, ...] | None = None  # both cameras

    def reset(self, instruction: str) -> None:
        """Start an episode; forwards to the policy's own `reset()` where it has one."""
        self._instruction, self._frozen = instruction, None
        if hasattr(self.policy, "reset"):
            self.policy.reset()

    def act(self, observation: Any) -> np.ndarray:
        """First `num_open_loop_steps` of the predicted chunk, in the simulator's convention.

        Raises:
            ValueError: the policy returned another shape than (K >= num_open_loop_steps, 7), or a non-finite number.
        """
        image, wrist_image = self._views(observation)
        chunk = np.asarray(self.policy.predict(image, wrist_image, observation.state, self._instruction))
        if chunk.ndim != 2 or chunk.shape[1] != len(WAIT_ACTION) or chunk.shape[0] < self.num_open_loop_steps:
            raise ValueError(
                f"policy.predict: expected actions (K >= {self.num_open_loop_steps}, 7), found shape {chunk.shape}"
            )
        if not np.isfinite(chunk).all():
            raise ValueError(f"policy.predict: expected finite actions, found {chunk[~np.isfinite(chunk)].ravel()[:3]}")
        return to_simulator_actions(chunk[: self.num_open_loop_steps])

    def _views(self, observation: Any) -> tuple[np.ndarray, ...]:
        true_views = observation.image, observation.wrist_image
        if self.control is Control.GREY_IMAGES:
            return tuple(np.full_like(view, GREY_LEVEL) for view in true_views)
        if self.control is Control.FROZEN_IMAGE:
            if self._frozen is None:
                self._frozen = tuple(np.array(view) for view in true_views)
            return self._frozen
        return true_views


class ReplayActor:
    """Open-loop replay of recorded actions; after the last one the arm rests and the gripper keeps its command.

    Args:
        actions: (T >= 1, 7) in the simulator's convention.
        num_open_loop_steps: chunk length handed out.
    """

    needs_observation = False

    def __init__(self, actions: np.ndarray, num_open_loop_steps: int) -> None:
        self.actions = np.asarray(actions, dtype=np.float64)
        if self.actions.ndim != 2 or self.actions.shape[1] != len(WAIT_ACTION) or len(self.actions) == 0:
            raise ValueError(f"replay: expected actions (T >= 1, 7), found shape {self.actions.shape}")
        self.num_open_loop_steps, self._next = num_open_loop_steps, 0

    def reset(self, instruction: str) -> None:
        """Back to the first action."""
        self._next = 0

    def act(self, observation: Any | None) -> np.ndarray:
        """Next actions of the recording, or one resting action after its end."""
        chunk = self.actions[self._next : self._next + self.num_open_loop_steps]
        self._next += len(chunk)
        if len(chunk):
            return chunk
        rest = np.zeros((1, len(WAIT_ACTION)))
        rest[0, -1] = self.actions[-1, -1]
        return rest


def find_demonstration(reader: Any, instruction: str, episode: int | None) -> np.ndarray:
    """Actions (T, 7) of the demonstration to replay for a task.

    Args:
        reader: `Recordings`, or any object with `num_episodes` and `episode(i)` (`.instruction`, `.actions`).
        instruction: the task's instruction; upper and lower case do not matter.
        episode: index, or None for the first episode with this instruction.

    Raises:
        KeyError: no episode has the instruction.
        IndexError: index outside the data set.
        ValueError: the episode of that index shows another task.
    """
    wanted = instruction.strip().lower()
    if episode is not None:
        if episode >= reader.num_episodes:
            raise IndexError(f"replay: episode: expected 0..{reader.num_episodes - 1}, found {episode}")
        found = reader.episode(episode)
        if found.instruction.strip().lower() != wanted:
            raise ValueError(
                f"replay: episode {episode}: expected a demonstration of {instruction!r}, found {found.instruction!r}"
            )
        return found.actions
    for index in range(reader.num_episodes):
        found = reader.episode(index)
        if found.instruction.strip().lower() == wanted:
            return found.actions
    raise KeyError(f"replay: no episode of {reader.num_episodes} demonstrates {instruction!r}")
