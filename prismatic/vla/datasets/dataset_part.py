"""The kept episodes of one data set, standardised and normalised for the model."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.known_statistics import outside
from prismatic.vla.datasets.registry import DataSetConfig
from prismatic.vla.datasets.source import DataSetError, EpisodeSource
from prismatic.vla.images import frame_pixels
from prismatic.vla.normalization import Normalizer, compute_statistics


class Part:
    """The kept episodes of one data set: where their frames are, and their numbers, ready for the model.

    actions (F, A), None without, and proprio (F, P) float32, normalised, of the kept episodes one after another: 60
    bytes per frame for LIBERO, shared by forked workers. Images stay on disk. left_out: {episode or file: reason}.
    """

    def __init__(
        self, name: str, source: EpisodeSource, kept: list[int], config: DataSetConfig, spec: ActionSpec
    ) -> None:
        self.name, self.source, self.kept = name, source, kept
        self.left_out: dict[str, str] = {}
        self.lengths = source.lengths[kept]
        self.starts = np.cumsum(self.lengths) - self.lengths
        episodes = [numbers(source, episode, config, name) for episode in kept]
        self.actions = None if source.keys.action is None else np.concatenate([actions for actions, _ in episodes])
        self.proprio = np.concatenate([proprio for _, proprio in episodes])
        # Actions that are not read have the size that the data set is registered with.
        action_shape = (config.action_spec.action_dim,) if self.actions is None else self.actions.shape[1:]
        check_size(name, "state", self.proprio.shape[1:], spec.proprio_dim)
        check_size(name, "actions", action_shape, spec.action_dim)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Rows per episode."""
        return np.split(values, self.starts[1:])

    def contradiction(self, statistics: Mapping) -> list[str]:
        """One line when the values do not look like those the statistics were computed from, none otherwise."""
        groups = {"state": (self.proprio, statistics["proprio"])}
        if self.actions is not None:
            groups["action"] = (self.actions, statistics["action"])
        found = [entry for what, (values, known) in groups.items() for entry in outside(what, values, known)]
        if not found:
            return []
        _, worst = max(found)
        others = f" (and {len(found) - 1} more dimensions)" if len(found) > 1 else ""
        return [f"{self.name}: {worst}{others}: check units and conventions, data of others need a name of their own"]

    def own_normalizer(self, config: DataSetConfig, spec: ActionSpec) -> Normalizer:
        """With the statistics of these values. Without actions it is good for the state alone: zeros stand for them."""
        actions = np.zeros((len(self.proprio), spec.action_dim)) if self.actions is None else self.actions
        statistics = compute_statistics(self.split(actions), self.split(self.proprio), config.action_mask)
        return Normalizer(statistics, spec, self.name)

    def normalize(self, normalizer: Normalizer) -> None:
        self.actions = None if self.actions is None else normalizer.normalize_action(self.actions)
        self.proprio = normalizer.normalize_proprio(self.proprio)

    def frame(self, position: int, camera: int, step: int) -> np.ndarray:
        """One decoded frame, uint8 (H, W, 3), of the episode at `position` of the kept ones."""
        key, episode = self.source.keys.cameras[camera], self.kept[position]
        try:
            return frame_pixels(self.source.frame(key, episode, step))
        except ValueError as error:
            raise DataSetError(f"{self.name}: episode {episode}, camera {key}, step {step}: {error}") from error


def check_size(name: str, what: str, found: tuple[int, ...], expected: int) -> None:
    """DataSetError unless the numbers of a step have the size of the policy."""
    if found != (expected,):
        raise DataSetError(
            f"{name}: {what} of {math.prod(found)} numbers per step, expected {expected} as the policy has; "
            "register the data set with a standardisation that gives them (docs/datasets.md)"
        )


def numbers(source: EpisodeSource, episode: int, config: DataSetConfig, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Standardised actions (T, A) and proprio (T, P) of one episode."""
    where = f"{name}: episode {episode}"
    state = source.state(episode)
    # Of observations: the standardisation wants actions, whatever they are.
    actions = source.actions(episode) if source.keys.action else _no_actions(len(state), config)
    for group, values in (("action", actions), ("state", state)):
        bad = np.argwhere(~np.isfinite(values))
        if bad.size:
            raise DataSetError(
                f"{where}: {group} is not finite at (step, dim) {tuple(bad[0].tolist())}; "
                "--skip_bad_episodes True leaves such episodes out"
            )
    try:
        return config.standardize(actions, state)
    except ValueError as error:
        raise DataSetError(f"{where}: {error}") from error


def episodes_left_out(source: EpisodeSource, config: DataSetConfig, shortest: int, skip_bad: bool) -> dict[str, str]:
    """{episode number or file: why it has no sample}: not read, fewer steps than `shortest`, without text.

    skip_bad: those with values that are not finite, or that do not fit the standardisation, are left out as well.
    """
    left_out = dict(source.problems)
    for episode in range(len(source)):
        reason = None if str(episode) in left_out else _why_unusable(source, config, episode, shortest, skip_bad)
        if reason is not None:
            left_out[str(episode)] = reason
    return left_out


def left_out_lines(left_out: Mapping[str, str], count: int) -> list[str]:
    """One line about what is left out of `count` episodes, none when nothing is."""
    if not left_out:
        return []
    first = "; ".join(left_out.values()) if len(left_out) < 4 else f"first: {next(iter(left_out.values()))}"
    return [f"{len(left_out)} of {count} episodes are left out: {first}"]


def _why_unusable(
    source: EpisodeSource, config: DataSetConfig, episode: int, shortest: int, skip_bad: bool
) -> str | None:
    length = int(source.lengths[episode])
    if length < shortest:
        return f"episode {episode} has {length} steps, expected at least one chunk of {shortest}"
    if not all(text.strip() for text in source.texts(episode)):
        return f"episode {episode}: the language instruction is empty"
    if skip_bad:
        try:
            numbers(source, episode, config, "")
        except DataSetError as error:
            return str(error).removeprefix(": ")
    return None


def _no_actions(length: int, config: DataSetConfig) -> np.ndarray:
    return np.zeros((length, config.action_spec.action_dim), dtype=np.float32)
