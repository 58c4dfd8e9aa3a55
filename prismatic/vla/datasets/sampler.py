"""Endless, sharded, resumable sample order."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class EpochSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index) forever; every epoch is a permutation of 0 .. num_samples - 1 seeded by (seed, epoch).

    The ranks deal the concatenated epochs out like cards: rank r takes positions r, r + W, r + 2 W, ... Nothing is
    dropped or repeated when num_samples is not a multiple of W, and a resumed run may use another world size.
    """

    def __init__(self, num_samples: int, seed: int = 7, rank: int = 0, world_size: int = 1):
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, expected at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 <= rank < world_size = {world_size}")
        self.num_samples = num_samples
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._position = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        position = self._position + self.rank
        epoch, permutation = -1, np.empty(0, dtype=np.int64)
        while True:
            if position // self.num_samples != epoch:
                epoch = position // self.num_samples
                permutation = np.random.default_rng((self.seed, epoch)).permutation(self.num_samples)
            yield epoch, int(permutation[position % self.num_samples])
            position += self.world_size

    def start_at(self, samples_consumed: int) -> None:
        """Let the next iterator begin after `samples_consumed` samples of this rank, counted from the very start."""
        if samples_consumed < 0:
            raise ValueError(f"samples_consumed is {samples_consumed}, expected 0 or more")
        self._position = samples_consumed * self.world_size

    def state_dict(self, samples_seen: int) -> dict[str, int]:
        """JSON-ready position after `samples_seen` samples of all ranks together.

        The caller counts: workers prefetch, so the sampler itself is ahead of what was trained on.
        """
        return {
            "seed": self.seed,
            "num_samples": self.num_samples,
            "position": samples_seen,
            "epoch": samples_seen // self.num_samples,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state_dict`, also with another world size; ValueError when seed or data differ."""
        for name in ("seed", "num_samples"):
            if state[name] != getattr(self, name):
                raise ValueError(f"sampler state has {name} {state[name]}, expected {getattr(self, name)}")
        if state["position"] < 0:
            raise ValueError(f"sampler state has position {state['position']}, expected 0 or more")
        self._position = state["position"]
