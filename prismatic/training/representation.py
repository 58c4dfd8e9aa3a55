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

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prismatic.craft import BridgeFeatures, CRaFTConfig, CRaFTFeatureExtractor, retention_loss
from prismatic.craft.reference import quiet_pass
from prismatic.craft.settings import FeatureSource, RetentionMetric
from prismatic.evidence.files import write_json
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import LoadedCheckpoint, package_versions, tensors_hash
from prismatic.training.retention.memory import to_device
from prismatic.training.retention.signals import craft_request
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.registry import alternative_name, expand_data_set_names
from prismatic.vla.datasets.selection import select_validation
from prismatic.vla.images import ImageSpec, center_crop
from prismatic.vla.normalization import STATISTICS_FILE, Normalizer, StatisticsError, resolve_statistics_key

# Weight of |W|^2 beside the mean squared error, for features of unit variance. Fixed, so that probes of two models
# differ by their features only; large enough that a few hundred samples do not fit the noise of as many features.
RIDGE_PENALTY = 0.1
_AXES = ("x", "y", "z")
_METRICS = (RetentionMetric.REL_MSE, RetentionMetric.MSE, RetentionMetric.TOKEN_REL_MSE)
_PART_WEIGHTS = {"total": (1.0, 1.0), "raw": (1.0, 0.0), "aq": (0.0, 1.0)}
# With this metric the extractor returns pooled features and tokens, which serve all metrics.
_SOURCES = {
    source.value: CRaFTConfig(feature_source=source, retention_metric=RetentionMetric.TOKEN_REL_MSE)
    for source in (FeatureSource.ORIGINAL, FeatureSource.BRIDGE)
}
# Share of the mean square below which a spread is rounding of fp32 features: they are constant.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class MeasureSettings:
    """How much is measured, and where.

    max_samples: at most this many, evenly spread over the episodes; 0 = all. batch_size: samples per pass. seed: which
    episodes the probe is tested on, and which give one sample more. device: of the passes. unnorm_key: key of the
    start model's statistics; None = the name of the data set.
    """

    max_samples: int = 512
    batch_size: int = 16
    seed: int = 7
    device: str = "cpu"
    unnorm_key: str | None = None

    def __post_init__(self) -> None:
        if self.max_samples < 0:
            raise ValueError(f"--max_samples is {self.max_samples}, expected 0 (all) or more")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size is {self.batch_size}, expected at least 1")


def measure_retention(
    start: LoadedCheckpoint, trained: LoadedCheckpoint, data_root_dir: str, dataset_name: str, settings: MeasureSettings
) -> dict:
    """All measures of `trained` against `start` on one data set, ready for JSON; undefined numbers are None.

    The policies are moved to the device and frozen. Memory grows by 2 (layers + 2) times the width in floats per sample
    and policy, beside the two policies. Raises ValueError for policies that cannot be compared, missing statistics
    (naming file and keys) and several data sets; errors of the data as `VLADataset`.
    """
    check_comparable(start, trained)
    samples = MeasuredSamples(start, trained, data_root_dir, dataset_name, settings)
    record = _Record()
    device = torch.device(settings.device)
    models = [loaded.model.to(device).requires_grad_(False) for loaded in (start, trained)]
    with quiet_pass(models[0]), quiet_pass(models[1]):
        for batches in samples.batches(settings.batch_size):
            record.add(models, [to_device(batch, device) for batch in batches])
    features = {name: _Pooled.joined(chunks) for name, chunks in record.pooled.items()}
    return {
        "data": samples.describe(),
        "checkpoints": {
            "start": describe_checkpoint(start) | {"statistics_key": samples.start_key},
            "trained": describe_checkpoint(trained)
            | {"statistics_key": samples.trained_key, "same_statistics": samples.same_statistics},
        },
        "versions": package_versions(),
        "drift": record.drift(),
        "cka": _cka_of_parts(features["start"], features["trained"]),
        "probe": probe_features(features["start"].f, features["trained"].f, samples.targets(), settings.seed),
        "action_l1": record.action_l1(),
    }


def check_comparable(start: LoadedCheckpoint, trained: LoadedCheckpoint) -> None:
    """ValueError unless both read the same samples in the same way, naming what differs."""
    found, expected = _conventions(trained), _conventions(start)
    for name, value in expected.items():
        if found.get(name) != value:
            raise ValueError(
                f"{trained.path}: {name} is {found.get(name)!r}, expected {value!r} as in the start model {start.path}"
            )
    if extra := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{trained.path}: {extra[:3]} are not in the start model {start.path}")


