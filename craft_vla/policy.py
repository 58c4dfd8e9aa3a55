"""A trained checkpoint as a policy: camera images, robot state and instruction in, a chunk of actions out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from prismatic.training.checkpoint_files import LoadedCheckpoint
from prismatic.training.checkpoints import load_checkpoint
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.images import MAX_PIXELS, ImageSpec, prepare_eval_image
from prismatic.vla.normalization import Normalizer, resolve_statistics_key

Picture = np.ndarray | Image.Image
"""One camera image: (H, W, 3) uint8 RGB of any size, or a PIL image. Upright, as the training data show it."""
Pictures = Mapping[str, Any] | Sequence[Any] | Picture
"""Images of all cameras by name, in the order of `Policy.cameras`, or the only one."""

UNNAMED_CAMERAS = ("image", "wrist_image")
"""Names of the cameras of checkpoints that record none."""


@dataclass(frozen=True)
class Observation:
    """What a policy needs to know: arguments of `Policy.predict`."""

    images: Pictures
    state: Any
    instruction: str


class Policy:
    """A loaded policy. Preprocessing, prompt and normalisation are those stored in the checkpoint.

    Actions and states are in the units and the convention of the training data as its registered configuration
    standardised them (docs/datasets.md). For data registered as LIBERO's: position deltas and axis-angle deltas as the
    controller takes them, gripper in [0, 1] with 1 = open. For data of one's own: what its `standardize` returned.

    Args:
        checkpoint: a loaded checkpoint.
        device: torch device of the forward pass.
        unnorm_key: data set whose statistics are used; `{suite}` also finds `{suite}_no_noops`, None needs one
            data set.
        execute: actions of a chunk that `step` executes before it asks again, from 1 to the length of the chunk; None
            is the whole chunk.
        ensemble: m >= 0 for temporal ensembling: `step` asks every time, and an action is the mean of all that chunks
            said of this moment, weighted with exp(-m i), where i = 0 is the oldest chunk. None executes open loop.

    Raises ValueError for `execute` or `ensemble` out of range, KeyError for an unknown `unnorm_key`.
    """

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        device: str = "cpu",
        unnorm_key: str | None = None,
        execute: int | None = None,
        ensemble: float | None = None,
    ) -> None:
        manifest = checkpoint.manifest
        self.metadata: dict[str, Any] = manifest | {"path": str(checkpoint.path)}
        self.action_spec = ActionSpec.from_dict(manifest["action_spec"])
        self.image_spec = ImageSpec.from_dict(manifest["image_spec"])
        self.unnorm_key = resolve_statistics_key(checkpoint.statistics, unnorm_key)
        self._normalizer = Normalizer(checkpoint.statistics[self.unnorm_key], self.action_spec)
        self._model = checkpoint.model.to(device).eval()
        self._device = device
        # Published policies were evaluated, and published rates measured, without the rule for constant dimensions.
        self._zero_constant = manifest.get("origin") != "published" or "training" in manifest
        self._collate = VLACollator.of_policy(checkpoint.processor, self._model)
        self.cameras = _camera_names(manifest, self.unnorm_key)
        chunk = self.action_spec.chunk_len
        self._execute = chunk if execute is None else execute
        if not 1 <= self._execute <= chunk:
            raise ValueError(f"execute is {execute}, expected 1 to {chunk}, the length of the policy's chunks")
        if ensemble is not None and (execute is not None or not 0 <= ensemble < float("inf")):
            raise ValueError(f"ensemble is {ensemble} and execute is {execute}, expected 0 or more, and no execute")
        self._ensemble = ensemble
        self.reset()

    # ---------------------------------------------------------------------------------------------- chunks

    def check(self, observation: Observation) -> None:
        """Raise the ValueError with which `predict` would refuse an observation, without asking the policy.

        It names what was found and expected: missing or unknown cameras, images that are not (H, W, 3) uint8 with at
        least one pixel and at most 2 ** 25, a state that is not (P,) finite numbers, an instruction that is empty, no
        text, or longer than the tokenizer has room for.
        """
        self._inputs(observation)

    @property
    def uses_state(self) -> bool:
        """Whether the policy reads the robot's state."""
        return self._model.proprio_projector is not None

    def predict(self, images: Pictures, state: Any, instruction: str | Sequence[str]) -> np.ndarray:
        """Actions of the next chunk: (K, A) float64.

        Args:
            images: of all cameras; see `Pictures`.
            state: (P,) numbers; None for a policy that does not read it (`uses_state`).
            instruction: the task in words. A list of B instructions makes a batch: every camera then has B images, and
                the state is (B, P). The answer is (B, K, A).

        Raises ValueError for missing or unknown cameras, images and states of another shape or type.
        """
        if isinstance(instruction, str):
            return self.predict_many([Observation(images, state, instruction)])[0]
        size, views = len(instruction), self._by_camera(images)
        lengths = {name: len(values) for name, values in views.items()}
        lengths |= {} if state is None else {"state": len(state)}
        if wrong := {name: length for name, length in lengths.items() if length != size}:
            raise ValueError(f"batch of {size} instructions: found {wrong}, expected {size} of each")
        requests = [
            Observation({name: values[i] for name, values in views.items()}, state if state is None else state[i], text)
            for i, text in enumerate(instruction)
        ]
        shape = (0, self.action_spec.chunk_len, self.action_spec.action_dim)
        return np.stack(self.predict_many(requests)) if requests else np.zeros(shape)

    @torch.inference_mode()
    def predict_many(self, observations: Sequence[Observation]) -> list[np.ndarray]:
        """Chunks (K, A) of several observations from one forward pass, in their order.

        A batch of one is `predict`; in larger ones matrix products are divided differently and the last bits of an
        action may differ from it.
        """
        if not observations:
            return []
        batch = self._collate([self._sample(one) for one in observations])
        batch = {k: v.to(self._device) if torch.is_tensor(v) else v for k, v in batch.items()}
        actions = self._model(batch).actions.float().cpu().numpy().astype(np.float64)
        return [self._normalizer.unnormalize_action(chunk) for chunk in actions]

    def _inputs(self, observation: Observation) -> tuple[list[np.ndarray], np.ndarray]:
        """Pixels of the cameras in their order, and the state (P,) float32; zeros for a policy without it."""
        views = self._by_camera(observation.images)
        images = [_pixels(views[name], name) for name in self.cameras]
        state = np.zeros(self.action_spec.proprio_dim, dtype=np.float32)
        if self.uses_state:
            state = self._state(observation.state)
        text = observation.instruction
        if not isinstance(text, str) or text != text.encode(errors="ignore").decode():  # halves of a surrogate pair
            found = f"{text[:100]!r}" if isinstance(text, str) else type(text).__name__
            raise ValueError(f"instruction is {found}, expected text of whole characters")
        self._collate.tokenize([text])
        return images, state

    def _sample(self, observation: Observation) -> dict[str, Any]:
        images, state = self._inputs(observation)
        return {
            "images": np.stack([prepare_eval_image(image, self.image_spec) for image in images]),
            "proprio": self._normalizer.normalize_proprio(state, self._zero_constant) if self.uses_state else state,
            "actions": np.zeros((self.action_spec.chunk_len, self.action_spec.action_dim), dtype=np.float32),
            "instruction": observation.instruction,
            "dataset_name": self.unnorm_key,
            "sample_id": (0, 0),
        }

    def _state(self, state: Any) -> np.ndarray:
        size = self.action_spec.proprio_dim
        try:
            given = np.asarray(() if state is None else state)
            if given.dtype.kind not in "biuf":
                raise TypeError
            with np.errstate(over="ignore"):  # too large for float32 is not finite below
                found = given.astype(np.float32)
        except (TypeError, ValueError):
            raise ValueError(f"state is {type(state).__name__} of other things, expected {size} numbers") from None
        if found.shape != (size,):
            raise ValueError(f"state has shape {found.shape}, expected ({size},)")
        if wrong := np.flatnonzero(~np.isfinite(found)).tolist():
            raise ValueError(f"state[{wrong[0]}] is {given[wrong[0]]}, which is not finite in float32")
        return found

    def _by_camera(self, images: Pictures) -> dict[str, Any]:
        if isinstance(images, Mapping):
            if set(images) != set(self.cameras):
                raise ValueError(f"images of cameras {sorted(images)}, expected {', '.join(self.cameras)}")
            return dict(images)
        is_one = isinstance(images, Image.Image) or (isinstance(images, np.ndarray) and len(self.cameras) == 1)
        views: list[Any] = [images] if is_one else list(cast(Sequence[Any], images))
        if len(views) != len(self.cameras):
            raise ValueError(f"found {len(views)} images, expected {len(self.cameras)}: {', '.join(self.cameras)}")
        return dict(zip(self.cameras, views, strict=True))

    # ---------------------------------------------------------------------------------------------- execution

    def reset(self) -> None:
        """Forget what earlier chunks said: call it before an episode."""
        self._instruction: str | None = None
        self._pending: deque[np.ndarray] = deque()
        self._chunks: deque[np.ndarray] = deque()

    @property
    def needs_observation(self) -> bool:
        """Whether the next `step` looks at its images and state."""
        return self._ensemble is not None or not self._pending

    def step(self, images: Pictures | None, state: Any, instruction: str) -> np.ndarray:
        """The next action to execute: (A,) float64. Arguments as `predict`; images may be None while actions are left.

        Another instruction than before takes effect at once.
        """
        if instruction != self._instruction:
            self.reset()
            self._instruction = instruction
        if not self.needs_observation:
            return self._pending.popleft()
        if images is None:
            raise ValueError("images are None, expected those of all cameras: no action of a chunk is left")
        chunk = self.predict(images, state, instruction)
        if self._ensemble is None:
            self._pending.extend(chunk[: self._execute])
            return self._pending.popleft()
        self._chunks.append(chunk)
        if len(self._chunks) > len(chunk):
            self._chunks.popleft()
        said = np.stack([c[age] for age, c in zip(range(len(self._chunks) - 1, -1, -1), self._chunks, strict=True)])
        weights = np.exp(-self._ensemble * np.arange(len(said)))
        return (weights[:, None] * said).sum(0) / weights.sum()

    def run(self, observe: Callable[[], tuple[Pictures, Any] | None], instruction: str) -> Iterator[np.ndarray]:
        """Actions (A,) to execute one after another, from a `reset` on.

        `observe` returns images and state when they are needed, or None to end the episode.
        """
        self.reset()
        while True:
            images, state = None, None
            if self.needs_observation:
                seen = observe()
                if seen is None:
                    return
                images, state = seen
            yield self.step(images, state, instruction)


