"""What CRaFT costs: step time, FLOPs and peak memory of each setting beside plain fine-tuning, interleaved in one run.

    python benchmarks/craft_overhead.py --size tiny --tuning lora
    python benchmarks/craft_overhead.py --report_only True

Random weights and one random batch. Writes raw times to results/craft_overhead/{size}_{tuning}.json (with `--rounds 0`
FLOPs alone, to {size}_{tuning}_flops.json) and its section of docs/performance.md, made from all files there. All rows
share one model and one optimizer; a row sets which weights are trained and runs its steps. The order of the rows is
shuffled in each round, and a row is compared with the plain step of the same round.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from benchmark_page import write, write_section
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.module_tracker import ModuleTracker

from prismatic.command_line import parse_or_exit
from prismatic.craft import CRaFTConfig, CRaFTFeatureExtractor, Plan, SignalKind
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.models.presets import build_policy_parts, build_vla
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.config import FinetuneConfig
from prismatic.training.lora import fixed_batch
from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.memory import InstructionMemory, Memory, take_rows
from prismatic.training.retention.signals import reaches
from prismatic.training.setup import apply_tuning
from prismatic.training.step import StepContext, action_loss, optimizer_step
from prismatic.vla.datasets.collator import VLACollator

SIZES = ("tiny", "mid", "full")
GIB = 2**30


@dataclass
class OverheadConfig:
    """Flags."""

    size: str = "tiny"  # tiny, mid (about 60 M parameters) or full (the published size)
    tuning: str = "lora"  # or full
    rounds: int = 20  # 0 counts FLOPs and times nothing
    warmup: int = 2  # rounds that are run and not counted
    batch_size: int = 4
    threads: int = 2
    lora_rank: int = 32
    seed: int = 0
    rows: str = ""  # names separated by commas; empty: all
    memory_rows: str = "all"  # names separated by commas, all or none
    output: str = "results/craft_overhead/{size}_{tuning}{only}.json"  # only: "_flops" without rounds, else nothing
    report: str = "docs/performance.md"
    count_executed: bool = True  # also count the FLOPs each row executes: one more run of every row
    report_only: bool = False
    variant: str = ""  # print the peak memory of one row, in GiB


@dataclass(frozen=True)
class Row:
    """One setting. `plan` is what its constrained steps must do; `craft` are overrides of the preset.

    `instructions` is the size of the memory `instructions`, as a share of the batch; 0: the memory is the batch itself.
    Method `bare` is the plain step after three passes over as many samples, without anything of CRaFT's.
    """

    label: str
    method: str = "craft"
    frozen: bool = False
    every: int = 1
    plan: Plan | None = None
    preset: str = "budget"
    craft: dict = field(default_factory=dict)
    instructions: float = 0.0

    @property
    def config(self) -> CRaFTConfig:
        """Settings of the constraint."""
        return CRaFTConfig.from_preset(self.preset, **self.craft)

    @property
    def holds_actions(self) -> bool:
        """Whether the actions are held, not the features."""
        return self.method in ("craft", "bare") and self.config.signal is SignalKind.ACTIONS

    @property
    def raw_only(self) -> bool:
        """Whether C_R alone is anchored."""
        return self.craft.get("anchor_type") == "raw_only"

    @property
    def baseline(self) -> str:
        """The plain row that trains the same weights."""
        return "frozen_plain" if self.frozen else "plain"


# The multiplier is held still (dual_lr 0), so that each row keeps its plan.
OPEN = {"retention_budget": 1e-12, "retention_weight": 0.0, "dual_lr": 0.0}
CLOSED = {"retention_budget": 1e12, "retention_weight": 0.0, "dual_lr": 0.0}
PRICED = {"retention_budget": 1e12, "retention_weight": 0.5, "dual_lr": 0.0}
RAW = {"anchor_type": "raw_only"}


def _rows(frozen: bool) -> dict[str, Row]:
    where = ", vision frozen" * frozen
    budget, raw = "preset `budget`", "C_R only"

    def craft(label: str, plan: Plan, settings: dict, every: int = 1, preset: str = "budget") -> Row:
        label += f", `craft_every` {every}" * (every > 1) + where
        return Row(label, "craft", frozen, every, plan, preset, settings)

    def keep(memory: str, instructions: float = 0.0, every: int = 1) -> Row:
        label = f"preset `keep`, {memory}" + f", `craft_every` {every}" * (every > 1) + where
        return Row(label, "craft", frozen, every, Plan.SEPARATE, "keep", instructions=instructions)

    def bare(instructions: float, every: int = 1) -> Row:
        size = {0.25: "a quarter", 1.0: "the whole"}[instructions]
        label = f"plain step and bare passes over {size} of the batch" + f", every {every} steps" * (every > 1) + where
        return Row(label, "bare", frozen, every, preset="keep", instructions=instructions)

    rows = {
        "plain": Row(f"plain{where}", "plain", frozen),
        "plain_logits": Row(f"plain that also computes the logits{where}", "logits", frozen),
        "procedure": Row(f"original procedure{where}", "procedure", frozen),
        "original": craft("preset `original`", Plan.SEPARATE, {}, preset="original"),
        "open": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN),
        "priced": craft(f"{budget}, gate closed, lambda > 0", Plan.FUSED, PRICED),
        "closed": craft(f"{budget}, gate closed, lambda 0", Plan.MEASURE, CLOSED),
        "open_every2": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN, 2),
        "open_every4": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN, 4),
        "open_every10": craft(f"{budget}, gate open", Plan.SEPARATE, OPEN, 10),
        "priced_every4": craft(f"{budget}, gate closed, lambda > 0", Plan.FUSED, PRICED, 4),
        "raw_open": craft(f"{raw}, gate open", Plan.SEPARATE, OPEN | RAW),
        "raw_priced": craft(f"{raw}, gate closed, lambda > 0", Plan.FUSED, PRICED | RAW),
        "raw_closed": craft(f"{raw}, gate closed, lambda 0", Plan.MEASURE, CLOSED | RAW),
        "raw_open_every4": craft(f"{raw}, gate open", Plan.SEPARATE, OPEN | RAW, 4),
        "keep_quarter": keep("instructions on a quarter of the batch", 0.25),
        "keep_quarter_every2": keep("instructions on a quarter of the batch", 0.25, 2),
        "keep_half_every2": keep("instructions on half of the batch", 0.5, 2),
        "keep_whole": keep("instructions on the whole batch", 1.0),
        "keep_batch": keep("memory `batch`"),
    }
    if not frozen:  # else the towers would run twice
        rows |= {f"bare_{size}": bare(share) for size, share in (("quarter", 0.25), ("whole", 1.0))}
        rows["bare_quarter_every2"] = bare(0.25, 2)
    return {("frozen_" if frozen else "") + name: row for name, row in rows.items()}


ROWS = _rows(frozen=False) | _rows(frozen=True)

INSTRUCTIONS = ("pick up the milk and place it in the basket", "open the top drawer", "turn on the stove")
"""Old instructions of the rows that hold the policy on some."""

# Published size, LoRA, by hand from 2 * parameters * tokens, relative to upstream's plain step
# (with logits) that trains the same weights.
DERIVED = {
    "plain_logits": 1.00,
    "plain": 0.94,
    "procedure": 1.95,
    "open": 1.83,
    "closed": 1.39,
    "open_every4": 1.16,
    "frozen_plain_logits": 1.00,
    "frozen_procedure": 1.93,
    "frozen_open": 1.40,
    "frozen_raw_open": 1.16,
    "frozen_raw_closed": 1.04,
    "frozen_open_every4": 1.04,
}


def mid_config() -> OpenVLAConfig:
    """About 60 M parameters with the published ratio of vision to language FLOPs (about 1.5): 160 px, two images."""
    tower = {"image_size": 160, "patch_size": 16, "embed_dim": 384, "depth": 9, "num_heads": 6, "mlp_hidden_dim": 1536}
    text = {
        "model_type": "qwen2",
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return OpenVLAConfig(
        vision_backbone_id="dinosiglip-vit-so-224px",
        llm_backbone_id="qwen25-0_5b-extra",
        arch_specifier="no-align+fused-gelu-mlp",
        image_resize_strategy="resize-naive",
        image_sizes=[160, 160],
        num_images_in_input=2,
        pad_token_id=0,
        projector_hidden_multiplier=1,
        vision_towers=[{**tower, "class_token": True, "reg_tokens": 4, "layer_scale": True}, tower],
        text_config=text,
    )


# ------------------------------------------------------------------------------------------------- what is measured


class Bench:
    """One model, one optimizer and one batch for all rows.

    Args:
        cfg: flags.
        names: rows to prepare. theta_0 of every constraint is the weights at this moment.
    """

    def __init__(self, cfg: OverheadConfig, names: list[str]) -> None:
        self.model = build_model(cfg)
        self.batch = random_batch(self.model, cfg)
        self._vision = [p for p in self.model.vla.vision_backbone.parameters() if p.requires_grad]
        self._adapters = [m for m in self.model.vla.vision_backbone.modules() if isinstance(m, BaseTunerLayer)]
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
        self._step = 0
        self.crafts: dict[str, CRaFT] = {}
        self.counted: dict[str, CRaFT] = {}  # that have the passes of a bare row, whose FLOPs are counted
        self.procedures: dict[str, OriginalProcedure] = {}
        accelerator = Accelerator(cpu=True)
        prompts = RandomPrompts(self.batch, self.model.vla.config.text_config.vocab_size)
        for name in names:
            row = ROWS[name]
            self.train_vision(not row.frozen)
            if row.method in ("craft", "bare"):
                memory = memory_of(row, cfg.batch_size, prompts)
                made = self.crafts if row.method == "craft" else self.counted
                made[name] = CRaFT(self.model, row.config, [memory], accelerator, row.every)
            elif row.method == "procedure":
                self.procedures[name] = OriginalProcedure(self.model, self.optimizer)

    def train_vision(self, wanted: bool) -> None:
        """Freeze or unfreeze the towers as `--freeze_vision` does: without adapters in them when frozen."""
        for layer in self._adapters:
            layer.enable_adapters(wanted)
        for parameter in self._vision:
            parameter.requires_grad_(wanted)

    def prime(self, name: str) -> None:
        """Run steps until the row's plan is in place: the gate opens after the first measurement."""
        for _ in range(3):
            if name not in self.crafts or self.crafts[name].constraint.plan is ROWS[name].plan:
                return
            self.run(name, check=False)

    def run(self, name: str, check: bool = True) -> list[float]:
        """Seconds of each of the row's `every` steps, the constrained one first.

        Raises RuntimeError when the constrained step would not follow the row's plan.
        """
        row, seconds = ROWS[name], []
        for i in range(row.every):
            craft = self.crafts[name].at(i) if name in self.crafts else None
            if check and craft is not None:
                require_plan(name, craft)
            self.train_vision(not row.frozen)
            started = time.perf_counter()
            self.take_step(name, craft, first=i == 0)
            seconds.append(time.perf_counter() - started)
        return seconds

    def take_step(self, name: str, craft: CRaFT | None, first: bool = True) -> None:
        """One optimizer step of a row; `first`: of its `every` steps."""
        self._step += 1
        method = ROWS[name].method
        if method == "bare" and first:
            self._bare_passes(ROWS[name].instructions)
        if method == "procedure":
            self.procedures[name].step(self.batch)
        elif method == "logits":
            logits_step(self.model, self.optimizer, self.batch)
        else:
            optimizer_step(StepContext(self.model, self.optimizer, craft), [self.batch], self._step)

    def _bare_passes(self, share: float) -> None:
        """A pass without and one with gradients, and the gradients, over the first samples of the batch."""
        rows = take_rows(self.batch, range(round(share * len(self.batch["input_ids"]))))
        with torch.no_grad():
            reference = self.model(rows).actions
        loss = (self.model(rows).actions - reference - 1).square().mean()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, parameters, allow_unused=True)


