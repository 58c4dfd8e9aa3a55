"""Fine-tune a vision-language-action policy, plain or under the CRaFT constraint.

python vla-scripts/finetune.py --config_file_path CHECKPOINT_OR_PRESET --dataset_name NAME --use_craft True
torchrun --standalone --nproc-per-node N vla-scripts/finetune.py ...
"""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from transformers.utils import logging as transformers_logging

from prismatic.training.command_line import bad_input_in_one_line, parse_flags
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.setup import build_setup


def finetune() -> None:
    """Parse, build, fit. Bad input ends it before anything is written."""
    transformers_logging.set_verbosity_error()
    with bad_input_in_one_line("finetune.py"):
        cfg = parse_flags()
        accelerator = build_accelerator(cfg)
        seed_everything(cfg.seed)
        trainer = Trainer(cfg, build_setup(cfg), accelerator)
    trainer.fit()


def build_accelerator(cfg: FinetuneConfig) -> Accelerator:
    """Device, processes, their timeout and precision."""
    use_cuda = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    timeout = InitProcessGroupKwargs(timeout=timedelta(seconds=cfg.ddp_timeout))
    return Accelerator(cpu=not use_cuda, mixed_precision=cfg.precision(use_cuda), kwargs_handlers=[timeout])


if __name__ == "__main__":
    finetune()
