"""The same episodes in other storage formats: LeRobot v2.1 and v3.0, HDF5 folders."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data_fixtures import make_episode
from PIL import Image

from prismatic.vla.datasets.rlds import Episode
from prismatic.vla.datasets.source import SourceKeys
from prismatic.vla.images import decode_jpeg, encode_jpeg

FPS = 10
CAMERAS = {"image": "observation.images.image", "wrist_image": "observation.images.wrist_image"}
LEROBOT_KEYS = SourceKeys("lerobot", tuple(CAMERAS.values()), ("observation.state",), "action")
HDF5_CAMERAS = {"image": "obs/agentview_rgb", "wrist_image": "obs/eye_in_hand_rgb"}
HDF5_KEYS = SourceKeys(
    "hdf5", tuple(HDF5_CAMERAS.values()), ("obs/ee_states", "obs/gripper_states"), "actions", rotated=True
)
# Without chroma subsampling: what is left is the rounding of the colour space and the quantiser. B-frames and short
# groups make the order of decoding differ from that of display.
VIDEO = {"codec": "libx264", "pix_fmt": "yuv444p", "options": {"crf": "1", "g": "5", "bf": "2"}}
LOSSLESS = {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"crf": "0", "g": "4", "bf": "0"}}


def make_smooth_episode(index: int, length: int = 12, instruction: str = "push the plate", side: int = 32) -> Episode:
    """An episode whose images are moving colour gradients, as a video codec expects; every step looks different."""
    episode = make_episode(index, length, instruction, side)
    rows, columns = np.mgrid[0:side, 0:side] * (120 / side)
    for camera, shift in (("image", 0), ("wrist_image", 30)):
        frames = []
        for step in range(length):
            level = 10.0 * (step % 13) + shift
            planes = [rows + level, columns + 0.5 * level, np.full_like(rows, 20 + 60 * (index % 3) + step % 7)]
            frames.append(encode_jpeg(np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)))
        episode.images[camera] = frames
    return episode


def write_video(path: Path, images: Sequence[np.ndarray], codec: str, pix_fmt: str, options: dict) -> None:
    """`images` (H, W, 3) as an mp4 file of `FPS` frames per second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=dict(options))
        stream.height, stream.width, stream.pix_fmt = *images[0].shape[:2], pix_fmt
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    _give_back_real_time()


def _give_back_real_time() -> None:
    """SVT-AV1 gives the calling thread of a root user real-time priority, and leaves it there: tests that come later,
    and the programs that they start, would starve whatever else the core has to do.
    """
    if hasattr(os, "sched_setscheduler"):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


