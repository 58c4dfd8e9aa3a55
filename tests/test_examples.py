"""The examples do what they say: the library keeps an old task, and the short step is the step of the training loop."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from prismatic.training.step import optimizer_step

ROOT = Path(__file__).parents[1]


def example(name: str) -> dict:
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))


@pytest.mark.parametrize("page", sorted((ROOT / "examples").glob("*.py")), ids=lambda page: page.stem)
def test_an_example_fits_on_one_page(page):
    assert len(page.read_text(encoding="utf-8").splitlines()) <= 60


def test_the_constraint_keeps_the_old_task_at_little_cost():
    module = example("constrain_your_model")
    results = module["main"]()
    (old_start, new_start, _), (old_plain, new_plain, _), (old, new, drift) = results.values()
    assert old_start < 0.05 < 0.2 < new_start, "the start model knows the old task only"
    assert new_plain < new_start / 5 and old_plain > 10 * old_start, "plain training learns and forgets"
    assert old < old_plain / 5 and new < new_start / 5
    assert 0 < drift < 1.25 * module["BUDGET"]


def test_the_short_step_is_the_step_of_the_training_loop_bit_for_bit(make_trainer):
    trainer, twin = (make_trainer(name, use_craft=True) for name in ("loop", "example"))
    policy, craft_step = twin.bare_model, example("craft_step_in_60_lines")["craft_step"]
    theta_0, lam, batches = copy.deepcopy(policy).eval(), 1.0, trainer.batches()
    trainer.model.train(), policy.train()
    conflicts, drifts = [], []
    for step in range(4):
        batch = next(batches)
        metrics = optimizer_step(trainer.step_context(), [batch], step)
        lam, l_act, l_ret = craft_step(policy, twin.optimizer, batch, theta_0, lam)
        assert (l_act, l_ret) == (metrics["VLA Train/Loss"], metrics["CRaFT/Retention Loss"])
        assert lam == trainer.retention.constraint.dual.get_lambda()
        weights, expected = policy.state_dict(), trainer.bare_model.state_dict()
        assert [name for name, value in expected.items() if not torch.equal(weights[name], value)] == []
        conflicts.append(metrics["CRaFT/Conflict Ratio"])
        drifts.append(l_ret)
    # Nothing was equal for want of work: the features moved, and there were tensors with a conflict and without.
    assert drifts[0] == 0 < min(drifts[1:])
    assert any(0 < ratio < 1 for ratio in conflicts)


def test_the_loop_of_the_documentation_holds_a_model():
    page = (ROOT / "docs" / "own_loop.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    held, plain = drift_after(code), drift_after(re.sub(r"\n *constraint\.\w+\(.*", "", code))
    assert 0 < held < plain / 5


def drift_after(code: str) -> float:
    """Root mean square of the change of a small network's outputs on old inputs, after running the code."""
    torch.manual_seed(0)
    old_inputs, inputs = torch.randn(2, 64, 8)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    start = copy.deepcopy(model)
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loss_function": nn.functional.mse_loss,
        "new_data": [(inputs, inputs[:, :4])] * 100,
        "old_data": [old_inputs] * 100,
    }
    exec(code, names)
    return (model(old_inputs) - start(old_inputs)).square().mean().sqrt().item()
