"""Rollout videos: the published file name, the choice of episodes, and an atomic MP4 writer (imageio-ffmpeg)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from enum import Enum

import numpy as np

from prismatic.evidence.files import temporary_beside
from prismatic.evidence.free_names import create_free

PUBLISHED_FPS = 30.0


class SaveVideos(str, Enum):
    """Which episodes are written as video."""

    NONE = "none"
    FAILURES = "failures"
    FIRST = "first"
    ALL = "all"


class VideoBudget:
    """Decides per episode of one task whether to record it. Several episodes may be under way at the same time.

    Args:
        choice: which episodes.
        limit: most videos to keep; None: no limit, except one for `first`.
    """

    def __init__(self, choice: SaveVideos, limit: int | None = None) -> None:
        self.choice = choice
        self.remaining = 1 if limit is None and choice is SaveVideos.FIRST else limit

    def reserve(self) -> bool:
        """True when the coming episode's frames may be needed; takes one of the remaining videos."""
        if self.choice is SaveVideos.NONE or self.remaining == 0:
            return False
        if self.remaining is not None:
            self.remaining -= 1
        return True

    def give_back(self) -> None:
        """An episode with a reservation ended without a video."""
        if self.remaining is not None:
            self.remaining += 1


def keeps_video(choice: SaveVideos, success: bool) -> bool:
    """Whether a recorded episode with this outcome is written."""
    return choice is not SaveVideos.NONE and not (choice is SaveVideos.FAILURES and success)


def rollout_path(folder: str, date_time: str, episode: int, success: bool, task: str) -> str:
    """Published video path `<folder>/<date>/<date_time>--episode=N--success=B--task=T.mp4`.

    Args:
        folder: e.g. `./rollouts/vla-adapter`.
        date_time: start of the run, `YYYY_MM_DD-HH_MM_SS`; the date folder is its first half.
        episode: number of the episode in the whole run, from 1.
        success: outcome.
        task: instruction; lower-cased, blanks, line ends and dots become underscores, 50 characters are kept.
    """
    name = task.lower().replace(" ", "_").replace("\n", "_").replace(".", "_")[:50]
    date = date_time.split("-")[0]
    return f"{folder}/{date}/{date_time}--episode={episode}--success={success}--task={name}.mp4"


def write_video(path: str, frames: Sequence[np.ndarray], fps: float = PUBLISHED_FPS) -> str:
    """Write an H.264 MP4; the file appears under its name only when complete.

    Args:
        path: wanted name, ending in .mp4; its folder is created. A name that another run has taken gets -2, -3, ...
            before the ending.
        frames: n >= 1 images (H, W, 3) uint8, all of one size, H and W even.
        fps: frames per second of the video.

    Returns:
        The name it got.

    Raises:
        ValueError: no frames, or a frame of another shape or dtype.
        OSError: the video cannot be written.
    """
    import imageio_ffmpeg

    if not frames:
        raise ValueError(f"{path}: expected at least one frame, found none")
    shape = frames[0].shape
    for index, frame in enumerate(frames):
        if frame.dtype != np.uint8 or frame.shape != shape or frame.ndim != 3 or frame.shape[2] != 3:
            raise ValueError(f"{path}: frame {index}: expected uint8 {shape}, found {frame.dtype} {frame.shape}")
    # Absolute, because ffmpeg takes what is before a colon in a relative path for a protocol.
    with temporary_beside(os.path.abspath(path)) as partial:
        # macro_block_size 2: the default of 16 would silently rescale sizes such as 100 x 100.
        settings = {"fps": fps, "codec": "libx264", "macro_block_size": 2, "ffmpeg_log_level": "error"}
        size = (shape[1], shape[0])
        with closing(imageio_ffmpeg.write_frames(str(partial), size, output_params=["-f", "mp4"], **settings)) as video:
            video.send(None)
            for frame in frames:
                video.send(np.ascontiguousarray(frame))
        if not partial.exists():
            raise OSError(f"{path}: ffmpeg wrote no video")
        with create_free(path) as taken:
            os.replace(partial, taken.name)
        return taken.name
