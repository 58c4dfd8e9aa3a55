"""Scaling of actions and proprioception by data set statistics, and the statistics themselves.

Statistics of one data set are a dict in the published JSON shape:
`{"action": {mean, std, max, min, q01, q99, mask}, "proprio": {mean, std, max, min, q01, q99}, "num_transitions",
"num_trajectories"}`, one value per dimension. A `dataset_statistics.json` maps data set names to such dicts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prismatic.evidence.checks import FOREIGN, read_object
from prismatic.evidence.files import write_json
from prismatic.vla.action_spec import ActionSpec, NormalizationType

STATISTICS_FILE = "dataset_statistics.json"
_QUANTITIES = ("mean", "std", "max", "min", "q01", "q99")
_EPSILON = 1e-8
# No unit of an action or a state gives larger numbers, and float32 arithmetic with them stays finite.
_LARGEST = 1e10
_BOUND_KEYS = {NormalizationType.BOUNDS: ("min", "max"), NormalizationType.BOUNDS_Q99: ("q01", "q99")}


class StatisticsError(ValueError):
    """Statistics that are incomplete, contradict each other or do not fit the action spec."""


class Normalizer:
    """Normalisation and its inverse with the statistics of one data set.

    BOUNDS and BOUNDS_Q99 map [lo, hi] (min/max or 1 %/99 % quantiles) to [-1, 1]:
    `y = clip(2 (x - lo) / (hi - lo + 1e-8) - 1, -1, 1)`, inverse `0.5 (y + 1) (hi - lo + 1e-8) + lo`; NORMAL is
    `(x - mean) / (std + 1e-8)`. Dimensions whose `mask` is false pass unchanged (the gripper of LIBERO).

    Raises StatisticsError when the statistics do not fit `spec` or are inconsistent.
    """

    def __init__(self, statistics: Mapping, spec: ActionSpec, dataset_name: str | None = None):
        self.spec = spec
        self.dataset_name = dataset_name
        where = f"statistics of {dataset_name!r}" if dataset_name else "statistics"
        try:
            self.statistics = json.loads(json.dumps(statistics))  # a private copy, and proof that it can be saved
        except (TypeError, ValueError, RecursionError) as error:
            raise StatisticsError(f"{where}: cannot be written as JSON: {error}") from error
        self._action = _Scaling(self.statistics, "action", spec.action_dim, where)
        self._proprio = _Scaling(self.statistics, "proprio", spec.proprio_dim, where)

    def normalize_action(self, actions: np.ndarray) -> np.ndarray:
        """(..., A) standardised actions -> same shape, float32 for float32 input, else float64.

        Masked dimensions that are constant in the data become 0 for the two bounds kinds.
        """
        return self._action.normalize(actions, self.spec.normalization, zero_constant=True)

    def unnormalize_action(self, actions: np.ndarray) -> np.ndarray:
        """(..., A) normalised actions -> (..., A) float64 in the units of the data set. ValueError for NaN."""
        return self._action.unnormalize(actions, self.spec.normalization)

    def normalize_proprio(self, state: np.ndarray, zero_constant: bool = True) -> np.ndarray:
        """(..., P) proprioception -> same shape, float32 for float32 input, else float64.

        zero_constant: dimensions that are constant in the data become 0 for the two bounds kinds, as in training;
        False reproduces published evaluation results, which skipped that rule.
        """
        return self._proprio.normalize(state, self.spec.normalization, zero_constant)

    def to_json(self, path: str | os.PathLike, dataset_name: str | None = None) -> None:
        """Write `{dataset_name: statistics}`; the name defaults to the one given at construction."""
        name = dataset_name or self.dataset_name
        if name is None:
            raise ValueError("the normalizer has no data set name: pass dataset_name")
        save_statistics(path, {name: self.statistics})

    @classmethod
    def from_json(cls, path: str | os.PathLike, dataset_name: str | None, spec: ActionSpec) -> Normalizer:
        """Read one entry of a `dataset_statistics.json`; the key is found by `resolve_statistics_key`.

        Raises FileNotFoundError, StatisticsError (naming file and field) and KeyError for an unknown data set.
        """
        statistics = load_statistics(path)
        try:
            key = resolve_statistics_key(statistics, dataset_name)
        except KeyError as error:
            raise KeyError(f"{path}: {error.args[0]}") from None
        try:
            return cls(statistics[key], spec, key)
        except StatisticsError as error:
            raise StatisticsError(f"{path}: {error}") from error


class _Scaling:
    """Statistics of one group (action or proprio) as arrays."""

    def __init__(self, statistics: Mapping, group: str, dim: int, where: str):
        if not isinstance(statistics, dict) or not isinstance(statistics.get(group), dict):
            found = sorted(statistics) if isinstance(statistics, dict) else type(statistics).__name__
            raise StatisticsError(f"{where}: no entry {group!r} with quantities, found {found}")
        self.group = group
        self.dim = dim
        self.values = {name: _vector(statistics[group], name, dim, f"{where}: {group}") for name in _QUANTITIES}
        mask = statistics[group].get("mask", [True] * dim)
        if not isinstance(mask, list) or len(mask) != dim or not all(isinstance(entry, bool) for entry in mask):
            raise StatisticsError(f"{where}: {group}.mask is {mask}, expected {dim} booleans")
        self.mask = np.array(mask)
        self.constant = self.mask & (self.values["min"] == self.values["max"])
        for low, high in (("q01", "q99"), ("min", "max")):
            slack = 1e-6 * (1 + np.abs(self.values[high]))  # of numbers that were rounded on their way
            wrong = np.flatnonzero(self.values[low] > self.values[high] + slack)
            if wrong.size:
                raise StatisticsError(f"{where}: {group}.{low} > {group}.{high} in dimensions {wrong.tolist()}")
        if (self.values["std"] < 0).any():
            raise StatisticsError(f"{where}: {group}.std is {self.values['std'].tolist()}, expected 0 or more")

    def normalize(self, x: np.ndarray, kind: NormalizationType, zero_constant: bool) -> np.ndarray:
        x = self._checked(x)
        if kind is NormalizationType.NORMAL:
            scaled = (x - self._get("mean", x)) / (self._get("std", x) + x.dtype.type(_EPSILON))
            return np.where(self.mask, scaled, x)
        low, high = (self._get(key, x) for key in _BOUND_KEYS[kind])
        scaled = np.clip(2 * (x - low) / (high - low + x.dtype.type(_EPSILON)) - 1, -1, 1)
        if zero_constant:
            scaled = np.where(self.constant, x.dtype.type(0), scaled)
        return np.where(self.mask, scaled, x)

    def unnormalize(self, y: np.ndarray, kind: NormalizationType) -> np.ndarray:
        y = self._checked(y)
        if kind is NormalizationType.NORMAL:
            return np.where(self.mask, y * (self.values["std"] + _EPSILON) + self.values["mean"], y)
        low, high = (self.values[key] for key in _BOUND_KEYS[kind])
        return np.where(self.mask, 0.5 * (y + 1) * (high - low + _EPSILON) + low, y)

    def _get(self, name: str, like: np.ndarray) -> np.ndarray:
        return self.values[name].astype(like.dtype)

    def _checked(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x)
        if x.dtype != np.float32:
            x = x.astype(np.float64)
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ValueError(f"{self.group} has shape {x.shape}, expected (..., {self.dim})")
        if not np.isfinite(x).all():
            raise ValueError(f"{self.group} holds values that are not finite, first at index {_first_bad(x)}")
        return x


def _vector(group: Mapping, name: str, dim: int, where: str) -> np.ndarray:
    if name not in group:
        raise StatisticsError(f"{where}: no entry {name!r}, found {sorted(group)}")
    values = group[name]
    # bool is an int, and numpy would read numbers out of strings.
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values) or len(values) != dim:
        raise StatisticsError(f"{where}.{name} is {values!r}, expected {dim} numbers")
    try:
        vector = np.array(values, dtype=np.float64)
    except OverflowError as error:
        raise StatisticsError(f"{where}.{name} holds an integer that is too large: {error}") from error
    if not np.isfinite(vector).all():
        raise StatisticsError(f"{where}.{name} holds values that are not finite: {vector.tolist()}")
    if (np.abs(vector) > _LARGEST).any():
        raise StatisticsError(f"{where}.{name} is {vector.tolist()}, expected an action scale: at most {_LARGEST:g}")
    return vector


def _first_bad(x: np.ndarray) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(~np.isfinite(x))[0])


def compute_statistics(
    actions: Sequence[np.ndarray], proprios: Sequence[np.ndarray], action_mask: Sequence[bool]
) -> dict:
    """Statistics of standardised, not yet normalised trajectories, over all their frames.

    actions: arrays (T_i, A); proprios: arrays (T_i, P), same T_i; action_mask: A booleans, true = normalise.
    std is the population one, quantiles are linear. Raises ValueError for no data, unequal lengths, values that are
    not finite or a mask of another length.
    """
    if not actions or len(actions) != len(proprios):
        raise ValueError(f"{len(actions)} action and {len(proprios)} proprio trajectories, expected equal and not 0")
    for index, (action, proprio) in enumerate(zip(actions, proprios, strict=True)):
        if len(action) != len(proprio):
            raise ValueError(f"trajectory {index}: {len(action)} actions, {len(proprio)} proprios")
        for name, values in (("action", action), ("proprio", proprio)):
            if not np.isfinite(values).all():
                raise ValueError(f"trajectory {index}: {name} is not finite at (step, dim) {_first_bad(values)}")
    all_actions, all_proprios = np.concatenate(actions), np.concatenate(proprios)
    if len(action_mask) != all_actions.shape[1]:
        raise ValueError(f"action mask has {len(action_mask)} entries, actions have {all_actions.shape[1]} dimensions")
    return {
        "action": {**_describe(all_actions), "mask": [bool(entry) for entry in action_mask]},
        "proprio": _describe(all_proprios),
        "num_transitions": len(all_actions),
        "num_trajectories": len(actions),
    }


def _describe(values: np.ndarray) -> dict[str, list[float]]:
    # Mean and deviation in float32, quantiles in float64: equal, not just close, to published statistics files.
    values = values.astype(np.float32, copy=False)
    q01, q99 = np.quantile(values.astype(np.float64), (0.01, 0.99), axis=0)
    quantities = {
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "max": values.max(axis=0),
        "min": values.min(axis=0),
        "q01": q01,
        "q99": q99,
    }
    return {name: vector.tolist() for name, vector in quantities.items()}


def resolve_statistics_key(all_stats: Mapping[str, Mapping], wanted: str | None) -> str:
    """Key of the data set to un-normalise with.

    `wanted` is a key or a suite name whose data set is `{suite}_no_noops`; None is allowed when there is only one.
    Raises KeyError listing the keys.
    """
    keys = sorted(all_stats)
    if wanted is None:
        if len(keys) != 1:
            raise KeyError(f"statistics of {len(keys)} data sets {keys}: name the one to use")
        return keys[0]
    for candidate in (wanted, f"{wanted}_no_noops"):
        if candidate in all_stats:
            return candidate
    raise KeyError(f"no statistics of {wanted!r} (nor {wanted}_no_noops), found {keys}")


def save_statistics(path: str | os.PathLike, all_stats: Mapping[str, Mapping]) -> None:
    """Write `{data set name: statistics}` as JSON in one go."""
    write_json(path, all_stats)


def load_statistics(path: str | os.PathLike) -> dict[str, dict]:
    """Read a `dataset_statistics.json`; StatisticsError when it does not map names to statistics."""
    path = Path(path)
    try:
        content = read_object(path, finite=False, limits=FOREIGN)
    except ValueError as error:
        raise StatisticsError(str(error)) from None
    if not all(isinstance(v, dict) and "action" in v for v in content.values()):
        raise StatisticsError(f"{path}: expected {{data set name: {{'action': ..., 'proprio': ...}}}}")
    return content
