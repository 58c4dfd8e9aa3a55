"""What every storage format gives: random access to the frames of a data set, as stored."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.format_table import FORMATS


class DataSetError(ValueError):
    """Files of a data set that are damaged, contradict each other or do not hold what they declare."""


class MissingFeatureError(KeyError):
    """A feature that the data set does not declare or a record does not hold."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True)
class SourceKeys:
    """Where one storage format keeps what a policy needs.

    format: a name in `formats.FORMATS`. cameras: keys of the images in model order, primary first. state: keys whose
    values are concatenated along the last axis. action: key of the actions, None where only observations are read.
    rotated: frames are stored as the simulator gives them, upside down, and are turned by 180 degrees on reading.
    instruction: key of the text, None for the format's own place. Keys are those of the format: RLDS below `steps/`
    (action, instruction) and `steps/observation/` (cameras, state), or whole ones that begin with `steps/` or
    `episode_metadata/`; LeRobot column names; HDF5 below `data/demo_i/` (instruction: also an attribute). State and
    action of one step are laid flat: a scalar is one number, a matrix its rows one after another.
    """

    format: str
    cameras: tuple[str, ...]
    state: tuple[str, ...]
    action: str | None
    rotated: bool = False
    instruction: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"SourceKeys.format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        for name in ("cameras", "state"):
            if isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"SourceKeys.{name} is {getattr(self, name)!r}, expected a tuple of keys")

    @property
    def numbers(self) -> tuple[str, ...]:
        """Keys of the number arrays: the action, if it is read, and the state's."""
        return self.state if self.action is None else (self.action, *self.state)

    @property
    def camera_names(self) -> tuple[str, ...]:
        """What the cameras are called: the ends of their keys, whole keys where two ends are the same."""
        ends = tuple(re.split(r"[./]", key)[-1] for key in self.cameras)
        return ends if len(set(ends)) == len(ends) else self.cameras

    def without_action(self) -> SourceKeys:
        """The keys of the observations alone: actions are not read and need not be there."""
        return replace(self, action=None)

    def with_cameras(self, count: int | None, data_set: str) -> SourceKeys:
        """The keys with the first `count` cameras, all for None; ValueError when there are fewer."""
        if count is not None and count > len(self.cameras):
            raise ValueError(f"{data_set}: num_images is {count}, the data set has cameras {list(self.cameras)}")
        return replace(self, cameras=self.cameras[:count])


class EpisodeSource(ABC):
    """One split of a data set, opened with the keys to read.

    Opening costs no pass over the frames once the index exists. Objects can be pickled: workers reopen their files.
    """

    directory: Path
    keys: SourceKeys
    split: str = "train"

    @property
    @abstractmethod
    def lengths(self) -> np.ndarray:
        """Steps of every episode, (E,) int64."""

    @property
    @abstractmethod
    def instructions(self) -> Sequence[str]:
        """The instruction of every episode."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash of the content; equal for equal episodes wherever the files lie and whenever they were written."""

    def instruction_at(self, episode: int, step: int) -> str:
        """The instruction at one step: an episode may hold several."""
        return self.instructions[episode]

    def texts(self, episode: int) -> list[str]:
        """The distinct instructions of one episode, in the order of their first steps."""
        return [self.instructions[episode]]

    @property
    def problems(self) -> dict[str, str]:
        """{episode number or file name: why it could not be read}; such episodes have no steps."""
        return {}

    @property
    def warnings(self) -> list[str]:
        """What contradicts itself in the files without keeping them from being read, a line each."""
        return []

    @property
    def recorded_hz(self) -> float | None:
        """Steps per second as the files say, None when they do not."""
        return None

    @property
    def metadata(self) -> dict | None:
        """How the data were collected (`craft_metadata.json`), None when there is no record."""
        return None

    def __len__(self) -> int:
        return len(self.lengths)

    @abstractmethod
    def cached(self, name: str, compute: Callable[[], dict]) -> dict:
        """What `compute` gives, kept with the index."""

    @abstractmethod
    def forget_actions(self) -> None:
        """From now on only observations can be read."""

    @abstractmethod
    def actions(self, episode: int) -> np.ndarray:
        """Actions as stored, (T, A) float32; MissingFeatureError when opened without actions."""

    @abstractmethod
    def state(self, episode: int) -> np.ndarray:
        """State as stored, (T, S) float32, the keys' values side by side."""

    @abstractmethod
    def frame(self, camera: str, episode: int, step: int) -> bytes | np.ndarray:
        """One image, upright: JPEG or PNG bytes, or uint8 (H, W, 3) RGB. DataSetError when it cannot be read."""
