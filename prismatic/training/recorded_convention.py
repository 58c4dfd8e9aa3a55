"""What the numbers of a checkpoint's actions mean, as far as the checkpoint says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prismatic.vla.datasets.registry import convention_of


def recorded_convention(manifest: Mapping[str, Any], data_set: str) -> Mapping[str, Any] | None:
    """`registry.convention_of` a data set whose statistics a checkpoint has; None where nothing is known.

    Checkpoints that record none, and data sets of the start, are known by name, unless a file of the user's gave the
    name its meaning in training.
    """
    conventions, cameras, training = (manifest.get(key) for key in ("conventions", "cameras", "training"))
    if isinstance(conventions, dict) and isinstance(found := conventions.get(data_set), dict):
        return found
    has_file = isinstance(training, dict) and training.get("data_set_file")
    if has_file and (not isinstance(cameras, dict) or data_set in cameras):
        return None
    try:
        return convention_of(data_set)
    except KeyError:
        return None
