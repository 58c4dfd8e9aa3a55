"""Runs of a few steps of the shipped start on shipped demonstrations."""

from __future__ import annotations

import json
from pathlib import Path

from accelerate.state import AcceleratorState
from gpu_findings import PartConfig

from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.processes import build_accelerator
from prismatic.training.setup import build_setup

ROOT = Path(__file__).resolve().parents[1]
START = str(ROOT / "pretrained_models" / "tiny-libero-object")
DATA_ROOT = ROOT / "datasets" / "rlds"
NEW, OLD = "libero_spatial_scripted_no_noops", str(DATA_ROOT / "libero_object_scripted_no_noops")
KEEP = {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": 0.001, "craft_every": 1}
LORA = {"use_lora": True, "lora_rank": 8}
METHODS = {
    "plain": {},
    "CRaFT `original`": {"use_craft": True, "craft_retention_budget": 1e-6},
    "CRaFT `budget`": {"use_craft": True, "craft_preset": "budget", "craft_retention_budget": 1e-6},
    "CRaFT `keep`": KEEP,
    "CRaFT `keep`, old observations": KEEP | {"craft_memory": "instructions,data", "craft_memory_data": OLD},
    "feature penalty": {"retention_method": "feature_penalty"},
    "L2-SP": {"retention_method": "l2sp"},
    "replay": {"replay_data": OLD},
    "distilled replay": {"replay_data": OLD, "replay_labels": "start"},
}
WAYS = {
    "LoRA": LORA,
    "CRaFT `original`, LoRA": LORA | METHODS["CRaFT `original`"],
    "vision frozen, CRaFT `keep`": {"freeze_vision": True} | KEEP,
    "accumulation, EMA, validation": {
        "grad_accumulation_steps": 2,
        "ema_decay": 0.9,
        "use_val_set": True,
        "val_freq": 1,
        "val_batches": 1,
    },
    "gradient checkpointing, CRaFT `keep`": {"gradient_checkpointing": True} | KEEP,
    "compiled": {"compile": True},
    "compiled, CRaFT `budget`": {"compile": True} | METHODS["CRaFT `budget`"],
}
TRIED = (
    "plain",
    "CRaFT `budget`",
    "CRaFT `keep`, old observations",
    "distilled replay",
    "L2-SP",
    "accumulation, EMA, validation",
)
"""Those that a trial on a CPU runs: it tries the kit, not the product."""


def trained(cfg: PartConfig, folder: str, name: str, **flags) -> Trainer:
    """A finished run of a few steps of the shipped start on shipped demonstrations."""
    trainer = prepared(cfg, folder, name, **flags)
    trainer.fit()
    return trainer


def prepared(cfg: PartConfig, folder: str, name: str, **flags) -> Trainer:
    """A run before its first step."""
    given = {"config_file_path": START, "data_root_dir": str(DATA_ROOT), "dataset_name": NEW, "n_shot_episodes": 2}
    given |= {"run_root_dir": folder, "run_id_override": "".join(c for c in name if c.isalnum()), "batch_size": 4}
    given |= {"max_steps": 3, "craft_log_freq": 1, "device": cfg.device.type, "image_aug": False}
    run = FinetuneConfig(**(given | flags))
    seed_everything(run.seed)
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the precision of the run before
    return Trainer(run, build_setup(run), build_accelerator(run))


def losses(trainer: Trainer) -> list[float]:
    """The action loss of every step, from the run's file of metrics."""
    lines = (trainer.setup.run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = {line["step"]: line["VLA Train/Loss"] for line in map(json.loads, lines) if "VLA Train/Loss" in line}
    return [found[step] for step in sorted(found)]
