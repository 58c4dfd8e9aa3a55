"""Action heads: equality with reference numbers, and properties of the start and of the inputs."""

import pytest
import torch
from model_fixtures import golden_head, max_difference, tensors

from prismatic.models.action_heads import L1RegressionActionHead, RopeMode, rope_tables

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def golden(golden_dir):
    folder = golden_dir / "action_head"
    return folder, tensors(folder / "inputs.safetensors"), tensors(folder / "expected.safetensors")


def small_head(**options):
    torch.manual_seed(0)
    defaults = {"hidden_dim": 32, "num_blocks": 2, "num_task_tokens": 6, "num_heads": 4, "chunk_len": 4}
    return L1RegressionActionHead(**(defaults | options))


def small_states(seed=0):
    return torch.randn(3, 3, 6 + 5, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["plain", "pro"])
def test_output_equals_reference(golden, kind):
    folder, inputs, expected = golden
    head, projector = golden_head(folder, kind)
    features = projector(inputs["proprio"])
    assert max_difference(features, expected["proprio_features"]) < 1e-6
    states = inputs["actions_hidden_states"]
    assert max_difference(head(states, features), expected[f"{kind}/output"]) < TOLERANCE
    noisy = head(states, features, expected[f"{kind}/train_noise"])
    assert max_difference(noisy, expected[f"{kind}/output_train_noise"]) < TOLERANCE
    by_published_call = head.predict_action(states, inputs["proprio"], projector, phase="Inference")
    assert max_difference(by_published_call, expected[f"{kind}/output"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "pro"])
def test_block_states_and_closed_gates_equal_reference(golden, kind):
    folder, inputs, expected = golden
    head, projector = golden_head(folder, kind)
    seen = {}
    for index, block in enumerate(head.model.mlp_resnet_blocks):
        block.register_forward_hook(lambda module, args, out, index=index: seen.update({index: (args[0], out)}))
    features = projector(inputs["proprio"])
    head(inputs["actions_hidden_states"], features)
    assert max_difference(seen[0][0], expected[f"{kind}/x_in"]) < TOLERANCE
    for index in (0, 1, 11, 23):
        assert max_difference(seen[index][1], expected[f"{kind}/block_{index:02d}"]) < TOLERANCE
    with torch.no_grad():
        for block in head.model.mlp_resnet_blocks:
            block.gating_factor.zero_()
    closed = head(inputs["actions_hidden_states"], features)
    assert max_difference(closed, expected[f"{kind}/output_gates_zero"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "pro"])
def test_gradients_equal_reference(golden, kind):
    folder, inputs, expected = golden
    head, projector = golden_head(folder, kind)
    states = inputs["actions_hidden_states"].clone().requires_grad_()
    (head(states, projector(inputs["proprio"])) * expected[f"{kind}/grad_weighting"]).sum().backward()
    gates = torch.cat([block.gating_factor.grad for block in head.model.mlp_resnet_blocks])
    pairs = {
        "grad_gating_factor": gates,
        "grad_fc2_weight": head.model.fc2.weight.grad,
        "grad_proprio_fc1_weight": projector.fc1.weight.grad,
        "grad_input_token_norms": states.grad.norm(dim=-1),
    }
    for name, value in pairs.items():
        scale = max(1.0, expected[f"{kind}/{name}"].abs().max().item())
        assert max_difference(value, expected[f"{kind}/{name}"]) < TOLERANCE * scale, name
    assert states.grad[:, 0].abs().max() == 0
    dead = [n for n, p in head.named_parameters() if p.grad is None]
    assert all("film_gen" in n for n in dead)
    assert len(dead) == (48 if kind == "pro" else 0)


def test_legacy_rope_equals_reference(golden):
    folder, inputs, expected = golden
    head, projector = golden_head(folder, "pro", rope_mode="legacy")
    output = head(inputs["actions_hidden_states"], projector(inputs["proprio"]))
    assert max_difference(output, expected["pro/output_legacy_rope"]) < TOLERANCE


