"""A trained checkpoint as a policy: camera images, robot state and instruction in, a chunk of actions out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismatic.training.checkpoint_files import LoadedCheckpoint
from prismatic.training.checkpoints import load_checkpoint
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.images import ImageSpec, prepare_eval_image
from prismatic.vla.normalization import Normalizer, resolve_statistics_key

Request = tuple[np.ndarray, np.ndarray, np.ndarray, str]
"""Arguments of `VLAPolicy.predict`."""


class VLAPolicy:
    """Open-loop chunk policy. Preprocessing, prompt and normalisation are those stored in the checkpoint.

    Args:
        checkpoint: a loaded checkpoint.
        device: torch device of the forward pass.
        unnorm_key: data set whose statistics are used; `{suite}` also finds `{suite}_no_noops`, None needs one
            data set.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, device: str = "cpu", unnorm_key: str | None = None) -> None:
        manifest = checkpoint.manifest
        self.metadata = manifest | {"path": str(checkpoint.path)}
        self.action_spec = ActionSpec.from_dict(manifest["action_spec"])
        self.image_spec = ImageSpec.from_dict(manifest["image_spec"])
        self.unnorm_key = resolve_statistics_key(checkpoint.statistics, unnorm_key)
        self._normalizer = Normalizer(checkpoint.statistics[self.unnorm_key], self.action_spec)
        self._model = checkpoint.model.to(device).eval()
        self._device = device
        self._num_images = manifest["num_images"]
        # Published policies were evaluated, and published rates measured, without the rule for constant dimensions.
        self._zero_constant = manifest.get("origin") != "published" or "training" in manifest
        self._collate = VLACollator.of_policy(checkpoint.processor, self._model)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str = "cpu", unnorm_key: str | None = None, **options: Any
    ) -> VLAPolicy:
        """Read a checkpoint folder, ours or published; errors name the file that is missing or does not fit.

        `options`: of `load_checkpoint`, what the folder does not state.
        """
        return cls(load_checkpoint(path, **options), device, unnorm_key)

    def predict(self, image: np.ndarray, wrist_image: np.ndarray, state: np.ndarray, instruction: str) -> np.ndarray:
        """Actions of the next chunk: (K, A) float64, un-normalised, gripper in [0, 1] with 1 = open.

        Args:
            image: third-person view (H, W, 3) uint8, upright (already rotated by 180 degrees).
            wrist_image: wrist view, the same; not used by one-image models.
            state: end-effector position (m), axis-angle (rad), gripper joint positions (m): (8,).
            instruction: the task in words.
        """
        return self.predict_batch([(image, wrist_image, state, instruction)])[0]

    @torch.inference_mode()
    def predict_batch(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Chunks of several observations from one forward pass, in their order.

        The arguments of each request are those of `predict`. A batch of one is `predict`; in larger ones matrix
        products are divided differently and the last bits of an action may differ from it.
        """
        if not requests:
            return []
        batch = self._collate([self._sample(*request) for request in requests])
        batch = {k: v.to(self._device) if torch.is_tensor(v) else v for k, v in batch.items()}
        actions = self._model(batch).actions.float().cpu().numpy().astype(np.float64)
        return [self._normalizer.unnormalize_action(chunk) for chunk in actions]

    def _sample(self, image: np.ndarray, wrist_image: np.ndarray, state: np.ndarray, instruction: str) -> dict:
        images = [image, wrist_image][: self._num_images]
        proprio = np.zeros(self.action_spec.proprio_dim, dtype=np.float32)  # a policy without it has no use for one
        if self._model.proprio_projector is not None:
            proprio = self._normalizer.normalize_proprio(np.asarray(state, dtype=np.float32), self._zero_constant)
        return {
            "images": np.stack([prepare_eval_image(i, self.image_spec) for i in images]),
            "proprio": proprio,
            "actions": np.zeros((self.action_spec.chunk_len, self.action_spec.action_dim), dtype=np.float32),
            "instruction": instruction,
            "dataset_name": self.unnorm_key,
            "sample_id": (0, 0),
        }
