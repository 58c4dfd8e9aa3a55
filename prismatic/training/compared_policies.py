"""Two policies that are compared: whether they can be, which they are, and under which key their statistics lie."""

from __future__ import annotations

from typing import Any

from prismatic.training.checkpoint_files import LoadedCheckpoint, tensors_hash
from prismatic.vla.datasets.known_statistics import known_key
from prismatic.vla.normalization import STATISTICS_FILE, StatisticsError, resolve_statistics_key


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


def _conventions(loaded: LoadedCheckpoint) -> dict[str, Any]:
    shapes = {f"shape of vla.{name}": tuple(p.shape) for name, p in loaded.model.vla.named_parameters()}
    image = loaded.manifest["image_spec"]
    return {
        "action_spec": loaded.manifest["action_spec"],
        "image size": image["size"],
        "num_images": loaded.model.num_images,
        "legacy_slices": loaded.model.legacy_slices,
        **shapes,
    }


def describe_checkpoint(loaded: LoadedCheckpoint) -> dict[str, Any]:
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


def start_key(start: LoadedCheckpoint, name: str) -> str:
    """Key of the start model's statistics for a data set; StatisticsError naming file and keys when none is meant."""
    key = known_key(start.statistics, name)
    if key is not None:
        return key
    try:
        return resolve_statistics_key(start.statistics, name)
    except KeyError as error:
        raise StatisticsError(
            f"{start.path / STATISTICS_FILE}: {error.args[0]}; choose one with --unnorm_key, which has to fit the "
            "robot and the units of the data set"
        ) from None
