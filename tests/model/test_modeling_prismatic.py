"""Properties of the multimodal model on a very small geometry."""

import pytest
import torch
from model_fixtures import max_difference, ragged_batch, small_config, small_model, vlm_inputs

from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, VisionTowerSpec
from prismatic.extern.hf.modeling_prismatic import (
    OpenVLAForActionPrediction,
    action_mask_from_labels,
    hide_right_padding,
    resolve_craft_layer,
)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture
def batch(model):
    return ragged_batch(model)


def run(model, batch, **options):
    with torch.no_grad():
        return model(**vlm_inputs(batch), output_hidden_states=True, **options)


def test_layout_equals_row_by_row_construction(model, batch):
    """Each row alone, built with plain loops and without padding, gives the batch's hidden states."""
    output = run(model, batch, output_projector_features=True)
    n = model.vision_backbone.num_vision_tokens
    table, queries = model.get_input_embeddings().weight, model.action_queries.weight
    for row in range(batch["input_ids"].shape[0]):
        sequence, seen = [table[batch["input_ids"][row, 0]]], 0
        sequence += list(output.projector_features[row])
        for column in range(1, int(batch["attention_mask"][row].sum())):
            if batch["action_mask"][row, column]:
                sequence.append(queries[seen])
                seen += 1
            else:
                sequence.append(table[batch["input_ids"][row, column]])
        embeddings = torch.stack(sequence)[None]
        with torch.no_grad():
            alone = model.language_model.model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
        assert seen == model.num_action_queries
        assert len(sequence) == n + int(batch["attention_mask"][row].sum())
        for joint, single in zip(output.hidden_states, alone, strict=True):
            assert max_difference(joint[row, : len(sequence)], single[0]) < 1e-5


def test_images_are_concatenated_in_order(model, batch):
    """The features of image i alone are the i-th run of patches."""
    backbone = model.vision_backbone
    with torch.no_grad():
        both = backbone(batch["pixel_values"])
        backbone.set_num_images_in_input(1)
        singles = [backbone(batch["pixel_values"][:, 6 * i : 6 * i + 6]) for i in (0, 1)]
        backbone.set_num_images_in_input(2)
    assert max_difference(both, torch.cat(singles, dim=1)) < 1e-6


def test_placeholder_and_padding_ids_are_irrelevant(model, batch):
    before = run(model, batch)
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][batch["action_mask"]] = 2**40  # no row of the table: only the slot counts
    other["input_ids"][~batch["attention_mask"]] = 3
    after = run(model, other)
    slices = [model.bridge_states(o.hidden_states, batch["action_mask"]) for o in (before, after)]
    assert torch.equal(slices[0][0], slices[1][0])
    assert torch.equal(slices[0][1], slices[1][1])


def test_craft_features_are_the_defined_slices(model, batch):
    output = run(model, batch, output_craft_features=True, craft_layer_idx=-1)
    n = model.vision_backbone.num_vision_tokens
    assert torch.equal(output.raw_latent_features, output.hidden_states[-1][:, 1 : 1 + n])
    for row in range(3):
        start = n + int(batch["action_mask"][row].float().argmax())
        assert torch.equal(output.action_query_features[row], output.hidden_states[-1][row, start : start + 5])
    default = run(model, batch, output_craft_features=True)
    assert torch.equal(default.raw_latent_features, output.hidden_states[1][:, 1 : 1 + n])


def test_raw_latents_do_not_depend_on_the_instruction_but_queries_do(model, batch):
    other = dict(batch, input_ids=batch["input_ids"].clone())
    other["input_ids"][:, 1] = (other["input_ids"][:, 1] + 7) % 50
    first, second = (run(model, b, output_craft_features=True) for b in (batch, other))
    assert torch.equal(first.raw_latent_features, second.raw_latent_features)
    assert max_difference(first.action_query_features, second.action_query_features) > 1e-3


def test_vision_plus_prompt_mask(model, batch):
    output = run(model, batch, output_craft_features=True, craft_cr_token_mode="vision_plus_prompt")
    mask, n = output.raw_latent_mask, model.vision_backbone.num_vision_tokens
    assert output.raw_latent_features.shape[:2] == mask.shape
    assert mask.sum(1).tolist() == [n + 6, n + 3, n + 4]
    assert bool(mask[:, : 1 + n].all())
    with pytest.raises(ValueError, match="vision_only|CrTokenMode"):
        run(model, batch, output_craft_features=True, craft_cr_token_mode="all")


