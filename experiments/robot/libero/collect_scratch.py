"""Finished demonstrations on disk, and what they add up to."""

from __future__ import annotations

import itertools
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np

from experiments.robot.libero.collect_settings import CollectSettings
from experiments.robot.libero.collect_starts import Start
from experiments.robot.libero.tasks import LiberoTask
from prismatic.evidence.checks import check_fields, parse_object, read_object
from prismatic.evidence.files import replacing
from prismatic.vla.datasets.rlds import Episode

MEGABYTE = 1_000_000
_HEADER: dict[str, type | tuple[type, ...]] = {
    "instruction": str,
    "file_path": str,
    "attempts": int,
    "seed": int,
    "noise_std": (int, float),
}


def episode_path(scratch: Path, task_id: int, episode: int) -> Path:
    """Scratch file of one finished episode."""
    return scratch / f"task_{task_id:03d}" / f"episode_{episode:05d}.npz"


def episode_header(task: LiberoTask, start: Start, attempts: int) -> dict[str, Any]:
    """What a scratch file says about its episode beside the arrays."""
    return {
        "instruction": task.language,
        "file_path": f"{task.suite}/{task.name}/{start.seed}",
        "attempts": attempts,
        **asdict(start),
    }


def load_episode(path: Path, index: int) -> Episode:
    """Read a scratch file back.  Raises ValueError naming the file when it is incomplete."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
        header = _header(arrays, path)
        images = {camera: _split(arrays[camera], arrays[camera + "_lengths"]) for camera in ("image", "wrist_image")}
    except (KeyError, OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"scratch episode {path} cannot be read: {error}; delete it and collect again") from error
    return Episode(
        index=index,
        instruction=header["instruction"],
        actions=arrays["actions"],
        state=arrays["state"],
        images=images,
        joint_state=arrays["joint_state"],
        file_path=header["file_path"],
    )


def finished_episodes(settings: CollectSettings) -> list[Path]:
    """Scratch files that belong to the run, ordered by task and number."""
    wanted = itertools.product(settings.task_ids, range(settings.episodes_per_task))
    paths = [episode_path(settings.scratch, task, number) for task, number in wanted]
    return [path for path in paths if path.is_file()]


def collection_report(settings: CollectSettings) -> dict[str, Any]:
    """Counts per task: episodes kept, attempts, first-attempt successes, steps, unsolved episodes."""
    return {str(task): _task_report(settings, task) for task in settings.task_ids}


def _task_report(settings: CollectSettings, task_id: int) -> dict[str, Any]:
    headers, lengths, sizes, failed = [], [], [], []
    for number in range(settings.episodes_per_task):
        path = episode_path(settings.scratch, task_id, number)
        if path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                headers.append(_header(stored, path))
                lengths.append(len(stored["actions"]))
                sizes.append(stored["image"].size + stored["wrist_image"].size)
        elif path.with_suffix(".failed.json").is_file():
            failed.append(_failure(path.with_suffix(".failed.json")))
    return {
        "episodes": len(headers),
        "unsolved": len(failed),
        "attempts": sum(h["attempts"] for h in headers) + sum(f["attempts"] for f in failed),
        "first_attempt_successes": sum(h["attempts"] == 1 for h in headers),
        "noisy_episodes": sum(h["noise_std"] > 0 for h in headers),
        "steps_min_median_max": [int(f(lengths)) for f in (min, np.median, max)] if lengths else None,
        "jpeg_megabytes": round(sum(sizes) / MEGABYTE, 3),
        "seeds": [h["seed"] for h in headers],
        "instruction": headers[0]["instruction"] if headers else None,
        "reasons": sorted({f["reason"] for f in failed if "reason" in f}),
    }


def _header(stored: Mapping[str, np.ndarray], path: Path) -> dict[str, Any]:
    header = parse_object(str(stored["header"]), str(path))
    check_fields(header, _HEADER, str(path))
    if not header.keys() >= _HEADER.keys():
        raise ValueError(f"{path}: header: found {sorted(header)}, expected {sorted(_HEADER)}")
    return header


def _failure(path: Path) -> dict[str, Any]:
    failure = {"attempts": 0} | read_object(path)
    check_fields(failure, {"attempts": int, "reason": str}, str(path))
    return failure


def is_settled(path: Path) -> bool:
    """Whether the episode was collected or given up."""
    return path.is_file() or path.with_suffix(".failed.json").is_file()


def _split(joined: np.ndarray, lengths: np.ndarray) -> list[bytes]:
    ends = np.cumsum(lengths)
    if len(ends) == 0 or ends[-1] != joined.size:
        raise ValueError(f"image bytes: lengths sum to {lengths.sum()}, found {joined.size}")
    return [joined[end - length : end].tobytes() for end, length in zip(ends, lengths, strict=True)]


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a scratch file, whole or not at all."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        # cast: numpy lets a keyword be `allow_pickle`, a bool.
        np.savez(stream, **cast("dict[str, Any]", arrays))
