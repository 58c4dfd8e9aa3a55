"""`--dry_run True`: everything a run checks before its first step, and what it will need. Nothing is written."""

from __future__ import annotations

import textwrap

from accelerate import Accelerator

from prismatic.command_line import groups_of
from prismatic.training.config import FinetuneConfig
from prismatic.training.memory.report import lines
from prismatic.training.memory.start_shape import empty_start
from prismatic.training.memory.trace import precision_of, trace_step
from prismatic.training.retention.methods import build_memories
from prismatic.training.setup import build_setup
from prismatic.training.training_setup import TrainingSetup
from prismatic.vla.datasets.collator import VLACollator


def dry_run(cfg: FinetuneConfig, accelerator: Accelerator) -> None:
    """Print the resolved flags, the sizes of data and model, and the predicted memory.

    Raises what a run raises for flags, data, memories and the descriptions of the start; its weights are not read.
    """
    setup = build_setup(cfg, empty_start)
    collate = VLACollator.of_policy(setup.processor, setup.model)
    if cfg.retention.measures_drift:
        build_memories(cfg, setup, accelerator, collate)
    for line in configuration(cfg) + data_lines(cfg, setup, accelerator.num_processes):
        print(line)
    trace = trace_step(cfg, setup.model, longest_prompt(setup, collate))
    print("\n".join(lines(trace, cfg.batch_size, precision_of(cfg))))


def configuration(cfg: FinetuneConfig) -> list[str]:
    """All flags with their values, by group."""
    said: list[str] = []
    for title, entries in groups_of(type(cfg)).items():
        said.append(f"{title}:")
        said += _paragraph([f"{entry.name}={getattr(cfg, entry.name)}" for entry in entries])
    return said


def _paragraph(words: list[str]) -> list[str]:
    text = " ".join(word.replace(" ", "\0") for word in words)
    wrapped = textwrap.wrap(text, 118, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    return [line.replace("\0", " ") for line in wrapped]


def data_lines(cfg: FinetuneConfig, setup: TrainingSetup, processes: int) -> list[str]:
    """Samples, and steps until each was seen once."""
    samples, per_step = len(setup.dataset), cfg.batch_size * cfg.grad_accumulation_steps * processes
    return [
        f"run {cfg.run_id} below {cfg.run_root_dir}",
        f"{samples:,} samples, {per_step} a step: {samples / per_step:,.1f} steps per epoch, "
        f"{cfg.max_steps * per_step / samples:.2f} epochs in {cfg.max_steps:,} steps",
    ]


def longest_prompt(setup: TrainingSetup, collate: VLACollator) -> int:
    """Tokens of the longest prompt in the data, without action queries."""
    instructions = {text for entry in setup.dataset.manifest().values() for text in entry["episodes"]}
    return collate.tokenize(sorted(instructions))["input_ids"].shape[1] - setup.model.num_action_queries
