"""On which inputs the policy is held: the memories, and the batches they give.

| memory | inputs |
|---|---|
| batch | the training batch |
| data | observations of a data set: images, state and instruction; its actions are not read |
| instructions | the training batch's images and state, with an old instruction drawn per sample |

A new memory is a class here, which `--craft_memory` finds by its `name`, and that name in `MEMORIES` of
`prismatic/training/flags.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from prismatic.training.config import FinetuneConfig
from prismatic.training.retention.instructions import old_instructions
from prismatic.training.retention.observed import observations
from prismatic.training.training_setup import TrainingSetup
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import VLADataset
from prismatic.vla.datasets.sampler import EpochSampler

BATCH = "batch"
_STREAM = 3  # keeps the draws of instructions apart from those of augmentation and dropout, which use the same key


@dataclass(frozen=True)
class MemoryInputs:
    """What memories are built from. collate: of the training batches. rank, world: this process and their number."""

    cfg: FinetuneConfig
    setup: TrainingSetup
    collate: VLACollator
    rank: int = 0
    world: int = 1


class Memory:
    """The training batch itself, or its first samples. The other memories override `batch`.

    Args:
        size: samples per micro-batch of a process; None takes as many as the training batch has.
    """

    name = BATCH

    def __init__(self, size: int | None = None) -> None:
        self.size = size

    @classmethod
    def build(cls, inputs: MemoryInputs, beside: Sequence[Memory]) -> Memory | None:
        """The memory as the flags say, None when it has nothing to add to those of the run that are built already.

        Raises ValueError or FileNotFoundError, which name the flag.
        """
        return cls(inputs.cfg.craft_memory_batch_size)

    def shown(self) -> set[str]:
        """Old instructions of which it holds the images."""
        return set()

    def batch(self, training: dict[str, Any]) -> dict[str, Any]:
        """The memory's batch beside this training batch, on the same device."""
        rows = len(training["input_ids"])
        return training if self.size in (None, rows) else take_rows(training, range(min(self.size, rows)))

    def state_dict(self) -> dict[str, Any]:
        """Position, JSON-ready."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


class InstructionMemory(Memory):
    """What the policy would do in the new scenes if it were asked for something old.

    The instruction of a sample is drawn from the seed and the sample's key in the endless order of samples: it depends
    neither on the number of processes nor on how a batch is divided, and is the same after a resume. More samples than
    the batch has go round it again, with other instructions.

    Args:
        instructions: distinct sentences, at least one. ValueError for one that the tokenizer has no room for.
        collate: of the training batches; makes the prompts.
        seed: of the draws.
        size: see `Memory`.
    """

    name = "instructions"

    def __init__(self, instructions: Sequence[str], collate: VLACollator, seed: int, size: int | None = None) -> None:
        super().__init__(size)
        self.instructions, self._collate, self._seed = list(instructions), collate, seed
        collate.tokenize(self.instructions)

    @classmethod
    def build(cls, inputs: MemoryInputs, beside: Sequence[Memory]) -> Memory | None:
        """None when the other memories show all old instructions."""
        cfg = inputs.cfg
        sentences = old_instructions(cfg, inputs.setup, {sentence for memory in beside for sentence in memory.shown()})
        if not sentences:
            return None
        try:
            return cls(sentences, inputs.collate, cfg.seed, cfg.craft_memory_batch_size)
        except ValueError as error:  # one does not fit the tokenizer
            raise ValueError(f"--craft_memory instructions: {error}; shorten it or leave it out") from None

    def batch(self, training: dict[str, Any]) -> dict[str, Any]:
        """The first samples of the training batch with old instructions."""
        keys = training["keys"]
        size = self.size or len(keys)
        places = [(i % len(keys), i // len(keys)) for i in range(size)]
        drawn = [self._draw(keys[row], turn) for row, turn in places]
        rows = take_rows(training, [row for row, _ in places])
        prompts = to_device(self._collate.tokenize(drawn), training["input_ids"].device)
        return rows | prompts | {"instructions": drawn}

    def _draw(self, key: tuple[int, int], turn: int) -> str:
        number = np.random.default_rng((self._seed, *key, turn, _STREAM)).integers(len(self.instructions))
        return self.instructions[int(number)]


class DataMemory(Memory):
    """Observations of another data set, in a seeded order of their own, dealt out over the processes.

    Args:
        dataset: opened with `observations_only`.
        collate: of the training batches.
        size: samples per micro-batch of a process.
        seed: of the order.
        rank, world: this process and their number.
    """

    name = "data"
    size: int

    def __init__(
        self, dataset: VLADataset, collate: VLACollator, size: int, seed: int, rank: int = 0, world: int = 1
    ) -> None:
        super().__init__(size)
        self.dataset, self._collate, self._world = dataset, collate, world
        self._sampler = EpochSampler(dataset.group_sizes, seed, rank, world, dataset.weights)
        self._generator = torch.Generator().manual_seed(seed)  # the loader draws a seed when it starts
        self._samples = 0  # of all processes
        self._batches: Iterator[dict[str, Any]] | None = None

    @classmethod
    def build(cls, inputs: MemoryInputs, beside: Sequence[Memory]) -> Memory:
        """Of `--craft_memory_data`."""
        cfg = inputs.cfg
        assert cfg.craft_memory_data is not None  # demanded by `FinetuneConfig`
        dataset = observations("--craft_memory_data", cfg.craft_memory_data, inputs.setup, cfg)
        size = cfg.craft_memory_batch_size or cfg.batch_size
        return cls(dataset, inputs.collate, size, cfg.seed, inputs.rank, inputs.world)

    def shown(self) -> set[str]:
        return {sentence for entry in self.dataset.manifest().values() for sentence in entry["episodes"]}

    def batch(self, training: dict[str, Any]) -> dict[str, Any]:
        """The next batch of the data set."""
        if self._batches is None:
            self._batches = iter(
                DataLoader(
                    self.dataset,
                    batch_size=self.size,
                    sampler=self._sampler,
                    collate_fn=self._collate,
                    generator=self._generator,
                )
            )
        self._samples += self.size * self._world
        return to_device(next(self._batches), training["input_ids"].device)

    def state_dict(self) -> dict[str, Any]:
        """Position in the order, of all processes together."""
        return self._sampler.state_dict(self._samples)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the samples that were used; ValueError when seed or data differ."""
        self._sampler.load_state_dict(state)
        self._samples, self._batches = int(state["samples"]), None


MEMORY_KINDS: dict[str, type[Memory]] = {kind.name: kind for kind in (Memory, DataMemory, InstructionMemory)}
"""In the order in which they are built: each sees those before it."""


def take_rows(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The samples `rows` of a batch, in this order; entries that are not per sample stay as they are."""
    count = len(batch["input_ids"])
    rows = list(rows)
    index: slice | list[int] = slice(len(rows)) if rows == list(range(len(rows))) else rows
    taken: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.ndim and len(value) == count:
            taken[name] = value[index]
        elif isinstance(value, list) and len(value) == count:
            taken[name] = [value[row] for row in rows]
        else:
            taken[name] = value
    return taken


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors on a device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
