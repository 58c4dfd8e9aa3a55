"""Recorded demonstrations: where they started, and a policy that acts only on what it recognises."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from experiments.robot.libero.collect_starts import Start, episode_start
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.suite_names import split_suite
from prismatic.vla.action_spec import ActionSpec, NormalizationType
from prismatic.vla.datasets.dataset_part import episodes_left_out, numbers
from prismatic.vla.datasets.format_table import expected_files, folder_and_split, is_data_set
from prismatic.vla.datasets.inspect import open_folder
from prismatic.vla.datasets.inspect_measures import read_pixels
from prismatic.vla.datasets.registry import DataSetConfig, standardize_libero
from prismatic.vla.datasets.rlds import METADATA_FILE, Episode, RLDSReader
from prismatic.vla.datasets.source import DataSetError, EpisodeSource
from prismatic.vla.images import decode_jpeg
from prismatic.vla.normalization import Normalizer, compute_statistics

_MOST_STARTS = 1_000_000
CAMERAS = ("image", "wrist_image")
THUMBNAIL = 24
_START_FACTS = {"seed", "initial_states", "noise_std", "noise_fraction", "max_attempts", "tasks"}
MAX_IMAGE_DIFFERENCE = 12.0
"""Grey levels, mean over a thumbnail: within 3 for the same scene in the same render mode, above 17 for a flip."""
MAX_STATE_DIFFERENCE = 0.15
"""Metres, radians: what contacts and rounding leave in a repeated rollout stays below a tenth of it."""


@dataclass(frozen=True)
class DataSet:
    """Demonstrations in any format that training reads.

    suite: base suite they show, None when it cannot be told. left_out: {episode or file: why training leaves it out}.
    reader: of whole episodes, None where no collection is recorded. metadata: as collected, or {}.
    """

    path: Path
    name: str
    suite: str | None
    source: EpisodeSource
    config: DataSetConfig
    left_out: dict[str, str]
    reader: RLDSReader | None
    metadata: dict[str, Any]

    def statistics(self) -> dict[str, Any]:
        """Statistics of the whole data set, as training computes them."""
        kept = [episode for episode in range(len(self)) if str(episode) not in self.left_out]
        pairs = [numbers(self.source, episode, self.config, self.name) for episode in kept]
        return compute_statistics([a for a, _ in pairs], [s for _, s in pairs], self.config.action_mask)

    def picture(self, camera: int, episode: int, step: int) -> np.ndarray:
        """What the policy's first, second, ... camera saw, uint8 (H, W, 3)."""
        return read_pixels(self.source, self.source.keys.cameras[camera], episode, step)

    def __len__(self) -> int:
        return len(self.source)


def open_data_set(path: str | Path) -> DataSet:
    """Open the folder of a data set, or one version of an RLDS one; `FOLDER:SPLIT` is another split.

    Raises FileNotFoundError when there is no data set, KeyError for a name that is not registered, and DataSetError
    when nothing in it can be read.
    """
    place, split = folder_and_split(str(path))
    folder = Path(place)
    if not is_data_set(folder):
        files = expected_files().removeprefix("<x.y.z>/")  # a single version will do here
        raise FileNotFoundError(f"--data {path}: expected a folder with {files}, found none of them")
    name, source, config = open_folder(folder, split, skip_bad=True)
    metadata = source.metadata or {}
    _check_metadata(metadata, source.directory / METADATA_FILE)
    # Only collections of this code record how episodes began, and all have its layout.
    reader = RLDSReader(source.directory, source.split, skip_bad=True) if metadata else None
    suite = metadata.get("task_suite_name") or split_suite(name)[0]
    left_out = episodes_left_out(source, config, config.action_spec.chunk_len, skip_bad=True)
    return DataSet(source.directory, name, suite, source, config, left_out, reader, metadata)


def _check_metadata(metadata: dict[str, Any], file: Path) -> None:
    """DataSetError for modes that the simulator does not have, and for more starts than can be drawn again."""
    for name, kind in (("render_mode", RenderMode), ("reset_mode", ResetMode)):
        modes = [mode.value for mode in kind]
        if name in metadata and metadata[name] not in modes:
            raise DataSetError(f"{file}: {name}: found {metadata[name]!r:.60}, expected one of {', '.join(modes)}")
    episodes = sum(facts.get("episodes", 0) + facts.get("unsolved", 0) for facts in metadata.get("tasks", {}).values())
    starts = episodes * metadata.get("max_attempts", 1)
    if starts > _MOST_STARTS:
        raise DataSetError(f"{file}: tasks, max_attempts: found {starts} starts, expected at most {_MOST_STARTS}")


