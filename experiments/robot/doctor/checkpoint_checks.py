"""A checkpoint against itself and against the data it is said to come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.robot.doctor.findings import Check, Status, judge
from prismatic.models.vla_policy import CraftRequest
from prismatic.training.checkpoint_files import LoadedCheckpoint
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.images import ImageSpec, prepare_eval_image
from prismatic.vla.normalization import resolve_statistics_key

MAX_REACH = 3.0
"""Largest normalised 1 % or 99 % quantile of the data; 1 for the statistics of the data themselves."""


@dataclass(frozen=True)
class Wanted:
    """What the checkpoint is to be used for.

    suite: its statistics are looked up, None: those of the only data set. unnorm_key: overrides suite. data_name and
    data_statistics: of the data it was trained on, None when unknown.
    """

    suite: str | None = None
    unnorm_key: str | None = None
    data_name: str | None = None
    data_statistics: dict[str, Any] | None = None


def checkpoint_checks(loaded: LoadedCheckpoint, wanted: Wanted) -> list[Check]:
    """Statistics, crop, number of images, attention."""
    return [
        Check(
            "statistics key",
            "one set of statistics for the suite",
            "actions in the scale of another robot or data set: 0 %",
            lambda: _statistics_key(loaded, wanted),
        ),
        Check(
            "statistics against data",
            f"1 % and 99 % quantiles of the data within {MAX_REACH:g} after normalisation (1 for the same data)",
            "the same policy at another scale: up to 0 % (min/max used for quantiles: 0 %)",
            lambda: _statistics_match(loaded, wanted),
        ),
        Check(
            "centre crop",
            "crop at evaluation exactly when training cropped at random",
            "about 3 points (76 -> 73 %)",
            lambda: _crop(loaded),
        ),
        Check(
            "number of images",
            "the same in the description, the model and the head",
            "an error, or a policy without its wrist view (LIBERO-Plus 70 -> 56 %)",
            lambda: _images(loaded),
        ),
        Check(
            "attention mask",
            "causal: a later query changes no earlier one, an earlier one changes the later; padding changes nothing; "
            "image and instruction change the actions",
            "another model than the one that was trained (60 instead of 98 % with a wrong mask)",
            lambda: _attention(loaded),
        ),
    ]


def _key(loaded: LoadedCheckpoint, wanted: Wanted) -> str:
    """Key of the statistics: as the evaluator finds it, else that of the data (`--data`), else the only one whose name
    begins with the suite (data sets of ours are named `<suite>_scripted_no_noops`)."""
    try:
        return resolve_statistics_key(loaded.statistics, wanted.unnorm_key or wanted.suite)
    except KeyError:
        if wanted.unnorm_key is not None:
            raise
        similar = [key for key in loaded.statistics if wanted.suite and key.startswith(wanted.suite)]
        if wanted.data_name is not None and wanted.data_name in loaded.statistics:
            return wanted.data_name
        if len(similar) == 1:
            return similar[0]
        raise


def _statistics_key(loaded: LoadedCheckpoint, wanted: Wanted) -> tuple[Status, str]:
    try:
        key = _key(loaded, wanted)
    except KeyError as error:
        return Status.FAIL, f"{error.args[0]}; --unnorm_key names one"
    found = f"{key} (of {', '.join(sorted(loaded.statistics))})"
    if wanted.unnorm_key is None and wanted.suite not in (None, key, key.removesuffix("_no_noops")):
        found += f", to be named: --unnorm_key {key}"
    return Status.OK, found


def _statistics_match(loaded: LoadedCheckpoint, wanted: Wanted) -> tuple[Status, str]:
    if wanted.data_statistics is None:
        return Status.SKIP, "no data given (--data)"
    try:
        key = _key(loaded, wanted)
    except KeyError:
        return Status.SKIP, "no statistics to compare"
    data = wanted.data_statistics
    reaches = {name: statistics_reach(statistics, data) for name, statistics in loaded.statistics.items()}
    nearest = min(reaches, key=lambda name: reaches[name][0])
    reach, where = reaches[key]
    found = f"{wanted.data_name} reaches {reach:.1f} in units of {key} ({where})"
    if reach > MAX_REACH:
        better = f", {reaches[nearest][0]:.1f} in those of {nearest}" if nearest != key else ""
        return Status.FAIL, found + better
    counts = (loaded.statistics[key].get("num_transitions"), data.get("num_transitions"))
    if key == wanted.data_name and counts[0] != counts[1]:
        return Status.WARN, f"{found}; the name is the same, but {counts[0]} transitions became {counts[1]}"
    return Status.OK, found


def statistics_reach(statistics: dict[str, Any], data: dict[str, Any]) -> tuple[float, str]:
    """How far the data reach in the units that the statistics normalise to, where [-1, 1] holds 98 % of the values.

    Args:
        statistics, data: statistics of one data set each, in the published shape.

    Returns:
        (largest absolute normalised 1 % or 99 % quantile of the data, "group[dimension]"). Infinite when the dimensions
        differ in number. Masked dimensions, and those that hardly move, are left out.
    """
    largest, where = 0.0, "nowhere"
    for group in ("action", "proprio"):
        low, high, own_low, own_high = (
            np.asarray(values[group][name], dtype=float) for values in (data, statistics) for name in ("q01", "q99")
        )
        if low.shape != own_low.shape:
            return float("inf"), f"{group}: {len(own_low)} dimensions against {len(low)}"
        span = own_high - own_low
        usable = np.asarray(data[group].get("mask", np.ones(len(low))), dtype=bool) & (span > 1e-3)
        centred = np.abs(np.stack([low, high]) - (own_low + own_high) / 2).max(axis=0)
        reach = np.where(usable, 2.0 * centred / np.where(usable, span, 1.0), 0.0)
        if reach.max() > largest:
            largest, where = float(reach.max()), f"{group}[{int(reach.argmax())}]"
    return largest, where


def _crop(loaded: LoadedCheckpoint) -> tuple[Status, str]:
    crop = ImageSpec.from_dict(loaded.manifest["image_spec"]).center_crop
    training = loaded.manifest.get("training") or {}
    augmented = training.get("image_aug")
    if augmented is None:
        augmented = True if "image_aug" in str(loaded.path) else None
    found = f"center_crop {crop}, trained with image_aug {'unknown' if augmented is None else augmented}"
    if augmented is None:
        return Status.WARN, found
    return judge(crop == augmented, found)


def _images(loaded: LoadedCheckpoint) -> tuple[Status, str]:
    model = loaded.model
    tokens = model.action_head.geometry.num_task_tokens
    patches = model.vla.vision_backbone.get_num_patches()
    counts = {
        "description": loaded.manifest["num_images"],
        "model": model.num_images,
        "head": tokens / patches if tokens % patches else tokens // patches,
    }
    return judge(len(set(counts.values())) == 1, ", ".join(f"{name} {count}" for name, count in counts.items()))


def _batch(loaded: LoadedCheckpoint, instructions: list[str], seed: int) -> dict[str, Any]:
    """Collated batch of noise images; rows share image and proprio, so that only the instructions differ."""
    rng = np.random.default_rng(seed)
    spec = ImageSpec.from_dict(loaded.manifest["image_spec"])
    shape = (loaded.model.num_images, 8, 8, 3)
    images = [np.kron(view, np.ones((16, 16, 1))).astype(np.uint8) for view in rng.integers(0, 256, shape)]
    action_spec = loaded.manifest["action_spec"]
    sample = {
        "images": np.stack([prepare_eval_image(image, spec) for image in images]),
        "proprio": np.zeros(action_spec["proprio_dim"], np.float32),
        "actions": np.zeros((action_spec["chunk_len"], action_spec["action_dim"]), np.float32),
        "dataset_name": "doctor",
        "sample_id": (0, 0),
    }
    collate = VLACollator.of_policy(loaded.processor, loaded.model)
    return collate([sample | {"instruction": text} for text in instructions])


def _attention(loaded: LoadedCheckpoint) -> tuple[Status, str]:
    short, long = "open the drawer", "pick up the black bowl on the ramekin and place it on the plate"
    model = loaded.model.eval()
    with torch.inference_mode():
        alone, padded = _batch(loaded, [short], 0), _batch(loaded, [short, long], 0)
        base, both = model(alone, CraftRequest(bridge=True)), model(padded).actions
        last = _shifted_queries(model, alone, -1)
        first = _shifted_queries(model, alone, 0)
        other_image = model(_batch(loaded, [short], 1)).actions
    earlier = _largest(last.action_query_features[:, :, :-1], base.action_query_features[:, :, :-1])
    vision = _largest(first.raw_latent_features, base.raw_latent_features)
    facts = {
        "earlier queries do not see later ones": earlier < 1e-5,
        "image tokens do not see queries": vision < 1e-5,
        "later queries see earlier ones": _largest(
            first.action_query_features[:, :, 1:], base.action_query_features[:, :, 1:]
        )
        > 1e-4,
        "padding changes nothing": _largest(both[:1], base.actions) < 1e-3,
        "instruction matters": _largest(both[1:], base.actions) > 1e-6,
        "image matters": _largest(other_image, base.actions) > 1e-6,
    }
    wrong = [name for name, holds in facts.items() if not holds]
    return judge(not wrong, f"violated: {', '.join(wrong)}" if wrong else "as expected in all six points")


def _shifted_queries(model: Any, batch: dict[str, Any], index: int) -> Any:
    """Output with one row of the action-query table changed."""
    table = model.vla.action_queries.weight
    kept = table.data.clone()
    try:
        table.data[index] += 1.0
        return model(batch, CraftRequest(bridge=True))
    finally:
        table.data.copy_(kept)


def _largest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())
