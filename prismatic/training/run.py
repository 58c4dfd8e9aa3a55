"""A run of `finetune.py`: build, fit; or only say what would be needed."""

from __future__ import annotations

from transformers.utils import logging as transformers_logging

from prismatic.command_line import bad_input_in_one_line, faults_in_one_line
from prismatic.output_folder import released_on_failure
from prismatic.training.config import FinetuneConfig
from prismatic.training.dry_run import dry_run
from prismatic.training.faults import FAULTS
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.processes import build_accelerator, end_processes
from prismatic.training.run_folder import claim_run_folder
from prismatic.training.setup import build_setup

PROGRAM = "finetune.py"


def run(cfg: FinetuneConfig) -> None:
    """Train as the flags say. Bad input ends it before anything is written."""
    transformers_logging.set_verbosity_error()
    with bad_input_in_one_line(PROGRAM), released_on_failure():
        accelerator = build_accelerator(cfg)
        if cfg.dry_run:
            dry_run(cfg, accelerator)
            return
        if accelerator.is_main_process:
            claim_run_folder(cfg)
        seed_everything(cfg.seed)
        trainer = Trainer(cfg, build_setup(cfg), accelerator)
    with faults_in_one_line(PROGRAM, FAULTS):
        trainer.fit()
    del trainer
    end_processes(accelerator)