@dataclass(frozen=True)
class RecordedStart:
    """How a demonstration began: task of the suite, and what to reset the simulator with."""

    episode: int
    task_id: int
    start: Start


def recorded_starts(data: DataSet) -> list[RecordedStart]:
    """Starts of the episodes whose recorded actions are the executed ones, shortest episode first.

    Empty when the data set does not record how it was collected.
    """
    if data.reader is None or not data.metadata.keys() >= _START_FACTS:
        return []
    known = _starts_by_seed(data.metadata)
    found = []
    for index in range(len(data.reader)):
        if str(index) in data.left_out:
            continue
        episode = data.reader.episode(index)
        seed = episode.file_path.rpartition("/")[2]
        match = known.get(int(seed)) if seed.isdigit() else None
        if match is not None and match[1].noise_std == 0:
            found.append((len(episode), RecordedStart(index, *match)))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])]


def _starts_by_seed(metadata: dict[str, Any]) -> dict[int, tuple[int, Start]]:
    known = {name: metadata[name] for name in _START_FACTS - {"tasks", "max_attempts"}}
    settings: Any = SimpleNamespace(**known)  # what a start depends on, of the settings of the collection
    starts = {}
    for task_id, facts in metadata["tasks"].items():
        for number in range(facts.get("episodes", 0) + facts.get("unsolved", 0)):
            for attempt in range(metadata["max_attempts"]):
                start = episode_start(settings, int(task_id), number, attempt)
                starts[start.seed] = (int(task_id), start)
    return starts


def thumbnail(image: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 -> (THUMBNAIL, THUMBNAIL, 3) float64, averaged."""
    small = Image.fromarray(np.ascontiguousarray(image)).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


class DemonstrationPolicy:
    """Repeats one demonstration, finding its place in it by what it sees; rests when it recognises nothing.

    It depends on every convention of the evaluator at once: a flipped image, exchanged cameras or another rotation
    resemble no recorded frame, and actions take the way of a policy's: standardised, normalised, un-normalised.

    Args:
        episode: the demonstration, as stored.
        chunk_len: actions per call.
    """

    def __init__(self, episode: Episode, chunk_len: int = 8) -> None:
        actions, self._states = standardize_libero(episode.actions, episode.state)
        spec = ActionSpec(chunk_len=chunk_len, normalization=NormalizationType.BOUNDS)  # quantiles would clip
        statistics = compute_statistics([actions], [self._states], [True] * 6 + [False])
        normalizer = Normalizer(statistics, spec)
        self._actions = normalizer.unnormalize_action(normalizer.normalize_action(actions).astype(np.float64))
        self._views = np.array([[thumbnail(decode_jpeg(f)) for f in episode.images[name]] for name in CAMERAS])
        self._chunk_len = chunk_len
        self.calls = 0
        self.problem: str | None = None

    def predict(self, image: np.ndarray, wrist_image: np.ndarray, state: np.ndarray, instruction: str) -> np.ndarray:
        """(K, 7) float64, gripper in [0, 1] with 1 = open; all zero in the arm when nothing is recognised."""
        self.calls += 1
        place = self._find(np.stack([thumbnail(image), thumbnail(wrist_image)]), np.asarray(state))
        chunk = np.zeros((self._chunk_len, 7))
        if place is None:
            chunk[:, -1] = 1.0
            return chunk
        found = self._actions[place : place + self._chunk_len]
        chunk[: len(found)] = found
        chunk[len(found) :, -1] = found[-1, -1]
        return chunk

    def _find(self, views: np.ndarray, state: np.ndarray) -> int | None:
        grey = np.abs(self._views - views[:, None]).mean(axis=(2, 3, 4))  # (cameras, T)
        moved = np.abs(self._states - state).max(axis=1)
        cost = (grey / MAX_IMAGE_DIFFERENCE).max(axis=0) + moved / MAX_STATE_DIFFERENCE
        place = int(cost.argmin())
        problems = []
        for name, difference in zip(CAMERAS, grey[:, place], strict=True):
            if difference > MAX_IMAGE_DIFFERENCE:
                problems.append(f"{name} differs by {difference:.0f} grey levels from every recorded frame")
        if moved[place] > MAX_STATE_DIFFERENCE:
            worst = int(np.abs(self._states[place] - state).argmax())
            problems.append(f"state[{worst}] is {state[worst]:.2f}, recorded {self._states[place, worst]:.2f}")
        if problems:
            self.problem = self.problem or f"at query {self.calls}: {'; '.join(problems)}"
            return None
        return place