def require_plan(name: str, craft: CRaFT) -> None:
    """RuntimeError unless the coming step of a row's constraint follows the row's plan."""
    found, expected = craft.constraint.plan, ROWS[name].plan
    if found is not expected:
        raise RuntimeError(f"row {name}: the step would be {found.value}, expected {expected.value}")


def build_model(cfg: OverheadConfig) -> VLAPolicyModel:
    """Random weights with the trainable ones chosen."""
    if cfg.size == "mid":
        parts = build_policy_parts(mid_config(), published_layout=False)
    else:
        parts = build_vla({"tiny": "tiny", "full": "qwen25-0_5b"}[cfg.size])
    model = VLAPolicyModel(*parts)
    lora = {"use_lora": True, "lora_rank": cfg.lora_rank} if cfg.tuning == "lora" else {}
    apply_tuning(model, FinetuneConfig(**lora))
    return model.train()


def random_batch(model: VLAPolicyModel, cfg: OverheadConfig) -> dict:
    """Noise images, random prompt of 50 tokens (24 below the published size), random state and actions."""
    batch = fixed_batch(model, rows=cfg.batch_size, prompt_length=50 if cfg.size == "full" else 24)
    geometry, generator = model.action_head.geometry, torch.Generator().manual_seed(1)
    batch["actions"] = 2 * torch.rand(cfg.batch_size, geometry.chunk_len, geometry.action_dim, generator=generator) - 1
    batch["keys"] = [(0, i) for i in range(cfg.batch_size)]
    return batch


