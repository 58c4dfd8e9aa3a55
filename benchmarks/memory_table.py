"""How much memory each way to fine-tune takes at the published size, and which cards have it: traced, not run.

    python benchmarks/memory_table.py

Every row is one optimizer step of LoRA 32 with two 224 px images, Pro head and bf16, traced on fake tensors
(`prismatic/training/memory`), as the code is and with the plain formulas in its place, as it was before it kept less.
A row whose record exists is not traced again. Writes the records, the section `memory` of docs/performance.md and the
short table of docs/gpus.md and of the first page.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

from benchmark_page import write, write_section
from bf16_curves import plain_formulas

from prismatic.command_line import UsageError, flag, one_of, parse_or_exit
from prismatic.craft.reference import adapter_layers
from prismatic.progress import over, say
from prismatic.training.config import FinetuneConfig
from prismatic.training.memory import trace as tracing
from prismatic.training.memory.report import CARDS, CONTEXT, FRAGMENTATION, GIB, allowance, largest_batch, peak_at
from prismatic.training.memory.start_shape import empty_model
from prismatic.training.memory.trace import KINDS, PROMPT_TOKENS, Trace, trace_step
from prismatic.training.setup import apply_tuning

BATCH = 8
BATCHES = (1, 2, 4, 8, 16)
KEEP = {"use_craft": True, "craft_preset": "keep", "craft_retention_budget": 0.03}
RECOMPUTED = {"gradient_checkpointing": True}
OPENVLA = {"config_file_path": "openvla-7b", "use_minivlm": False}
ROWS: dict[str, dict] = {
    "plain": {},
    "CRaFT `original`": {"use_craft": True},
    "CRaFT `budget`": {"use_craft": True, "craft_preset": "budget"},
    "CRaFT `keep`, no old data": KEEP,
    "CRaFT `keep`, with old observations": KEEP
    | {"craft_memory": "instructions,data", "craft_memory_data": "observations"},
    "plain, gradient checkpointing": RECOMPUTED,
    "CRaFT `keep`, no old data, gradient checkpointing": KEEP | RECOMPUTED,
    "plain, vision frozen": {"freeze_vision": True},
    "plain, all weights trained": {"use_lora": False},
    "plain, openvla-7b": OPENVLA,
    "plain, openvla-7b, plain head, gradient checkpointing": OPENVLA | {"use_pro_version": False} | RECOMPUTED,
}
CARD_ROWS = (
    "plain",
    "CRaFT `original`",
    "CRaFT `keep`, no old data",
    "plain, gradient checkpointing",
    "CRaFT `keep`, no old data, gradient checkpointing",
)
FILES = {"predicted": True, "before": False}  # name of the record: whether the code is as it is


@dataclass
class MemoryTableConfig:
    """Flags."""

    rows: str = flag("", "names with ; between; empty: all")
    output: str = "results/memory"
    page: str = "docs/performance.md"
    cards: tuple[str, ...] = ("docs/gpus.md", "README.md", "README.zh.md")

    def __post_init__(self) -> None:
        for name in self.rows.split(";") if self.rows else ():
            if name not in ROWS:
                raise UsageError(f"--rows: found {name!r}, expected {one_of(list(ROWS), name)}")


def main() -> None:
    """Trace what is missing, then write record and pages."""
    cfg = parse_or_exit(MemoryTableConfig, __doc__)
    records = {name: follow(cfg, Path(cfg.output) / f"{name}.json", lean) for name, lean in FILES.items()}
    traces, before = records["predicted"], records["before"]
    write_section(Path(cfg.page), "memory", page(traces, before))
    for cards in cfg.cards:
        write_section(Path(cards), "memory", "\n".join(card_table({name: traces[name] for name in CARD_ROWS})))


def follow(cfg: MemoryTableConfig, file: Path, lean: bool) -> dict[str, Trace]:
    """The rows of a record; what is missing is traced."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    missing = [name for name in (cfg.rows.split(";") if cfg.rows else ROWS) if name not in record]
    for name in over(missing, "tracing", "rows"):
        record[name] = asdict(traced(ROWS[name], lean))
        say(f"{file.stem}, {name}: {record[name]['peak'] / GIB:.2f} GiB")
        write(file, json.dumps(record, indent=1) + "\n")
    return {name: Trace(**record[name]) for name in ROWS if name in record}


