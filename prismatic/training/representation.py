"""What training did to the representation: a trained policy against the one it started from, on the same samples.

| measure | question |
|---|---|
| drift | how far the bridge features moved, in the units of the CRaFT constraint (`prismatic.craft.distances`) |
| cka | whether the features of the samples still lie alike, up to rotation and scale: linear CKA, arXiv 1905.00414 |
| probe | whether position and instruction can still be read from the features, and by the reader of the start model |
| action_l1 | what is lost for the policy, and whether the start model's head still acts on the trained VLM |

The bridge features hold no proprioception: it enters at the action head, behind them. A probe that finds the position
of the end effector has therefore read it from the images, or, as far as they differ in it, from the instruction.

All passes are in fp32 and eval mode without gradient. Samples are images as the evaluation shows them (resized, centre
crop where the start model has one), without augmentation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prismatic.craft.reference import quiet_pass
from prismatic.evidence.files import write_json
from prismatic.progress import over
from prismatic.training.checkpoint_files import LoadedCheckpoint, package_versions
from prismatic.training.compared_policies import check_comparable, describe_checkpoint, start_key
from prismatic.training.data_sets import open_data
from prismatic.training.linear_cka import cka_of_parts
from prismatic.training.linear_probe import ProbeTargets, probe_features
from prismatic.training.representation_passes import Pooled, Record
from prismatic.training.retention.memory import to_device
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import DatasetSettings
from prismatic.vla.datasets.known_statistics import known_key
from prismatic.vla.datasets.registry import expand_data_set_names
from prismatic.vla.datasets.selection import select_validation
from prismatic.vla.image_resampling import center_crop
from prismatic.vla.images import ImageSpec
from prismatic.vla.normalization import Normalizer


@dataclass(frozen=True)
class MeasureSettings:
    """How much is measured, and where.

    max_samples: at most this many, evenly spread over the episodes; 0 = all. batch_size: samples per pass. seed: which
    episodes the probe is tested on, and which give one sample more. device: of the passes. unnorm_key: key of the
    start model's statistics; None = the name of the data set. split, skip_bad_episodes: as in `DatasetSettings`.
    """

    max_samples: int = 512
    batch_size: int = 16
    seed: int = 7
    device: str = "cpu"
    unnorm_key: str | None = None
    split: str | None = None
    skip_bad_episodes: bool = False

    def __post_init__(self) -> None:
        if self.max_samples < 0:
            raise ValueError(f"--max_samples is {self.max_samples}, expected 0 (all) or more")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}, expected at least 1")


def measure_retention(
    start: LoadedCheckpoint, trained: LoadedCheckpoint, data_root_dir: str, dataset_name: str, settings: MeasureSettings
) -> dict[str, Any]:
    """All measures of `trained` against `start` on one data set, ready for JSON; undefined numbers are None.

    The policies are moved to the device and frozen. Memory grows by 2 (layers + 2) times the width in floats per sample
    and policy, beside the two policies. Raises ValueError for policies that cannot be compared, missing statistics
    (naming file and keys) and several data sets; errors of the data as `VLADataset`.
    """
    check_comparable(start, trained)
    samples = MeasuredSamples(start, trained, data_root_dir, dataset_name, settings)
    record = Record()
    device = torch.device(settings.device)
    models = [loaded.model.to(device).requires_grad_(False) for loaded in (start, trained)]
    with quiet_pass(models[0]), quiet_pass(models[1]):
        count = -(-len(samples.indices) // settings.batch_size)
        for batches in over(samples.batches(settings.batch_size), "measuring", "batches", count):
            record.add(models, [to_device(batch, device) for batch in batches])
    features = {name: Pooled.joined(chunks) for name, chunks in record.pooled.items()}
    return {
        "data": samples.describe(),
        "checkpoints": {
            "start": describe_checkpoint(start) | {"statistics_key": samples.start_key},
            "trained": describe_checkpoint(trained)
            | {"statistics_key": samples.trained_key, "same_statistics": samples.same_statistics},
        },
        "versions": package_versions(),
        "drift": record.drift(),
        "cka": cka_of_parts(features["start"], features["trained"]),
        "probe": probe_features(features["start"].f, features["trained"].f, samples.targets(), settings.seed),
        "action_l1": record.action_l1(),
    }


class MeasuredSamples:
    """The samples of one data set on which two policies are compared, each normalised as the policy knows it.

    The start model's statistics are found under `unnorm_key`, else under the name of the data set. The trained policy
    uses its own entry for the data set when it has one (a checkpoint keeps those of its start model), else the start
    model's.
    """

    def __init__(
        self,
        start: LoadedCheckpoint,
        trained: LoadedCheckpoint,
        data_root_dir: str,
        dataset_name: str,
        settings: MeasureSettings,
    ) -> None:
        names = list(expand_data_set_names(dataset_name))
        if len(names) != 1:
            raise ValueError(f"--dataset_name {dataset_name}: names {len(names)} data sets, expected one")
        self.start_key = start_key(start, settings.unnorm_key or names[0])
        own_key = known_key(trained.statistics, names[0]) or known_key(trained.statistics, self.start_key)
        self.trained_key = own_key or self.start_key
        statistics = start.statistics[self.start_key]
        own = trained.statistics[own_key] if own_key else statistics
        self.same_statistics = all(own[group] == statistics[group] for group in ("action", "proprio"))
        spec = ActionSpec.from_dict(start.manifest["action_spec"])
        self._image_spec = ImageSpec.from_dict(start.manifest["image_spec"])
        data = DatasetSettings(
            spec,
            self._image_spec,
            start.model.num_images,
            image_aug=False,
            split=settings.split,
            skip_bad_episodes=settings.skip_bad_episodes,
            normalizer=Normalizer(statistics, spec),
        )
        self._seen = open_data("--dataset_name", data_root_dir, names[0], data)
        # The trained policy's numbers; its images are those of the other data set.
        data = replace(data, blind_images=True, normalizer=Normalizer(own, spec))
        self._numbers = open_data("--dataset_name", data_root_dir, names[0], data, self._seen.warnings)
        self._collate = VLACollator.of_policy(start.processor, start.model)
        self.name = self._seen.data_set_names[0]
        self._seed = settings.seed
        self.indices = evenly_spread(self._seen.window_counts[self.name], settings.max_samples, settings.seed)
        self._labels = [self._label(index) for index in self.indices]

    def batches(self, batch_size: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Batches of the start model and of the trained policy: the same images, each with its own numbers."""
        for first in range(0, len(self.indices), batch_size):
            chosen = slice(first, first + batch_size)
            batch = self._collate([self._sample(index) for index in self.indices[chosen]])
            numbers = self._labels[chosen]
            own = {name: torch.from_numpy(np.stack([n[name] for n in numbers])) for name in ("proprio", "actions")}
            yield batch, batch | own

    def _label(self, index: int) -> dict[str, Any]:
        """A sample of the trained policy without its images."""
        return {name: value for name, value in self._numbers[(0, index)].items() if name != "images"}

    def _sample(self, index: int) -> dict[str, Any]:
        sample = self._seen[(0, index)]
        if not self._image_spec.center_crop:
            return sample
        images = [center_crop(image, self._image_spec.crop_area) for image in sample["images"]]
        return sample | {"images": np.stack(images)}

    def targets(self) -> ProbeTargets:
        """Targets of all samples. Half of the episodes of each instruction are held out (`select_validation`)."""
        samples = self._labels
        where = [sample["sample_id"] for sample in samples]
        episodes = sorted({episode for episode, _ in where})
        proprio = {episode: self._seen.raw_proprio(self.name, episode) for episode in episodes}
        instruction_of = {episode: s["instruction"] for (episode, _), s in zip(where, samples, strict=True)}
        texts = sorted(set(instruction_of.values()))
        held_out = select_validation([instruction_of[episode] for episode in episodes], 0.5, self._seed)
        tested = {episodes[position] for position in held_out}
        return ProbeTargets(
            position=np.array([proprio[episode][step, :3] for episode, step in where], dtype=np.float64),
            instruction=np.array([texts.index(sample["instruction"]) for sample in samples]),
            held_out=np.array([episode in tested for episode, _ in where]),
        )

    def describe(self) -> dict[str, Any]:
        """Name, fingerprint and amount of the data, JSON-ready."""
        samples = self._labels
        return {
            "dataset_name": self.name,
            "fingerprint": self._seen.fingerprints[self.name],
            "samples": len(samples),
            "samples_available": len(self._seen),
            "episodes": len({sample["sample_id"][0] for sample in samples}),
            "instructions": len({sample["instruction"] for sample in samples}),
            "center_crop": self._image_spec.center_crop,
        }


def evenly_spread(counts: Sequence[int], limit: int, seed: int) -> list[int]:
    """Numbers of at most `limit` samples (0 = all), sorted, as evenly spread over episodes and their steps as possible.

    counts: samples of each episode; they are numbered episode after episode. Every episode gives the same number, or
    all it has; which ones give one more is seeded. Within an episode the samples are the middles of equal parts.
    """
    starts = np.cumsum(counts) - np.asarray(counts)
    left = min(limit, int(np.sum(counts))) if limit else int(np.sum(counts))
    order = np.random.default_rng(seed).permutation(len(counts))
    order = order[np.argsort(np.asarray(counts)[order], kind="stable")]  # short ones first: what they lack, others give
    chosen: list[int] = []
    for position, episode in enumerate(order):
        share = min(counts[episode], left // (len(order) - position))
        left -= share
        chosen.extend(int(starts[episode] + (2 * i + 1) * counts[episode] // (2 * share)) for i in range(share))
    return sorted(chosen)


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """Write JSON in one go; missing folders are made. ValueError for NaN and infinity."""
    write_json(path, report, allow_nan=False)