class RandomPrompts:
    """Prompts of random ids, as long as those of `batch`: a part of the batch costs that part of a pass over it."""

    def __init__(self, batch: dict, vocab_size: int) -> None:
        self._masks = {name: batch[name] for name in ("attention_mask", "action_mask")}
        self._vocab_size = vocab_size

    def tokenize(self, instructions: Sequence[str]) -> dict[str, Tensor]:
        """input_ids, attention_mask, action_mask, each (B, L), of at most as many rows as the batch has."""
        masks = {name: mask[: len(instructions)] for name, mask in self._masks.items()}
        return {"input_ids": torch.randint(self._vocab_size, masks["action_mask"].shape), **masks}


def memory_of(row: Row, batch_size: int, collate: RandomPrompts | VLACollator) -> Memory:
    """The memory of a row; ValueError when the batch cannot be divided as it asks."""
    if row.instructions == 0:
        return Memory()
    size = row.instructions * batch_size
    if not size.is_integer():
        raise ValueError(
            f"--batch_size {batch_size}: row {row.label!r} takes {row.instructions:g} of the batch, expected a whole "
            f"number of samples; give a multiple of {round(1 / row.instructions)}, or name other rows with --rows"
        )
    return InstructionMemory(INSTRUCTIONS, collate, seed=0, size=int(size))