def write_lerobot_v21(root: Path, episodes: Sequence[Episode], images: str = "png", video: dict = VIDEO) -> Path:
    """LeRobot v2.1, `images` is `video`, `png` or `jpeg` (as stored in the episodes)."""
    tasks = _tasks(episodes)
    info = _info(episodes, "v2.1", images)
    info |= {
        "chunks_size": 1000,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    lines = []
    begin = 0
    for number, episode in enumerate(episodes):
        chunk = f"chunk-{number // 1000:03d}"
        columns = _columns(episode, number, begin, tasks, images)
        _write_table(root / "data" / chunk / f"episode_{number:06d}.parquet", columns)
        for camera, key in CAMERAS.items():
            if images == "video":
                frames = [decode_jpeg(data) for data in episode.images[camera]]
                write_video(root / "videos" / chunk / key / f"episode_{number:06d}.mp4", frames, **video)
        lines.append({"episode_index": number, "tasks": [episode.instruction], "length": len(episode)})
        begin += len(episode)
    _write_json(root / "meta" / "info.json", info)
    _write_lines(root / "meta" / "episodes.jsonl", lines)
    _write_lines(root / "meta" / "tasks.jsonl", [{"task_index": i, "task": text} for text, i in tasks.items()])
    return root


def write_lerobot_v30(
    root: Path, episodes: Sequence[Episode], images: str = "png", video: dict = VIDEO, per_file: int = 2
) -> Path:
    """LeRobot v3.0 with `per_file` episodes in every data and video file."""
    tasks = _tasks(episodes)
    info = _info(episodes, "v3.0", images)
    info |= {
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
    }
    rows, begin = [], 0
    for file, first in enumerate(range(0, len(episodes), per_file)):
        group = episodes[first : first + per_file]
        tables, origin = [], begin
        for number, episode in enumerate(group, start=first):
            tables.append(_columns(episode, number, begin, tasks, images))
            rows.append(_episode_row(number, episode, file, begin, begin - origin, images))
            begin += len(episode)
        name = f"chunk-000/file-{file:03d}"
        _write_table(root / "data" / f"{name}.parquet", {key: sum((t[key] for t in tables), []) for key in tables[0]})
        for camera, key in CAMERAS.items():
            if images == "video":
                frames = [decode_jpeg(data) for episode in group for data in episode.images[camera]]
                write_video(root / "videos" / key / f"{name}.mp4", frames, **video)
    _write_json(root / "meta" / "info.json", info)
    _write_table(
        root / "meta" / "episodes" / "chunk-000" / "file-000.parquet",
        {key: [row[key] for row in rows] for key in rows[0]},
    )
    _write_table(root / "meta" / "tasks.parquet", {"task_index": list(tasks.values()), "task": list(tasks)})
    return root


def write_hdf5(root: Path, episodes: Sequence[Episode]) -> Path:
    """A folder with one file per instruction; images upside down, as the simulator gives them."""
    import h5py

    root.mkdir(parents=True, exist_ok=True)
    for instruction in _tasks(episodes):
        with h5py.File(root / f"{instruction.replace(' ', '_')}_demo.hdf5", "w") as file:
            chosen = [episode for episode in episodes if episode.instruction == instruction]
            for number, episode in enumerate(chosen):
                demo = file.create_group(f"data/demo_{number}")
                demo["actions"] = episode.actions.astype(np.float64)
                demo["obs/ee_states"] = episode.state[:, :6].astype(np.float64)
                demo["obs/gripper_states"] = episode.state[:, 6:].astype(np.float64)
                demo["obs/joint_states"] = episode.joint_state
                for camera, key in HDF5_CAMERAS.items():
                    demo[key] = np.stack([decode_jpeg(data)[::-1, ::-1] for data in episode.images[camera]])
    return root


def _tasks(episodes: Sequence[Episode]) -> dict[str, int]:
    return {text: number for number, text in enumerate(dict.fromkeys(episode.instruction for episode in episodes))}


def _info(episodes: Sequence[Episode], version: str, images: str) -> dict:
    shape = list(decode_jpeg(episodes[0].images["image"][0]).shape)
    features = {
        "action": {"dtype": "float32", "shape": [7], "names": None},
        "observation.state": {"dtype": "float32", "shape": [8], "names": None},
    }
    kind = "video" if images == "video" else "image"
    features |= {key: {"dtype": kind, "shape": shape, "names": list("hwc")} for key in CAMERAS.values()}
    for name, dtype in (("timestamp", "float32"), ("frame_index", "int64"), ("task_index", "int64")):
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return {
        "codebase_version": version,
        "total_episodes": len(episodes),
        "fps": FPS,
        "splits": {"train": f"0:{len(episodes)}"},
        "features": features,
    }


def _columns(episode: Episode, number: int, begin: int, tasks: dict, images: str) -> dict[str, list]:
    steps = np.arange(len(episode))
    columns = {
        "action": list(episode.actions),
        "observation.state": list(episode.state),
        "timestamp": list((steps / FPS).astype(np.float32)),
        "frame_index": steps.tolist(),
        "episode_index": [number] * len(episode),
        "index": (begin + steps).tolist(),
        "task_index": [tasks[episode.instruction]] * len(episode),
    }
    for camera, key in CAMERAS.items():
        if images != "video":
            data = [png_of(image) if images == "png" else image for image in episode.images[camera]]
            columns[key] = [{"bytes": image, "path": f"frame-{step:06d}.png"} for step, image in enumerate(data)]
    return columns


def _episode_row(number: int, episode: Episode, file: int, begin: int, offset: int, images: str) -> dict:
    row = {
        "episode_index": number,
        "tasks": [episode.instruction],
        "length": len(episode),
        "data/chunk_index": 0,
        "data/file_index": file,
        "dataset_from_index": begin,
        "dataset_to_index": begin + len(episode),
    }
    for key in CAMERAS.values() if images == "video" else ():
        row |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file}
        row[f"videos/{key}/from_timestamp"] = offset / FPS
        row[f"videos/{key}/to_timestamp"] = (offset + len(episode)) / FPS
    return row


def png_of(image: bytes) -> bytes:
    """The pixels of a JPEG as PNG."""
    stream = io.BytesIO()
    Image.fromarray(decode_jpeg(image)).save(stream, "PNG")
    return stream.getvalue()


def _write_table(path: Path, columns: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def _write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