def published(flags: dict) -> FinetuneConfig:
    """The published recipe with these flags."""
    base = {"config_file_path": "qwen25-0_5b", "dataset_name": "libero_spatial_no_noops", "batch_size": BATCH}
    return FinetuneConfig(**base | {"use_lora": True, "device": "cuda", "num_images_in_input": None} | flags)


def traced(flags: dict, lean: bool) -> Trace:
    """A step of the published recipe with these flags; not `lean`: as it was before it kept less."""
    cfg = published(flags)
    model = empty_model(cfg)
    apply_tuning(model, cfg)
    if lean:
        return trace_step(cfg, model, PROMPT_TOKENS)
    for layer in adapter_layers(model) if cfg.use_lora else ():
        layer.cast_input_dtype_enabled = True
    with plain_formulas(), mock.patch.object(tracing, "narrow", lambda *_: None):
        return trace_step(cfg, model, PROMPT_TOKENS)


def card_table(traces: dict[str, Trace]) -> list[str]:
    """Largest batch size of each row on each card."""
    lines = ["| | " + " | ".join(f"{card} GB" for card in CARDS) + " |", "|---|" + "---|" * len(CARDS)]
    for name, trace in traces.items():
        most = [largest_batch(trace, BATCH, card) for card in CARDS]
        lines.append(f"| {name} | " + " | ".join(str(count) if count else "-" for count in most) + " |")
    return lines


def page(traces: dict[str, Trace], before: dict[str, Trace]) -> str:
    """The section of docs/performance.md."""
    return "\n".join(
        [
            "# Memory",
            "",
            "This section is written by `python benchmarks/memory_table.py` from `results/memory`. Do not edit.",
            "",
            f"The published size (DINOv2-L, SigLIP-so400m, Qwen2.5-0.5B, Pro head), LoRA 32, two images, prompts of "
            f"{PROMPT_TOKENS} tokens, bf16, one process. Nothing was run on a GPU: a step is traced on tensors that "
            "have a size and no content, and every storage is counted from its first tensor to its last. On the CPU "
            "the trace agrees with the allocator's own account of a real step (`tests/training/test_memory.py`). A "
            f"card needs more than its tensors: {CONTEXT / GIB:g} GiB for context, kernels and workspaces and "
            f"{FRAGMENTATION:.0%} for the allocator are allowed for, which is an estimate.",
            "",
            f"Peak of tensors in GiB, by what it is for at batch size {BATCH}. Of the parts of the model: what their "
            "forward passes keep. `before`: the same trace of the plain formulas: everything kept, float32 between "
            "the products, frozen weights in float32.",
            "",
            *kind_table(traces, before),
            "",
            "Peak with the allowance in GiB, by batch size:",
            "",
            *batch_table(traces),
            "",
            "Largest batch size by card:",
            "",
            *card_table(traces),
        ]
    )


def kind_table(traces: dict[str, Trace], before: dict[str, Trace]) -> list[str]:
    """Where the memory goes."""
    lines = [f"| | {' | '.join(KINDS)} | in all | before | TFLOP | to before |", "|---|" + "---|" * (len(KINDS) + 4)]
    for name, trace in traces.items():
        cells = [f"{trace.by_kind[kind] / GIB:.2f}" for kind in KINDS]
        work = trace.flops / 1e12, trace.flops / before[name].flops
        cells += [f"{trace.peak / GIB:.2f}", f"{before[name].peak / GIB:.2f}", f"{work[0]:.1f}", f"{work[1]:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def batch_table(traces: dict[str, Trace]) -> list[str]:
    """Peak with the allowance at several batch sizes."""
    lines = ["| | " + " | ".join(map(str, BATCHES)) + " |", "|---|" + "---|" * len(BATCHES)]
    for name, trace in traces.items():
        peaks = [peak_at(trace, BATCH, batch) for batch in BATCHES]
        lines.append(f"| {name} | " + " | ".join(f"{(peak + allowance(peak)) / GIB:.1f}" for peak in peaks) + " |")
    return lines


if __name__ == "__main__":
    main()