def forward_with_logits(model: VLAPolicyModel, batch: dict):
    """(model output, actions (B, K, A)) of the causal LM with its logits, which nothing reads, as upstream does."""
    output = model.vla(
        **{name: batch[name] for name in ("input_ids", "attention_mask", "action_mask", "pixel_values")},
        output_hidden_states=True,
        output_craft_features=True,
        output_logits=True,
    )
    states = model.vla.bridge_states(output.hidden_states, batch["action_mask"], model.legacy_slices)
    return output, lambda: model.action_head(states, model.proprio_projector(batch["proprio"]))


def logits_step(model: VLAPolicyModel, optimizer: torch.optim.Optimizer, batch: dict) -> None:
    """Plain step of the upstream procedure."""
    _, actions = forward_with_logits(model, batch)
    loss = (actions() - batch["actions"]).abs().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class OriginalProcedure:
    """One step as the original notes write it (docs/IDEA.md section 6), with its costs.

    Weights are copied out and in around the anchor pass, both passes are those of the causal LM with logits, both
    gradients come from a `backward` of their own and are cloned, and projection is a loop with a host decision per
    tensor. Two errors are left out because they would make it cheaper: gradients of the head are kept, and the mask
    places C_AQ.
    """

    def __init__(self, model: VLAPolicyModel, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.config = CRaFTConfig()
        self.extractor = CRaFTFeatureExtractor(self.config)
        trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        in_vla = reaches(model, [model.vla])
        self.vla = [p for n, p in trainable if in_vla(n)]
        self.all = [p for _, p in trainable]
        self.initial = [p.detach().clone() for p in self.vla]
        self.multiplier = self.config.retention_weight

    def _features(self, output) -> Tensor:
        return self.extractor(output.raw_latent_features, output.action_query_features)

    @torch.no_grad()
    def _anchor(self, batch: dict) -> Tensor:
        current = [p.data.clone() for p in self.vla]
        for p, initial in zip(self.vla, self.initial, strict=True):
            p.data.copy_(initial)
        features = self._features(forward_with_logits(self.model, batch)[0])
        for p, saved in zip(self.vla, current, strict=True):
            p.data.copy_(saved)
        return features

    def step(self, batch: dict) -> None:
        """One optimizer step."""
        anchor = self._anchor(batch)
        output, actions = forward_with_logits(self.model, batch)
        loss = (actions() - batch["actions"]).abs().mean()
        retention = (self._features(output) - anchor).square().mean()
        loss.backward(retain_graph=True)
        g_act = [None if p.grad is None else p.grad.clone() for p in self.all]
        self.optimizer.zero_grad()
        retention.backward()
        g_ret = [None if p.grad is None else p.grad.clone() for p in self.all]
        for p, a, r in zip(self.all, g_act, g_ret, strict=True):
            p.grad = a if a is None or r is None else self._combined(a, r)
        self.optimizer.step()
        self.multiplier = max(0.0, self.multiplier + self.config.dual_lr * (retention.item() - 0.1))
        self.optimizer.zero_grad()

    def _combined(self, a: Tensor, r: Tensor) -> Tensor:
        dot = (a * r).sum()
        if dot.item() < 0:
            a = a - dot / ((r * r).sum() + self.config.projection_eps) * r
        return a + self.multiplier * r


# ------------------------------------------------------------------------------------------------------------ FLOPs


def count(run: Callable[[], object]) -> int:
    """FLOPs of matrix products, convolutions and attention that `run` executes; elementwise work is not counted."""
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_cpu_attention())
    counter.mod_tracker = _NoModules()
    with counter:
        run()
    return counter.get_total_flops()


class _NoModules(ModuleTracker):
    """Does not tell modules apart. The hooks for that fail in `autograd.grad` where a module's input is a weight."""

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def _cpu_attention() -> dict:
    """The counter's registry lacks the fused attention of CPUs; its formulas are those of the CUDA kernels."""

    def forward(query, key, value, *_args, out_shape=None, **_kwargs) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(grad_out, query, key, value, *_args, out_shape=None, **_kwargs) -> int:
        return flop_counter.sdpa_backward_flop_count(grad_out, query, key, value)

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


