"""One model, one optimizer and one batch for all rows of `craft_overhead.py`."""

from __future__ import annotations

import time

import torch
from accelerate import Accelerator
from original_procedure import OriginalProcedure, logits_step
from overhead_config import OverheadConfig
from overhead_memory import RandomPrompts, memory_of
from overhead_model import build_model, random_batch
from overhead_rows import ROWS
from peft.tuners.tuners_utils import BaseTunerLayer

from prismatic.training.retention.craft import CRaFT
from prismatic.training.retention.memory import take_rows
from prismatic.training.step import StepContext, optimizer_step


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
