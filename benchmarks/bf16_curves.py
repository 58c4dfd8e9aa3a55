"""Does the bf16 step that keeps less learn as the plain bf16 step does? Loss curves of both beside float32.

    python benchmarks/bf16_curves.py

Each seed and size is trained three times on the same batches of shipped demonstrations: in float32, under bf16 autocast
with the plain formulas (float32 stream, everything kept, frozen weights in float32), and under bf16 autocast as the
product does it. LoRA, so that there are frozen weights. Losses go to {output}/{size}.json, a run that is there is not
made again; the section `bf16_curves` of docs/performance.md is made of these files.

How it is judged: bf16 noise is the distance of the plain bf16 curve from the float32 one. The product agrees within it
when its own distance is no larger, and when its mean loss differs from the plain one's by less than that distance.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from unittest import mock

import torch
from benchmark_page import write, write_section
from overhead_model import mid_config
from torch.utils.data import DataLoader

from prismatic.command_line import flag, parse_or_exit
from prismatic.extern.hf import language_body
from prismatic.models import action_heads, activations, vla_policy
from prismatic.models.presets import build_policy_parts, get_preset
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.progress import over, say
from prismatic.training.config import FinetuneConfig
from prismatic.training.frozen_weights import narrow_frozen_weights
from prismatic.training.setup import StartModel, build_setup, load_start_model
from prismatic.training.step import StepContext, optimizer_step
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.sampler import EpochSampler

FLOAT32, PLAIN, PRODUCT = "float32", "plain bf16", "product bf16"


@dataclass
class CurvesConfig:
    """Flags."""

    sizes: tuple[str, ...] = flag(("tiny", "mid"), "with commas between", choices=("tiny", "mid"))
    seeds: tuple[int, ...] = flag((0, 1), "with commas between", at_least=0)
    steps: int = flag(60, "of tiny; mid makes a third of them", at_least=3)
    batch_size: int = flag(4, at_least=1)
    threads: int = flag(2, at_least=1)
    output: str = "results/bf16_curves"
    page: str = "docs/performance.md"


def main() -> None:
    """Train what is missing, then write the section."""
    cfg = parse_or_exit(CurvesConfig, __doc__)
    torch.set_num_threads(cfg.threads)
    for size in cfg.sizes:
        file = Path(cfg.output) / f"{size}.json"
        curves = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        runs = [(f"{kind}, seed {seed}", seed, kind) for seed in cfg.seeds for kind in (FLOAT32, PLAIN, PRODUCT)]
        for name, seed, kind in over([run for run in runs if run[0] not in curves], size, "trainings"):
            curves[name] = losses(cfg, size, seed, kind)
            say(f"{size}, {name}: {curves[name][-1]:.4f}")
            write(file, json.dumps(curves, indent=1) + "\n")
    files = sorted(Path(cfg.output).glob("*.json"), reverse=True)
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    write_section(Path(cfg.page), "bf16_curves", page(found))


def losses(cfg: CurvesConfig, size: str, seed: int, kind: str) -> list[float]:
    """Action loss of every step of one training."""
    run = FinetuneConfig(
        config_file_path="pretrained_models/tiny-libero-object",
        dataset_name="libero_spatial_scripted_no_noops",
        use_lora=True,
        batch_size=cfg.batch_size,
        seed=seed,
        device="cpu",
    )
    setup = build_setup(run, load_start_model if size == "tiny" else mid_start)
    model = setup.model
    if kind == PRODUCT:
        narrow_frozen_weights(model, torch.bfloat16)
    collate = VLACollator.of_policy(setup.processor, model)
    sampler = EpochSampler(setup.dataset.group_sizes, seed, weights=setup.dataset.weights)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(setup.dataset, cfg.batch_size, sampler=sampler, collate_fn=collate, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.learning_rate, weight_decay=run.weight_decay, fused=True)

    def autocast():
        return nullcontext() if kind == FLOAT32 else torch.autocast("cpu", torch.bfloat16)

    context = StepContext(model.train(), optimizer, autocast=autocast)
    torch.manual_seed(seed)
    steps = cfg.steps if size == "tiny" else cfg.steps // 3
    with plain_formulas() if kind == PLAIN else nullcontext():
        made = (optimizer_step(context, [batch], i)["VLA Train/Loss"] for i, batch in enumerate(islice(loader, steps)))
        return [round(loss, 6) for loss in made]


@contextmanager
def plain_formulas() -> Iterator[None]:
    """The formulas without autocast's own paths: as the code was before it kept less."""
    with ExitStack() as patches:
        for module in (activations, language_body, action_heads):
            patches.enter_context(mock.patch.object(module, "product_dtype", lambda _: None))
        patches.enter_context(mock.patch.object(vla_policy, "fewer_kept", nullcontext))
        yield


def mid_start(cfg: FinetuneConfig) -> StartModel:
    """A start of about 60 M parameters with random weights, with the tokenizer and the data's units of the tiny one."""
    tiny = load_start_model(cfg)
    parts = build_policy_parts(mid_config(), cfg.seed, tiny.action_spec.proprio_dim, **get_preset("tiny").head)
    processor, size = tiny.processor, mid_config().tower_specs()[0].image_size
    processor.image_processor = type(processor.image_processor)(input_sizes=[[3, size, size]] * 2)
    image = replace(tiny.image_spec, size=size)
    return replace(tiny, model=VLAPolicyModel(*parts), image_spec=image)


def page(found: dict[str, dict[str, list[float]]]) -> str:
    """The section."""
    lines = [
        "# bf16: curves with and without what is kept",
        "",
        "This section is written by `python benchmarks/bf16_curves.py` from `results/bf16_curves`. Do not edit.",
        "",
        *" ".join(__doc__.partition("How it is judged: ")[2].split()).splitlines(),
        "",
        "| size | seed | steps | float32, last third | plain bf16 | product bf16 | plain: distance from float32 | "
        "product: distance | mean loss, product against plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ratios, close = [], []
    for size, curves in found.items():
        for seed in sorted({name.rpartition(" ")[2] for name in curves}):
            exact, plain, product = (curves[f"{kind}, seed {seed}"] for kind in (FLOAT32, PLAIN, PRODUCT))
            noise, own = _distance(plain, exact), _distance(product, exact)
            shift = statistics.fmean(product) - statistics.fmean(plain)
            ends = [f"{statistics.fmean(curve[-len(curve) // 3 :]):.4f}" for curve in (exact, plain, product)]
            cells = [size, seed, str(len(exact)), *ends, f"{noise:.5f}", f"{own:.5f}", f"{shift:+.5f}"]
            lines.append(f"| {' | '.join(cells)} |")
            ratios.append(own / noise)
            close.append(abs(shift) < noise)
    lines += [
        "",
        f"Mean loss within the noise: {sum(close)} of {len(close)}. The product's own distance is "
        f"{min(ratios):.2f} to {max(ratios):.2f} times the plain one's, and no larger in "
        f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}: it rounds the residual stream as well.",
    ]
    return "\n".join(lines)


def _distance(curve: list[float], exact: list[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(curve, exact, strict=True))


if __name__ == "__main__":
    main()
