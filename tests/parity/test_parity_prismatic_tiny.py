"""The complete tiny model against reference numbers: every intermediate, losses, gradients, predicted actions."""

import re

import numpy as np
import pytest
import torch
from parity_fixtures import (
    assert_close,
    assert_gradient_close,
    below,
    golden_head,
    golden_model,
    read_json,
    tensors,
)

from prismatic.craft import CRaFTConfig, CRaFTFeatureExtractor, compute_retention_loss
from prismatic.extern.hf.modeling_prismatic import resolve_craft_layer
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor
from prismatic.models.vla_policy import CraftRequest, VLAPolicyModel
from prismatic.training.step import action_loss
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.normalization import Normalizer, load_statistics

TOLERANCE = 2e-5
KINDS = ("plain", "pro")


@pytest.fixture(scope="module")
def folder(golden_dir):
    return golden_dir / "prismatic_tiny"


@pytest.fixture(scope="module")
def meta(folder):
    return read_json(folder / "meta.json")


@pytest.fixture(scope="module")
def model(folder):
    model = golden_model(folder)
    model.norm_stats = load_statistics(folder / "dataset_statistics.json")
    return model


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


@pytest.fixture(scope="module")
def spec(batch):
    return ActionSpec(*batch["actions"].shape[1:], proprio_dim=batch["proprio"].shape[1])


@pytest.fixture
def make_policy(folder, meta, model, spec):
    """make_policy(kind, **head options) -> policy on the shared VLM, without gradients from other tests."""
    model.zero_grad()

    def make(kind, **options):
        head, projector = golden_head(folder, kind, num_task_tokens=meta["N"], chunk_len=spec.chunk_len, **options)
        return VLAPolicyModel(model, head, projector, legacy_slices=True)

    yield make
    model.zero_grad()


def gradient_of(policy, name):
    """Gradient of the parameter that the reference calls, for instance, `llm_layer1_q_proj_weight`."""
    vla = policy.vla
    towers = {"dino": vla.vision_backbone.towers[0], "siglip": vla.vision_backbone.towers[-1]}
    if name == "action_queries":
        return vla.action_queries.weight.grad
    if match := re.fullmatch(r"llm_layer(\d+)_([qkvo]_proj)_weight", name):
        attention = vla.language_model.model.layers[int(match[1])].self_attn
        return attention.get_submodule(match[2]).weight.grad
    if match := re.fullmatch(r"(dino|siglip)_patch_embed_weight", name):
        return towers[match[1]].patch_embed.proj.weight.grad
    owners = {"projector": vla.projector, "head": policy.action_head.model, "proprio": policy.proprio_projector}
    owner, layer = re.fullmatch(r"(projector|head|proprio)_(fc\d)_weight", name).groups()
    return owners[owner].get_submodule(layer).weight.grad


def test_image_processor_gives_the_stored_pixel_values(model, batch):
    processor = PrismaticImageProcessor(
        use_fused_vision_backbone=model.config.use_fused_vision_backbone,
        image_resize_strategy=model.config.image_resize_strategy,
        input_sizes=[[3, tower.spec.image_size, tower.spec.image_size] for tower in model.vision_backbone.towers],
    )
    assert_close(processor.preprocess_batch(batch["images_uint8"]), batch["pixel_values"], 1e-6)


def test_sizes_follow_from_the_configuration(meta, model, expected):
    assert len(model.state_dict()) == meta["num_state_dict_keys"]
    assert model.vision_backbone.get_num_patches() == meta["patches_per_image"]
    assert model.vision_backbone.num_vision_tokens == meta["N"]
    assert (model.config.text_config.num_hidden_layers, model.llm_dim) == (meta["num_layers"], meta["D"])
    for tower, facts in zip(model.vision_backbone.towers, meta["vision_towers"], strict=True):
        assert tower.spec.num_prefix_tokens == facts["num_prefix_tokens"]
        assert tower.spec.depth - 2 == facts["feature_block_index"]
    assert len(below(expected, "hidden_states/")) == meta["num_layers"] + 1


def test_vision_features_and_projector(model, batch, expected, output):
    with torch.no_grad():
        features = model.vision_backbone(batch["pixel_values"])
    assert_close(features, expected["vision_features"], TOLERANCE)
    assert_close(output.projector_features, expected["projector_features"], TOLERANCE)


