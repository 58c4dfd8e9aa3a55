"""Videos of a LeRobot data set: the times of their frames, and exact frames by time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from prismatic.vla.datasets.lerobot_info import INFO
from prismatic.vla.datasets.source import DataSetError
from prismatic.vla.images import MAX_PIXELS


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Whatever PyAV raises on damaged content becomes a DataSetError with the file's name."""
    import av

    try:
        yield
    except DataSetError:
        raise
    except (av.error.FFmpegError, OSError, ValueError, OverflowError, MemoryError) as error:
        raise DataSetError(f"{path}: cannot be read, expected a complete video: {error}") from error


def _open_video(path: Path):
    import av

    # A file may hold a play list that names addresses elsewhere: only local files are followed. In a relative path what
    # is before a colon would be a protocol.
    container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"}, metadata_errors="ignore")
    if not container.streams.video:
        container.close()
        raise DataSetError(f"{path}: no video stream")
    context = container.streams.video[0].codec_context
    if context is None:
        container.close()
        raise DataSetError(f"{path}: its video is damaged, or in a codec that cannot be decoded")
    context.options = context.options | {"max_pixels": str(MAX_PIXELS)}
    return container


class VideoScan:
    """The frames of a video in the order of display, without decoding them.

    pts (N,) int64: time stamps in units of the stream. seeks (N,) int64: where to begin decoding. digests (N, 16).
    """

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self.path = path
        with decoding(path), _open_video(path) as container:
            stream = container.streams.video[0]
            size = (stream.height, stream.width)
            if size not in (shape[:2], shape[1::-1]):
                raise DataSetError(f"{path}: frames of {size}, {INFO} declares {shape}")
            rows, keys = _packets(container, stream, path)
            self._unit = float(stream.time_base or 0)
        rows.sort()
        keys.sort()
        self.pts = np.array([pts for pts, _ in rows], dtype=np.int64)
        self.digests = np.array([np.frombuffer(digest, np.uint8) for _, digest in rows]).reshape(-1, 16)
        # The last keyframe displayed no later than the frame, by its time of decoding: that is what files are
        # searched by, and it is not later than its time of display.
        before = np.searchsorted([pts for pts, _ in keys], self.pts, side="right") - 1
        if not rows:
            raise DataSetError(f"{path}: no frames that are displayed")
        if not keys or (before < 0).any():
            raise DataSetError(f"{path}: no keyframe before the first of {len(rows)} frames")
        self.seeks = np.array([dts for _, dts in keys], dtype=np.int64)[before]

    def locate(self, times: np.ndarray, fps: float, where: str) -> np.ndarray:
        """Rows of the frames at `times` (T,) seconds; DataSetError if one is further than half a step away."""
        seconds = self.pts * self._unit
        rows = np.searchsorted((seconds[1:] + seconds[:-1]) / 2, times)  # nearest frames
        slack = 1e-4 + 1e-6 * np.abs(times)  # time stamps are float32
        bad = ~(np.abs(seconds[rows] - times) <= 0.5 / fps + slack)
        bad[1:] |= np.diff(rows) < 1
        if bad.any():
            step = int(np.argmax(bad))
            raise DataSetError(
                f"{where}: no frame for step {step} at {times[step]:.4f} s, found {len(seconds)} frames from "
                f"{seconds[0]:.4f} to {seconds[-1]:.4f} s, expected one for every step of {1 / fps:.4f} s"
            )
        return rows


def _packets(container, stream, path: Path) -> tuple[list[tuple[int, bytes]], list[tuple[int, int]]]:
    """(pts, digest) of all displayed frames, and (pts, dts) of all keyframes."""
    rows: list[tuple[int, bytes]] = []
    keys: list[tuple[int, int]] = []
    limit = path.stat().st_size
    for packet in container.demux(stream):
        if packet.size == 0:
            continue  # the end of the stream
        if packet.pts is None or packet.is_corrupt or len(rows) > limit:
            raise DataSetError(f"{path}: frame {len(rows)} is damaged or has no time stamp")
        if packet.is_keyframe:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        if not packet.is_discard:
            rows.append((packet.pts, hashlib.blake2b(bytes(packet), digest_size=16).digest()))
    return rows, keys


class VideoFile:
    """An open video: exact frames by time stamp, cheap when they follow each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container = _open_video(path)
        self._stream = self._container.streams.video[0]
        # One thread: several delay the first frame after a jump, and data loading has its own processes.
        self._stream.codec_context.thread_count = 1
        self._frames: Iterator = iter(())
        self._last = None
        self._began: int | None = None

    def read(self, pts: int, seek: int) -> np.ndarray:
        """The frame with time stamp `pts`, uint8 (H, W, 3) RGB; decoding begins at the keyframe at `seek`."""
        if self._last is None or self._last.pts != pts:
            if self._last is None or seek != self._began or self._last.pts > pts:
                self._container.seek(seek, stream=self._stream, backward=True, any_frame=False)
                self._frames, self._began = self._container.decode(self._stream), seek
            self._last = next((frame for frame in self._frames if frame.pts is not None and frame.pts >= pts), None)
        if self._last is None or self._last.pts != pts or self._last.is_corrupt:
            raise DataSetError(f"{self.path}: the frame at time stamp {pts} cannot be decoded")
        return self._last.to_ndarray(format="rgb24")

    def close(self) -> None:
        """Close the file."""
        self._container.close()
