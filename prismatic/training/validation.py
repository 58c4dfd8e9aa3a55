"""Action error on held-out episodes, on the same samples every time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from prismatic.craft.reference import quiet_pass
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.retention.memory import to_device
from prismatic.training.stop_signal import ignore_stop_signals
from prismatic.vla.datasets.dataset import VLADataset
from prismatic.vla.datasets.sampler import EpochSampler

PREFIX = "VLA Val/"
NAMES = ("Loss", "Curr Action L1 Loss", "Next Actions L1 Loss")


@dataclass(frozen=True)
class ValidationSettings:
    """What is measured, and on which share of it.

    batch_size: samples per forward pass. num_batches: at most this many batches over all processes, 0 for the whole
    data set. seed: which samples. rank, world_size: this process; it takes batches rank, rank + world_size, ...
    num_workers: loader processes.
    """

    batch_size: int
    num_batches: int = 0
    seed: int = 7
    rank: int = 0
    world_size: int = 1
    num_workers: int = 0


class Validator:
    """Mean action L1 of a data set in eval mode. Weights, training flags and random generators stay as they were.

    Args:
        dataset: held-out samples, without augmentation, normalised like the training data.
        collate: samples to batch.
        settings: which samples, and this process's share of them.
        device: of the model.

    Raises ValueError for an augmented data set.
    """

    def __init__(
        self,
        dataset: VLADataset,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        settings: ValidationSettings,
        device: torch.device,
    ) -> None:
        if dataset.settings.image_aug:
            raise ValueError("validation data set: image_aug is True, expected False: its samples must not vary")
        self.settings, self._device = settings, device
        self._loader = DataLoader(
            dataset,
            batch_sampler=_FixedBatches(self.batches(len(dataset))),
            num_workers=settings.num_workers,
            collate_fn=collate,
            worker_init_fn=ignore_stop_signals,
            # Its own generator: a loader draws a seed when it starts.
            generator=torch.Generator().manual_seed(settings.seed),
        )

    def batches(self, num_samples: int) -> list[list[tuple[int, int]]]:
        """Keys of this process's batches, the last one of all possibly short: a seeded choice without repetition."""
        size, limit = self.settings.batch_size, self.settings.num_batches
        wanted = num_samples if limit == 0 else min(num_samples, limit * size)
        order = iter(EpochSampler(num_samples, self.settings.seed))
        keys = [next(order) for _ in range(wanted)]
        chunks = [keys[i : i + size] for i in range(0, wanted, size)]
        return chunks[self.settings.rank :: self.settings.world_size]

    def measure(
        self,
        model: VLAPolicyModel,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reduce_sum: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, float]:
        """`VLA Val/...` as means over all samples of all processes. Every process must call it, with a bare model.

        Processes may have different numbers of batches: sums and counts are added up, means are not averaged.
        `autocast` is the context of the forward pass, `reduce_sum` the sum of a tensor over processes (None: one).
        """
        totals = torch.zeros(len(NAMES) + 1, dtype=torch.float64, device=self._device)
        with quiet_pass(model):
            for batch in self._loader:
                on_device = to_device(batch, self._device)
                with autocast():
                    output = model(on_device)
                totals += _error_sums(output.actions, on_device["actions"])
        if reduce_sum is not None:
            totals = reduce_sum(totals)
        *sums, count = totals.tolist()
        return {f"{PREFIX}{name}": value / count for name, value in zip(NAMES, sums, strict=True)}


def _error_sums(predicted: Tensor, actions: Tensor) -> Tensor:
    """(4,) float64: the three errors, each a mean per sample summed over samples, and the number of samples."""
    error = (predicted.float() - actions.float()).abs()
    rows = error.mean(dim=(1, 2)), error[:, 0].mean(dim=1), error[:, 1:].mean(dim=(1, 2))
    return torch.stack([*(row.sum() for row in rows), error.new_tensor(len(error))]).double()


class _FixedBatches:
    """The same batches in every iteration."""

    def __init__(self, batches: list[list[tuple[int, int]]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