def test_hidden_states_at_real_tokens(expected, output):
    real = expected["multimodal_attention_mask"]
    reference = below(expected, "hidden_states/")
    assert len(output.hidden_states) == len(reference)
    for index, state in enumerate(output.hidden_states):
        assert_close(state[real], reference[str(index)][real], TOLERANCE, f"hidden state {index}")


def test_masks(model, batch, expected):
    assert torch.equal(model.resolve_action_mask(None, batch["labels"]), expected["action_query_mask_text"])
    with torch.no_grad():
        raw_mask = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"],
            action_mask=batch["action_mask"],
            output_craft_features=True,
            craft_cr_token_mode="vision_plus_prompt",
        ).raw_latent_mask
    queries = torch.zeros_like(raw_mask).scatter(1, expected["true_aq_positions"], True)
    assert torch.equal(raw_mask | queries, expected["multimodal_attention_mask"])
    assert not (raw_mask & queries).any()


def test_positions_of_patches_and_action_queries(model, batch, expected):
    mask = expected["multimodal_attention_mask"]
    index = torch.arange(mask.shape[1]).expand_as(mask).unsqueeze(-1)
    patches, queries = model.bridge_states([index], batch["action_mask"], legacy_slices=False)
    assert torch.equal(patches[:, 0, :, 0], expected["true_patch_positions"].expand(len(mask), -1))
    assert torch.equal(queries[:, 0, :, 0], expected["true_aq_positions"])


def test_true_and_legacy_slices(meta, model, batch, output, expected):
    task, action = model.bridge_states(output.hidden_states, batch["action_mask"], legacy_slices=True)
    assert_close(task, expected["legacy_task_slice"], TOLERANCE)
    assert_close(action, expected["legacy_action_slice"], TOLERANCE)
    task, action = model.bridge_states(output.hidden_states, batch["action_mask"], legacy_slices=False)
    assert_close(task[:, meta["anchor_layer"]], expected["C_R"], TOLERANCE)
    assert_close(action[:, -1], expected["C_AQ"], TOLERANCE)


def test_craft_features(meta, output, expected):
    assert resolve_craft_layer(None, len(output.hidden_states)) == meta["anchor_layer"]
    raw, queries = output.raw_latent_features, output.action_query_features
    assert_close(raw, expected["C_R"], TOLERANCE)
    assert_close(queries, expected["C_AQ"], TOLERANCE)
    for anchor_type, name in (("concat", "f"), ("raw_only", "C_R_mean"), ("aq_only", "C_AQ_mean")):
        features = CRaFTFeatureExtractor(CRaFTConfig(anchor_type=anchor_type))(raw, queries)
        assert_close(features, expected[name], TOLERANCE, name)


@pytest.mark.parametrize("kind", KINDS)
def test_action_loss_and_gradients(make_policy, meta, batch, expected, kind):
    policy, reference = make_policy(kind), below(expected, f"train/{kind}/")
    result = policy(batch)
    assert_close(result.actions, reference["predicted_actions"], TOLERANCE)
    loss, parts = action_loss(result, batch["actions"])
    assert_close(loss.reshape(1), reference["loss"], TOLERANCE)
    for key, name in (
        ("loss_value", "VLA Train/Loss"),
        ("curr_action_l1_loss", "VLA Train/Curr Action L1 Loss"),
        ("next_actions_l1_loss", "VLA Train/Next Actions L1 Loss"),
    ):
        assert parts[name].item() == pytest.approx(meta[f"train_{kind}_metrics"][key], abs=TOLERANCE), name
    loss.backward()
    for name, gradient in below(reference, "grad_").items():
        assert_gradient_close(gradient_of(policy, name), gradient, TOLERANCE, name)
    without = {name for name, parameter in policy.vla.named_parameters() if parameter.grad is None}
    assert without == {n for n in meta[f"train_{kind}_params_without_grad"] if not n.startswith("model.")}