def _conventions(loaded: LoadedCheckpoint) -> dict:
    shapes = {f"shape of vla.{name}": tuple(p.shape) for name, p in loaded.model.vla.named_parameters()}
    image = loaded.manifest["image_spec"]
    return {
        "action_spec": loaded.manifest["action_spec"],
        "image size": image["size"],
        "num_images": loaded.model.num_images,
        "legacy_slices": loaded.model.legacy_slices,
        **shapes,
    }


def describe_checkpoint(loaded: LoadedCheckpoint) -> dict:
    """Which policy it is: path, step, sha256 over all its weights (adapters merged) and how it was trained."""
    training = loaded.manifest.get("training", {})
    names = ("config_file_path", "dataset_name", "retention_method", "image_aug", "blind_images", "seed")
    return {
        "path": str(loaded.path),
        "step": loaded.manifest.get("step"),
        "policy_sha256": tensors_hash(loaded.model.state_dict()),
        "tuning": loaded.manifest["tuning"],
        "interpolation": loaded.manifest.get("interpolation"),
        "training": {name: training.get(name) for name in names},
    }


# ------------------------------------------------------------------------------------------------ samples


@dataclass(frozen=True)
class ProbeTargets:
    """What a probe reads off N samples.

    position: (N, 3) float64, the first three numbers of the recorded robot state, in LIBERO's conventions the
    end-effector position in metres. instruction: (N,) index of the instruction. held_out:
    (N,) bool, whether the sample's episode is one of those the probe is tested on.
    """

    position: np.ndarray
    instruction: np.ndarray
    held_out: np.ndarray


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
        self.start_key = _start_key(start, settings.unnorm_key or names[0])
        own_key = _find_key(trained.statistics, names[0]) or _find_key(trained.statistics, self.start_key)
        self.trained_key = own_key or self.start_key
        statistics = start.statistics[self.start_key]
        own = trained.statistics[own_key] if own_key else statistics
        self.same_statistics = all(own[group] == statistics[group] for group in ("action", "proprio"))
        spec = ActionSpec.from_dict(start.manifest["action_spec"])
        self._image_spec = ImageSpec.from_dict(start.manifest["image_spec"])
        data = DatasetSettings(spec, self._image_spec, start.model.num_images, image_aug=False)
        data = replace(data, normalizer=Normalizer(statistics, spec))
        self._seen = VLADataset(data_root_dir, names[0], data)
        # The trained policy's numbers; its images are those of the other data set.
        data = replace(data, blind_images=True, normalizer=Normalizer(own, spec))
        self._numbers = VLADataset(data_root_dir, names[0], data)
        self._collate = VLACollator.of_policy(start.processor, start.model)
        self.name = self._seen.data_set_names[0]
        self._seed = settings.seed
        self.indices = evenly_spread(self._seen.window_counts[self.name], settings.max_samples, settings.seed)
        self._labels = [self._label(index) for index in self.indices]

    def batches(self, batch_size: int) -> Iterator[tuple[dict, dict]]:
        """Batches of the start model and of the trained policy: the same images, each with its own numbers."""
        for first in range(0, len(self.indices), batch_size):
            chosen = slice(first, first + batch_size)
            batch = self._collate([self._sample(index) for index in self.indices[chosen]])
            numbers = self._labels[chosen]
            own = {name: torch.from_numpy(np.stack([n[name] for n in numbers])) for name in ("proprio", "actions")}
            yield batch, batch | own

    def _label(self, index: int) -> dict:
        """A sample of the trained policy without its images."""
        return {name: value for name, value in self._numbers[(0, index)].items() if name != "images"}

    def _sample(self, index: int) -> dict:
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

    def describe(self) -> dict:
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


def _find_key(statistics: dict, name: str) -> str | None:
    """Key of a data set under either spelling of its name, None without one."""
    for candidate in (name, alternative_name(name)):
        if candidate in statistics:
            return candidate
    return None


def _start_key(start: LoadedCheckpoint, name: str) -> str:
    key = _find_key(start.statistics, name)
    if key is not None:
        return key
    try:
        return resolve_statistics_key(start.statistics, name)
    except KeyError as error:
        raise StatisticsError(
            f"{start.path / STATISTICS_FILE}: {error.args[0]}; choose one with --unnorm_key, which has to fit the "
            "robot and the units of the data set"
        ) from None


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


# ------------------------------------------------------------------------------------------------ passes


