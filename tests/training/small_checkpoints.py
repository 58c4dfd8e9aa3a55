"""Real checkpoints of the micro model: a full one, and one with adapters on it; trained for one step."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import micro
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from prismatic.models.presets import PRESETS
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.lora import fixed_batch
from prismatic.training.setup import build_setup

LORA = {"use_lora": True, "lora_rank": 2}


def train(root: Path, name: str, **flags) -> Path:
    """One step of a run `name` in `root`; returns its checkpoint folder."""
    plain = {"config_file_path": "tiny", "data_root_dir": str(micro.DATA), "dataset_name": "libero_mini_no_noops"}
    plain |= {"run_root_dir": str(root), "run_id_override": name, "batch_size": 1, "max_steps": 1, "device": "cpu"}
    with mock.patch.dict(PRESETS, tiny=micro.MICRO):
        cfg = FinetuneConfig(**(plain | flags))
        seed_everything(cfg.seed)
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(cfg, build_setup(cfg), Accelerator(cpu=True, mixed_precision="no")).fit()
    return root / f"{name}--1_chkpt"


def act(model) -> torch.Tensor:
    """Normalised actions for a fixed batch."""
    with torch.no_grad():
        return model(fixed_batch(model)).actions
