"""Replay: samples of old data sets mixed with those of the new task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.normalization import Normalizer


class ReplayMixture(Dataset):
    """New and old data sets as one, for the sampler and the trainer in place of the new one.

    The weights make `fraction` of the samples old ones, old data sets in proportion to their sizes; an epoch holds each
    new sample as often as without replay. Samples also say `is_replay`, and their key is that of the mixture.

    Args:
        new: data of the new task.
        old: data sets to replay, at least one.
        fraction: share of old samples among all, between 0 and 1.

    Raises ValueError for another fraction, and for a data set that is among both.
    """

    def __init__(self, new: VLADataset, old: Sequence[VLADataset], fraction: float) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"replay fraction is {fraction}, expected more than 0 and less than 1")
        self._all = [new, *old]
        names = self.data_set_names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"replayed data set {twice[0]!r} is trained on or replayed already: name it once")
        self._first = np.cumsum([0, *(len(part) for part in self._all)])
        new_samples = sum(weight * size for weight, size in zip(new.weights, new.group_sizes, strict=True))
        old_samples = sum(len(part) for part in old)
        weight = fraction / (1 - fraction) * new_samples / old_samples
        self.weights: list[float] = [*new.weights, *(weight for part in old for _ in part.group_sizes)]

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
    def fingerprints(self) -> dict[str, str]:
        """{data set name: hash of all its episodes}."""
        return self._merged("fingerprints")

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
        new, old = self._all[0].manifest(), {}
        for part in self._all[1:]:
            old |= {name: entry | {"replay": True} for name, entry in part.manifest().items()}
        return new | old

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample `index` as seen in `epoch`, key = (epoch, index)."""
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: expected 0 <= index < {len(self)}")
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        sample = self._all[number][(epoch, index - int(self._first[number]))]
        return sample | {"key": (int(epoch), int(index)), "is_replay": number > 0}

    def _merged(self, name: str) -> dict:
        return {key: value for part in self._all for key, value in getattr(part, name).items()}