def flop_parts(bench: Bench, frozen: bool, raw_only: bool) -> dict[str, int]:
    """FLOPs of the pieces a step is made of, vision computed once when it is frozen.

    shared (vision, when both passes use it), forward and anchor (without that), backward (of L_act), fused (backward
    of L_act + L_ret) and retention (of L_ret alone).
    """
    bench.train_vision(not frozen)
    model, parts = bench.model, {}
    craft = bench.crafts[("frozen_" if frozen else "") + ("raw_open" if raw_only else "open")]
    batch = {}
    parts["shared"] = count(lambda: batch.update(model.share_vision(bench.batch)))
    held = {}
    parts["anchor"] = count(lambda: held.update(anchor=craft.constraint.reference(batch)))

    def forward() -> None:
        output = model(batch, craft.request)
        held["act"], _ = action_loss(output, batch["actions"])
        held["ret"] = craft.constraint.signal.loss(craft.value_of(output), held["anchor"])

    parts["forward"] = count(forward)
    parts["retention"] = count(lambda: gradient(model, held["ret"], keep=True))
    parts["backward"] = count(lambda: gradient(model, held["act"], keep=True))
    parts["fused"] = count(lambda: gradient(model, held["act"] + held["ret"]))
    return parts


def memory_parts(bench: Bench, name: str) -> dict[str, int]:
    """FLOPs of the pieces that hold the actions of a row on its memory, vision left out when it is frozen.

    reference (the policy under theta_0), memory_forward (0 when the training pass gives the actions), memory_backward.
    """
    craft, model = (bench.crafts | bench.counted)[name], bench.model
    bench.train_vision(not ROWS[name].frozen)
    batch = craft.memories[0].batch(model.share_vision(bench.batch))
    held = {}
    reference = count(lambda: held.update(anchor=craft.constraint.reference(batch)))
    forward = count(lambda: held.update(actions=model(batch).actions))
    loss = craft.constraint.signal.loss(held["actions"], held["anchor"])
    backward = count(lambda: gradient(model, loss))
    return {
        "reference": reference,
        "memory_forward": 0 if craft.shares_pass else forward,
        "memory_backward": backward,
    }


def gradient(model: VLAPolicyModel, loss: Tensor, keep: bool = False) -> None:
    """One backward pass of a loss to all trained weights; `keep` leaves its graph for another one."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)


def floor_flops(row: Row, parts: dict[str, int]) -> float:
    """FLOPs per step that a row cannot do without, averaged over `every` steps.

    parts: `flop_parts`, and of a row that holds the actions also `memory_parts`. `original procedure` and `plain that
    also computes the logits` need what `original` and `plain` need.
    """
    plain = parts["shared"] + parts["forward"] + parts["backward"]
    if row.method in ("plain", "logits"):
        return plain
    if row.holds_actions:
        memory = parts["reference"] + parts["memory_forward"] + parts["memory_backward"]
        return plain + memory / row.every
    constrained = plain + parts["anchor"]
    if row.plan is Plan.FUSED:
        constrained += parts["fused"] - parts["backward"]
    elif row.plan is not Plan.MEASURE:
        constrained += parts["retention"]
    return (constrained + (row.every - 1) * plain) / row.every


def count_flops(bench: Bench, names: list[str], with_executed: bool) -> dict[str, dict[str, float]]:
    """Per row: `floor` (what it needs) and `executed` (what its step runs, if wanted), FLOPs per optimizer step."""
    counted: dict[str, dict[str, int]] = {}
    result = {}
    for name in names:
        row = ROWS[name]
        key = parts_key(row.frozen, row.raw_only)
        if key not in counted:
            counted[key] = flop_parts(bench, row.frozen, row.raw_only)
        parts = counted[key]
        if row.holds_actions:
            key += f"_memory_{row.instructions:g}"
            if key not in counted:
                counted[key] = memory_parts(bench, name)
            parts = parts | counted[key]
        result[name] = {"floor": floor_flops(row, parts)}
        if with_executed:
            result[name]["executed"] = count(lambda name=name: bench.run(name)) / row.every
    return result | {"parts": counted}


def parts_key(frozen: bool, raw_only: bool) -> str:
    """Name of a set of `flop_parts` in the results."""
    return ("frozen" if frozen else "all") + ("_raw" if raw_only else "")


# --------------------------------------------------------------------------------------------------------- the runs


def measure_times(bench: Bench, cfg: OverheadConfig, names: list[str]) -> dict[str, list[list[float]]]:
    """Seconds per row, round and step; rounds of warm-up are run and left out."""
    times: dict[str, list[list[float]]] = {name: [] for name in names}
    shuffler = random.Random(cfg.seed)
    for round_ in range(cfg.warmup + cfg.rounds if cfg.rounds else 0):
        order = list(names)
        shuffler.shuffle(order)
        for name in order:
            seconds = bench.run(name)
            if round_ >= cfg.warmup:
                times[name].append(seconds)
        print(f"round {round_ + 1}/{cfg.warmup + cfg.rounds}", flush=True)
    return times


def measure_memory(cfg: OverheadConfig, name: str) -> dict[str, float]:
    """GiB of this process: before the first step, and the peak over the steps of one row."""
    torch.set_num_threads(cfg.threads)
    bench = Bench(cfg, [name])
    before = resident()
    for _ in range(3):
        bench.run(name, check=False)
    return {"before": before, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def memory_in_child(cfg: OverheadConfig, name: str) -> dict[str, float]:
    """`measure_memory` in a process of its own, which starts before this one has used torch's threads."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure_memory, (cfg, name))