def test_craft_switch_changes_nothing_else(model, batch):
    plain, craft = run(model, batch), run(model, batch, output_craft_features=True)
    assert plain.raw_latent_features is None
    assert plain.action_query_features is None
    for a, b in zip(plain.hidden_states, craft.hidden_states, strict=True):
        assert torch.equal(a, b)


def test_lm_head_runs_only_for_logits(model, batch):
    def refuse(*_):
        raise AssertionError("lm_head was called")

    handle = model.language_model.lm_head.register_forward_hook(refuse)
    try:
        run(model, batch, output_craft_features=True)
        with pytest.raises(AssertionError, match="lm_head was called"):
            run(model, batch, output_logits=True)
    finally:
        handle.remove()
    assert run(model, batch, output_logits=True).logits.shape[-1] == 50


def test_last_vision_block_and_pool_never_run(model, batch):
    def refuse(*_):
        raise AssertionError("unreached module ran")

    names = model.unreached_module_names()
    handles = [model.get_submodule(name).register_forward_hook(refuse) for name in names]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def test_unreached_modules_are_exactly_those_without_gradient(batch):
    model = small_model().train()
    output = model(**vlm_inputs(batch), output_craft_features=True, craft_layer_idx=1)
    (output.raw_latent_features.sum() + output.action_query_features.square().sum()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    prefixes = tuple(f"{name}." for name in model.unreached_module_names())
    assert without == {n for n, _ in model.named_parameters() if n.startswith(prefixes)}


def test_legacy_slices_are_one_position_early(model, batch):
    states = run(model, batch).hidden_states
    true_task, true_action = model.bridge_states(states, batch["action_mask"], legacy_slices=False)
    old_task, old_action = model.bridge_states(states, batch["action_mask"], legacy_slices=True)
    assert torch.equal(old_task[:, :, 1:], true_task[:, :, :-1])
    assert torch.equal(old_action[:, :, 1:], true_action[:, :, :-1])
    assert torch.equal(old_task[:, 0, 0], model.get_input_embeddings().weight[batch["input_ids"][:, 0]])


def test_labels_place_the_queries_like_the_mask(model, batch):
    labels = torch.full_like(batch["input_ids"], -100)
    labels[batch["action_mask"]] = 151500
    labels[0, 5] = 198  # the published off-by-one leaves one prompt token supervised
    assert torch.equal(action_mask_from_labels(labels), batch["action_mask"])
    by_mask = run(model, batch).hidden_states[-1]
    inputs = vlm_inputs(batch)
    del inputs["action_mask"]
    with torch.no_grad():
        by_labels = model(**inputs, labels=labels, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(by_mask, by_labels)


def test_mask_errors(model, batch):
    inputs = vlm_inputs(batch)
    short = batch["action_mask"].clone()
    short[1] &= torch.arange(short.shape[1]) != 4
    with pytest.raises(ValueError, match=r"expected 5 slots per row, found \[5, 4, 5\]"):
        model(**(inputs | {"action_mask": short}))
    with pytest.raises(ValueError, match="action_mask.*labels"):
        model(**(inputs | {"action_mask": None}))


def test_image_errors(model, batch):
    with pytest.raises(ValueError, match="expected 12 channels for num_images_in_input=2.*found 6"):
        model(**(vlm_inputs(batch) | {"pixel_values": batch["pixel_values"][:, :6]}))
    with pytest.raises(ValueError, match=r"\(16, 16\) pixels, got \(16, 8\)"):
        model(**(vlm_inputs(batch) | {"pixel_values": batch["pixel_values"][..., :8]}))


def test_unsupported_inputs_are_refused(model, batch):
    with pytest.raises(NotImplementedError, match="use_film"):
        model(**vlm_inputs(batch), use_film=True)
    with pytest.raises(TypeError, match="pixle_values"):
        model(**vlm_inputs(batch), pixle_values=None)
    ignored = model(**vlm_inputs(batch), proprio=torch.zeros(3, 8), output_hidden_states=True)
    assert torch.equal(ignored.hidden_states[-1], run(model, batch).hidden_states[-1])


@pytest.mark.parametrize(("index", "resolved"), [(None, 2), (0, 0), (4, 4), (-1, 4), (-5, 0)])
def test_craft_layer_index(index, resolved):
    assert resolve_craft_layer(index, 5) == resolved


@pytest.mark.parametrize("index", [5, -6])
def test_craft_layer_index_out_of_range(index):
    with pytest.raises(ValueError, match="-5..4"):
        resolve_craft_layer(index, 5)


def test_left_padding_keeps_its_mask():
    left = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    right = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    assert torch.equal(hide_right_padding(left), left)
    assert bool(hide_right_padding(right).all())


def test_bfloat16_is_finite_and_close(batch):
    model = small_model()
    reference = run(model, batch, output_craft_features=True)
    half = run(
        model.to(torch.bfloat16), batch | {"pixel_values": batch["pixel_values"].bfloat16()}, output_craft_features=True
    )
    for name in ("raw_latent_features", "action_query_features"):
        value = getattr(half, name)
        assert value.dtype == torch.bfloat16
        assert torch.isfinite(value).all()
        assert max_difference(value, getattr(reference, name)) < 0.5


def test_save_and_load(tmp_path, model, batch):
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(str(tmp_path / "model.safetensors"), "pt") as file:
        assert set(file.keys()) == set(model.state_dict()) - {"language_model.lm_head.weight"}
    again, report = OpenVLAForActionPrediction.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert again.language_model.lm_head.weight is again.get_input_embeddings().weight
    assert torch.equal(run(again.eval(), batch).hidden_states[-1], run(model, batch).hidden_states[-1])
    assert again.config.num_images_in_input == 2
    assert again.config.num_action_queries == 5


def test_action_queries_start_as_small_normal():
    model = small_model(
        text_config=small_config().text_config.to_dict() | {"initializer_range": 0.02, "hidden_size": 512}
    )
    assert abs(model.action_queries.weight.std().item() - 0.02) < 0.002


def test_gradient_checkpointing_gives_the_same_gradients(batch):
    grads = []
    for checkpointing in (False, True):
        model = small_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(**vlm_inputs(batch), output_craft_features=True).action_query_features.square().sum().backward()
        grads.append(model.action_queries.weight.grad)
    assert max_difference(*grads) < 1e-5


def test_text_only_runs_without_queries(model):
    output = model(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True)
    assert output.hidden_states[-1].shape == (1, 3, 32)
    with pytest.raises(ValueError, match="pixel_values"):
        model(input_ids=torch.tensor([[1, 2, 3]]), output_craft_features=True)


def test_predict_action_input_errors(model, batch):
    with pytest.raises(ValueError, match="action head"):
        model.predict_action(batch["input_ids"][:1], pixel_values=batch["pixel_values"][:1])
    with pytest.raises(ValueError, match="batch size 1, got 3"):
        model.predict_action(batch["input_ids"], action_head=torch.nn.Identity(), pixel_values=batch["pixel_values"])
    model.norm_stats = {"libero_goal_no_noops": {}}
    with pytest.raises(KeyError, match="libero_goal_no_noops"):
        model.get_action_statistics("libero_10")


@pytest.mark.parametrize(
    ("field", "value"),
    [("vision_backbone_id", "resnet"), ("llm_backbone_id", "gpt"), ("image_resize_strategy", "stretch")],
)
def test_config_rejects_unknown_ids(field, value):
    with pytest.raises(ValueError, match=field):
        OpenVLAConfig(**{field: value})


def test_config_rejects_impossible_towers():
    good = small_config().tower_specs()[0].to_dict()
    assert VisionTowerSpec.from_dict(good).num_patches == 4
    for bad in (
        {"patch_size": 17},
        {"patch_size": 3, "stem": "conv"},
        {"num_heads": 3},
        {"stem": "wavelet"},
        {"depth": 1},
        {"colour": 1},
    ):
        with pytest.raises(ValueError, match="vision tower"):
            VisionTowerSpec.from_dict(good | bad)
    with pytest.raises(ValueError, match="expected 2 towers, found 1"):
        small_config(vision_towers=[good]).tower_specs()


@pytest.mark.parametrize("backbone", ["siglip-vit-so400m", "clip-vit-l", "dinosiglip-vit-so-384px", "in1k-vit-l"])
def test_published_backbones_have_a_geometry(backbone):
    for spec in OpenVLAConfig(vision_backbone_id=backbone).tower_specs():
        assert spec.num_patches in (196, 256, 729)
