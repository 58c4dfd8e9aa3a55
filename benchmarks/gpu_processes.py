"""Two processes train like one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from gpu_findings import LATER, Check, Checks, PartConfig
from gpu_runs import DATA_ROOT, METHODS, NEW, ROOT, START, losses


def processes(cfg: PartConfig) -> Checks:
    """Two processes with half the batch each against one with the whole, on two cards with NCCL (on CPUs with gloo)."""
    cards = torch.cuda.device_count()
    if cfg.device.type == "cuda" and cards < 2:
        yield Check("two processes", f"needs two GPUs, this machine has {cards}")
        return
    for name in ("plain", "CRaFT `budget`")[cfg.is_trial :]:
        with tempfile.TemporaryDirectory() as folder:
            one, two = (_launched(cfg, folder, METHODS[name], count) for count in (1, 2))
        gap = max(abs(a - b) / a for a, b in zip(one, two, strict=True))
        found = f"largest relative difference of a loss {gap:.1e}"
        yield Check(f"two processes, {name}", found, f"at most {LATER:g}", gap <= LATER)


def _launched(cfg: PartConfig, folder: str, flags: dict, count: int) -> list[float]:
    name = f"processes{count}"
    given = flags | {"config_file_path": START, "data_root_dir": str(DATA_ROOT), "dataset_name": NEW, "max_steps": 3}
    given |= {"batch_size": 4 // count, "mixed_precision": "no", "device": cfg.device.type, "craft_log_freq": 1}
    given |= {"run_root_dir": folder, "run_id_override": name, "image_aug": False, "save_training_state": False}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    words += [str(ROOT / "vla-scripts" / "finetune.py"), *(w for k, v in given.items() for w in (f"--{k}", str(v)))]
    # One process on a machine with several cards must not take them all.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{count} process(es): {done.stderr.strip()[-300:]}")
    return losses(SimpleNamespace(setup=SimpleNamespace(run_dir=Path(folder) / name)))
