"""A trained checkpoint as a policy: camera images, robot state and instruction in, a chunk of actions out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

Picture = np.ndarray | torch.Tensor | Image.Image
"""One camera image: (H, W, 3) uint8 RGB of any size, or a PIL image. Upright, as the training data show it.

OpenCV reads BGR, which nothing here can notice: turn it with `image[..., ::-1]`.
"""
Pictures = Mapping[str, Any] | Sequence[Any] | Picture
"""Images of all cameras by name, in the order of `Policy.cameras`, or the only one."""

UNNAMED_CAMERAS = ("image", "wrist_image")
"""Names of the cameras of checkpoints that record none."""
_SHOWN = 5
"""Trained instructions that `repr` shows."""


@dataclass(frozen=True)
class Observation:
    """What a policy needs to know: arguments of `Policy.predict`."""

    images: Pictures
    state: Any
    instruction: str


class Policy:
    """A loaded policy, as `load_policy` makes it; its `repr` says what it takes and gives.

    Preprocessing, prompt and normalisation are those stored in the checkpoint. Actions and states are in the units and
    the convention of the training data, as their registered configuration standardised them (docs/datasets.md):

    * Data registered as LIBERO's: position and axis-angle deltas as the controller takes them, then the gripper, 1 =
      open and 0 = closed. LIBERO's robots take -1 = open and 1 = closed: send them `-1 if gripper > 0.5 else 1`. The
      state is the end effector's position (m) and axis-angle (rad), then the two positions of the fingers (m).
    * Data of one's own: what its `standardize` returned. The gripper, if there is one, means what it means there.

    Nothing is clipped: predicted numbers may lie beyond those of the training data, a gripper a little beyond 0 or 1.

    Args:
        checkpoint: a loaded checkpoint.
        device: torch device of the forward pass, for instance cpu, cuda or cuda:1.
        unnorm_key: data set whose statistics are used; `{suite}` also finds `{suite}_no_noops`, None needs one
            data set.
        execute: actions of a chunk that `step` executes before it asks again, from 1 to the length of the chunk; None
            is the whole chunk.
        ensemble: m >= 0 for temporal ensembling: `step` asks every time, and an action is the mean of all that chunks
            said of this moment, weighted with exp(-m i), where i = 0 is the oldest chunk. None executes open loop.

    Raises ValueError for `execute` or `ensemble` out of range and a device that this machine has not, KeyError for an
    unknown `unnorm_key`.
    """

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        device: str | torch.device = "cpu",
        unnorm_key: str | None = None,
        execute: int | None = None,
        ensemble: float | None = None,
    ) -> None:
        manifest = checkpoint.manifest
        self.metadata: dict[str, Any] = manifest | {"path": str(checkpoint.path)}
        self.action_spec = ActionSpec.from_dict(manifest["action_spec"])
        self.image_spec = ImageSpec.from_dict(manifest["image_spec"])
        try:
            self.unnorm_key = resolve_statistics_key(checkpoint.statistics, unnorm_key)
        except KeyError as error:
            raise KeyError(f"unnorm_key is {unnorm_key!r}: {error.args[0]}") from None
        self._normalizer = Normalizer(checkpoint.statistics[self.unnorm_key], self.action_spec)
        self._device = usable_device(device)
        self._model = checkpoint.model.to(self._device).eval()
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

    def __repr__(self) -> str:
        spec, step = self.action_spec, self.metadata.get("step")
        sentences = self.instructions[:_SHOWN] + ["..."] * (len(self.instructions) > _SHOWN)
        executed = f"{self._execute} actions of a chunk" if self._ensemble is None else "the mean of all chunks"
        return "\n".join(
            [
                f"Policy of {self.metadata['path']}{'' if step is None else f', step {step:,}'}, on {self._device}",
                f"  cameras       {', '.join(self.cameras)}: (height, width, 3) uint8 RGB",
                f"  state         {f'{spec.proprio_dim} numbers' if self.uses_state else 'not read'}",
                f"  actions       chunks of {spec.chunk_len}, each {spec.action_dim} numbers; step executes {executed}",
                f"  statistics    {self.unnorm_key}",
                f"  trained on    {(chr(10) + ' ' * 16).join(sentences) or 'instructions that are not recorded'}",
            ]
        )

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

    @property
    def instructions(self) -> list[str]:
        """What the policy was asked in training, in the data whose statistics it uses; empty when not recorded."""
        return list((self.metadata.get("instructions") or {}).get(self.unnorm_key) or [])

    def predict(self, images: Pictures, state: Any, instruction: str | Sequence[str]) -> np.ndarray:
        """Actions of the next chunk: (K, A) float64, in the units that the class describes.

        Args:
            images: {camera: image} for all of `cameras`, or their images in this order, which nothing can check; the
                image alone for a policy with one camera. An image is (H, W, 3) uint8 RGB, upright, of any size: an
                array, a tensor of any device, or a PIL image.
            state: (P,) numbers; None for a policy that does not read it (`uses_state`).
            instruction: the task in words. A list of B instructions makes a batch: every camera then has B images, and
                the state is (B, P). The answer is (B, K, A).

        Raises ValueError for missing or unknown cameras, images and states of another shape or type.
        """
        if isinstance(instruction, str):
            return self.predict_many([Observation(images, state, instruction)])[0]
        if not isinstance(instruction, list | tuple | np.ndarray):
            raise ValueError(f"instruction is {type(instruction).__name__}, expected text, or a list of it for a batch")
        size, views = len(instruction), self._by_camera(images)
        lengths = {name: _length(values) for name, values in views.items()}
        lengths |= {} if state is None else {"state": _length(state)}
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
            given = _array(() if state is None else state)
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
                raise ValueError(f"images of cameras {sorted(map(str, images))}, expected {', '.join(self.cameras)}")
            return dict(images)
        if isinstance(images, str | bytes) or not isinstance(images, Iterable | Image.Image):
            raise ValueError(f"images are {type(images).__name__}, expected arrays of {', '.join(self.cameras)}")
        is_one = isinstance(images, Image.Image)
        if isinstance(images, np.ndarray | torch.Tensor):
            is_one = len(self.cameras) == 1 or images.ndim < 4
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
        if not isinstance(instruction, str):
            raise ValueError(f"instruction is {type(instruction).__name__}, expected the text of one robot's task")
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

        `observe` returns (images, state), as `predict` takes them, whenever they are needed, or None to end the
        episode; the iteration ends then.

        Raises ValueError for anything else that it returns.
        """
        self.reset()
        while True:
            images, state = None, None
            if self.needs_observation:
                seen = observe()
                if seen is None:
                    return
                if not isinstance(seen, tuple) or len(seen) != 2:
                    raise ValueError(f"observe returned {type(seen).__name__}, expected (images, state) or None")
                images, state = seen
            yield self.step(images, state, instruction)