@dataclass(frozen=True)
class _Pooled:
    """Pooled features of samples, float32 on the CPU: f (N, 2D), and per hidden state (N, layers + 1, D)."""

    f: np.ndarray
    patches: np.ndarray
    queries: np.ndarray

    @classmethod
    def of(cls, features: dict[str, BridgeFeatures]) -> _Pooled:
        bridge = features[FeatureSource.BRIDGE.value]
        values = features[FeatureSource.ORIGINAL.value].f, bridge.raw.pooled, bridge.aq.pooled
        return cls(*(value.cpu().numpy() for value in values))

    @classmethod
    def joined(cls, chunks: list[_Pooled]) -> _Pooled:
        return cls(*(np.concatenate([getattr(c, name) for c in chunks]) for name in ("f", "patches", "queries")))


class _Record:
    """What is kept of the passes over all batches."""

    def __init__(self) -> None:
        self.pooled: dict[str, list[_Pooled]] = {"start": [], "trained": []}
        self._drift: dict[tuple[str, str, str], float] = defaultdict(float)
        self._l1: dict[str, float] = defaultdict(float)
        self._count = 0

    def add(self, models: Sequence[VLAPolicyModel], batches: Sequence[dict]) -> None:
        """Run both models, start first, each on its batch of the same samples."""
        (first, states), (last, trained_states) = map(_run, models, batches)
        self._count += len(batches[0]["actions"])
        self.pooled["start"].append(_Pooled.of(first))
        self.pooled["trained"].append(_Pooled.of(last))
        self._add_drift(last, first, len(batches[0]["actions"]))
        for name, head, own, batch in (
            ("start", models[0], states, batches[0]),
            ("trained", models[1], trained_states, batches[1]),
            ("start_head", models[0], trained_states, batches[0]),
        ):
            error = (head.actions_of(own, batch).float() - batch["actions"]).abs()
            self._l1[name] += float(error.mean(dim=(1, 2)).double().sum())

    def _add_drift(self, features: dict, anchor: dict, samples: int) -> None:
        for source, config in _SOURCES.items():
            for metric in _METRICS:
                for part, (w_raw, w_aq) in _PART_WEIGHTS.items():
                    settings = replace(config, retention_metric=metric, w_raw=w_raw, w_aq=w_aq)
                    loss = retention_loss(features[source], anchor[source], settings)
                    self._drift[source, metric.value, part] += float(loss) * samples

    def drift(self) -> dict:
        """{feature source: {metric: {total, raw, aq}}}, means over samples."""
        result: dict = {}
        for (source, metric, part), value in self._drift.items():
            result.setdefault(source, {}).setdefault(metric, {})[part] = value / self._count
        return result

    def action_l1(self) -> dict[str, float]:
        """Mean |predicted - true| of the normalised chunk by policy."""
        return {name: value / self._count for name, value in self._l1.items()}


def _run(model: VLAPolicyModel, batch: dict) -> tuple[dict[str, BridgeFeatures], tuple[Tensor, Tensor]]:
    """Features by source, and the bridge states that the head reads."""
    batch = model.share_vision(batch)
    outputs = {name: model.anchor_features(batch, craft_request(config)) for name, config in _SOURCES.items()}
    features = {name: CRaFTFeatureExtractor(_SOURCES[name]).parts(*output) for name, output in outputs.items()}
    return features, outputs[FeatureSource.BRIDGE.value][:2]


# ------------------------------------------------------------------------------------------------ CKA


def linear_cka(x: np.ndarray, y: np.ndarray) -> float | None:
    """Linear CKA of two feature sets of the same samples, in [0, 1] (Kornblith et al. 2019, arXiv 1905.00414).

    |Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F) with centred columns, in float64. x: (N, F), y: (N, G). None when one of the
    two is constant over the samples, as the action queries are at the input of the language model.
    """
    if len(x) != len(y):
        raise ValueError(f"features of {len(x)} and {len(y)} samples, expected the same samples")
    centred = [_centred(values) for values in (x, y)]
    if any(values is None for values in centred):
        return None
    x, y = centred
    if len(x) < x.shape[1] + y.shape[1]:  # the same numbers from (N, N) matrices, which are smaller
        x, y = x @ x.T, y @ y.T
        value = (x * y).sum() / (np.linalg.norm(x) * np.linalg.norm(y))
    else:
        value = np.square(y.T @ x).sum() / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))
    return min(float(value), 1.0)  # rounding may exceed 1


def _centred(values: np.ndarray) -> np.ndarray | None:
    values = values.astype(np.float64)
    centred = values - values.mean(axis=0)
    return None if np.square(centred).sum() <= _CONSTANT * np.square(values).sum() else centred


