"""A trained checkpoint as the policy of LIBERO's robot: two views, its state and an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from craft_vla.policy import Observation, Policy, load_policy

Request = tuple[np.ndarray, np.ndarray, np.ndarray, str]
"""Arguments of `VLAPolicy.predict`."""


class VLAPolicy:
    """A `craft_vla.Policy` that takes the simulator's observation as it is. Attributes are those of the policy."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.metadata, self.unnorm_key = policy.metadata, policy.unnorm_key
        self.action_spec, self.image_spec = policy.action_spec, policy.image_spec

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "cpu", unnorm_key: str | None = None, **options: Any
    ) -> VLAPolicy:
        """Read a checkpoint folder: `craft_vla.load_policy`."""
        return cls(load_policy(path, device, unnorm_key, **options))

    def predict(self, image: np.ndarray, wrist_image: np.ndarray, state: np.ndarray, instruction: str) -> np.ndarray:
        """Actions of the next chunk: (K, A) float64, un-normalised, gripper in [0, 1] with 1 = open.

        Args:
            image: third-person view (H, W, 3) uint8, upright (already rotated by 180 degrees).
            wrist_image: wrist view, the same; not used by one-image models.
            state: end-effector position (m), axis-angle (rad), gripper joint positions (m): (8,).
            instruction: the task in words.
        """
        return self.predict_batch([(image, wrist_image, state, instruction)])[0]

    def predict_batch(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Chunks of several observations from one forward pass, in their order: `Policy.predict_many`."""
        count = len(self.policy.cameras)
        return self.policy.predict_many(
            [Observation((image, wrist)[:count], state, text) for image, wrist, state, text in requests]
        )
