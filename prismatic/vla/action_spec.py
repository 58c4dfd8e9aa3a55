"""Shape and normalisation kind of the actions of a robot platform."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum


class NormalizationType(str, Enum):
    """How action and proprioception values are scaled; see `prismatic.vla.normalization`."""

    NORMAL = "normal"
    BOUNDS = "bounds"
    BOUNDS_Q99 = "bounds_q99"


_LARGEST = 10_000


@dataclass(frozen=True)
class ActionSpec:
    """Numbers that policy, data and evaluation must share; saved with every checkpoint.

    chunk_len: predicted actions per query (K). action_dim (A), proprio_dim (P): values per step.
    """

    chunk_len: int = 8
    action_dim: int = 7
    proprio_dim: int = 8
    normalization: NormalizationType = NormalizationType.BOUNDS_Q99

    def __post_init__(self) -> None:
        for name in ("chunk_len", "action_dim", "proprio_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
                raise ValueError(f"ActionSpec.{name} is {value!r}, expected a positive integer up to {_LARGEST}")
        # Accepts the JSON spelling; an unknown one is a ValueError that lists nothing useful, hence the re-raise.
        try:
            kind = NormalizationType(self.normalization)
        except ValueError:
            known = [kind.value for kind in NormalizationType]
            raise ValueError(f"ActionSpec.normalization is {self.normalization!r}, expected one of {known}") from None
        object.__setattr__(self, "normalization", kind)

    def to_dict(self) -> dict:
        """JSON-ready fields; `from_dict` restores an equal object."""
        return {**asdict(self), "normalization": self.normalization.value}

    @classmethod
    def from_dict(cls, fields: dict) -> ActionSpec:
        """Inverse of `to_dict`; ValueError for missing or unknown fields."""
        expected = set(cls.__dataclass_fields__)
        if set(fields) != expected:
            raise ValueError(f"ActionSpec has fields {sorted(fields)}, expected {sorted(expected)}")
        return cls(**fields)


ACTION_SPECS: dict[str, ActionSpec] = {
    "libero": ActionSpec(),
    "calvin": ActionSpec(),
    "aloha": ActionSpec(chunk_len=25, action_dim=14, proprio_dim=14, normalization=NormalizationType.BOUNDS),
    "bridge": ActionSpec(chunk_len=5, action_dim=7, proprio_dim=7),
}


def get_action_spec(platform: str) -> ActionSpec:
    """Spec of a registered platform; KeyError lists the known ones."""
    if platform not in ACTION_SPECS:
        raise KeyError(f"robot platform {platform!r} is not registered, expected one of {sorted(ACTION_SPECS)}")
    return ACTION_SPECS[platform]
