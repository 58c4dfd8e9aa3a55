"""Training samples: windows of episodes with augmentation that depends only on (seed, epoch, index)."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.dataset_part import Part, check_size, episodes_left_out, left_out_lines, numbers
from prismatic.vla.datasets.formats import open_data_set
from prismatic.vla.datasets.inspect_checks import check_for_training
from prismatic.vla.datasets.known_statistics import known_key
from prismatic.vla.datasets.registry import (
    DataSetConfig,
    alternative_name,
    expand_data_set_names,
    get_data_set_config,
)
from prismatic.vla.datasets.selection import select_few_shot, select_validation
from prismatic.vla.datasets.source import DataSetError, EpisodeSource, MissingFeatureError
from prismatic.vla.image_augmentation import AugmentSettings
from prismatic.vla.images import ImageSpec, grey_images, prepare_train_images
from prismatic.vla.normalization import Normalizer

PARTS = ("train", "val")


@dataclass(frozen=True)
class DatasetSettings:
    """How episodes become samples.

    num_images: cameras per sample, primary first. image_aug: random augmentation, seeded by `seed`.
    blind_images: constant grey in place of every image, which is then not read, nor augmented.
    proprio_dropout: share of the samples whose robot state is zeros (the middle of its normalised range), seeded by
    `seed`.
    n_shot_episodes: demonstrations kept per distinct instruction, None = all; the subset depends on `subset_seed` (None
    = `seed`) and the instruction only, and a smaller subset is part of a larger one. val_fraction: share of the
    episodes of each instruction that are held out; `part` says which of the two parts (`train` or `val`) this data set
    is. frame_stride: every n-th window start of an episode. normalizer: statistics to use instead of computing them,
    one Normalizer or {data set name: Normalizer}. known_statistics: {data set name: statistics} that are kept where a
    data set has one of these names (either spelling). observations_only: images, state and instruction of every frame;
    actions are not read and need not be there. split: of the files, None is `train` or the only one there is.
    skip_bad_episodes: episodes that cannot be read, or hold values that are not finite, are left out. Those without a
    sample (shorter than a chunk, without text) always are; `manifest` lists both.
    """

    action_spec: ActionSpec = field(default_factory=ActionSpec)
    image_spec: ImageSpec = field(default_factory=ImageSpec)
    num_images: int = 2
    image_aug: bool = True
    blind_images: bool = False
    proprio_dropout: float = 0.0
    seed: int = 7
    subset_seed: int | None = None
    n_shot_episodes: int | None = None
    val_fraction: float = 0.0
    part: str = "train"
    frame_stride: int = 1
    split: str | None = None
    skip_bad_episodes: bool = False
    normalizer: Normalizer | Mapping[str, Normalizer] | None = None
    known_statistics: Mapping[str, dict] | None = None
    observations_only: bool = False

    @property
    def window_length(self) -> int:
        """Frames that a sample needs: a chunk of actions, or one observation."""
        return 1 if self.observations_only else self.action_spec.chunk_len

    def __post_init__(self) -> None:
        for name in ("num_images", "frame_stride", "n_shot_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"DatasetSettings.{name} is {value}, expected a positive integer")
        if not 0 <= self.proprio_dropout <= 1:
            raise ValueError(f"DatasetSettings.proprio_dropout is {self.proprio_dropout}, expected 0 to 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"DatasetSettings.val_fraction is {self.val_fraction}, expected 0 <= fraction < 1")
        if self.part not in PARTS or (self.part == "val" and self.val_fraction == 0):
            raise ValueError(
                f"DatasetSettings.part is {self.part!r} with val_fraction {self.val_fraction}, expected one of "
                f"{', '.join(PARTS)} and a positive fraction for val"
            )


class VLADataset(Dataset):
    """Map-style data set over all windows t = 0 .. T - chunk_len of all kept episodes; images are read when needed.

    `dataset_name` is a folder of `data_root_dir` (or `folder/folder`), a registered mixture or a comma separated list
    with optional weights (`a,b:0.5`); `libero_x` and `libero_x_no_noops` stand for each other when only one is there.
    Several data sets are concatenated, each with its own statistics (of the episodes kept); `group_sizes` and `weights`
    are for the sampler.

    normalizers: {data set name: Normalizer}, without data sets whose actions have no statistics (`observations_only`
    and not known). warnings: lines about what stands out, what was left out, and data that contradict their known
    statistics.

    Raises FileNotFoundError (data root, data set), ValueError (split, NaN, too few demonstrations, statistics that do
    not fit, no episode with a chunk), MissingFeatureError (camera, actions), DataSetError (damaged files, values that
    contradict the registered conventions, another number of state or action values than `action_spec` says).
    """

    def __init__(self, data_root_dir: str | os.PathLike, dataset_name: str, settings: DatasetSettings):
        self.settings = settings
        self.normalizers: dict[str, Normalizer] = {}
        self.warnings: list[str] = []
        named = expand_data_set_names(dataset_name)
        names = {_existing_name(data_root_dir, name): weight for name, weight in named.items()}
        self.weights: list[float] = list(names.values())
        given = _given_normalizers(settings, list(names))
        self._parts = [self._load(data_root_dir, name, given.get(name)) for name in names]
        self._windows = [_window_counts(part, settings) for part in self._parts]
        self._first = np.cumsum([0, *self.group_sizes])
        self._augment = AugmentSettings(crop_area=settings.image_spec.crop_area) if settings.image_aug else None

    @property
    def data_set_names(self) -> list[str]:
        """Folder names of the data sets, in order."""
        return [part.name for part in self._parts]

    @property
    def normalizer(self) -> Normalizer:
        """The normalizer of the only data set; ValueError when there are several (use `normalizers`) or it has none."""
        if not self.normalizers:
            raise ValueError(f"{self.data_set_names}: observations without known statistics have no normalizer")
        if len(self.normalizers) != 1:
            raise ValueError(f"several data sets {self.data_set_names}: use normalizers[name]")
        return next(iter(self.normalizers.values()))

    @property
    def statistics(self) -> dict[str, dict]:
        """{data set name: statistics}, the content of `dataset_statistics.json`; of the sets in `normalizers`."""
        return {name: normalizer.statistics for name, normalizer in self.normalizers.items()}

    @property
    def episode_ids(self) -> dict[str, list[int]]:
        """{data set name: kept episodes}."""
        return {part.name: part.kept for part in self._parts}

    @property
    def metadata(self) -> dict[str, dict | None]:
        """{data set name: how its data were collected}."""
        return {part.name: part.source.metadata for part in self._parts}

    @property
    def cameras(self) -> dict[str, tuple[str, ...]]:
        """Names of the cameras of each data set, in the order of the model's images."""
        return {part.name: part.source.keys.camera_names for part in self._parts}

    @property
    def fingerprints(self) -> dict[str, str]:
        """{data set name: hash of all its episodes}."""
        return {part.name: part.source.fingerprint for part in self._parts}

    @property
    def window_counts(self) -> dict[str, list[int]]:
        """{data set name: samples of each kept episode}; samples are ordered by episode and step."""
        return {
            part.name: np.diff(ends, prepend=0).tolist() for part, ends in zip(self._parts, self._windows, strict=True)
        }

    def raw_proprio(self, data_set: str, episode: int) -> np.ndarray:
        """Proprioception of a whole episode before normalisation, (T, P) float32 in the units of the data set.

        `episode` is its number in the data set. Raises KeyError for a data set that is not open.
        """
        part = {part.name: part for part in self._parts}[data_set]
        return numbers(part.source, episode, get_data_set_config(data_set), data_set)[1]

    @property
    def group_sizes(self) -> list[int]:
        """Samples per data set."""
        return [int(ends[-1]) for ends in self._windows]

    def manifest(self) -> dict[str, dict]:
        """Which episodes are used: {data set name: {fingerprint, seed, episodes: {instruction: ids}}}, JSON-ready.

        An episode with several instructions is listed with each. Where there is something to say also `split` (another
        than `train`) and `left_out` {episode or file: reason}.
        """
        seed = _subset_seed(self.settings)
        content = {}
        for part in self._parts:
            episodes: dict[str, list[int]] = defaultdict(list)
            for episode in part.kept:
                for text in part.source.texts(episode):
                    episodes[text].append(int(episode))
            content[part.name] = {"fingerprint": part.source.fingerprint, "seed": seed, "episodes": dict(episodes)}
            content[part.name] |= {"split": part.source.split} if part.source.split != "train" else {}
            content[part.name] |= {"left_out": part.left_out} if part.left_out else {}
        return content

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Sample `index` as seen in `epoch`, key = (epoch, index).

        Returns images (n, S, S, 3) uint8, proprio (P,) and actions (K, A) float32 normalised (no actions with
        `observations_only`), instruction, dataset_name, sample_id = (episode number in the data set, t) and the key.
        """
        part, position, step = self._locate(key[1])
        row = part.starts[position] + step
        episode = part.kept[position]
        chunk = slice(row, row + self.settings.action_spec.chunk_len)
        return ({} if part.actions is None else {"actions": part.actions[chunk]}) | {
            "images": self._images(part, position, step, key),
            "proprio": np.zeros_like(part.proprio[row]) if self._drops_proprio(key) else part.proprio[row],
            "instruction": part.source.instruction_at(episode, step),
            "dataset_name": part.name,
            "sample_id": (int(episode), step),
            "key": (int(key[0]), int(key[1])),
        }

    def _drops_proprio(self, key: tuple[int, int]) -> bool:
        share = self.settings.proprio_dropout
        # A stream of its own: images are augmented as without dropout.
        return share > 0 and np.random.default_rng((self.settings.seed, *key, 1)).random() < share

    def _images(self, part: Part, position: int, step: int, key: tuple[int, int]) -> np.ndarray:
        settings = self.settings
        if settings.blind_images:
            return grey_images(settings.num_images, settings.image_spec)
        frames = [part.frame(position, camera, step) for camera in range(settings.num_images)]
        rng = np.random.default_rng((settings.seed, *key)) if self._augment else None
        return prepare_train_images(frames, settings.image_spec, self._augment, rng)

    def _locate(self, index: int) -> tuple[Part, int, int]:
        """Data set, position among its kept episodes and first step of a window."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index}: expected 0 <= index < {len(self)}")
        group = int(np.searchsorted(self._first, index, side="right")) - 1
        inside, ends = index - int(self._first[group]), self._windows[group]
        position = int(np.searchsorted(ends, inside, side="right"))
        before = 0 if position == 0 else int(ends[position - 1])
        return self._parts[group], position, (inside - before) * self.settings.frame_stride

    def _load(self, data_root: str | os.PathLike, name: str, normalizer: Normalizer | None) -> Part:
        settings, config = self.settings, get_data_set_config(name)
        source = self._open(data_root, name, config)
        part = self._make_part(name, source, config)
        statistics = settings.known_statistics or {}
        known = None if normalizer is not None else known_key(statistics, name)
        if known is not None:
            normalizer = Normalizer(statistics[known], settings.action_spec, name)
        given = normalizer is not None
        if normalizer is None:
            normalizer = part.own_normalizer(config, settings.action_spec)
        else:
            self.warnings += part.contradiction(normalizer.statistics)
        # Statistics of actions that were not read are made up: nobody may act with them.
        if given or part.actions is not None:
            self.normalizers[name] = normalizer
        part.normalize(normalizer)
        return part

    def _open(self, data_root: str | os.PathLike, name: str, config: DataSetConfig) -> EpisodeSource:
        """The data set, checked against its conventions; of observations without actions."""
        settings = self.settings
        choices = settings.split, settings.num_images, settings.skip_bad_episodes
        try:
            source = open_data_set(data_root, name, config, *choices)
        except (MissingFeatureError, DataSetError):
            if not settings.observations_only:
                raise
            source = open_data_set(data_root, name, config.without_actions(), *choices)
        if not len(source):
            raise DataSetError(f"{source.directory}: split {source.split!r} has no episodes")
        if source.keys.action is None and not settings.observations_only:
            raise MissingFeatureError(f"{name}: its configuration names no actions, so only observations_only opens it")
        if settings.observations_only and source.keys.action is not None:
            self._check_unread_actions(source, name, config)
            source.forget_actions()
        if settings.split is None and source.split != "train":
            self.warnings.append(f"{name}: split {source.split!r} is read, the only one (--split)")
        lines = [*source.warnings, *check_for_training(source, config, name)]
        self.warnings += [f"{name}: {line}" for line in lines]
        return source

    def _make_part(self, name: str, source: EpisodeSource, config: DataSetConfig) -> Part:
        """The kept episodes; what was left out is said."""
        settings = self.settings
        left_out = episodes_left_out(source, config, settings.window_length, settings.skip_bad_episodes)
        usable = [episode for episode in range(len(source)) if str(episode) not in left_out]
        if left_out and not usable:
            raise DataSetError(f"{name}: {next(iter(left_out.values()))}; none of {len(source)} episodes can be used")
        self.warnings += [f"{name}: {line}" for line in left_out_lines(left_out, len(source))]
        chosen = _kept_episodes([source.instructions[episode] for episode in usable], settings, name)
        part = Part(name, source, [usable[place] for place in chosen], config, settings.action_spec)
        part.left_out = left_out
        return part

    def _check_unread_actions(self, source: EpisodeSource, name: str, config: DataSetConfig) -> None:
        """Actions of another robot are a sign of the wrong folder, also where only observations are wanted."""
        first = int(np.flatnonzero(source.lengths)[0]) if source.lengths.any() else 0
        try:
            actions, _ = config.standardize(source.actions(first), source.state(first))
        except ValueError as error:
            raise DataSetError(f"{name}: episode {first}: {error}") from error
        check_size(name, "actions", actions.shape[1:], self.settings.action_spec.action_dim)


def _subset_seed(settings: DatasetSettings) -> int:
    return settings.seed if settings.subset_seed is None else settings.subset_seed


def _kept_episodes(instructions: Sequence[str], settings: DatasetSettings, name: str) -> list[int]:
    seed = _subset_seed(settings)
    held_out = select_validation(instructions, settings.val_fraction, seed)
    if settings.part == "val":
        if not held_out:
            raise ValueError(f"{name}: no instruction has two demonstrations, so none can be held out for validation")
        return held_out
    rest = sorted(set(range(len(instructions))) - set(held_out))
    chosen = select_few_shot([instructions[i] for i in rest], settings.n_shot_episodes, seed, name)
    return [rest[i] for i in chosen]


def _existing_name(data_root: str | os.PathLike, name: str) -> str:
    other = alternative_name(name)
    return other if not (Path(data_root) / name).is_dir() and (Path(data_root) / other).is_dir() else name


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


def _window_counts(part: Part, settings: DatasetSettings) -> np.ndarray:
    """(E,) int64: number of windows up to and including each kept episode."""
    counts = (part.lengths - settings.window_length) // settings.frame_stride + 1
    return np.cumsum(counts)
