"""The command line of `finetune.py`: its flags, and those of other code bases."""

from __future__ import annotations

from collections.abc import Sequence

from prismatic.command_line import ForeignFlag, given_flags, parse, require_package
from prismatic.training.config import FinetuneConfig

_DIFFUSION = ForeignFlag("diffusion heads are not implemented; leave it out", harmless=None)
FOREIGN = {
    "vla_path": ForeignFlag("use --config_file_path FOLDER"),
    "pretrained_checkpoint": ForeignFlag("use --config_file_path FOLDER"),
    "diffusion_sample_freq": _DIFFUSION,
    "num_diffusion_steps_train": _DIFFUSION,
    "num_diffusion_steps": _DIFFUSION,
}
"""Flags of published training commands that this program does not have (docs/migrating.md)."""


def parse_flags(args: Sequence[str] | None = None) -> FinetuneConfig:
    """The flags of `finetune.py`, from `args` or the command line.

    Raises ValueError for a flag without its switch, also when it was given its default value, and for all that
    `FinetuneConfig` refuses.
    """
    cfg = parse(FinetuneConfig, args, FOREIGN, "Fine-tune a vision-language-action policy, plain or under CRaFT.")
    cfg.check_switches(given_flags(args))
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, f"use_{name}"):
            require_package(f"--use_{name} True", name, name)
    return cfg
