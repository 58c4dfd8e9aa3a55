"""Action heads: properties of the start, of the gate and of the inputs."""

import pytest
import torch
from model_fixtures import max_difference

from prismatic.models.action_heads import L1RegressionActionHead


def small_head(**options):
    torch.manual_seed(0)
    defaults = {"hidden_dim": 32, "num_blocks": 2, "num_task_tokens": 6, "num_heads": 4, "chunk_len": 4}
    return L1RegressionActionHead(**(defaults | options))


def small_states(seed=0):
    return torch.randn(3, 3, 6 + 5, 32, generator=torch.Generator().manual_seed(seed))


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
