"""How much faster an action is made here than in the straightforward form, and that both say the same.

    python benchmarks/inference.py
    python benchmarks/inference.py --size full --device cuda

The straightforward form runs each tower on each image by itself, all blocks of it, and the language model with its
logits and its key and value cache. Here the images of a tower are one batch, blocks that nothing reads are not run, and
there are no logits and no cache. Both are timed in turn with random weights, batch 1. Raw times go to
{output}/{size}_{device}.json, the page's section is made of the files there.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from benchmark_page import write, write_section
from overhead_model import mid_config
from paired_times import paired_ratio
from torch import Tensor

from prismatic.command_line import flag, parse_or_exit
from prismatic.models.presets import build_policy_parts, build_vla
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.progress import over
from prismatic.training.lora import fixed_batch
from prismatic.training.retention.memory import to_device

PROMPT_TOKENS = 50
STATISTICS = {"mean": 0.0, "std": 1.0, "min": -1.0, "max": 1.0, "q01": -1.0, "q99": 1.0}


@dataclass
class InferenceConfig:
    """Flags."""

    size: str = flag("full", choices=("tiny", "mid", "full"))
    device: str = flag("cpu", choices=("cpu", "cuda"))
    rounds: int = flag(10, at_least=1)
    threads: int = flag(2, at_least=1)
    output: str = "results/inference"
    page: str = "docs/performance.md"


def main() -> None:
    """Measure, then write record and section."""
    cfg = parse_or_exit(InferenceConfig, __doc__)
    torch.set_num_threads(cfg.threads)
    record = measure(random_policy(cfg.size).to(cfg.device).eval(), cfg.rounds)
    record |= {"threads": cfg.threads, "torch": torch.__version__}
    write(Path(cfg.output) / f"{cfg.size}_{cfg.device}.json", json.dumps(record, indent=1) + "\n")
    files = sorted(Path(cfg.output).glob("*.json"))
    write_section(Path(cfg.page), "inference", page({f.stem: json.loads(f.read_text("utf-8")) for f in files}))


def random_policy(size: str) -> VLAPolicyModel:
    """A policy with random weights that answers for a data set `random`."""
    if size == "mid":
        parts = build_policy_parts(mid_config(), published_layout=False)
    else:
        parts = build_vla({"tiny": "tiny", "full": "qwen25-0_5b"}[size])
    model = VLAPolicyModel(*parts)
    sizes = {"action": model.action_head.geometry.action_dim, "proprio": model.proprio_projector.proprio_dim}
    statistics = {group: {name: [value] * n for name, value in STATISTICS.items()} for group, n in sizes.items()}
    model.vla.norm_stats = {"random": statistics}
    return model


def prediction(model: VLAPolicyModel) -> np.ndarray:
    """Actions (K, A) of `predict_action` for a fixed observation."""
    batch = to_device(fixed_batch(model, rows=1, prompt_length=PROMPT_TOKENS), next(model.parameters()).device)
    return model.vla.predict_action(
        batch["input_ids"][:, :PROMPT_TOKENS],
        unnorm_key="random",
        proprio=batch["proprio"][0],
        proprio_projector=model.proprio_projector,
        action_head=model.action_head,
        legacy_slices=model.legacy_slices,
        pixel_values=batch["pixel_values"],
    )[0]


@torch.no_grad()
def straightforward(model: VLAPolicyModel) -> np.ndarray:
    """The same actions in the straightforward form."""
    vla = model.vla
    batch = to_device(fixed_batch(model, rows=1, prompt_length=PROMPT_TOKENS), next(model.parameters()).device)
    mask = batch["action_mask"]
    projected = vla.projector(_features_one_by_one(model, batch["pixel_values"]))
    embeddings, padding = vla._multimodal_inputs(batch["input_ids"], batch["attention_mask"], projected, mask)
    output = vla.language_model(
        inputs_embeds=embeddings, attention_mask=padding, use_cache=True, output_hidden_states=True
    )
    states = vla.bridge_states(output.hidden_states, mask, model.legacy_slices)
    actions = model.actions_of(states, batch)[0].float().cpu().numpy()
    return np.asarray(vla._unnormalize(actions, "random", None))


def _features_one_by_one(model: VLAPolicyModel, pixels: Tensor) -> Tensor:
    towers = model.vla.vision_backbone.towers
    views = pixels.view(model.num_images, len(towers), 1, 3, *pixels.shape[-2:])
    images = []
    for view in views:
        made = []
        for tower, image in zip(towers, view, strict=True):
            x = tower._embed(image)
            for index, block in enumerate(tower.blocks):
                x = block(x)
                if index == tower.spec.depth - 2:
                    made.append(x[:, tower.spec.num_prefix_tokens :])
            tower.norm(x)
        images.append(torch.cat(made, dim=-1))
    return torch.cat(images, dim=1)


def measure(model: VLAPolicyModel, rounds: int) -> dict:
    """Seconds of both forms, taken in turn, and the largest difference of an action."""
    forms = {"straightforward": straightforward, "here": prediction}
    actions = {name: form(model) for name, form in forms.items()}  # also warms up
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for turn in over(range(rounds), "timing", "rounds"):
        for name in sorted(forms, reverse=bool(turn % 2)):
            started = time.perf_counter()
            forms[name](model)  # ends with the actions on the CPU
            seconds[name].append(time.perf_counter() - started)
    gap = np.abs(actions["here"] - actions["straightforward"]).max()
    return {"seconds": seconds, "difference": float(gap), "largest_action": float(np.abs(actions["here"]).max())}


def page(records: dict[str, dict]) -> str:
    """The section of docs/performance.md."""
    lines = [
        "# Inference",
        "",
        "This section is written by `python benchmarks/inference.py` from `results/inference`. Do not edit.",
        "",
        " ".join(__doc__.split("\n\n")[2].split()).partition(" Raw times")[0],
        "",
        "| size, device | straightforward, ms | here, ms | times as fast (95 %) | largest difference of an action | "
        "rounds |",
        "|---|---|---|---|---|---|",
    ]
    for name, record in records.items():
        slow, fast = record["seconds"]["straightforward"], record["seconds"]["here"]
        ratio, low, high = paired_ratio(slow, fast)
        lines.append(
            f"| {name.replace('_', ', ')} | {1000 * np.median(slow):.0f} | {1000 * np.median(fast):.0f} | "
            f"{ratio:.2f} ({low:.2f}-{high:.2f}) | {record['difference']:.1e} | {len(fast)} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
