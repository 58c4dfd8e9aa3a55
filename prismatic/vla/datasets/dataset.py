"""Training samples: windows of RLDS episodes with augmentation that depends only on (seed, epoch, index)."""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.registry import (
    DataSetConfig,
    alternative_name,
    expand_data_set_names,
    get_data_set_config,
)
from prismatic.vla.datasets.rlds import Episode, RLDSReader, find_version_directory, list_data_sets
from prismatic.vla.images import AugmentSettings, ImageSpec, augment_images, prepare_train_image
from prismatic.vla.normalization import Normalizer, compute_statistics


@dataclass(frozen=True)
class DatasetSettings:
    """How episodes become samples.

    num_images: cameras per sample, primary first. image_aug: random augmentation, seeded by `seed`.
    n_shot_episodes: demonstrations kept per distinct instruction, None = all; the subset depends on `seed` and the
    instruction only, and a smaller subset is part of a larger one. frame_stride: every n-th window start of an
    episode. normalizer: statistics to use instead of computing them, one Normalizer or {data set name: Normalizer}.
    """

    action_spec: ActionSpec = field(default_factory=ActionSpec)
    image_spec: ImageSpec = field(default_factory=ImageSpec)
    num_images: int = 2
    image_aug: bool = True
    seed: int = 7
    n_shot_episodes: int | None = None
    frame_stride: int = 1
    split: str = "train"
    normalizer: Normalizer | Mapping[str, Normalizer] | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "frame_stride", "n_shot_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DatasetSettings.{name} is {value}, expected a positive integer")


@dataclass(eq=False)
class _LoadedEpisode:
    """Normalised actions (T, A) and proprio (T, P) float32; per camera one byte blob with T + 1 offsets.

    Blobs instead of lists of bytes: forked workers then share the pages, no reference counts are touched.
    """

    data_set: str
    episode: int
    instruction: str
    actions: np.ndarray
    proprio: np.ndarray
    blobs: list[np.ndarray]
    offsets: list[np.ndarray]

    def jpeg(self, camera: int, step: int) -> bytes:
        start, stop = self.offsets[camera][step : step + 2]
        return self.blobs[camera][start:stop].tobytes()


