"""What a row of `craft_overhead.py` holds the policy on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from overhead_rows import Row
from torch import Tensor

from prismatic.command_line import UsageError
from prismatic.training.retention.memory import InstructionMemory, Memory
from prismatic.vla.datasets.collator import VLACollator

INSTRUCTIONS = ("pick up the milk and place it in the basket", "open the top drawer", "turn on the stove")
"""Old instructions of the rows that hold the policy on some."""


class RandomPrompts:
    """Prompts of random ids, as long as those of `batch`: a part of the batch costs that part of a pass over it."""

    def __init__(self, batch: dict, vocab_size: int) -> None:
        self._masks = {name: batch[name] for name in ("attention_mask", "action_mask")}
        self._vocab_size = vocab_size

    def tokenize(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """input_ids, attention_mask, action_mask, each (B, L), of at most as many rows as the batch has."""
        masks = {name: mask[: len(instructions)] for name, mask in self._masks.items()}
        return {"input_ids": torch.randint(self._vocab_size, masks["action_mask"].shape), **masks}


def memory_of(row: Row, batch_size: int, collate: RandomPrompts | VLACollator) -> Memory:
    """The memory of a row; UsageError when the batch cannot be divided as it asks."""
    if row.instructions == 0:
        return Memory()
    size = row.instructions * batch_size
    if not size.is_integer():
        raise UsageError(
            f"--batch_size {batch_size}: row {row.label!r} takes {row.instructions:g} of the batch, expected a whole "
            f"number of samples; give a multiple of {round(1 / row.instructions)}, or name other rows with --rows"
        )
    return InstructionMemory(INSTRUCTIONS, collate, seed=0, size=int(size))