def resident() -> float:
    """Resident size of the process now, GiB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / GIB


def run_all(cfg: OverheadConfig) -> dict:
    """All measurements of one size and tuning."""
    names = _selected(cfg.rows, list(ROWS))
    memory_names = [] if cfg.memory_rows == "none" else _selected(cfg.memory_rows.replace("all", cfg.rows), names)
    memory = {name: memory_in_child(cfg, name) for name in memory_names}
    torch.set_num_threads(cfg.threads)
    # The FLOP count takes features of these two or four whatever is timed.
    needed = {("frozen_" if ROWS[n].frozen else "") + ("raw_open" if ROWS[n].raw_only else "open") for n in names}
    bench = Bench(cfg, [*names, *(needed - set(names))])
    bench.take_step("plain", None)  # away from theta_0, where L_ret is zero
    for name in names:
        bench.prime(name)
    flops = count_flops(bench, names, cfg.count_executed)
    times = measure_times(bench, cfg, names)
    trained = sum(p.numel() for p in bench.optimizer.param_groups[0]["params"])
    return {
        "size": cfg.size,
        "tuning": cfg.tuning,
        "batch_size": cfg.batch_size,
        "rounds": cfg.rounds,
        "warmup": cfg.warmup,
        "lora_rank": cfg.lora_rank if cfg.tuning == "lora" else None,
        "parameters": {"total": sum(p.numel() for p in bench.model.parameters()), "trained": trained},
        "machine": {"threads": cfg.threads, "python": platform.python_version(), "torch": torch.__version__},
        "seconds": times,
        "flops": flops,
        "memory_gib": memory,
    }


def _selected(given: str, known: list[str]) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"unknown rows {unknown}; known are {known}")
    return names or known


# --------------------------------------------------------------------------------------------------------- the page


def per_step(rounds: list[list[float]]) -> list[float]:
    """Seconds per optimizer step of each round."""
    return [sum(steps) / len(steps) for steps in rounds]


def paired_ratio(times: list[float], base: list[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of times[i] / base[i] with a 95 % bootstrap interval of the median (2000 resamples)."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[49], medians[1949]


def table(result: dict) -> list[str]:
    """Markdown lines of one result."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    lines = [
        "| setting | ms | ratio to plain (95 %) | floor | measured / floor | executed FLOPs / floor | "
        "ratio to plain, vision frozen | floor | measured / floor | peak GiB | of it in the steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (n for n in ROWS if n in seconds):
        row, flops = ROWS[name], result["flops"][name]
        cells = [row.label, f"{1000 * statistics.median(seconds[name]):.0f}", *_against(result, seconds, name, "plain")]
        cells.append(f"{flops['executed'] / flops['floor']:.2f}" if "executed" in flops else "")
        cells += _against(result, seconds, name, "frozen_plain") if row.frozen else ["", "", ""]
        memory = result["memory_gib"].get(name)
        cells += [f"{memory['peak']:.2f}", f"{memory['peak'] - memory['before']:.2f}"] if memory else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def flop_table(result: dict) -> list[str]:
    """Markdown lines of a result without times."""
    lines = ["| setting | floor | executed FLOPs / floor | floor to plain, vision frozen |", "|---|---|---|---|"]
    for name in (n for n in ROWS if n in result["seconds"]):
        own = result["flops"][name]
        bases = ("plain", "frozen_plain") if ROWS[name].frozen else ("plain",)
        floors = [own["floor"] / result["flops"][base]["floor"] if base in result["flops"] else None for base in bases]
        cells = ["" if value is None else f"{value:.2f}" for value in floors] + [""] * (2 - len(bases))
        executed = f"{own['executed'] / own['floor']:.2f}" if "executed" in own else ""
        lines.append(f"| {ROWS[name].label} | {cells[0]} | {executed} | {cells[1]} |")
    return lines