def _cka_of_parts(start: _Pooled, trained: _Pooled) -> dict:
    width = start.f.shape[1] // 2
    result = {
        "raw": linear_cka(start.f[:, :width], trained.f[:, :width]),
        "aq": linear_cka(start.f[:, width:], trained.f[:, width:]),
    }
    for name in ("patches", "queries"):
        pairs = (np.moveaxis(getattr(pooled, name), 1, 0) for pooled in (start, trained))
        result[f"{name}_by_layer"] = [linear_cka(x, y) for x, y in zip(*pairs, strict=True)]
    return result


# ------------------------------------------------------------------------------------------------ probes


class LinearProbe:
    """Ridge regression in closed form: minimises mean_n |y_n - b - W z_n|^2 + penalty |W|_F^2, z standardised.

    b is the mean of the targets. Features that are constant over the fitted samples are not used.

    Args:
        features: (N, F), N >= 1.
        targets: (N, T).
        penalty: > 0.
    """

    def __init__(self, features: np.ndarray, targets: np.ndarray, penalty: float = RIDGE_PENALTY) -> None:
        features = features.astype(np.float64)
        self._mean, spread = features.mean(axis=0), features.std(axis=0)
        constant = np.square(spread) <= _CONSTANT * np.square(features).mean(axis=0)
        self._scale = np.where(constant, np.inf, spread)
        self._offset = targets.mean(axis=0)
        z, y = self._standardised(features), targets - self._offset
        count, width = z.shape
        if count < width:  # the dual form, of the same solution: an (N, N) system
            self._weights = z.T @ np.linalg.solve(z @ z.T + count * penalty * np.eye(count), y)
        else:
            self._weights = np.linalg.solve(z.T @ z + count * penalty * np.eye(width), z.T @ y)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(N, F) -> (N, T) float64."""
        return self._standardised(features.astype(np.float64)) @ self._weights + self._offset

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        return (features - self._mean) / self._scale


def r_squared(targets: np.ndarray, predicted: np.ndarray) -> list[float | None]:
    """1 - residual / total sum of squares per column of (N, T), at most 1; None for a constant target."""
    residual = np.square(targets - predicted).sum(axis=0)
    total = np.square(targets - targets.mean(axis=0)).sum(axis=0)
    columns = zip(residual, total, np.ptp(targets, axis=0), strict=True)
    return [float(1 - r / t) if spread > 0 else None for r, t, spread in columns]


def probe_features(start: np.ndarray, trained: np.ndarray, targets: ProbeTargets, seed: int) -> dict | None:
    """Linear probes from features (N, F) to the position in metres and to the instruction (one-hot least squares).

    Fitted on the episodes that are not held out, tested on those that are: `start`, `trained` (fitted anew) and `stale`
    (the start model's probes on the trained features). None when no episode is held out: every instruction has one.
    """
    tested = targets.held_out
    if not tested.any():
        return None
    one_hot = np.eye(targets.instruction.max() + 1)[targets.instruction]
    values = np.concatenate([targets.position, one_hot], axis=1)
    probes = {name: LinearProbe(f[~tested], values[~tested]) for name, f in (("start", start), ("trained", trained))}
    predictions = {
        "start": probes["start"].predict(start[tested]),
        "trained": probes["trained"].predict(trained[tested]),
        "stale": probes["start"].predict(trained[tested]),
    }
    instruction = targets.instruction[tested]
    return {
        "penalty": RIDGE_PENALTY,
        "seed": seed,
        "fitted_samples": int((~tested).sum()),
        "tested_samples": int(tested.sum()),
        "chance_accuracy": float(np.bincount(instruction).max() / len(instruction)),
        **{name: _scores(targets.position[tested], instruction, values) for name, values in predictions.items()},
    }


def _scores(position: np.ndarray, instruction: np.ndarray, predicted: np.ndarray) -> dict:
    found = r_squared(position, predicted[:, :3])
    defined = [value for value in found if value is not None]
    error = np.sqrt(np.square(position - predicted[:, :3]).mean(axis=0))
    return {
        "position_r2": {
            **dict(zip(_AXES, found, strict=True)),
            "mean": float(np.mean(defined)) if defined else None,
        },
        "position_rmse_m": dict(zip(_AXES, error.tolist(), strict=True)),
        "instruction_accuracy": float((predicted[:, 3:].argmax(axis=1) == instruction).mean()),
    }


# ------------------------------------------------------------------------------------------------ writing


def write_report(report: dict, path: str | Path) -> None:
    """Write JSON in one go; missing folders are made. ValueError for NaN and infinity."""
    write_json(path, report, allow_nan=False)