class VLADataset(Dataset):
    """Map-style data set over all windows t = 0 .. T - chunk_len of all episodes, held in memory as JPEG bytes.

    `dataset_name` is a folder of `data_root_dir`, a registered mixture or a comma separated list; `libero_x` and
    `libero_x_no_noops` stand for each other when only one is there. Several data sets are concatenated, each with its
    own statistics (of the episodes kept by `n_shot_episodes`).

    Raises FileNotFoundError (data root, data set), ValueError (split, NaN, too few demonstrations, statistics that do
    not fit, episodes shorter than a chunk), MissingFeatureError (camera), CorruptRecordError.
    """

    def __init__(self, data_root_dir: str | os.PathLike, dataset_name: str, settings: DatasetSettings):
        self.settings = settings
        self.normalizers: dict[str, Normalizer] = {}
        self.episode_ids: dict[str, list[int]] = {}
        self.metadata: dict[str, dict | None] = {}
        self._episodes: list[_LoadedEpisode] = []
        names = [_existing_name(data_root_dir, name) for name in expand_data_set_names(dataset_name)]
        given = _given_normalizers(settings, names)
        for name in names:
            self._load(name, find_version_directory(data_root_dir, name), given.get(name))
        self._starts = _window_starts(self._episodes, settings)
        self._augment = AugmentSettings(crop_area=settings.image_spec.crop_area)

    @property
    def data_set_names(self) -> list[str]:
        """Folder names of the data sets, in order."""
        return list(self.normalizers)

    @property
    def normalizer(self) -> Normalizer:
        """The normalizer of the only data set; ValueError when there are several (use `normalizers`)."""
        if len(self.normalizers) != 1:
            raise ValueError(f"several data sets {self.data_set_names}: use normalizers[name]")
        return next(iter(self.normalizers.values()))

    @property
    def statistics(self) -> dict[str, dict]:
        """{data set name: statistics}, the content of `dataset_statistics.json`."""
        return {name: normalizer.statistics for name, normalizer in self.normalizers.items()}

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample `index` as seen in `epoch`, key = (epoch, index).

        Returns images (n, S, S, 3) uint8, proprio (P,) and actions (K, A) float32 normalised, instruction,
        dataset_name and sample_id = (episode number in the data set, t).
        """
        epoch, index = key
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: expected 0 <= index < {len(self)}")
        number, step = self._starts[index]
        episode = self._episodes[number]
        spec = self.settings.image_spec
        images = np.stack(
            [prepare_train_image(episode.jpeg(camera, step), spec) for camera in range(self.settings.num_images)]
        )
        if self.settings.image_aug:
            images = augment_images(images, np.random.default_rng((self.settings.seed, epoch, index)), self._augment)
        return {
            "images": images,
            "proprio": episode.proprio[step],
            "actions": episode.actions[step : step + self.settings.action_spec.chunk_len],
            "instruction": episode.instruction,
            "dataset_name": episode.data_set,
            "sample_id": (episode.episode, int(step)),
        }

    def _load(self, name: str, directory: Path, normalizer: Normalizer | None) -> None:
        config = get_data_set_config(name)
        reader = RLDSReader(directory, self.settings.split)
        cameras = _cameras(config, reader, self.settings.num_images, name)
        episodes = [_pack(episode, config, cameras, name) for episode in reader]
        if not episodes:
            raise ValueError(f"{directory}: split {self.settings.split!r} has no episodes")
        kept = select_few_shot(
            [episode.instruction for episode in episodes], self.settings.n_shot_episodes, self.settings.seed, name
        )
        episodes = [episodes[index] for index in kept]
        if normalizer is None:
            normalizer = self._compute_normalizer(name, episodes, config)
        for episode in episodes:
            if len(episode.actions) < self.settings.action_spec.chunk_len:
                raise ValueError(
                    f"{name}: episode {episode.episode} has {len(episode.actions)} steps, "
                    f"expected at least one chunk of {self.settings.action_spec.chunk_len}"
                )
            episode.actions = normalizer.normalize_action(episode.actions)
            episode.proprio = normalizer.normalize_proprio(episode.proprio)
        self.normalizers[name] = normalizer
        self.episode_ids[name] = kept
        self.metadata[name] = reader.metadata
        self._episodes.extend(episodes)

    def _compute_normalizer(self, name: str, episodes: list[_LoadedEpisode], config: DataSetConfig) -> Normalizer:
        actions = [episode.actions for episode in episodes]
        proprios = [episode.proprio for episode in episodes]
        return Normalizer(compute_statistics(actions, proprios, config.action_mask), self.settings.action_spec, name)


def select_few_shot(instructions: Sequence[str], n_shot: int | None, seed: int, data_set: str) -> list[int]:
    """Sorted episode numbers: `n_shot` per distinct instruction, all for None.

    The order of preference within an instruction is a permutation seeded by (seed, text), so that subsets are nested
    and the same for every process and method. Raises ValueError naming the instruction with too few demonstrations.
    """
    if n_shot is None:
        return list(range(len(instructions)))
    groups: dict[str, list[int]] = defaultdict(list)
    for index, instruction in enumerate(instructions):
        groups[instruction].append(index)
    kept: list[int] = []
    for instruction, members in groups.items():
        if len(members) < n_shot:
            raise ValueError(
                f"{data_set}: n_shot_episodes is {n_shot}, but {instruction!r} has {len(members)} demonstrations"
            )
        order = np.random.default_rng((seed, zlib.crc32(instruction.encode()))).permutation(len(members))
        kept.extend(members[position] for position in order[:n_shot])
    return sorted(kept)


def _existing_name(data_root: str | os.PathLike, name: str) -> str:
    available = list_data_sets(data_root)
    other = alternative_name(name)
    return other if name not in available and other in available else name


def _given_normalizers(settings: DatasetSettings, names: list[str]) -> dict[str, Normalizer]:
    given = settings.normalizer
    if given is None:
        return {}
    if isinstance(given, Normalizer):
        given = {given.dataset_name or names[0]: given}
    missing = sorted(set(names) - set(given))
    if missing:
        raise ValueError(f"given statistics are of {sorted(given)}, but the data sets are {names}: missing {missing}")
    for name in names:
        if given[name].spec != settings.action_spec:
            raise ValueError(f"normalizer of {name!r} has {given[name].spec}, expected {settings.action_spec}")
    return {name: given[name] for name in names}


def _cameras(config: DataSetConfig, reader: RLDSReader, num_images: int, name: str) -> tuple[str, ...]:
    if num_images > len(config.cameras):
        raise ValueError(f"{name}: num_images is {num_images}, the data set has cameras {list(config.cameras)}")
    cameras = config.cameras[:num_images]
    for camera in cameras:
        reader.require_camera(camera)
    return cameras


def _pack(episode: Episode, config: DataSetConfig, cameras: tuple[str, ...], name: str) -> _LoadedEpisode:
    where = f"{name}: episode {episode.index}"
    for group, values in (("action", episode.actions), ("state", episode.state)):
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{where}: {group} is not finite at (step, dim) {tuple(bad[0].tolist())}")
    if not episode.instruction.strip():
        raise ValueError(f"{where}: the language instruction is empty")
    actions, proprio = config.standardize(episode.actions, episode.state)
    frames = [episode.images[camera] for camera in cameras]
    return _LoadedEpisode(
        data_set=name,
        episode=episode.index,
        instruction=episode.instruction,
        actions=actions,
        proprio=proprio,
        blobs=[np.frombuffer(b"".join(jpegs), dtype=np.uint8) for jpegs in frames],
        offsets=[np.cumsum([0, *(len(jpeg) for jpeg in jpegs)]) for jpegs in frames],
    )


def _window_starts(episodes: list[_LoadedEpisode], settings: DatasetSettings) -> np.ndarray:
    """(samples, 2) int64: episode position in memory and first step of each window."""
    windows = []
    for number, episode in enumerate(episodes):
        steps = np.arange(0, len(episode.actions) - settings.action_spec.chunk_len + 1, settings.frame_stride)
        windows.append(np.stack([np.full_like(steps, number), steps], axis=1))
    return np.concatenate(windows)