def load_policy(
    path: str | Path,
    device: str | None = None,
    unnorm_key: str | None = None,
    execute: int | None = None,
    ensemble: float | None = None,
    **options: Any,
) -> Policy:
    """Read a checkpoint folder, ours or published, as a `Policy`.

    Args:
        path: the folder.
        device: torch device; None is the GPU where there is one.
        unnorm_key: as in `Policy`.
        execute: as in `Policy`.
        ensemble: as in `Policy`.
        options: of `prismatic.training.checkpoints.load_checkpoint`, what a published folder does not state.

    Raises MissingFileError or CheckpointError, which name the file that is missing or does not fit.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Policy(load_checkpoint(path, **options), where, unnorm_key, execute, ensemble)


def _camera_names(manifest: dict[str, Any], data_set: str) -> tuple[str, ...]:
    count = manifest["num_images"]
    names = (manifest.get("cameras") or {}).get(data_set) or UNNAMED_CAMERAS
    if len(names) < count:
        names = [f"image_{number}" for number in range(count)]
    return tuple(names[:count])


def _pixels(image: Any, camera: str) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"camera {camera}: found {pixels.dtype} {pixels.shape}, expected uint8 (height, width, 3)")
    if not 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS:
        raise ValueError(f"camera {camera}: found an image {pixels.shape[:2]}, expected 1 to {MAX_PIXELS} pixels")
    return pixels