def load_policy(
    path: str | Path,
    device: str | torch.device | None = None,
    unnorm_key: str | None = None,
    execute: int | None = None,
    ensemble: float | None = None,
    **options: Any,
) -> Policy:
    """Read a checkpoint folder, ours or published, as a `Policy`. Nothing is downloaded.

        policy = craft_vla.load_policy("pretrained_models/tiny-libero-object")
        policy  # its cameras, state, actions, statistics and trained instructions

        actions = policy.predict({"image": front, "wrist_image": wrist}, state, "pick up the milk")  # (K, A)

        def observe():  # called when images are needed
            return {"image": camera(), "wrist_image": wrist_camera()}, robot.state()

        for action in policy.run(observe, "pick up the milk"):  # whole chunks, one action after another
            robot.move(action)

    Images are (height, width, 3) uint8 RGB, upright, of any size. State and actions are in the units of the training
    data. In LIBERO's the last number of an action is the gripper, 1 = open and 0 = closed; in data of one's own it is
    what their `standardize` made of it. `help(craft_vla.Policy)` says more.

    Args:
        path: the folder of a checkpoint, such as `runs/NAME--800_chkpt`; `~` is home.
        device: torch device, such as cpu, cuda or cuda:1; None is the GPU where there is one.
        unnorm_key: the data set whose statistics turn the network's numbers into actions. None will do for a checkpoint
            with those of one data set; a fine-tuned one also has its start's, and needs to be told.
        execute: actions of a chunk that `step` and `run` execute before they ask again; None is the whole chunk.
        ensemble: temporal ensembling in place of that: a weight, such as 0.1, with which older predictions count more.
        options: what a published folder does not state: num_images, robot, data_set; base: where the base of LoRA
            adapters is now (`prismatic.training.checkpoints.load_checkpoint`).

    Raises MissingFileError or CheckpointError (ValueErrors), which name the file that is missing or does not fit, and
    for another kind of folder the one that was meant; ValueError for a device that this machine has not, KeyError for
    statistics that the checkpoint has not.
    """
    where = usable_device(device)  # before minutes of loading
    return Policy(load_checkpoint(os.path.expanduser(path), **options), where, unnorm_key, execute, ensemble)


