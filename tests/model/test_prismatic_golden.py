"""A complete small model against reference numbers: every intermediate, losses, gradients, predicted actions."""

import json

import numpy as np
import pytest
import torch
from model_fixtures import golden_head, golden_model, max_difference, tensors

from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor
from prismatic.models.vla_policy import CraftRequest, VLAPolicyModel

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "prismatic_tiny"


@pytest.fixture(scope="module")
def model(folder):
    return golden_model(folder)


@pytest.fixture(scope="module")
def expected(folder):
    return tensors(folder / "expected.safetensors")


@pytest.fixture(scope="module")
def batch(folder, expected):
    values = tensors(folder / "train_inputs.safetensors")
    return {**values, "action_mask": expected["action_query_mask_text"]}


@pytest.fixture(scope="module")
def output(model, batch):
    with torch.no_grad():
        return model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            labels=batch["labels"],
            output_hidden_states=True,
            output_projector_features=True,
            output_craft_features=True,
        )


def make_policy(folder, model, kind, **options):
    meta = json.loads((folder / "meta.json").read_text())
    head, projector = golden_head(folder, kind, num_task_tokens=meta["N"], **options)
    return VLAPolicyModel(model, head, projector, legacy_slices=True)


def test_image_processor(batch):
    size = batch["images_uint8"].shape[2]
    processor = PrismaticImageProcessor(input_sizes=[[3, size, size]] * 2)
    assert max_difference(processor.preprocess_batch(batch["images_uint8"]), batch["pixel_values"]) < 1e-6


def test_key_count(folder, model):
    assert len(model.state_dict()) == json.loads((folder / "meta.json").read_text())["num_state_dict_keys"]


def test_vision_and_projector(model, batch, expected, output):
    with torch.no_grad():
        features = model.vision_backbone(batch["pixel_values"])
    assert max_difference(features, expected["vision_features"]) < TOLERANCE
    assert max_difference(output.projector_features, expected["projector_features"]) < TOLERANCE


def test_hidden_states(expected, output):
    real = expected["multimodal_attention_mask"]
    assert len(output.hidden_states) == 5
    for index, state in enumerate(output.hidden_states):
        assert max_difference(state[real], expected[f"hidden_states/{index}"][real]) < TOLERANCE, index


def test_action_mask_from_labels(model, batch, expected):
    assert torch.equal(model.resolve_action_mask(None, batch["labels"]), expected["action_query_mask_text"])


def test_craft_features(output, expected):
    assert max_difference(output.raw_latent_features, expected["C_R"]) < TOLERANCE
    assert max_difference(output.action_query_features, expected["C_AQ"]) < TOLERANCE
    f = torch.cat([output.raw_latent_features.mean(1), output.action_query_features.mean(1)], dim=-1)
    assert max_difference(f, expected["f"]) < TOLERANCE


def test_slices(model, batch, output, expected):
    task, action = model.bridge_states(output.hidden_states, batch["action_mask"], legacy_slices=True)
    assert max_difference(task, expected["legacy_task_slice"]) < TOLERANCE
    assert max_difference(action, expected["legacy_action_slice"]) < TOLERANCE
    task, action = model.bridge_states(output.hidden_states, batch["action_mask"], legacy_slices=False)
    assert max_difference(task[:, 2], expected["C_R"]) < TOLERANCE
    assert max_difference(action[:, -1], expected["C_AQ"]) < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "pro"])
def test_loss_and_gradients(folder, model, batch, expected, kind):
    policy = make_policy(folder, model, kind)
    policy.zero_grad()
    actions = policy(batch).actions
    assert max_difference(actions, expected[f"train/{kind}/predicted_actions"]) < 5e-5
    loss = (actions - batch["actions"]).abs().mean()
    assert max_difference(loss.reshape(1), expected[f"train/{kind}/loss"]) < TOLERANCE
    loss.backward()
    parameters = {
        "action_queries": model.action_queries.weight,
        "projector_fc3_weight": model.projector.fc3.weight,
        "llm_layer1_q_proj_weight": model.language_model.model.layers[1].self_attn.q_proj.weight,
        "dino_patch_embed_weight": model.vision_backbone.featurizer.patch_embed.proj.weight,
        "head_fc1_weight": policy.action_head.model.fc1.weight,
        "proprio_fc2_weight": policy.proprio_projector.fc2.weight,
    }
    for name, parameter in parameters.items():
        assert max_difference(parameter.grad, expected[f"train/{kind}/grad_{name}"]) < TOLERANCE, name
    without = {f"{n}" for n, p in model.named_parameters() if p.grad is None}
    meta = json.loads((folder / "meta.json").read_text())
    assert without == {n for n in meta[f"train_{kind}_params_without_grad"] if not n.startswith("model.")}
    model.zero_grad()


def test_retention_gradients(folder, model, batch, expected):
    model.zero_grad()
    raw, aq, mask = make_policy(folder, model, "plain").anchor_features(batch, CraftRequest())
    assert mask is None
    f = torch.cat([raw.float().mean(1), aq.float().mean(1)], dim=-1)
    squared = (f - expected["retention/anchor_f"]).square()
    loss = squared.sum(-1).mean()
    assert max_difference(loss.reshape(1), expected["retention/loss_sum_over_features_mean_over_batch"]) < 2e-4
    assert max_difference(squared.mean().reshape(1), expected["retention/loss_mean_over_everything"]) < TOLERANCE
    loss.backward()
    q_proj = model.language_model.model.layers[1].self_attn.q_proj.weight
    for name, value in (("action_queries", model.action_queries.weight), ("llm_layer1_q_proj_weight", q_proj)):
        reference = expected[f"retention/grad_{name}"]
        assert max_difference(value.grad, reference) < TOLERANCE * max(1.0, reference.abs().max().item())
    model.zero_grad()


@pytest.mark.parametrize(
    ("kind", "rope", "suffix"), [("plain", "exact", ""), ("pro", "exact", ""), ("pro", "legacy", "_legacy_rope")]
)
@pytest.mark.parametrize("index", [0, 1])
def test_predict_action(folder, model, batch, expected, kind, rope, suffix, index):
    inputs = tensors(folder / f"predict_inputs_{index}.safetensors")
    policy = make_policy(folder, model, kind, rope_mode=rope)
    actions, states = model.predict_action(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=batch["pixel_values"][index : index + 1],
        proprio=inputs["proprio_normalised"].numpy(),
        proprio_projector=policy.proprio_projector,
        action_head=policy.action_head,
        unnorm_key="libero_mini",
    )
    reference = expected[f"predict/{index}/{kind}/actions_unnormalised{suffix}"].numpy()
    assert actions.dtype == np.float64
    assert np.abs(actions - reference).max() < 5e-5
    assert max_difference(states, expected[f"predict/{index}/legacy_action_slice"][:, -1]) < TOLERANCE


def test_single_sample_call_agrees_with_batch(folder, model, batch, expected):
    """Training-style batch and predict_action give the same normalised actions for the same sample."""
    with torch.no_grad():
        actions = make_policy(folder, model, "pro")(batch).actions
    for index in (0, 1):
        assert max_difference(actions[index], expected[f"predict/{index}/pro/actions_normalised"]) < 5e-5
