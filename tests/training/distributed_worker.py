"""Run by test_distributed.py under torchrun: trains a few steps and saves this rank's weights, lambda and metrics."""

import os
import sys

import torch
from accelerate import Accelerator

from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.setup import build_setup

torch.set_num_threads(1)
output, data_root, batch_size, accumulation = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rank = int(os.environ.get("RANK", 0))
cfg = FinetuneConfig(
    config_file_path="tiny",
    data_root_dir=data_root,
    dataset_name="libero_mini_no_noops",
    run_root_dir=output,
    run_id_override="run",
    batch_size=batch_size,
    grad_accumulation_steps=accumulation,
    max_steps=4,
    save_freq=100,
    use_craft=True,
    device="cpu",
)
seed_everything(cfg.seed)
trainer = Trainer(cfg, build_setup(cfg), Accelerator(cpu=True))
# SGD: AdamW's first steps are sign(gradient), which turns rounding of tiny gradients into full steps.
trainer.optimizer = torch.optim.SGD([p for p in trainer.bare_model.parameters() if p.requires_grad], lr=0.1)
trainer.cfg.learning_rate = 0.1
trainer.fit()
state = {name: p.detach() for name, p in trainer.bare_model.named_parameters()}
torch.save({"weights": state, "lambda": trainer.craft.dual.get_lambda()}, f"{output}/rank{rank}.pt")