def usable_device(device: str | torch.device | None) -> torch.device:
    """The device; None: cuda when there is one, else cpu. ValueError for one that this machine has not."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found).cpu()  # "meta" has no numbers
        return found
    except (RuntimeError, AssertionError, NotImplementedError, ValueError, TypeError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0][:80]
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        here += ["mps"] * torch.backends.mps.is_available()
        raise ValueError(f"device is {str(device)!r}, expected one of {', '.join(here)}: {reason}") from None


def _camera_names(manifest: dict[str, Any], data_set: str) -> tuple[str, ...]:
    count = manifest["num_images"]
    names = (manifest.get("cameras") or {}).get(data_set) or UNNAMED_CAMERAS
    if len(names) < count:
        names = [f"image_{number}" for number in range(count)]
    return tuple(names[:count])


def _array(value: Any) -> np.ndarray:
    """As numpy sees it, tensors of any device, with a gradient or in bfloat16 included."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype is torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _length(values: Any) -> int | str:
    try:
        return len(values)
    except TypeError:  # a PIL image, a number
        return "one"


def _pixels(image: Any, camera: str) -> np.ndarray:
    if isinstance(image, Image.Image):
        if image.mode[0] in "IF":  # their numbers are no levels of grey, and would be clipped
            raise ValueError(f"camera {camera}: found a PIL image of mode {image.mode}, expected RGB")
        image = image.convert("RGB")
    try:
        pixels = _array(image)
    except ValueError:
        raise ValueError(f"camera {camera}: found rows of different lengths, expected (height, width, 3)") from None
    if pixels.dtype.kind not in "biuf":
        raise ValueError(f"camera {camera}: found {type(image).__name__}, expected an array or a PIL image")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        found = f"{pixels.dtype} {pixels.shape}"
        raise ValueError(f"camera {camera}: found {found}, expected uint8 (height, width, 3){_remedy(pixels)}")
    if not 0 < pixels.shape[0] * pixels.shape[1] <= MAX_PIXELS:
        raise ValueError(f"camera {camera}: found an image {pixels.shape[:2]}, expected 1 to {MAX_PIXELS} pixels")
    return pixels


def _remedy(pixels: np.ndarray) -> str:
    """What to do about an image that is not uint8 (H, W, 3), where that can be seen."""
    shape = pixels.shape
    if pixels.ndim == 4:
        return ": a list of instructions makes a batch"
    if pixels.ndim == 2 or shape[2:] == (1,):
        return ": repeat the grey channel three times"
    if pixels.ndim == 3 and shape[2] != 3 and shape[0] == 3:
        return ": put the channels last"
    if shape[2:] == (4,):
        return ": leave out the fourth channel"
    if pixels.dtype.kind == "f" and shape[2:] == (3,):
        return ": round levels from 0 to 255, and scale those from 0 to 1 before"
    return ""
