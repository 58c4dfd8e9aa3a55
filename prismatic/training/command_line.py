"""The command line of `finetune.py`: its flags, and those of other code bases."""

from __future__ import annotations

from collections.abc import Sequence

from prismatic.command_line import ForeignFlag, given_flags, parse
from prismatic.training.config import FinetuneConfig
from prismatic.training.writers import require_services

_DIFFUSION = ForeignFlag("diffusion heads are not implemented; leave it out", harmless=None)
_START = ForeignFlag("use --config_file_path FOLDER")
FOREIGN = {
    "vla_path": _START,
    "pretrained_checkpoint": _START,
    "save_steps": ForeignFlag("use --save_freq N"),
    "use_quantization": ForeignFlag("quantised training is not implemented", harmless=("false",)),
    "diffusion_sample_freq": _DIFFUSION,
    "num_diffusion_steps_train": _DIFFUSION,
    "num_diffusion_steps": _DIFFUSION,
    "val_time_limit": ForeignFlag("--val_batches says how much is measured", harmless=None),
    "adapter_tmp_dir": ForeignFlag("adapters are written to the checkpoint folder", harmless=None),
    "phase1_path": ForeignFlag("nothing reads it", harmless=None),
}
"""Flags of published training commands that this program does not have (docs/migrating.md)."""


def parse_flags(args: Sequence[str] | None = None) -> FinetuneConfig:
    """The flags of `finetune.py`, from `args` or the command line.

    Raises ValueError for a flag without its switch, also when it was given its default value, and for all that
    `FinetuneConfig` refuses.
    """
    cfg = parse(FinetuneConfig, args, FOREIGN, "Fine-tune a vision-language-action policy, plain or under CRaFT.")
    cfg.check_switches(given_flags(args))
    require_services(cfg)
    return cfg
