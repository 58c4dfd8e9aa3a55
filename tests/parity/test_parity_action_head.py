"""Action heads, plain and Pro, against reference numbers: outputs, block states, gradients, rotary angles."""

import re

import pytest
import torch
from parity_fixtures import assert_close, assert_gradient_close, below, golden_head, read_json, tensors

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig
from prismatic.models.action_heads import RopeMode, rope_tables

TOLERANCE = 5e-5
KINDS = ("plain", "pro")


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "action_head"


@pytest.fixture(scope="module")
def inputs(folder):
    return tensors(folder / "inputs.safetensors")


@pytest.fixture(scope="module")
def expected(folder):
    return tensors(folder / "expected.safetensors")


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def make_head(folder, inputs, expected):
    """make_head(kind, **options) -> (head, proprio projector) for the token counts of the inputs."""
    # The published number of action queries is fixed; the remaining tokens of a layer are task tokens.
    task_tokens = inputs["actions_hidden_states"].shape[2] - OpenVLAConfig().num_action_queries

    def make(kind, **options):
        chunk_len = expected[f"{kind}/output"].shape[1]
        return golden_head(folder, kind, chunk_len=chunk_len, num_task_tokens=task_tokens, **options)

    return make


def test_file_and_parameter_counts(folder, make_head, kind):
    meta = read_json(folder / "meta.json")
    head, _ = make_head(kind)
    assert len(head.state_dict()) == meta[f"{kind}_keys"]
    assert sum(p.numel() for p in head.parameters()) == meta[f"{kind}_params"]
    assert head.geometry.hidden_dim == meta["D"]


def test_output_of_inference(make_head, inputs, expected, kind):
    head, projector = make_head(kind)
    states, features = inputs["actions_hidden_states"], projector(inputs["proprio"])
    assert_close(features, expected["proprio_features"], TOLERANCE)
    assert_close(head(states, features), expected[f"{kind}/output"], TOLERANCE)
    by_published_call = head.predict_action(states, inputs["proprio"], projector, phase="Inference")
    assert_close(by_published_call, expected[f"{kind}/output"], TOLERANCE)


def test_output_of_training_phase_with_fixed_start_noise(make_head, inputs, expected, kind):
    head, projector = make_head(kind)
    noise = expected[f"{kind}/train_noise"]
    noisy = head.train()(inputs["actions_hidden_states"], projector(inputs["proprio"]), start_noise=noise)
    assert_close(noisy, expected[f"{kind}/output_train_noise"], TOLERANCE)


def test_output_with_closed_gates(make_head, inputs, expected, kind):
    head, projector = make_head(kind)
    with torch.no_grad():
        for block in head.model.mlp_resnet_blocks:
            block.gating_factor.zero_()
    closed = head(inputs["actions_hidden_states"], projector(inputs["proprio"]))
    assert_close(closed, expected[f"{kind}/output_gates_zero"], TOLERANCE)


def test_state_after_every_traced_block(make_head, inputs, expected, kind):
    head, projector = make_head(kind)
    seen = {}
    for index, block in enumerate(head.model.mlp_resnet_blocks):
        block.register_forward_hook(lambda module, args, out, index=index: seen.update({index: (args[0], out)}))
    head(inputs["actions_hidden_states"], projector(inputs["proprio"]))
    assert_close(seen[0][0], expected[f"{kind}/x_in"], TOLERANCE, "x_in")
    for number, state in below(expected, f"{kind}/block_").items():
        assert_close(seen[int(number)][1], state, TOLERANCE, f"block {number}")


def test_gradients(make_head, inputs, expected, kind):
    head, projector = make_head(kind)
    states = inputs["actions_hidden_states"].clone().requires_grad_()
    (head(states, projector(inputs["proprio"])) * expected[f"{kind}/grad_weighting"]).sum().backward()
    gradients = {
        "gating_factor": torch.cat([block.gating_factor.grad for block in head.model.mlp_resnet_blocks]),
        "fc2_weight": head.model.fc2.weight.grad,
        "proprio_fc1_weight": projector.fc1.weight.grad,
        "input_token_norms": states.grad.norm(dim=-1),
    }
    for name, reference in below(expected, f"{kind}/grad_").items():
        if name != "weighting":
            assert_gradient_close(gradients[name], reference, TOLERANCE, name)
    assert states.grad[:, 0].abs().max() == 0
    assert expected[f"{kind}/grad_input_token_norms"][:, 0].abs().max() == 0


def test_only_film_parameters_get_no_gradient(folder, make_head, inputs, kind):
    head, projector = make_head(kind)
    head(inputs["actions_hidden_states"], projector(inputs["proprio"])).sum().backward()
    dead = {name for name, parameter in head.named_parameters() if parameter.grad is None}
    *some, count = read_json(folder / "meta.json")[f"{kind}_grad_none"]
    assert set(some) <= dead
    assert len(dead) == count
    assert all(".film_gen." in name for name in dead)


def test_legacy_rotary_angles(make_head, inputs, expected):
    head, projector = make_head("pro", rope_mode="legacy")
    output = head(inputs["actions_hidden_states"], projector(inputs["proprio"]))
    assert_close(output, expected["pro/output_legacy_rope"], TOLERANCE)


def test_rotary_tables(folder):
    stored = tensors(folder / "rope_tables.safetensors")
    head_dims = {int(re.match(r"dim(\d+)/", key)[1]) for key in stored}
    assert head_dims
    for dim in head_dims:
        reference, half = below(stored, f"dim{dim}/"), dim // 2
        probe, length = reference["exact/probe_positions"], len(reference["legacy/cos_half"])
        exact, legacy = (dict(zip(("cos", "sin"), rope_tables(length, dim, m), strict=True)) for m in RopeMode)
        for name in ("cos", "sin"):
            assert_close(exact[name][probe, :half], reference[f"exact/{name}_half"], TOLERANCE, f"{dim} {name}")
            bits = reference[f"legacy/{name}_half"].view(torch.int16)
            assert torch.equal(legacy[name][:, :half].contiguous().view(torch.int16), bits), f"{dim} {name}"
            for table in (exact[name], legacy[name]):
                assert torch.equal(table[:, :half], table[:, half:])
