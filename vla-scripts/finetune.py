"""Fine-tune a vision-language-action policy, plain or under the CRaFT constraint.

python vla-scripts/finetune.py --config_file_path CHECKPOINT_OR_PRESET --dataset_name NAME --use_craft True
torchrun --standalone --nproc-per-node N vla-scripts/finetune.py ...
"""

from transformers.utils import logging as transformers_logging

from prismatic.command_line import bad_input_in_one_line, faults_in_one_line
from prismatic.output_folder import released_on_failure
from prismatic.training.command_line import parse_flags
from prismatic.training.dry_run import dry_run
from prismatic.training.faults import FAULTS
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.processes import build_accelerator, end_processes
from prismatic.training.run_folder import claim_run_folder
from prismatic.training.setup import build_setup


def finetune() -> None:
    """Parse, build, fit; or only say what would be needed. Bad input ends it before anything is written."""
    transformers_logging.set_verbosity_error()
    with bad_input_in_one_line("finetune.py"), released_on_failure():
        cfg = parse_flags()
        accelerator = build_accelerator(cfg)
        if cfg.dry_run:
            dry_run(cfg, accelerator)
            return
        if accelerator.is_main_process:
            claim_run_folder(cfg)
        seed_everything(cfg.seed)
        trainer = Trainer(cfg, build_setup(cfg), accelerator)
    with faults_in_one_line("finetune.py", FAULTS):
        trainer.fit()
    del trainer
    end_processes(accelerator)


if __name__ == "__main__":
    finetune()
