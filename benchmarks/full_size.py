"""The published size on this machine: one CRaFT optimizer step and one action prediction with random weights.

    python benchmarks/full_size.py --output results/full_size/measurements.json --report docs/full_size.md

LoRA, batch 1, two 224 px images, Pro head, fp32 on a CPU. Writes the measurements as JSON and a page with them.
"""

from __future__ import annotations

import gc
import json
import platform
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from prismatic.command_line import flag, parse_or_exit
from prismatic.craft import CRaFTConfig
from prismatic.models.presets import build_vla
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.progress import over
from prismatic.training.config import FinetuneConfig
from prismatic.training.lora import fixed_batch
from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.memory import Memory
from prismatic.training.setup import apply_tuning
from prismatic.training.step import StepContext, optimizer_step

PUBLISHED = {"lora_r32": 51_897_088, "lora_r64": 103_794_176, "pro_head": 217_864_223, "vlm": 1_252_553_792}
"""Parameter counts of the published code; its adapters also cover layers that never get a gradient."""


@dataclass
class FullSizeConfig:
    """Flags."""

    lora_rank: int = flag(32, at_least=1, at_most=4096)
    steps: int = flag(2, at_least=1)
    threads: int = flag(2, at_least=1)
    output: str = "results/full_size/measurements.json"
    report: str = "docs/full_size.md"


def main() -> None:
    """Measure, then write both files."""
    cfg = parse_or_exit(FullSizeConfig, __doc__)
    torch.set_num_threads(cfg.threads)
    measured = measure(cfg)
    for path, text in ((cfg.output, json.dumps(measured, indent=2) + "\n"), (cfg.report, report(measured))):
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    print(report(measured))


def measure(cfg: FullSizeConfig) -> dict:
    """Build the policy, train `steps` steps under the constraint, predict once."""
    started = time.perf_counter()
    vla, head, projector = build_vla("qwen25-0_5b", rope_mode="legacy")
    counts = {"vlm": count(vla), "head": count(head), "proprio_projector": count(projector)}
    model = VLAPolicyModel(vla, head, projector, legacy_slices=True)
    apply_tuning(model, FinetuneConfig(use_lora=True, lora_rank=cfg.lora_rank))
    counts |= {
        "lora": sum(p.numel() for n, p in model.named_parameters() if "lora_" in n),
        "head_trainable": count(head, trainable=True),
        "trainable": count(model, trainable=True),
    }
    result = {"lora_rank": cfg.lora_rank, "parameters": counts, "seconds": {"build": time.perf_counter() - started}}
    result["memory_gib"] = {"built": resident()}
    result["seconds"]["craft_steps"], result["metrics"] = train(model, cfg.steps)
    result["memory_gib"]["training_peak"] = peak()
    gc.collect()
    result["seconds"]["predict_action"] = predict(model)
    result["memory_gib"]["peak"] = peak()
    result["machine"] = {"threads": cfg.threads, "python": platform.python_version(), "torch": torch.__version__}
    return result


def train(model: VLAPolicyModel, steps: int) -> tuple[list[float], list[dict]]:
    """Seconds and metrics of each CRaFT optimizer step (batch 1, random images, ids, state and actions)."""
    craft = CRaFT(model, CRaFTConfig(), [Memory()], Accelerator(cpu=True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)
    batch = fixed_batch(model, rows=1, prompt_length=50)
    geometry = model.action_head.geometry
    batch["actions"] = torch.zeros(1, geometry.chunk_len, geometry.action_dim)
    model.train()
    seconds, metrics = [], []
    for step in over(range(steps), "training", "steps"):
        started = time.perf_counter()
        metrics.append(optimizer_step(StepContext(model, optimizer, craft), [batch], step))
        seconds.append(time.perf_counter() - started)
    return seconds, metrics


def predict(model: VLAPolicyModel) -> float:
    """Seconds of one `predict_action` through the model inside the adapters."""
    model.eval()
    batch = fixed_batch(model, rows=1, prompt_length=50)
    vla = model.vla.get_base_model()
    bounds = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}
    vla.norm_stats = {"random": {group: {k: [v] * n for k, v in bounds.items()} for group, n in SIZES}}
    started = time.perf_counter()
    actions, _ = vla.predict_action(
        batch["input_ids"][:, :50],
        unnorm_key="random",
        proprio=batch["proprio"][0],
        proprio_projector=model.proprio_projector,
        action_head=model.action_head,
        pixel_values=batch["pixel_values"],
    )
    if actions.shape != (8, 7):
        raise RuntimeError(f"predict_action returned {actions.shape}, expected (8, 7)")
    return time.perf_counter() - started


SIZES = (("action", 7), ("proprio", 8))


def count(module: nn.Module, trainable: bool = False) -> int:
    """Scalars in the module's parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable)


def peak() -> float:
    """Largest resident size of the process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def resident() -> float:
    """Resident size of the process now, GiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**30


def report(measured: dict) -> str:
    """The page."""
    counts, seconds, memory = measured["parameters"], measured["seconds"], measured["memory_gib"]
    rank, steps = measured["lora_rank"], ", ".join(f"{s:.1f}" for s in seconds["craft_steps"])
    published = PUBLISHED["lora_r32"] * rank // 32
    return f"""# The published size on a CPU

Written by `python benchmarks/full_size.py` from `results/full_size/measurements.json`: random weights, fp32,
{measured["machine"]["threads"]} threads, batch 1, two 224 px images, LoRA rank {rank}, Pro head, CRaFT with its
default flags.

| | |
|---|---|
| building the model | {seconds["build"]:.1f} s |
| CRaFT optimizer steps, one after the other | {steps} s |
| `predict_action`, 8 actions | {seconds["predict_action"]:.1f} s |
| resident memory after building | {memory["built"]:.1f} GiB |
| peak memory, training | {memory["training_peak"]:.1f} GiB |
| peak memory, all | {memory["peak"]:.1f} GiB |

| parameters | here | published code |
|---|---|---|
| VLM | {counts["vlm"]:,} | {PUBLISHED["vlm"]:,} |
| LoRA rank {rank} | {counts["lora"]:,} | {published:,} |
| Pro head | {counts["head"]:,} | {PUBLISHED["pro_head"]:,} |
| Pro head, trained | {counts["head_trainable"]:,} | {PUBLISHED["pro_head"]:,} |
| trained in all | {counts["trainable"]:,} | |

The adapters are smaller because layers whose output nothing reads get none: the LM head, the attention pool and the
last block of each vision tower. `--lora_emit_unused True` writes zero adapters for them, under the published names. The
head's `film_gen` layers exist in published files and are never run; here they are not trained.
"""


if __name__ == "__main__":
    main()
