"""Known data sets: how their stored actions and states become the policy's, and which cameras they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_SUFFIX = "_no_noops"
_LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

MIXTURES: dict[str, tuple[str, ...]] = {
    f"libero_4_task_suites{_SUFFIX}": tuple(f"{suite}{_SUFFIX}" for suite in _LIBERO_SUITES[:4]),
}


@dataclass(frozen=True)
class DataSetConfig:
    """standardize: (actions (T, A), state (T, S)) -> (actions (T, A), proprio (T, P)), float32.

    cameras: image keys in model order (primary first). action_mask: dimensions that are normalised.
    """

    standardize: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    cameras: tuple[str, ...]
    action_mask: tuple[bool, ...]


def standardize_libero(actions: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """LIBERO convention to policy convention.

    actions (T, 7): the gripper g (-1 open, +1 close) becomes 1 - clip(g, 0, 1), i.e. 1 = open, 0 = close. Not
    idempotent: apply it once. state (T, 8) -> proprio (T, 8): end-effector pose (6) and gripper joints (last 2).
    """
    if actions.ndim != 2 or actions.shape[1] != 7 or state.shape != (len(actions), 8):
        raise ValueError(f"actions {actions.shape} and state {state.shape}, expected (T, 7) and (T, 8)")
    opening = 1.0 - np.clip(actions[:, 6:], 0.0, 1.0)
    return np.concatenate([actions[:, :6], opening], axis=1), np.concatenate([state[:, :6], state[:, -2:]], axis=1)


_LIBERO = DataSetConfig(standardize_libero, ("image", "wrist_image"), (True,) * 6 + (False,))


_REGISTERED: dict[str, DataSetConfig] = {}


def register_data_set(name: str, config: DataSetConfig) -> None:
    """Say how data set `name` is standardised; ValueError when it is known with another configuration.

    For data in LIBERO's conventions under another name: `register_data_set(name, get_data_set_config("libero_"))`.
    """
    if _REGISTERED.setdefault(name, config) != config:
        raise ValueError(f"data set {name!r} is registered with another configuration")


def get_data_set_config(name: str) -> DataSetConfig:
    """Configuration of data set `name`: a registered one, or a name that starts with `libero_`; KeyError otherwise."""
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name.startswith("libero_"):
        return _LIBERO
    raise KeyError(
        f"data set {name!r} has no registered standardisation, expected a name that starts with 'libero_' or one given "
        "to prismatic.vla.datasets.registry.register_data_set"
    )


def expand_data_set_names(name: str) -> list[str]:
    """Data sets behind a `--dataset_name`: a name, a registered mixture, or a comma separated list of these."""
    names: list[str] = []
    for part in name.split(","):
        names.extend(MIXTURES.get(part.strip(), (part.strip(),)))
    if not all(names) or len(set(names)) != len(names):
        raise ValueError(f"data set name {name!r} means {names}, expected distinct non-empty names")
    return names


def alternative_name(name: str) -> str:
    """The other spelling of a suite: with or without `_no_noops`."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else f"{name}{_SUFFIX}"
