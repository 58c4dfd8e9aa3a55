"""Chunk length and normalisation of published heads, which their folders do not state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from prismatic.model_files import CheckpointError
from prismatic.vla.action_spec import ACTION_SPECS, ActionSpec, NormalizationType
from prismatic.vla.datasets.registry import expand_data_set_names, get_data_set_config

_PUBLISHED = {
    "calvin": ("calvin_abc", "calvin_abc_rlds"),
    "aloha": (
        "aloha_scoop_x_into_bowl",
        "aloha1_fold_shorts_20_demos",
        "aloha1_fold_shirt_30_demos",
        "aloha1_scoop_x_into_bowl_45_demos",
        "aloha1_put_x_into_pot_300_demos",
    ),
    "bridge": ("bridge", "bridge_orig", "bridge_oxe", "bridge_dataset"),
}
"""Data sets that the public code knows, in lower case. A name that only begins like one may be of any robot."""
_ROBOTS = {name: ACTION_SPECS[robot] for robot, names in _PUBLISHED.items() for name in names}


@dataclass(frozen=True)
class HeadSizes:
    """What the weights tell: action numbers per step, and proprioception numbers, None without a projector."""

    action_dim: int
    proprio_dim: int | None

    def fits(self, spec: ActionSpec) -> bool:
        """Whether a head for this robot has these sizes."""
        return self.action_dim == spec.action_dim and self.proprio_dim in (None, spec.proprio_dim)

    def __str__(self) -> str:
        proprio = "" if self.proprio_dim is None else f" and {self.proprio_dim} proprio"
        return f"{self.action_dim} action{proprio} numbers"


def published_spec(
    sizes: HeadSizes, statistics: Iterable[str], source: Path, robot: str | ActionSpec | None, data_set: str | None
) -> ActionSpec:
    """The action specification of a published head.

    Args:
        sizes: of the head.
        statistics: names of the data sets in its statistics, which identify the robot when they are registered, or
            those of published data.
        source: its folder, for errors.
        robot: `--robot_platform`, or the specification itself where it is known.
        data_set: data that the caller registered and uses with the head; asked last.

    Raises CheckpointError when nothing says it, when names contradict each other, or when the sizes do not fit.
    """
    if isinstance(robot, ActionSpec):
        found = {"the checkpoint trained from it": robot}
    elif robot is not None:
        found = {f"--robot_platform {robot}": read_robot(robot, sizes)}
    else:
        known = {name: _spec_of_name(name) for name in sorted(statistics)}
        found = {f"statistics {name}": spec for name, spec in known.items() if spec is not None}
        found = found or _registered(data_set)
    if not found:
        raise CheckpointError(
            f"{source}: a published folder does not say how many actions its head predicts at once and how they are "
            f"normalised, and its statistics ({', '.join(sorted(statistics)) or 'none'}) are of no registered robot: "
            f"register the data set in a --data_set_file, or give --robot_platform ({_choices()})"
        )
    if len(set(found.values())) > 1:
        raise CheckpointError(f"{source}: its data sets are of different robots, {found}: give --robot_platform")
    where, spec = next(iter(found.items()))
    if not sizes.fits(spec):
        raise CheckpointError(
            f"{source}: the head has {sizes}, expected {spec.action_dim} action and {spec.proprio_dim} proprio numbers "
            f"as of {where}: give --robot_platform ({_choices()})"
        )
    return spec


def read_robot(text: str, sizes: HeadSizes) -> ActionSpec:
    """`--robot_platform`: a platform, a data set, or chunk length and normalisation as in `10,bounds_q99`.

    Raises CheckpointError for another text.
    """
    chunk, _, kind = (part.strip() for part in text.partition(","))
    if chunk.isdecimal() and kind in tuple(NormalizationType) and 1 <= int(chunk) <= 1000:
        return ActionSpec(int(chunk), sizes.action_dim, sizes.proprio_dim or 1, NormalizationType(kind))
    spec = ACTION_SPECS.get(text) or _spec_of_data_set(text)
    if spec is None:
        raise CheckpointError(f"--robot_platform is {text!r}, expected {_choices()}")
    return spec


def _choices() -> str:
    return f"{', '.join(ACTION_SPECS)}, a registered data set, or chunk length and normalisation as in 10,bounds_q99"


def _spec_of_name(name: str) -> ActionSpec | None:
    """Of a data set in the statistics."""
    return _spec_of_data_set(name) or _ROBOTS.get(name.lower())


def _spec_of_data_set(name: str) -> ActionSpec | None:
    try:
        return get_data_set_config(name).action_spec
    except KeyError:
        return None


def _registered(data_set: str | None) -> dict[str, ActionSpec]:
    """Of `--dataset_name`. LIBERO's configuration goes by the name alone, so it says nothing about a foreign head."""
    names = [] if data_set is None else list(expand_data_set_names(data_set))
    specs = {name: _spec_of_data_set(name) for name in names if not name.startswith("libero_")}
    return {f"data set {name}": spec for name, spec in specs.items() if spec is not None}
