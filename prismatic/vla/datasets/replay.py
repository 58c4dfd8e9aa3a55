"""Replay: samples of old data sets mixed with those of the new task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.normalization import Normalizer

_FEWEST = 100  # replayed samples of an epoch per data set: rounding then changes their share by half a percent at most


class ReplayMixture(Dataset):
    """New and old data sets as one, for the sampler and the trainer in place of the new one.

    The weights make `fraction` of the samples old ones, old data sets in proportion to their sizes, new ones as their
    own weights say. Samples also say `is_replay`, and their key is that of the mixture.

    Args:
        new: data of the new task.
        old: data sets to replay, at least one.
        fraction: share of old samples among all, between 0 and 1.

    Raises ValueError for another fraction, no old data set, one that is named twice, and observations without actions.
    """

    def __init__(self, new: VLADataset, old: Sequence[VLADataset], fraction: float) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"replay fraction is {fraction}, expected more than 0 and less than 1")
        if not old:
            raise ValueError("replay has no old data set, expected at least one")
        self._all = [new, *old]
        if any(part.settings.observations_only for part in self._all):
            raise ValueError(f"replay of {self.data_set_names}: samples need actions, expected no observations_only")
        names = self.data_set_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"replayed data set {twice[0]!r} is trained on or replayed already: name it once")
        self._first = np.cumsum([0, *(len(part) for part in self._all)])
        self.weights = _weights(new, [size for part in old for size in part.group_sizes], fraction)

    @property
    def settings(self) -> DatasetSettings:
        """How samples of the new task are made."""
        return self._all[0].settings

    @property
    def data_set_names(self) -> list[str]:
        """Names of all data sets, new ones first."""
        return [name for part in self._all for name in part.data_set_names]

    @property
    def normalizers(self) -> dict[str, Normalizer]:
        """{data set name: normalizer}."""
        return self._merged("normalizers")

    @property
    def statistics(self) -> dict[str, dict]:
        """{data set name: statistics}."""
        return self._merged("statistics")

    @property
    def metadata(self) -> dict[str, dict | None]:
        """{data set name: how its data were collected}."""
        return self._merged("metadata")

    @property
    def cameras(self) -> dict[str, tuple[str, ...]]:
        """{data set name: names of its cameras}."""
        return self._merged("cameras")

    @property
    def fingerprints(self) -> dict[str, str]:
        """{data set name: hash of all its episodes}."""
        return self._merged("fingerprints")

    @property
    def episode_ids(self) -> dict[str, list[int]]:
        """{data set name: kept episodes}."""
        return self._merged("episode_ids")

    @property
    def window_counts(self) -> dict[str, list[int]]:
        """{data set name: samples of each kept episode}."""
        return self._merged("window_counts")

    @property
    def warnings(self) -> list[str]:
        """What contradicts known statistics, a line each."""
        return [line for part in self._all for line in part.warnings]

    @property
    def group_sizes(self) -> list[int]:
        """Samples per data set."""
        return [size for part in self._all for size in part.group_sizes]

    def manifest(self) -> dict[str, dict]:
        """Which episodes are used, as `VLADataset.manifest`; entries of old data say `replay`."""
        new = self._all[0].manifest()
        old: dict[str, dict] = {}
        for part in self._all[1:]:
            old |= {name: entry | {"replay": True} for name, entry in part.manifest().items()}
        return new | old

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample `index` as seen in `epoch`, key = (epoch, index).

        It is that of its own data set in the same epoch, augmentation included, but for `key`, and `is_replay` (bool).
        """
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: expected 0 <= index < {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        sample = self._all[number][(epoch, index - int(self._first[number]))]
        return sample | {"key": (int(epoch), int(index)), "is_replay": number > 0}

    def _merged(self, name: str) -> dict:
        return {key: value for part in self._all for key, value in getattr(part, name).items()}


def _weights(new: VLADataset, old_sizes: list[int], fraction: float) -> list[float]:
    """Weights for the sampler, which deals out whole numbers of samples of each data set in an epoch.

    Where the old share of an epoch is too small to be rounded, the epoch is made longer by a whole factor.
    """
    new_samples = sum(weight * size for weight, size in zip(new.weights, new.group_sizes, strict=True))
    old_weight = fraction / (1 - fraction) * new_samples / sum(old_sizes)
    expected = [old_weight * size for size in old_sizes]
    repeats = math.ceil(max(1, _FEWEST * len(expected) / sum(expected), 1 / min(expected)))
    return [repeats * weight for weight in new.weights] + [repeats * old_weight] * len(old_sizes)
