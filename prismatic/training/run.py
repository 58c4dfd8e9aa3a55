"""A run of `finetune.py`: build, fit; or only say what would be needed."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from transformers.utils import logging as transformers_logging

from prismatic.command_line import bad_input_in_one_line, faults_in_one_line
from prismatic.output_folder import release, released_on_failure
from prismatic.training.checkpoints import checkpoint_path
from prismatic.training.config import FinetuneConfig
from prismatic.training.dry_run import dry_run
from prismatic.training.faults import FAULTS
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.processes import build_accelerator, end_processes
from prismatic.training.run_folder import claim_run_folder
from prismatic.training.setup import build_setup

PROGRAM = "finetune.py"


def run(cfg: FinetuneConfig) -> None:
    """Train as the flags say. Bad input ends the program before anything is written."""
    transformers_logging.set_verbosity_error()
    train(cfg, bad_input_in_one_line(PROGRAM), faults_in_one_line(PROGRAM, FAULTS))


def train(
    cfg: FinetuneConfig,
    mistakes: AbstractContextManager[None] | None = None,
    faults: AbstractContextManager[None] | None = None,
) -> Path | None:
    """Train as the flags say and return the folder of the newest checkpoint; None for a dry run.

    mistakes, faults: contexts for what is raised before the training and by it. Without them it is raised, for a caller
    that lives on: others may write to the run's folder afterwards, and this process may train again.
    """
    with mistakes or nullcontext(), released_on_failure():
        accelerator = build_accelerator(cfg)
        if cfg.dry_run:
            dry_run(cfg, accelerator)
            return None
        if accelerator.is_main_process:
            claim_run_folder(cfg)
        seed_everything(cfg.seed)
        setup = build_setup(cfg)
        trainer = Trainer(cfg, setup, accelerator)
    try:
        with faults or nullcontext():
            trainer.fit()
    finally:
        release(setup.run_dir)
    folder = checkpoint_path(cfg, trainer.step)  # the last step is saved; other machines may not see it
    del trainer, setup
    end_processes(accelerator)
    return folder
