"""Endless, sharded, resumable sample order over one or several data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) forever; every epoch is a seeded permutation.

    Samples are numbered through the data sets ("groups") one after another. With weight 1 an epoch holds each sample of
    a group once; with weight w it holds round(w * size) of them, dealt from an endless sequence of permutations of the
    group, so that no sample is used again before all others of its group were used as often. The yielded epoch is the
    number of that permutation, so that a key never comes twice and two uses of a sample differ in augmentation.

    The ranks deal the concatenated epochs out like cards: rank r takes positions r, r + W, r + 2 W, ... Nothing is
    dropped or repeated when the epoch is not a multiple of W, and a resumed run may use another world size.

    Args:
        sizes: number of samples, per group when a sequence.
        seed: of all permutations.
        rank, world_size: which share is this process's.
        weights: one per group, None is 1 each.
    """

    def __init__(
        self,
        sizes: int | Sequence[int],
        seed: int = 7,
        rank: int = 0,
        world_size: int = 1,
        weights: Sequence[float] | None = None,
    ):
        self.sizes = [sizes] if isinstance(sizes, int) else [int(size) for size in sizes]
        self.weights = [1.0] * len(self.sizes) if weights is None else [float(weight) for weight in weights]
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sampler sizes are {self.sizes}, expected at least 1 each")
        if len(self.weights) != len(self.sizes):
            raise ValueError(
                f"sampler has {len(self.weights)} weights, expected one for each of {len(self.sizes)} groups"
            )
        self._counts = [round(weight * size) for weight, size in zip(self.weights, self.sizes, strict=True)]
        if min(self._counts) < 1:
            raise ValueError(f"sampler weights {self.weights} leave no sample of a group with sizes {self.sizes}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 <= rank < world_size = {world_size}")
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._position = 0

    @property
    def epoch_length(self) -> int:
        """Samples of one epoch over all ranks."""
        return sum(self._counts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self._position + self.rank
        epoch, keys = -1, np.empty((0, 2), dtype=np.int64)
        while True:
            if position // self.epoch_length != epoch:
                epoch = position // self.epoch_length
                keys = self._keys(epoch)
            use, index = keys[position % self.epoch_length].tolist()
            yield use, index
            position += self.world_size

    def _keys(self, epoch: int) -> np.ndarray:
        """(epoch_length, 2) int64 keys of an epoch in their order."""
        groups = zip(self.sizes, self._counts, range(len(self.sizes)), strict=True)
        first = np.cumsum([0, *self.sizes])
        keys = np.concatenate([self._deal(epoch, size, count, g) + (0, first[g]) for size, count, g in groups])
        return keys[np.random.default_rng((self.seed, epoch)).permutation(len(keys))]

    def _deal(self, epoch: int, size: int, count: int, group: int) -> np.ndarray:
        """(count, 2): permutation number and sample, the epoch's share of the group's endless permutations."""
        places = np.arange(epoch * count, (epoch + 1) * count)
        rounds = places // size
        if count == size:
            return np.stack([rounds, places % size], axis=1)
        numbers = range(rounds[0], rounds[-1] + 1)
        dealt = np.concatenate([np.random.default_rng((self.seed, group, r)).permutation(size) for r in numbers])
        return np.stack([rounds, dealt[places - rounds[0] * size]], axis=1)

    def start_at(self, samples_consumed: int) -> None:
        """Let the next iterator begin after `samples_consumed` samples of this rank, counted from the very start."""
        if samples_consumed < 0:
            raise ValueError(f"samples_consumed is {samples_consumed}, expected 0 or more")
        self._position = samples_consumed * self.world_size

    def state_dict(self, samples_seen: int) -> dict:
        """JSON-ready position after `samples_seen` samples of all ranks together.

        The caller counts: workers prefetch, so the sampler itself is ahead of what was trained on.
        """
        epoch, position = divmod(samples_seen, self.epoch_length)
        identity = {"seed": self.seed, "sizes": self.sizes, "weights": self.weights}
        return identity | {"samples": samples_seen, "epoch": epoch, "position": position}

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`, also with another world size; ValueError when seed or data differ."""
        for name in ("seed", "sizes", "weights"):
            if state[name] != getattr(self, name):
                raise ValueError(f"sampler state has {name} {state[name]}, expected {getattr(self, name)}")
        if state["samples"] < 0:
            raise ValueError(f"sampler state has {state['samples']} samples, expected 0 or more")
        self._position = state["samples"]
