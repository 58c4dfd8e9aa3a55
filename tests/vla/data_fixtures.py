"""Hand-made episodes and data sets."""

from __future__ import annotations

import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from prismatic.vla.datasets.rlds import Episode, write_rlds
from prismatic.vla.images import encode_jpeg


def make_episode(index: int, length: int = 12, instruction: str = "push the plate", side: int = 16) -> Episode:
    rng = np.random.default_rng(index)
    actions = rng.uniform(-0.9, 0.9, (length, 7)).astype(np.float32)
    actions[:, 6] = rng.choice([-1.0, 1.0], length)
    images = rng.integers(0, 256, (2, length, side, side, 3), dtype=np.uint8)
    return Episode(
        index=index,
        instruction=instruction,
        actions=actions,
        state=rng.normal(size=(length, 8)).astype(np.float32),
        joint_state=rng.normal(size=(length, 7)).astype(np.float32),
        images={
            key: [encode_jpeg(frame) for frame in frames]
            for key, frames in zip(("image", "wrist_image"), images, strict=True)
        },
        file_path=f"/somewhere/{index}.hdf5",
    )


def write_data_set(root: Path, name: str, episodes: list[Episode], shards: int = 1, side: int = 16) -> Path:
    return write_rlds(root / name / "1.0.0", name, episodes, shards, (side, side, 3))


@contextmanager
def ends():
    """A hang becomes a failure; nothing else depends on the clock."""
    previous = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(1800)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