def _against(result: dict, seconds: dict[str, list[float]], name: str, base: str) -> list[str]:
    if base not in seconds:
        return ["", "", ""]
    median, low, high = paired_ratio(seconds[name], seconds[base])
    floor = result["flops"][name]["floor"] / result["flops"][base]["floor"]
    return [f"{median:.2f} ({low:.2f}-{high:.2f})", f"{floor:.2f}", f"{median / floor:.2f}"]


def cheap_settings(result: dict, limit: float) -> list[str]:
    """Constrained rows whose median ratio to the plain step that trains the same weights is at most `limit`."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    found = []
    for name, times in seconds.items():
        row = ROWS[name]
        if row.method in ("plain", "logits", "bare") or row.baseline not in seconds:
            continue
        ratio = paired_ratio(times, seconds[row.baseline])[0]
        if ratio <= limit:
            found.append(f"{row.label} ({ratio:.2f})")
    return found


def above_floor(result: dict, tolerance: float = 0.05) -> list[str]:
    """Rows whose measured ratio is more than `tolerance` above their FLOP floor, both to their own plain row."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    found = []
    for name in seconds:
        base = ROWS[name].baseline
        if base in seconds:
            floor = result["flops"][name]["floor"] / result["flops"][base]["floor"]
            excess = paired_ratio(seconds[name], seconds[base])[0] / floor
            if excess > 1 + tolerance:
                found.append(f"{ROWS[name].label} ({excess:.2f})")
    return found


def section(result: dict) -> list[str]:
    """Heading, facts, table and the two lists of one result."""
    machine, rank, is_timed = result["machine"], result["lora_rank"], result["rounds"] > 0
    tuning = f"LoRA rank {rank}" if rank else "full tuning"
    sizes = result["parameters"]
    lines = [
        f"## {result['size']}, {tuning}, batch {result['batch_size']}" + ", FLOPs only" * (not is_timed),
        "",
        f"{sizes['total'] / 1e6:.1f} M parameters, {sizes['trained'] / 1e6:.1f} M of them trained; "
        f"{result['rounds']} rounds, {machine['threads']} thread(s), torch {machine['torch']}, "
        f"Python {machine['python']}.",
        "",
        *(table(result) if is_timed else flop_table(result)),
        "",
    ]
    if not is_timed:
        return lines
    for limit in (1.25, 1.10):
        settings = cheap_settings(result, limit) or ["none"]
        lines += [f"Settings at no more than {limit:.2f}x the plain step that trains the same weights:", ""]
        lines += [*(f"- {setting}" for setting in settings), ""]
    lines += ["More than 5 % above the floor, against the plain step that trains the same weights:", ""]
    lines += [*(f"- {row}" for row in above_floor(result) or ["none"]), ""]
    beside = beside_bare(result)
    if beside:
        lines += ["Against the plain step and bare passes over as many samples, in the same round:", ""]
        lines += [*(f"- {row}" for row in beside), ""]
    return lines


def beside_bare(result: dict) -> list[str]:
    """Rows of preset `keep` with their ratio to the same passes without CRaFT."""
    seconds = {name: per_step(rounds) for name, rounds in result["seconds"].items()}
    found = []
    for name in (n for n in seconds if ROWS[n].method == "bare"):
        kept = name.replace("bare", "keep")
        if kept in seconds:
            median, low, high = paired_ratio(seconds[kept], seconds[name])
            found.append(f"{ROWS[kept].label}: {median:.2f} ({low:.2f}-{high:.2f})")
    return found


# Logits of the published size: 2 x (512 patches + 50 prompt tokens + 64 queries) x vocabulary x width.
LOGITS_FLOPS = 2 * 626 * 151_936 * 896


def derived_section(results: list[dict]) -> list[str]:
    """The hand-derived ratios at the published size beside the counted ones."""
    full = next((r for r in results if r["size"] == "full" and r["tuning"] == "lora"), None)
    lines = [
        "## The floor derived by hand",
        "",
        "Published size, LoRA, from 2 x parameters x tokens, relative to the upstream plain step, which trains the",
        "same weights and computes logits nobody reads. `counted` is the floor from the FLOPs counted in the run",
        f"above, relative to the plain step's plus {LOGITS_FLOPS / 1e9:.0f} GFLOP for the logits. For `original",
        "procedure` the derived number is what it executes; that was not counted at this size.",
        "",
        "| setting | derived | counted |",
        "|---|---|---|",
    ]
    counted = full["flops"]["parts"] if full else {}
    for name, ratio in DERIVED.items():
        row = ROWS[name]
        parts, cell = counted.get(parts_key(row.frozen, row.raw_only)), ""
        if parts and row.method != "procedure":
            plain = floor_flops(ROWS[row.baseline], parts) + LOGITS_FLOPS * full["batch_size"]
            flops = plain if row.method == "logits" else floor_flops(row, parts)
            cell = f"{flops / plain:.2f}"
        lines.append(f"| {row.label} | {ratio:.2f} | {cell} |")
    return [*lines, ""]


