"""Known data sets: where their files keep things, and how stored actions and states become the policy's.

Users describe their own data in a file of theirs (`--data_set_file`, docs/datasets.md).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prismatic.command_line import nearest
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.source import SourceKeys

_SUFFIX = "_no_noops"
_LEROBOT = "observation.images."
_LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

MIXTURES: dict[str, dict[str, float]] = {
    f"libero_4_task_suites{_SUFFIX}": {f"{suite}{_SUFFIX}": 1.0 for suite in _LIBERO_SUITES[:4]},
}


@dataclass(frozen=True)
class DataSetConfig:
    """Description of a data set.

    standardize: (actions (T, A), state (T, S)) of an episode -> (actions (T, A), proprio (T, P)), float32. keys: where
    the storage formats keep cameras, state and action; the first entry of the found format whose keys exist is used.
    action_mask: dimensions that are normalised. action_spec: sizes and normalisation kind of a model made for this
    data; a checkpoint brings its own. control_hz: rate of the actions, None when unknown.
    """

    standardize: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
    keys: tuple[SourceKeys, ...]
    action_mask: tuple[bool, ...]
    action_spec: ActionSpec = field(default_factory=ActionSpec)
    control_hz: float | None = None

    def without_actions(self) -> DataSetConfig:
        """The same where only observations are read."""
        return replace(self, keys=tuple(keys.without_action() for keys in self.keys))

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("DataSetConfig.keys is empty, expected at least one SourceKeys")
        if len(self.action_mask) != self.action_spec.action_dim:
            raise ValueError(
                f"DataSetConfig.action_mask has {len(self.action_mask)} entries, expected one per action dimension "
                f"({self.action_spec.action_dim})"
            )


@dataclass(frozen=True)
class LiberoStandardization:
    """LIBERO convention to policy convention, where the gripper is 1 = open, 0 = close. Apply it once.

    opens, closes: stored commands of the gripper, LIBERO's -1 and 1, of which g becomes 1 - clip(g, 0, 1); between
    others it is interpolated. Data of this convention are checked against it when they are opened.
    """

    opens: float = -1.0
    closes: float = 1.0

    def __call__(self, actions: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """actions (T, 7), gripper last; state (T, 8) -> proprio (T, 8): end-effector pose (6) and gripper joints."""
        if actions.ndim != 2 or actions.shape[1] != 7 or state.shape != (len(actions), 8):
            raise ValueError(f"actions {actions.shape} and state {state.shape}, expected (T, 7) and (T, 8)")
        gripper = actions[:, 6:]
        if (self.opens, self.closes) == (-1.0, 1.0):
            opening = 1.0 - np.clip(gripper, 0.0, 1.0)
        else:
            opening = np.clip((gripper - self.closes) / (self.opens - self.closes), 0.0, 1.0).astype(actions.dtype)
        return np.concatenate([actions[:, :6], opening], axis=1), np.concatenate([state[:, :6], state[:, -2:]], axis=1)


standardize_libero = LiberoStandardization()
"""Of data as LIBERO stores them."""


_LIBERO = DataSetConfig(
    standardize_libero,
    keys=(
        SourceKeys("rlds", ("image", "wrist_image"), ("state",), "action"),
        SourceKeys("lerobot", (f"{_LEROBOT}image", f"{_LEROBOT}image2"), ("observation.state",), "action"),
        SourceKeys("lerobot", (f"{_LEROBOT}image", f"{_LEROBOT}wrist_image"), ("observation.state",), "action"),
        SourceKeys("lerobot", ("image", "wrist_image"), ("state",), "actions"),
        # Regenerated with the simulator's own orientation: upside down.
        SourceKeys(
            "hdf5",
            ("obs/agentview_rgb", "obs/eye_in_hand_rgb"),
            ("obs/ee_states", "obs/gripper_states"),
            "actions",
            rotated=True,
        ),
    ),
    action_mask=(True,) * 6 + (False,),
    control_hz=20.0,
)


def libero_config(opens: float = -1.0, closes: float = 1.0, cameras: Sequence[str] = ()) -> DataSetConfig:
    """LIBERO's conventions, with other names or another gripper.

    Args:
        opens, closes: stored commands of the gripper: 1 and 0 for converted data sets.
        cameras: names in the order of the model's images, without what a format puts before all of them, such as
            LeRobot's `observation.images.`. Empty: LIBERO's.

    Raises ValueError for equal or infinite commands.
    """
    if opens == closes or not all(abs(value) < float("inf") for value in (opens, closes)):
        raise ValueError(f"libero_config: opens is {opens}, closes is {closes}, expected two different numbers")
    found = replace(_LIBERO, standardize=LiberoStandardization(float(opens), float(closes)))
    if not cameras:
        return found
    return replace(found, keys=tuple(dict.fromkeys(_renamed(keys, cameras) for keys in found.keys)))


def _renamed(keys: SourceKeys, cameras: Sequence[str]) -> SourceKeys:
    before = re.sub("[^./]*$", "", keys.cameras[0])
    return replace(keys, cameras=tuple(before + camera for camera in cameras))


_REGISTERED: dict[str, DataSetConfig] = {}


def register_data_set(name: str, config: DataSetConfig) -> None:
    """Say how data set `name` is read; ValueError when it is known with another configuration.

    For data in LIBERO's conventions under another name: `register_data_set(name, libero_config())`.
    """
    if _REGISTERED.setdefault(name, config) != config:
        raise ValueError(f"data set {name!r} is registered with another configuration")


def convention_of(name: str) -> dict[str, Any]:
    """What checkpoints record of a data set's configuration. KeyError for one that is not registered.

    `libero`: whether actions and states are in LIBERO's convention; `control_hz`, or None.
    """
    config = get_data_set_config(name)
    return {"libero": isinstance(config.standardize, LiberoStandardization), "control_hz": config.control_hz}


def register_mixture(name: str, weights: Mapping[str, float]) -> None:
    """Name a mixture of data sets; ValueError when the name is taken by another one or a weight is not positive."""
    weights = {data_set: float(weight) for data_set, weight in weights.items()}
    if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
        raise ValueError(f"mixture {name!r} has weights {weights}, expected positive numbers")
    if MIXTURES.setdefault(name, weights) != weights:
        raise ValueError(f"mixture {name!r} is registered with other weights")


def load_data_set_file(path: str | os.PathLike) -> None:
    """Run a user's Python file that calls `register_data_set`.

    FileNotFoundError when there is none, ValueError for another kind of file and for one that ends in an error.
    """
    path = Path(path).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--data_set_file {path} is no file, expected a Python file that registers data sets")
    if path.suffix != ".py":
        raise ValueError(f"--data_set_file {path}: expected a Python file, with the ending .py")
    name = f"craft_data_sets_{path.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(path):
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception):
            raise
        raise ValueError(f"--data_set_file {path} ends in {type(error).__name__}: {error}") from error


def get_data_set_config(name: str) -> DataSetConfig:
    """Configuration of data set `name`: a registered one, or a name that starts with `libero_`; KeyError otherwise.

    Of `name/configuration` that of `name` will do.
    """
    for known in (name, name.partition("/")[0]):
        if known in _REGISTERED:
            return _REGISTERED[known]
    if name.startswith("libero_"):
        return _LIBERO
    raise KeyError(
        f"data set {name!r} has no registered standardisation, expected a name that starts with 'libero_' or one given "
        f"to prismatic.vla.datasets.registry.register_data_set (--data_set_file, docs/datasets.md)"
        + nearest(name, set(_REGISTERED))
    )


def expand_data_set_names(name: str) -> dict[str, float]:
    """Data sets behind a `--dataset_name`, with their weights.

    `name` is a data set, a registered mixture, or a comma separated list of these; `data_set:2.5` multiplies the
    weight, which says how often the samples of the data set are used in an epoch. ValueError for empty or repeated
    names and for weights that are not positive numbers.
    """
    weights: dict[str, float] = {}
    for part in name.split(","):
        part, _, given = part.strip().partition(":")
        try:
            factor = float(given) if given else 1.0
        except ValueError:
            factor = float("nan")
        if not 0 < factor < float("inf"):
            raise ValueError(f"data set name {name!r}: the weight of {part!r} is not a positive number")
        for data_set, weight in MIXTURES.get(part, {part: 1.0}).items():
            if not data_set or data_set in weights:
                raise ValueError(f"data set name {name!r} names {data_set!r} twice or not at all")
            weights[data_set] = weight * factor
    return weights


def alternative_name(name: str) -> str:
    """The other spelling of a suite: with or without `_no_noops`."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else f"{name}{_SUFFIX}"
