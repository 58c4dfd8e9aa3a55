"""Teach a network a new task and keep the old one: any module, any PyTorch loop.

The old task is the left half of a curve, the new task its right half. One network can fit both, but training on the
right half alone ruins the left. Here the outputs on old inputs are held near those of the start weights. That needs
inputs of the old task, no labels, and a budget: how far the outputs may move on them, as a root mean square.
"""

import copy

import torch
from torch import nn

from prismatic.craft import CRaFTConfig, CRaFTConstraint, OutputSignal

BUDGET = 0.03


def train(model, inputs, targets, steps, memory=None):
    """An ordinary loop. `memory`, inputs of the old task, adds the constraint."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    if memory is not None:  # made before the first step: it remembers the start weights
        config = CRaFTConfig.from_preset("keep", retention_budget=BUDGET)
        constraint = CRaFTConstraint(model, config, OutputSignal(), memories=1)
    for _ in range(steps):
        optimizer.zero_grad()
        if memory is not None:
            constraint.hold(memory)  # before the forward pass of the task's loss
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        if memory is not None:
            constraint.combine_()  # changes the gradients, before the optimizer reads them
        optimizer.step()
        schedule.step()
    return model


def curve(low, high, count):
    """Random inputs between `low` and `high` and their targets, each (count, 1)."""
    x = torch.empty(count, 1).uniform_(low, high)
    return x, torch.sin(3 * x)


def main(steps=400):
    """Print and return, on test inputs, {model: (error on the old task, on the new task, drift on old inputs)}."""
    torch.manual_seed(0)
    old, new, old_test, new_test = curve(-2, 0, 128), curve(0, 2, 128), curve(-2, 0, 1000), curve(0, 2, 1000)
    start = nn.Sequential(nn.Linear(1, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
    models = {"start": train(start, *old, steps), "plain": train(copy.deepcopy(start), *new, steps)}
    models["constrained"] = train(copy.deepcopy(start), *new, steps, memory=old[0])
    results, rms = {}, lambda x: x.detach().square().mean().sqrt().item()
    for name, model in models.items():
        old_error, new_error = (rms(model(x) - y) for x, y in (old_test, new_test))
        results[name] = old_error, new_error, rms(model(old_test[0]) - start(old_test[0]))
        print("{:12} old error {:.3f}   new error {:.3f}   drift {:.3f}".format(name, *results[name]), f"of {BUDGET}")
    return results


if __name__ == "__main__":
    main()