HEAD = """# What CRaFT costs

This section is written by `python benchmarks/craft_overhead.py` from the files in `results/craft_overhead/`.
Do not edit.

Each row is an optimizer step with one random batch and random weights. All rows of a table run in one process, in an
order that is shuffled in each round. A ratio is the median over rounds of the row's time divided by the plain step's
time in the same round, with a bootstrap 95 % interval of the median; with five rounds or fewer the interval is little
more than the range of the rounds. Rows with `craft_every` k time k steps in a row and divide by k.

- `floor`: FLOPs the setting cannot do without (main pass, its backward pass, anchor pass, retention backward pass, each
  only as deep as needed; frozen vision once) divided by those of the plain step. Counted with
  `torch.utils.flop_counter`: matrix products, convolutions and attention. That counter does not know the fused
  attention of CPUs, so the script adds its formulas. Elementwise work, normalisation and the optimizer are not counted.
- `executed FLOPs / floor`: what the step really runs. Above 1 it does more than it must.
- `original procedure`: weights copied out and in, two backward passes over cloned gradients, the causal LM with
  logits, a Python loop over tensors. Its floor is that of the preset `original`.
- `gate closed`: the drift is below the budget. With lambda 0 only the drift is measured; with lambda > 0 one backward
  pass serves both losses. `gate open`: the drift is above the budget, the two gradients are kept apart.
- `vision frozen`: `--freeze_vision True`. The towers run once per constrained step. These rows are compared with the
  plain step that trains the vision towers and with the one that does not.
- `C_R only`: preset `budget` and `--craft_anchor_type raw_only`. The anchor pass and the retention backward pass stop
  at the middle layer.
- Preset `keep` holds the actions. On instructions: before the training pass, the policy under theta_0 answers old
  instructions on images of the batch, then the current policy does, with a backward pass of its own; the floor has
  these three at the memory's size. Memory `batch`: the actions of the training pass are held, unless the policy draws
  noise in training; the tiny preset draws none.
- `bare passes`: such three passes over the first samples of the batch, written by hand without anything of CRaFT's.
  A pass over few samples takes longer than its share of the FLOPs: half of a pass over four samples of the tiny size is
  the time of starting each operation. These rows show how much, and what CRaFT adds to it.
- Peak memory is that of a process that runs three rounds of this row only.

Measured on a CPU. Nothing here was measured on a GPU. How well preset `budget` keeps the drift at its budget with
`craft_every` 1 and 4 is measured in `results/budget/budget.md`; there the gate is open in a part of the constrained
steps only (its last column), so that a run costs less than the rows with an open gate: with a share p of open steps
`(1 - p) x` the row with the gate closed and lambda > 0, plus `p x` the row with it open.

Commands:
"""


def report(results: list[dict]) -> str:
    """The page."""
    lines = HEAD.splitlines() + [""]
    lines += [f"    {command_of(r)}" for r in results] + [""]
    for result in results:
        lines += section(result)
    return "\n".join(lines + derived_section(results)).rstrip() + "\n"


def command_of(result: dict) -> str:
    """The command line that repeats a run."""
    command = f"python benchmarks/craft_overhead.py --size {result['size']} --tuning {result['tuning']}"
    command += f" --rounds {result['rounds']} --batch_size {result['batch_size']}"
    command += f" --threads {result['machine']['threads']}"
    command += f" --warmup {result['warmup']}" if "warmup" in result else ""
    if "executed" not in result["flops"]["plain"]:
        command += " --count_executed False"
    if list(result["memory_gib"]) != list(result["seconds"]):
        command += f" --memory_rows {','.join(result['memory_gib']) or 'none'}"
    return command if set(result["seconds"]) == set(ROWS) else f"{command} --rows {','.join(result['seconds'])}"


def read_results(folder: Path) -> list[dict]:
    """All results, small sizes first."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    return sorted(results, key=lambda r: (SIZES.index(r["size"]), r["tuning"]))


def main() -> None:
    """Measure unless `--report_only`, then write the page."""
    cfg = parse_or_exit(OverheadConfig, __doc__)
    if cfg.size not in SIZES or cfg.tuning not in ("lora", "full"):
        raise ValueError(f"--size {cfg.size} --tuning {cfg.tuning}: expected one of {SIZES} and lora or full")
    if cfg.variant:
        print(json.dumps(measure_memory(cfg, cfg.variant)))
        return
    output = Path(cfg.output.format(size=cfg.size, tuning=cfg.tuning, only="_flops" * (cfg.rounds == 0)))
    if not cfg.report_only:
        write(output, json.dumps(run_all(cfg), indent=1) + "\n")
    write_section(Path(cfg.report), "craft_overhead", report(read_results(output.parent)))


if __name__ == "__main__":
    main()
