"""FLOPs of a row: what it needs and what it executes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from overhead_bench import Bench
from overhead_rows import ROWS, Row
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.module_tracker import ModuleTracker

from prismatic.craft import Plan
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.step import action_loss


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
        "memory_forward": 0 if craft.uses_training_pass else forward,
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
