"""Run by test_distributed.py, alone or under torchrun: trains each scenario and saves what this rank saw.

Arguments: output folder, data folder, start checkpoint for LoRA, JSON list of scenarios.
"""

import json
import os
import sys

import torch
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel

from prismatic.training import loop
from prismatic.training.config import FinetuneConfig
from prismatic.training.loop import Trainer, seed_everything
from prismatic.training.processes import end_processes
from prismatic.training.retention import memory
from prismatic.training.retention.memory import to_device
from prismatic.training.setup import build_setup
from prismatic.training.step import NonFiniteLossError, action_loss

torch.set_num_threads(1)
loop.SAMPLES = 8  # to land on
rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
output, data_root, start, scenarios = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])


def build(scenario: dict) -> Trainer:
    flags = {
        "config_file_path": start,
        "data_root_dir": data_root,
        "dataset_name": "libero_mini_no_noops",
        "run_root_dir": output,
        "run_id_override": scenario["name"],
        "batch_size": scenario.get("batch_size", scenario.get("global_batch", 4) // world),
        "save_freq": 1000,
        "save_training_state": False,
        "device": "cpu",
    }
    if scenario["flags"].get("use_craft"):
        flags["craft_log_freq"] = 1
    if "memory" in scenario:
        flags["craft_memory_batch_size"] = scenario["memory"] // world
    cfg = FinetuneConfig(**flags | scenario["flags"])
    seed_everything(cfg.seed)
    setup = build_setup(cfg)
    loop.to_device = memory.to_device = to_device
    if scenario.get("double"):
        # L_ret is a difference of nearly equal features: in float32 its rounding depends on the batch and processor.
        setup.model.double()
        loop.to_device = memory.to_device = in_double
    trainer = Trainer(cfg, setup, Accelerator(cpu=True))
    if scenario.get("sgd"):
        # AdamW's first steps are sign(gradient), which turns rounding of tiny gradients into full steps.
        trainer.optimizer = torch.optim.SGD([p for p in trainer.bare_model.parameters() if p.requires_grad], lr=0.01)
        trainer.cfg.learning_rate = 0.01
    return trainer


def in_double(batch: dict, device: torch.device) -> dict:
    moved = to_device(batch, device)
    floating = {k: v.double() for k, v in moved.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}
    return moved | floating


def train(scenario: dict) -> dict:
    trainer = build(scenario)
    collectives, steps, reduce, step = [], [], trainer._reduce_mean, loop.optimizer_step
    trainer._reduce_mean = lambda tensor: collectives.append(tensor.numel()) or reduce(tensor)
    loop.optimizer_step = lambda *a: steps.append(step(*a)) or steps[-1]
    trainer.fit()
    loop.optimizer_step = step
    keep = ("CRaFT/Lambda", "CRaFT/Retention Loss", "CRaFT/Conflict Ratio", "CRaFT/Gate Open")
    return {
        "weights": {name: p.detach() for name, p in trainer.bare_model.named_parameters()},
        "metrics": [{k: v for k, v in line.items() if k in keep} for line in steps],
        "dual": trainer.retention.constraint.dual.state_dict(),
        "collectives": len(collectives),
        "steps": len(steps),
        "landing": None if trainer.landing is None else trainer.landing.record(),
        "constrained_steps": trainer.retention.constraint.statistics["constrained_steps"],
    }


def head_gradients(scenario: dict) -> dict:
    """Gradient of the action head after a backward pass: in our wrapper, and called past its own, as published."""
    trainer = build(scenario)
    batch, model = next(trainer.batches()), trainer.bare_model
    parameter = max((p for p in model.action_head.parameters() if p.requires_grad), key=torch.Tensor.numel)
    action_loss(trainer.model(batch), batch["actions"])[0].backward()
    ours = parameter.grad.clone()
    model.zero_grad()
    vla = DistributedDataParallel(model.vla, find_unused_parameters=True)
    head = DistributedDataParallel(model.action_head)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "action_mask")}
    states = model.vla.bridge_states(vla(**inputs, output_hidden_states=True).hidden_states, batch["action_mask"])
    actions = head.module(states, model.proprio_projector(batch["proprio"]))
    (actions - batch["actions"]).abs().mean().backward()
    return {"ours": ours, "published": parameter.grad.clone()}


def poisoned(scenario: dict) -> dict:
    """The error that ends the run when the last process gets a NaN in its second step."""
    trainer, step, error = build(scenario), loop.optimizer_step, ""

    def poison(context, micro_batches, number):
        if number == 1 and rank == world - 1:
            micro_batches[0][scenario["poison"]].view(-1)[0] = float("nan")
        return step(context, micro_batches, number)

    loop.optimizer_step = poison
    try:
        trainer.fit()
    except NonFiniteLossError as found:
        error = str(found)
    loop.optimizer_step = step
    weights = {name: p.detach().clone() for name, p in trainer.bare_model.named_parameters()}
    finite = all(bool(p.isfinite().all()) for p in weights.values())
    return {"error": error, "step": trainer.step, "weights": weights, "finite": finite}


def validated(scenario: dict) -> dict:
    """Validation of the start weights by all processes, in batches of two."""
    trainer = build(scenario)
    chosen = trainer.validator.batches(len(trainer.setup.val_dataset))
    assert len(chosen) == (3 if world == 1 else 2 - rank), chosen
    trainer.step = trainer.cfg.max_steps
    return trainer._validate()


def kind(scenario: dict):
    special = {"head": head_gradients, "poison": poisoned, "validate": validated}
    return next((run for name, run in special.items() if name in scenario), train)


results = {s["name"]: kind(s)(s) for s in scenarios}
torch.save(results, f"{output}/rank{rank}.pt")
end_processes(Accelerator(cpu=True))
