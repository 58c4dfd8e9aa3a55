"""Fine-tuning from Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prismatic.training.command_line import parse_flags


def finetune(**flags: Any) -> Path | None:
    """Fine-tune a policy; returns the folder of its newest checkpoint, for `load_policy`.

        folder = craft_vla.finetune(
            config_file_path="pretrained_models/tiny-libero-object",  # the start
            data_root_dir="datasets/rlds",
            dataset_name="libero_spatial_scripted_no_noops",
            use_craft=True,
            craft_preset="keep",  # without these two: plain fine-tuning
            max_steps=800,
        )

    The arguments are the flags of `craft-finetune`, which `craft-finetune --help` and `FinetuneConfig`
    (prismatic/training/config.py) explain, with the same defaults and checks. Checkpoints go to `run_root_dir`
    ("runs"), metrics to `{run_root_dir}/{run id}/metrics.jsonl`. Lines about the progress are printed, and Python's,
    NumPy's and torch's global generators are seeded. With `dry_run=True` it trains nothing and returns None.

    An interruption of the kernel or Ctrl-C ends it after the step in progress, with a checkpoint of that step, which is
    returned; a second one ends the process.

    Raises ValueError, KeyError and OSError, before anything is written, for flags, data and starts that cannot be used:
    also for a run that is there already (`overwrite=True`, or another `run_id_override`). Later one of
    `prismatic.training.faults.FAULTS`, such as `NonFiniteLossError`.
    """
    cfg = parse_flags([f"--{name}={value}" for name, value in flags.items()])
    from prismatic.training.run import train

    return train(cfg)
