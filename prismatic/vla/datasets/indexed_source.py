"""A source of episodes whose numbers, texts and problems are those of an index."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import numpy as np

from prismatic.vla.datasets.index_reader import EpisodeIndex
from prismatic.vla.datasets.source import EpisodeSource, MissingFeatureError


class IndexedSource(EpisodeSource):
    """A source that knows its episodes from an index, with their numbers in the arrays `actions` and `state`.

    Subclasses set `_index` and read the frames.
    """

    _index: EpisodeIndex

    @property
    def lengths(self) -> np.ndarray:
        """Steps of every episode, (E,) int64."""
        return self._index.lengths

    @property
    def instructions(self) -> Sequence[str]:
        """The instruction of every episode."""
        return self._index.instructions

    def instruction_at(self, episode: int, step: int) -> str:
        """The instruction at one step."""
        runs = self._index.runs.get(str(episode))
        if runs is None:
            return self._index.instructions[episode]
        return runs[bisect.bisect_right(runs, step, key=lambda run: run[0]) - 1][1]

    def texts(self, episode: int) -> list[str]:
        """The distinct instructions of one episode."""
        runs = self._index.runs.get(str(episode))
        return [self._index.instructions[episode]] if runs is None else list(dict.fromkeys(text for _, text in runs))

    @property
    def problems(self) -> dict[str, str]:
        """What could not be read, and why."""
        return self._index.problems

    @property
    def warnings(self) -> list[str]:
        """What contradicts itself without keeping the data from being read."""
        return self._index.warnings

    @property
    def fingerprint(self) -> str:
        """Hash of instructions, numbers and images."""
        return self._index.fingerprint

    def cached(self, name: str, compute: Callable[[], dict]) -> dict:
        """What `compute` gives, kept with the index."""
        return self._index.cached(name, compute)

    def forget_actions(self) -> None:
        """From now on only observations can be read."""
        self.keys = self.keys.without_action()

    def actions(self, episode: int) -> np.ndarray:
        """Actions as stored, (T, A) float32; MissingFeatureError when opened without actions."""
        self.require_actions()
        return self._index.rows("actions", episode)

    def state(self, episode: int) -> np.ndarray:
        """State as stored, (T, S) float32, the keys' values side by side."""
        return self._index.rows("state", episode)

    def require_actions(self) -> None:
        """MissingFeatureError when the source was opened without actions."""
        if self.keys.action is None:
            raise MissingFeatureError(f"{self.directory}: opened without actions, only its observations can be read")

    def require_frame(self, camera: str, episode: int, step: int) -> None:
        """MissingFeatureError for a camera that was not opened, IndexError for a step outside the episode."""
        if camera not in self.keys.cameras:
            raise MissingFeatureError(f"{self.directory}: no camera {camera!r}, opened with {list(self.keys.cameras)}")
        length = int(self._index.lengths[episode])
        if not 0 <= step < length:
            raise IndexError(f"{self.directory}: episode {episode}: step {step}, expected 0 <= step < {length}")
