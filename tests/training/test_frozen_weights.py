"""Frozen matrices are held in low precision while a run works, and are exact wherever they leave it."""

import copy

import pytest
import torch
from micro import MICRO
from torch import nn

from prismatic.models.presets import PRESETS, build_vla
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.config import FinetuneConfig
from prismatic.training.frozen_weights import exact_frozen_weights, narrow_frozen_weights
from prismatic.training.lora import fixed_batch, merged_state_dict
from prismatic.training.setup import apply_tuning


@pytest.fixture(params=["lora", "frozen", "vision"])
def pair(request, monkeypatch):
    """The same policy twice: as it was made, and with narrow frozen weights."""
    monkeypatch.setitem(PRESETS, "tiny", MICRO)
    flags = {"lora": {"use_lora": True, "lora_rank": 2}, "frozen": {"use_fz": True}, "vision": {"freeze_vision": True}}
    model = VLAPolicyModel(*build_vla("tiny"))
    apply_tuning(model, FinetuneConfig(config_file_path="tiny", **flags[request.param]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    narrow = copy.deepcopy(model)
    assert narrow_frozen_weights(narrow, torch.bfloat16) > 0
    return model, narrow


def test_matrices_that_are_not_trained_are_narrow_and_nothing_else(pair):
    matrices = (nn.Linear, nn.Conv2d, nn.Embedding)
    for module in pair[1].modules():
        for name, p in module.named_parameters(recurse=False):
            is_narrow = isinstance(module, matrices) and name == "weight" and not p.requires_grad
            assert p.dtype is (torch.bfloat16 if is_narrow else torch.float32), (module, name)


def test_a_step_under_autocast_is_the_same_to_the_bit(pair):
    results = []
    for model in pair:
        model.train()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(fixed_batch(model)).actions.float().square().mean()
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for exact, narrow in zip(*results, strict=True):
        torch.testing.assert_close(narrow, exact, rtol=2e-2, atol=1e-4)
    assert torch.equal(results[0][0], results[1][0])


def test_what_leaves_a_run_is_exact(pair):
    exact, narrow = pair
    states = [model.state_dict() for model in pair]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    if hasattr(exact.vla, "get_base_model"):
        merged = [merged_state_dict(model.vla.get_base_model()) for model in pair]
        assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])
    with exact_frozen_weights(narrow), torch.no_grad():
        batch = fixed_batch(exact)
        assert torch.equal(narrow.eval()(batch).actions, exact.eval()(batch).actions)
    test_matrices_that_are_not_trained_are_narrow_and_nothing_else(pair)
    assert all(torch.equal(t, copy.deepcopy(narrow).state_dict()[name]) for name, t in states[0].items())


def test_values_that_are_read_from_a_file_replace_the_exact_ones(pair):
    _, narrow = pair
    other = {name: tensor + 1e-4 for name, tensor in narrow.state_dict().items()}
    narrow.load_state_dict(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in narrow.state_dict().items())


def test_weights_that_lose_nothing_are_not_kept_twice():
    linear = nn.Linear(4, 4).requires_grad_(False)
    linear.weight.data = linear.weight.bfloat16().float()
    before = linear.weight.clone()
    narrow_frozen_weights(linear, torch.bfloat16)
    assert linear._exact_weight._kept is None
    assert torch.equal(linear.state_dict()["weight"], before)


def test_a_tied_weight_stays_one():
    table, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    both = nn.ModuleList([table, head]).requires_grad_(False)
    exact = table.weight.clone()
    assert narrow_frozen_weights(both, torch.float16) == exact.numel()
    assert table.weight is head.weight
    assert all(torch.equal(tensor, exact) for tensor in both.state_dict().values())
