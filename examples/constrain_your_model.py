"""Teach a network a new task and keep the old one: any module, any PyTorch loop.

    python examples/constrain_your_model.py     # prints errors and drift of three models, and the file of a picture

The old task is the left half of a curve, the new task its right half. One network can fit both, but training on the
right half alone ruins the left. Here the outputs on old inputs are held near those of the start weights. That needs
inputs of the old task, no labels, and a budget: how far the outputs may move on them, as a root mean square.
"""

# %% The loop, with and without the constraint
import copy
import tempfile

import matplotlib.pyplot as plt
import torch
from torch import nn

from prismatic.craft import CRaFTConfig, CRaFTConstraint, OutputSignal

BUDGET, STEPS = 0.03, 400


def train(model, inputs, targets, memory=None):
    """An ordinary loop. `memory`, inputs of the old task, adds the constraint."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, STEPS)
    if memory is not None:  # made before the first step: it remembers the start weights
        config = CRaFTConfig.from_preset("keep", retention_budget=BUDGET)
        constraint = CRaFTConstraint(model, config, OutputSignal(), memories=1)
    for _ in range(STEPS):
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


# %% The old task, then the new one: plainly, and constrained
torch.manual_seed(0)
old, new = torch.empty(128, 1).uniform_(-2, 0), torch.empty(128, 1).uniform_(0, 2)
start = nn.Sequential(nn.Linear(1, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1))
models = {"start": train(start, old, torch.sin(3 * old))}
models["plain"] = train(copy.deepcopy(start), new, torch.sin(3 * new))
models["constrained"] = train(copy.deepcopy(start), new, torch.sin(3 * new), memory=old)

# %% What each does on both halves: root mean square of its errors, and of its drift on the old one
x = torch.linspace(-2, 2, 1000)[:, None]
task, before, results = torch.sin(3 * x), start(x).detach(), {}
for name, model in models.items():
    y = model(x).detach()
    plt.plot(x, y, label=name)
    differences = (y - task)[:500], (y - task)[500:], (y - before)[:500]
    results[name] = tuple(difference.square().mean().sqrt().item() for difference in differences)
    print("{:12} old error {:.3f}   new error {:.3f}   drift {:.3f}".format(name, *results[name]), f"of {BUDGET}")
plt.plot(x, task, "--", color="black", label="old task (left), new task (right)")
plt.legend()
plt.savefig(picture := f"{tempfile.mkdtemp()}/curves.png")
print(picture)
