"""Which demonstrations are kept and which are held out: drawn for each instruction, whatever else is there."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def select_validation(instructions: Sequence[str], fraction: float, seed: int) -> list[int]:
    """Sorted numbers of the held-out episodes: of each instruction `fraction`, at least one and not all.

    An instruction with a single demonstration keeps it for training. Seeded by (seed, text).
    """
    held_out: list[int] = []
    for instruction, members in _by_instruction(instructions).items():
        count = min(len(members) - 1, max(1, round(fraction * len(members)))) if fraction else 0
        order = np.random.default_rng((seed, zlib.crc32(instruction.encode()), 1)).permutation(len(members))
        held_out.extend(members[position] for position in order[:count])
    return sorted(held_out)


def select_few_shot(instructions: Sequence[str], n_shot: int | None, seed: int, data_set: str) -> list[int]:
    """Sorted episode numbers: `n_shot` per distinct instruction, all for None.

    The order of preference within an instruction is a permutation seeded by (seed, text), so that subsets are nested
    and the same for every process and method. Raises ValueError naming the instruction with too few demonstrations.
    """
    if n_shot is None:
        return list(range(len(instructions)))
    kept: list[int] = []
    for instruction, members in _by_instruction(instructions).items():
        if len(members) < n_shot:
            raise ValueError(
                f"{data_set}: n_shot_episodes is {n_shot}, but {instruction!r} has {len(members)} demonstrations"
            )
        order = np.random.default_rng((seed, zlib.crc32(instruction.encode()))).permutation(len(members))
        kept.extend(members[position] for position in order[:n_shot])
    return sorted(kept)


def _by_instruction(instructions: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = defaultdict(list)
    for index, instruction in enumerate(instructions):
        groups[instruction].append(index)
    return groups
