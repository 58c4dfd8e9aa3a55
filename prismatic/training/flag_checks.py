"""Flags that nothing reads, and choices: one line names the flag, what was found and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from typing import Protocol

from prismatic.command_line import one_of
from prismatic.craft.duals import DUALS
from prismatic.craft.settings import PRESETS, CRaFTConfig, SignalKind

_OF_FEATURES = (
    "anchor_layer_idx",
    "use_mean_pooling",
    "anchor_type",
    "cr_token_mode",
    "feature_source",
    "retention_metric",
    "w_raw",
    "w_aq",
)


class _Flags(Protocol):
    """What is read of `FinetuneConfig`, beside one `craft_*` flag per setting."""

    craft_preset: str
    retention_method: str | None


def check_unread(cfg: _Flags, config: CRaFTConfig) -> None:
    """ValueError for the first `--craft_*` flag of `cfg` that the settings `config`, made of it, leave without effect.

    The flags of the original procedure are not looked at there: its ablations give them together.
    """
    own = _changed(cfg)
    unread: dict[str, str] = {}
    if config.signal is not SignalKind.FEATURES:
        unread |= dict.fromkeys(_OF_FEATURES, f"is about features, but --craft_signal is {config.signal.value}")
    chosen = config.dual_kind
    for name, dual in DUALS.items():
        if name != chosen:
            unread |= dict.fromkeys(dual.own, f"has no effect: it needs --craft_dual {name}, found {chosen}")
    unread |= dict.fromkeys(DUALS[chosen].unread, f"has no effect: --craft_dual {chosen} does not read it")
    if cfg.retention_method == "feature_penalty":
        unread["dual"] = "has no effect: --retention_method feature_penalty has a constant multiplier"
    for name, why in unread.items():
        if name in own:
            raise ValueError(f"--craft_{name} {getattr(cfg, f'craft_{name}')} {why}; leave it out")


def _changed(cfg: _Flags) -> set[str]:
    """Settings of the constraint whose flag is neither its default nor what the preset says anyway."""
    preset = PRESETS[cfg.craft_preset]
    changed = set()
    for field in fields(CRaFTConfig):
        value = getattr(cfg, f"craft_{field.name}", None)
        default = preset.get(field.name, field.default)
        if value is not None and value != (default.value if isinstance(default, Enum) else default):
            changed.add(field.name)
    return changed


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """ValueError unless the flag's value is one of the choices."""
    if value not in choices:
        raise ValueError(f"--{name} is {value!r}, expected {one_of(choices, value)}")
