"""Memories with passes of their own: what they add to a step, and what they leave alone."""

import pytest
import torch
from craft_fixtures import action_loss, gradients, make_batch, make_policy, norm, perturb, split
from torch import nn

from prismatic.craft import CRaFTConfig, CRaFTConstraint, OutputSignal, Plan

MEMORY = 11  # seed of a batch that is not trained on


def actions(policy, batch):
    return policy(batch)[0]


def make_held(policy, memories: int = 1, **settings) -> CRaFTConstraint:
    config = CRaFTConfig.from_preset("keep", **{"retention_budget": 0.05, **settings})
    return CRaFTConstraint(policy, config, OutputSignal(actions, "actions"), memories=memories)


def held_step(policy, constraint, micro_batches, memories) -> dict:
    """One step: per micro-batch its part of each memory, then the action loss; returns the metrics."""
    share = 1 / len(micro_batches)
    for i, batch in enumerate(micro_batches):
        for name, pieces in memories.items():
            constraint.hold(pieces[i], share, name=name)
        (share * action_loss(actions(policy, batch), batch)).backward()
    return constraint.combine_()


def settle(constraint, lam: float = 0.7) -> None:
    """A controller in the middle of a run, with means of norms that make its multiplier known: lambda = `lam`."""
    controller = constraint.dual.controller
    controller.multiplier_for = lambda act, ret: lam if ret else 0.0


@pytest.mark.parametrize("lora", [False, True])
def test_without_drift_a_step_is_a_plain_one(lora):
    policy = make_policy(lora=lora, dropout=0.3)
    constraint = make_held(policy)
    torch.manual_seed(0)
    action_loss(actions(policy, make_batch()), make_batch()).backward()
    expected = gradients(policy)
    policy.zero_grad()
    torch.manual_seed(0)  # the passes of the memory draw nothing, so the training pass has the same dropout
    metrics = held_step(policy, constraint, [make_batch()], {"data": [make_batch(MEMORY)]})
    assert metrics["CRaFT/Retention Loss"] == 0.0
    assert metrics["CRaFT/Lambda"] == 0.0
    found = gradients(policy)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(m.training for m in policy.modules() if isinstance(m, nn.Dropout))


def test_every_trainable_weight_is_reached_and_snapshot():
    policy = make_policy()
    constraint = make_held(policy)
    trainable = {n for n, p in policy.named_parameters() if p.requires_grad}
    assert set(constraint.weights.state_dict()) == trainable
    perturb(policy)
    constraint.hold(make_batch(MEMORY))
    assert set(constraint.gradient.names) == trainable  # the head's among them


@pytest.mark.parametrize("count", [1, 4])
def test_the_step_has_the_gradient_of_the_weighted_sum(count):
    policy = make_policy()
    constraint = make_held(policy, memories=2)
    start = {n: p.detach().clone() for n, p in policy.named_parameters()}
    perturb(policy)
    settle(constraint)
    batches = {"data": make_batch(MEMORY), "instructions": make_batch(MEMORY + 1)}
    pieces = {name: split(batch, count) for name, batch in batches.items()}
    metrics = held_step(policy, constraint, split(make_batch(), count), pieces)
    found = gradients(policy)
    policy.zero_grad()
    losses = []
    for batch in batches.values():
        with torch.no_grad():
            reference = torch.func.functional_call(policy, start, (batch,))[0]
        losses.append((actions(policy, batch) - reference).square().mean())
    (action_loss(actions(policy, make_batch()), make_batch()) + 0.7 * sum(losses) / 2).backward()
    for name, expected in gradients(policy).items():
        assert norm([found[name] - expected]) <= 1e-5 * norm([expected]), name
    assert metrics["CRaFT/Retention Loss"] == pytest.approx(float(sum(losses).detach() / 2) ** 0.5, rel=1e-5)
    for name, loss in zip(batches, losses, strict=True):
        assert metrics[f"CRaFT/Drift/{name}/actions_rms"] == pytest.approx(float(loss.detach()) ** 0.5, rel=1e-5)


def test_the_share_of_the_step_is_what_the_controller_says():
    policy = make_policy()
    constraint = make_held(policy, retention_budget=1e-4)
    perturb(policy)
    shares = []
    for seed in range(6):
        policy.zero_grad()
        metrics = held_step(policy, constraint, [make_batch(seed)], {"data": [make_batch(MEMORY)]})
        ratio = metrics["CRaFT/Lambda"] * metrics["CRaFT/Retention Gradient Norm"]
        assert metrics["CRaFT/Share"] > 0
        shares.append(metrics["CRaFT/Share"])
        assert ratio > 0
    # The drift is far above the budget: the share grows to its limit and no further.
    assert shares[0] < shares[-1] <= 2.7182819


def test_a_closed_gate_without_price_measures_and_makes_no_gradient():
    policy = make_policy()
    constraint = make_held(policy, dual="off", fixed_lambda=0.0)
    perturb(policy)
    assert constraint.plan is Plan.MEASURE
    metrics = held_step(policy, constraint, [make_batch()], {"data": [make_batch(MEMORY)]})
    assert metrics["CRaFT/Retention Loss"] > 0
    assert constraint.gradient.flat is None


def test_a_fixed_price_needs_no_norms_but_separates_where_passes_are_apart():
    policy = make_policy()
    constraint = make_held(policy, dual="off", fixed_lambda=0.5)
    assert constraint.plan is Plan.SEPARATE


def test_hold_without_memories_is_an_error():
    policy = make_policy()
    with pytest.raises(ValueError, match="memories 0, expected the number of memories"):
        make_held(policy, memories=0).hold(make_batch(MEMORY))


def test_no_graph_of_the_memory_is_alive_when_the_training_pass_begins():
    policy = make_policy()
    constraint = make_held(policy)
    perturb(policy)
    constraint.hold(make_batch(MEMORY))
    constraint.reference(make_batch())  # refused inside a live graph
    assert not constraint.weights.is_swapped


@pytest.mark.parametrize("preset", ["original", "budget", "keep"])
def test_the_signal_decides_the_unit_of_the_budget(preset):
    """Outputs are held to a root mean square whatever the preset's own signal is."""
    policy = make_policy()
    config = CRaFTConfig.from_preset(preset, retention_budget=0.05)
    constraint = CRaFTConstraint(policy, config, OutputSignal(actions), memories=1)
    memory = make_batch(MEMORY)
    perturb(policy)
    reference = constraint.reference(memory)
    expected = float((actions(policy, memory) - reference).detach().square().mean()) ** 0.5
    metrics = held_step(policy, constraint, [make_batch()], {"": [memory]})
    assert metrics["CRaFT/Retention Loss"] == pytest.approx(expected)
    assert constraint.config.loss_budget == pytest.approx(0.05**2)
