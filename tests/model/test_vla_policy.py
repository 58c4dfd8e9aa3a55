"""The policy module, presets and the tiny tokenizer."""

import pytest
import torch
from model_fixtures import max_difference, ragged_batch, small_model

from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.presets import PRESETS, build_config, build_processor, build_vla, get_preset, head_options
from prismatic.models.projectors import ProprioProjector
from prismatic.models.vla_policy import CraftRequest, VLAPolicyModel


def small_policy(legacy_slices=False, with_proprio=True, **overrides):
    vla = small_model()
    options = {"hidden_dim": 32, "num_blocks": 2, "num_heads": 4, "num_task_tokens": 8, "start_noise_std": 0.0}
    head = L1RegressionActionHead(**(options | overrides))
    return VLAPolicyModel(vla, head, ProprioProjector(32, 8) if with_proprio else None, legacy_slices)


def test_forward_with_and_without_constraint_features():
    policy = small_policy()
    batch = ragged_batch(policy.vla)
    plain, craft = policy(batch), policy(batch, CraftRequest(layer_idx=1))
    assert plain.actions.shape == (3, 8, 7)
    assert plain.raw_latent_features is None
    assert torch.equal(plain.actions, craft.actions)
    raw, aq, mask = policy.anchor_features(batch, CraftRequest(layer_idx=1))
    assert torch.equal(raw, craft.raw_latent_features)
    assert torch.equal(aq, craft.action_query_features)
    assert mask is None


def test_anchor_features_do_not_run_the_head():
    policy = small_policy()

    def refuse(*_):
        raise AssertionError("head ran")

    policy.action_head.register_forward_hook(refuse)
    policy.anchor_features(ragged_batch(policy.vla), CraftRequest(cr_token_mode="vision_plus_prompt"))


def test_all_trained_parts_get_gradients():
    policy = small_policy().train()
    policy(ragged_batch(policy.vla)).actions.abs().mean().backward()
    parts = (policy.vla.action_queries, policy.action_head.model.fc2, policy.proprio_projector.fc1)
    assert all(part.weight.grad.abs().max() > 0 for part in parts)


def test_slices_matter_and_proprio_is_optional():
    batch = ragged_batch(small_policy().vla)
    torch.manual_seed(0)
    true = small_policy(with_proprio=False)
    legacy = VLAPolicyModel(true.vla, true.action_head, None, legacy_slices=True)
    del batch["proprio"]
    assert max_difference(true(batch).actions, legacy(batch).actions) > 1e-6


def test_head_for_another_model_is_refused():
    with pytest.raises(ValueError, match="12 vision tokens.*8"):
        small_policy(num_task_tokens=12)
    with pytest.raises(ValueError, match="3 blocks.*2 layers"):
        small_policy(num_blocks=3)


def test_build_is_reproducible_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = build_vla("tiny", seed=1), build_vla("tiny", seed=1), build_vla("tiny", seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first, second, other, strict=True):
        pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
        assert all(torch.equal(p, q) for p, q, _ in pairs)
        assert any(not torch.equal(p, r) for p, _, r in pairs)


def test_tiny_trains_on_a_batch():
    """A few steps on one batch reduce the loss; everything reachable gets a finite gradient."""
    vla, head, projector = build_vla("tiny", seed=0)
    policy = VLAPolicyModel(vla, head, projector).train()
    batch = ragged_batch(vla, (9, 7))
    target = torch.rand(2, 8, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = (policy(batch).actions - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    unreached = tuple(vla.unreached_module_names())
    for name, parameter in vla.named_parameters():
        if not name.startswith(unreached):
            assert torch.isfinite(parameter.grad).all(), name
    assert 2e6 < sum(p.numel() for p in policy.parameters()) < 4e6


def test_presets():
    assert set(PRESETS) == {"tiny", "qwen25-0_5b", "openvla-7b", "smollm2-135m"}
    with pytest.raises(KeyError, match="qwen25-0_5b"):
        get_preset("big")
    options = head_options("qwen25-0_5b", build_config("qwen25-0_5b"))
    assert (options["num_task_tokens"], options["num_blocks"], options["hidden_dim"]) == (512, 24, 896)
    with pytest.raises(ValueError, match="tokenizer_path"):
        build_processor("qwen25-0_5b")
