"""Flags of a resumed run against those of the interrupted one: what is held must be the same, what tunes it is said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prismatic.training.config import FinetuneConfig

_SAME = (
    "retention_method",
    "replay_labels",
    "craft_signal",
    "craft_memory",
    "craft_dual",
    "craft_enable_dual",
    "craft_retention_metric",
    "craft_feature_source",
    "craft_anchor_type",
    "craft_anchor_layer_idx",
    "craft_cr_token_mode",
    "craft_use_mean_pooling",
)
"""Another value asks for another state, or gives the saved one another meaning."""
_FREE = ("craft_preset", "craft_log_freq", "craft_probe_data", "craft_probe_size", "craft_land")
"""Nothing that was done before depends on them; a preset is compared by the values that it gives."""
_OURS = ("retention_", "l2sp_", "replay_", "craft_")


def check_resumed_flags(
    cfg: FinetuneConfig, saved: Mapping[str, Any], folder: Path, say: Callable[[str], None]
) -> None:
    """Compare with the flags that the checkpoint `folder` records. Flags that it does not record are not compared.

    Raises ValueError naming the first flag that must be what it was; says each other one about keeping skills that
    changed.
    """
    now = cfg.to_dict()
    changed = [name for name in now if name.startswith(_OURS) and name in saved and saved[name] != now[name]]
    for name in _SAME:
        if name in changed:
            raise ValueError(
                f"--{name} is {now[name]}, but the interrupted run in {folder} had {saved[name]}: resume with its "
                "flags, or start a new run from the checkpoint with --config_file_path"
            )
    for name in changed:
        if name not in _FREE:
            say(f"Warning: --{name} is {now[name]} from here on, until the checkpoint it was {saved[name]}")


def check_same_start(cfg: FinetuneConfig, saved: Any, sha256: str | None, folder: Path) -> None:
    """Whether `--resume auto` continues a run from the start that is given now; another one asks for another run.

    Args:
        cfg: the flags. A checkpoint that they name is continued whatever it started from.
        saved: `start` of its manifest. Nothing is compared where it records none.
        sha256: of the weights of the present start; None for one without weights.
        folder: the checkpoint that would be continued.

    Raises ValueError when they differ.
    """
    before = saved.get("sha256") if isinstance(saved, dict) else None
    if cfg.resume == "auto" and None not in (before, sha256) and before != sha256:
        raise ValueError(
            f"--config_file_path {cfg.config_file_path}: sha256 of its weights is {sha256}, but the interrupted run in "
            f"{folder} started from {before}: give the new run another --run_id_override, or delete the old one"
        )
