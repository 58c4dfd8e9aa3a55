"""Frames per second of the storage formats: `python benchmarks/episode_sources.py --side 256 --steps 120`.

Writes the same episodes in every format to a temporary directory and reads frames in random order in one process,
decoded to pixels; prints one line per format with the time to build the index and to open it again. Processor time, so
that other programs do not count.
"""

from __future__ import annotations

import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "vla"))

import format_writers as writers

from prismatic.command_line import UsageError, flag, parse_or_exit
from prismatic.progress import over, say
from prismatic.vla.datasets.hdf5_source import HDF5Source
from prismatic.vla.datasets.lerobot_source import LeRobotSource
from prismatic.vla.datasets.source import EpisodeSource
from prismatic.vla.datasets.source_files import decode_image

AV1 = {"codec": "libsvtav1", "pix_fmt": "yuv420p", "options": {"crf": "30", "g": "2"}}
H264 = {"codec": "libx264", "pix_fmt": "yuv420p", "options": {"crf": "23", "g": "12", "bf": "2"}}
FORMATS = {
    "lerobot v2.1 png": lambda root, episodes: writers.write_lerobot_v21(root, episodes, "png"),
    "lerobot v2.1 jpeg": lambda root, episodes: writers.write_lerobot_v21(root, episodes, "jpeg"),
    "lerobot v2.1 av1 g=2": lambda root, episodes: writers.write_lerobot_v21(root, episodes, "video", AV1),
    "lerobot v3.0 av1 g=2": lambda root, episodes: writers.write_lerobot_v30(root, episodes, "video", AV1, 20),
    "lerobot v3.0 h264 g=12": lambda root, episodes: writers.write_lerobot_v30(root, episodes, "video", H264, 20),
    "hdf5": writers.write_hdf5,
}


@dataclass
class SourcesConfig:
    """Flags."""

    side: int = flag(256, "pixels of an image, an even number", at_least=64, at_most=4096)
    steps: int = flag(120, "per episode", at_least=1)
    episodes: int = flag(20, at_least=1)
    frames: int = flag(600, "to read", at_least=1)

    def __post_init__(self) -> None:
        if self.side % 2:
            raise UsageError(
                f"--side is {self.side}, expected an even number: videos have colours of two by two pixels"
            )


def frames_per_second(source: EpisodeSource, order: list[tuple[str, int, int]]) -> float:
    """Frames (camera, episode, step) of `order` per second of processor time, decoded."""
    begin = time.process_time()
    for place in order:
        frame = source.frame(*place)
        if isinstance(frame, bytes):
            decode_image(frame, "benchmark")
    return len(order) / (time.process_time() - begin)


def main() -> None:
    """Write, index and read every format."""
    cfg = parse_or_exit(SourcesConfig, __doc__)
    episodes = [writers.make_smooth_episode(i, cfg.steps, side=cfg.side) for i in range(cfg.episodes)]
    rng = np.random.default_rng(0)
    print(f"{'format':24}{'frames/s':>10}{'index s':>10}{'open s':>10}")
    with tempfile.TemporaryDirectory() as root:
        for name, write in over(FORMATS.items(), "reading", "formats"):
            folder = write(Path(root) / name.replace(" ", "_"), episodes)
            open_source, keys = (
                (HDF5Source, writers.HDF5_KEYS) if name == "hdf5" else (LeRobotSource, writers.LEROBOT_KEYS)
            )
            times = [time.process_time()]
            for _ in range(2):
                source = open_source(folder, keys)
                times.append(time.process_time())
            places = zip(rng.integers(0, len(source), cfg.frames), rng.integers(0, cfg.steps, cfg.frames), strict=True)
            order = [(keys.cameras[number % 2], int(e), int(t)) for number, (e, t) in enumerate(places)]
            built, opened = np.diff(times)
            say(f"{name:24}{frames_per_second(source, order):10.0f}{built:10.2f}{opened:10.3f}")


if __name__ == "__main__":
    main()
