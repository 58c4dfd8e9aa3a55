"""A data set of published size without published data: RLDS episodes of textured noise.

    python benchmarks/synthetic_data.py --output runs/synthetic --frames 60000

256 px JPEG images of about 19 kB from a pool of distinct ones, random actions and states, ten instructions. Written as
`{output}/libero_synthetic/1.0.0`. The content means nothing; sizes and counts are those of libero_spatial.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prismatic.command_line import flag, parse_or_exit
from prismatic.progress import over
from prismatic.vla.datasets.rlds import Episode, write_rlds
from prismatic.vla.images import encode_jpeg

NAME = "libero_synthetic"


@dataclass
class SyntheticConfig:
    """Flags."""

    output: str = "runs/synthetic"
    frames: int = flag(60_000, at_least=1)
    episode_length: int = flag(123, "libero_spatial's median", at_least=1)
    pool: int = flag(256, "distinct images", at_least=1)
    shards: int = flag(16, at_least=1, at_most=10_000)
    seed: int = flag(0, at_least=0)


def textured_image(rng: np.random.Generator, side: int = 256) -> np.ndarray:
    """uint8 (side, side, 3): smooth colour fields with grain, about 19 kB as a JPEG of quality 95."""
    coarse = rng.uniform(40, 215, (9, 9, 3))
    position = np.linspace(0, 7.999, side)
    low, fraction = position.astype(int), (position % 1)[:, None]
    rows = coarse[low] * (1 - fraction[..., None]) + coarse[low + 1] * fraction[..., None]
    field = rows[:, low] * (1 - fraction) + rows[:, low + 1] * fraction
    return np.clip(field + rng.normal(0, 2.2, (side, side, 1)), 0, 255).astype(np.uint8)


def episodes(cfg: SyntheticConfig) -> Iterator[Episode]:
    """Episodes of `episode_length` steps, the last one shorter, `frames` steps in total."""
    rng = np.random.default_rng(cfg.seed)
    pool = [encode_jpeg(textured_image(rng)) for _ in range(cfg.pool)]
    done = 0
    while done < cfg.frames:
        length = min(cfg.episode_length, cfg.frames - done)
        actions = rng.uniform(-0.9, 0.9, (length, 7)).astype(np.float32)
        actions[:, 6] = rng.choice([-1.0, 1.0], length)
        number = done // cfg.episode_length
        yield Episode(
            index=number,
            instruction=f"pick up object {'abcdefghij'[number % 10]} and place it on the plate",
            actions=actions,
            state=rng.normal(size=(length, 8)).astype(np.float32),
            joint_state=rng.normal(size=(length, 7)).astype(np.float32),
            images={key: [pool[i] for i in rng.integers(0, len(pool), length)] for key in ("image", "wrist_image")},
            file_path=f"synthetic/{number}",
        )
        done += length


def generate(cfg: SyntheticConfig) -> Path:
    """Write the data set; an existing one is kept. Returns its root."""
    directory = Path(cfg.output) / NAME / "1.0.0"
    if not directory.exists():
        made = over(episodes(cfg), "writing", "episodes", -(-cfg.frames // cfg.episode_length))
        write_rlds(directory, NAME, made, cfg.shards, metadata={"jpeg_quality": 95})
    return Path(cfg.output)


if __name__ == "__main__":
    print(generate(parse_or_exit(SyntheticConfig, __doc__)))