@pytest.mark.parametrize("explicit_layer", [False, True])
def test_retention_losses_and_gradients(make_policy, meta, batch, expected, explicit_layer):
    policy, reference = make_policy("plain"), below(expected, "retention/")
    request = CraftRequest(layer_idx=meta["anchor_layer"] if explicit_layer else None)
    f = CRaFTFeatureExtractor(CRaFTConfig())(*policy.anchor_features(batch, request))
    loss = compute_retention_loss(f, reference["anchor_f"])
    assert_close(loss.reshape(1), reference["loss_mean_over_everything"], TOLERANCE)
    summed = loss * f.shape[1]
    name = "loss_sum_over_features_mean_over_batch"
    assert_gradient_close(summed.reshape(1), reference[name], TOLERANCE, name)
    summed.backward()
    for name, gradient in below(reference, "grad_").items():
        assert_gradient_close(gradient_of(policy, name), gradient, TOLERANCE, name)


def single_calls(folder):
    """(call number, inputs) of every stored single-sample call."""
    files = sorted(folder.glob("predict_inputs_*.safetensors"))
    assert files
    return [(int(file.stem.rsplit("_", 1)[1]), tensors(file)) for file in files]


def predict(policy, inputs, pixel_values, **options):
    """(un-normalised actions, normalised actions, what the head received, last layer's query tokens) of one call."""
    seen = {}
    hook = policy.action_head.register_forward_hook(lambda module, args, out: seen.update(states=args[0], out=out[0]))
    actions, last = policy.vla.predict_action(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=pixel_values,
        proprio=inputs["proprio_normalised"].numpy(),
        proprio_projector=policy.proprio_projector,
        action_head=policy.action_head,
        **options,
    )
    hook.remove()
    return actions, seen["out"], seen["states"], last


@pytest.mark.parametrize(
    ("kind", "rope", "suffix"), [("plain", "exact", ""), ("pro", "exact", ""), ("pro", "legacy", "_legacy_rope")]
)
def test_predict_action(folder, make_policy, meta, batch, spec, expected, kind, rope, suffix):
    policy = make_policy(kind, rope_mode=rope)
    for call, inputs in single_calls(folder):
        pixels = batch["pixel_values"][call : call + 1]
        actions, normalised, _, _ = predict(policy, inputs, pixels, unnorm_key=meta["unnorm_key"], action_spec=spec)
        reference = below(expected, f"predict/{call}/{kind}/")
        assert_close(normalised, reference[f"actions_normalised{suffix}"], TOLERANCE, f"call {call}")
        wanted = reference[f"actions_unnormalised{suffix}"].numpy()
        assert actions.dtype == wanted.dtype == np.float64
        np.testing.assert_allclose(actions, wanted, rtol=1e-7, atol=TOLERANCE)


def test_states_that_reach_the_head_in_single_calls(folder, make_policy, meta, batch, spec, expected):
    policy = make_policy("plain")
    for call, inputs in single_calls(folder):
        pixels = batch["pixel_values"][call : call + 1]
        _, _, (task, action), last = predict(policy, inputs, pixels, unnorm_key=meta["unnorm_key"], action_spec=spec)
        assert_close(task[:, :, [0, -1]], expected[f"predict/{call}/legacy_task_slice_first_and_last"], TOLERANCE)
        stored = expected[f"predict/{call}/legacy_action_slice"]
        # Not every layer is stored; the stored ones are found by content.
        layers = [int((action - state[:, None]).abs().amax(dim=(0, 2, 3)).argmin()) for state in stored.unbind(1)]
        assert layers == sorted(set(layers)) and layers[-1] == meta["num_layers"]
        assert_close(action[:, layers], stored, TOLERANCE)
        assert_close(last, stored[:, -1], TOLERANCE)


def test_unnormalisation_of_the_stored_actions(folder, meta, spec, expected):
    statistics = load_statistics(folder / "dataset_statistics.json")[meta["unnorm_key"]]
    normalizer = Normalizer(statistics, spec)
    for call, _ in single_calls(folder):
        for kind in KINDS:
            reference = below(expected, f"predict/{call}/{kind}/")
            actions = normalizer.unnormalize_action(reference["actions_normalised"].numpy())
            # The reference adds 1 in float32 before it changes to float64.
            np.testing.assert_allclose(actions, reference["actions_unnormalised"].numpy(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_single_calls_agree_with_the_batch(folder, make_policy, batch, expected, kind):
    with torch.no_grad():
        actions = make_policy(kind)(batch).actions
    for call, _ in single_calls(folder):
        assert_close(actions[call], expected[f"predict/{call}/{kind}/actions_normalised"], TOLERANCE, f"call {call}")