@pytest.mark.parametrize("head_dim", [4, 112])
def test_rope_tables_equal_reference(golden, head_dim):
    stored = tensors(golden[0] / "rope_tables.safetensors")
    probe = stored[f"dim{head_dim}/exact/probe_positions"]
    legacy = rope_tables(512, head_dim, RopeMode.LEGACY)
    for name, exact, old in zip(("cos", "sin"), rope_tables(512, head_dim, RopeMode.EXACT), legacy, strict=True):
        assert max_difference(exact[probe, : head_dim // 2], stored[f"dim{head_dim}/exact/{name}_half"]) < 1e-6
        bits = stored[f"dim{head_dim}/legacy/{name}_half"].view(torch.int16)
        assert torch.equal(old[:, : head_dim // 2].contiguous().view(torch.int16), bits)
        assert torch.equal(exact[:, : head_dim // 2], exact[:, head_dim // 2 :])


def test_plain_head_repeats_one_action_and_others_do_not():
    states = small_states()

    def spread(**options):
        output = small_head(**options).eval()(states)
        return (output - output[:, :1]).abs().max().item()

    assert spread(use_pro_version=False) < 1e-6
    assert spread(use_pro_version=True) > 1e-6
    assert spread(use_pro_version=False, chunk_start="learned") > 1e-3
    assert spread(use_pro_version=True, chunk_start="learned") > 1e-3


def test_start_noise_only_in_training_phase():
    head, states = small_head().eval(), small_states()
    quiet = head(states)
    assert torch.equal(head(states), quiet)
    assert not torch.allclose(head.predict_action(states, phase="Training"), quiet)
    assert not head.training
    head.train()
    first, second = head(states), head(states)
    assert not torch.allclose(first, second)
    silent = small_head(start_noise_std=0.0).train()
    assert torch.equal(silent(states), silent(states))


def test_pair_input_equals_joint_input_and_first_layer_is_unused():
    head, states = small_head().eval(), small_states()
    joint = head(states)
    assert torch.equal(head((states[:, :, :6], states[:, :, 6:])), joint)
    other = states.clone()
    other[:, 0] = 7.0
    assert torch.equal(head(other), joint)
    other[:, 2, 3] += 1.0
    assert not torch.equal(head(other), joint)


def test_open_gate_scales_vision_logits():
    """The fused attention equals softmax([qk, qk, tanh(g) qk] / sqrt(d)) written out."""
    head, states = small_head(use_pro_version=False).eval(), small_states()
    block = head.model.mlp_resnet_blocks[0]
    with torch.no_grad():
        block.gating_factor.fill_(0.7)
    x, task, condition = torch.randn(3, 4, 32), states[:, 1, :6], states[:, 1, 6:]
    tokens = torch.cat([x, condition, task], dim=1)

    def split(t):
        return t.view(3, -1, 4, 8).transpose(1, 2)

    scores = split(block.q_proj(x)) @ split(block.k_proj(tokens)).transpose(-1, -2)
    scores[..., -6:] = scores[..., -6:] * torch.tanh(block.gating_factor)
    y = (scores / 8**0.5).softmax(-1) @ split(block.v_proj(tokens))
    expected = block.ffn(x + block.o_proj(y.transpose(1, 2).reshape(3, 4, 32)))
    assert max_difference(block(x, condition, task), expected) < 1e-5


def test_proprio_token_changes_output_and_is_optional():
    head, states = small_head().eval(), small_states()
    assert head(states).shape == (3, 4, 7)
    assert not torch.allclose(head(states, torch.randn(3, 32)), head(states))
    with pytest.raises(ValueError, match="proprio_projector"):
        head.predict_action(states, proprio=torch.zeros(3, 8))


def test_wrong_token_or_layer_counts_are_errors():
    head, states = small_head(), small_states()
    with pytest.raises(ValueError, match="6 task tokens.*got 5"):
        head((states[:, :, :5], states[:, :, 6:]))
    with pytest.raises(ValueError, match="3 hidden states"):
        head(states[:, :2])
    with pytest.raises(ValueError, match="unknown fields.*chunk"):
        L1RegressionActionHead(chunk=3)
    with pytest.raises(ValueError, match="multiple"):
        L1RegressionActionHead(hidden_dim=30)


def test_config_round_trip():
    head = small_head(rope_mode="legacy", chunk_start="learned")
    again = L1RegressionActionHead(**head.config)
    assert again.config == head.config
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.eval()(small_states()), head.eval()(small_states()))
