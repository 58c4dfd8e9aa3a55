"""What holds for every LLM body, and what is Llama's own: no biases, a head of its own that nothing reaches."""

import pytest
import torch
from model_fixtures import LLAMA_TEXT, max_difference, ragged_batch, small_config, small_model, vlm_inputs
from safetensors.torch import load_file, save_file
from test_native import native_components, write_native

from prismatic.extern.hf import modeling_prismatic
from prismatic.extern.hf.language_body import first_layers
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction
from prismatic.models.action_heads import L1RegressionActionHead
from prismatic.models.native import load_native_weights
from prismatic.models.presets import build_config, build_processor, head_options
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.checkpoint_files import load_vla, read_config
from prismatic.training.lora import lora_targets, unused_targets
from prismatic.training.published import check_exportable

BODIES = {"qwen2": {}, "llama": {"text_config": LLAMA_TEXT, "llm_backbone_id": "llama2-7b-pure"}}
LM_HEAD = "language_model.lm_head.weight"


@pytest.fixture(params=BODIES)
def body(request):
    return request.param


@pytest.fixture
def model(body):
    return small_model(**BODIES[body])


@torch.no_grad()
def run(model, batch, **options):
    return model(**vlm_inputs(batch), output_hidden_states=True, output_craft_features=True, **options)


def test_the_body_is_the_one_that_is_named_with_its_layer_kept_whole(model, body):
    assert model.language_model.config.model_type == body
    layer = type(model.language_model.model.layers[0]).__name__
    assert layer.lower().startswith(body) and layer in model._no_split_modules
    assert (model.language_model.model.layers[0].self_attn.q_proj.bias is None) == (body == "llama")


def test_earlier_positions_do_not_see_later_ones(model):
    batch = ragged_batch(model, (6,))
    before = run(model, batch).action_query_features
    with torch.no_grad():
        model.action_queries.weight[-1] += 1.0
    after = run(model, batch).action_query_features
    assert max_difference(after[:, :-1], before[:, :-1]) < 1e-6 < max_difference(after[:, -1], before[:, -1])


def test_padding_on_the_right_changes_nothing(model):
    together, alone = ragged_batch(model, (6, 3)), ragged_batch(model, (3,))
    length = alone["input_ids"].shape[1]
    alone["input_ids"], alone["pixel_values"] = together["input_ids"][1:, :length], together["pixel_values"][1:]
    for trusted in (False, True):
        found = run(model, together, trusted_masks=trusted).action_query_features[1:]
        assert max_difference(found, run(model, alone).action_query_features) < 1e-5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_trusted_masks_change_nothing(model, attention):
    model.language_model.set_attn_implementation(attention)
    batch = ragged_batch(model)
    checked, trusted = run(model, batch), run(model, batch, trusted_masks=True)
    assert max_difference(checked.action_query_features, trusted.action_query_features) < 1e-6


def test_the_body_cut_short_gives_the_same_layer(model):
    batch = ragged_batch(model)
    for layer in range(3):
        cut = run(model, batch, craft_layer_idx=layer, craft_raw_only=True).raw_latent_features
        assert torch.equal(cut, run(model, batch, craft_layer_idx=layer).raw_latent_features)


def test_nothing_is_recorded_of_the_body_cut_short(model, monkeypatch):
    """Newer versions of the library would hang recording hooks on its layers, beside those of the whole body."""
    asked = []

    def watched(body, count):
        cut = first_layers(body, count)
        return lambda **inputs: asked.append(inputs["output_hidden_states"]) or cut(**inputs)

    monkeypatch.setattr(modeling_prismatic, "first_layers", watched)
    output = run(model, ragged_batch(model), craft_layer_idx=1, craft_raw_only=True)
    assert asked == [False] and output.hidden_states is None


def test_no_gradient_reaches_the_head_and_every_adapter_gets_one(model, body):
    """A head of its own is never trained; a tied one is the embedding table, which is."""
    targets = lora_targets(model)
    assert not any(name.startswith("language_model.lm_head") for name in targets)
    assert "language_model.lm_head" in unused_targets(model)
    output = model(**vlm_inputs(ragged_batch(model)), output_craft_features=True)
    output.action_query_features.square().sum().backward()
    assert all(model.get_submodule(name).weight.grad is not None for name in targets)
    assert (model.language_model.lm_head.weight.grad is None) == (body == "llama")


def test_published_labels_mark_the_action_tokens_of_the_body(model, body):
    first = {"qwen2": 151387, "llama": 31744}[body]
    labels = torch.full((1, 9), -100)
    labels[0, 3] = first - 1
    labels[0, 4:] = first
    assert model.resolve_action_mask(None, labels).nonzero()[:, 1].tolist() == [4, 5, 6, 7, 8]


def test_saved_and_loaded_with_every_tensor_that_is_its_own(model, body, tmp_path):
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert (LM_HEAD in state) == (body == "llama")
    again = load_vla(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    if body == "llama":
        del state[LM_HEAD]
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"1 missing: {LM_HEAD}"):
            load_vla(tmp_path)


def test_native_weights_of_the_body(model, body, tmp_path):
    """Where embeddings and head are apart, the file must hold both."""
    components = native_components(model.state_dict())
    if body == "qwen2":
        del components["llm_backbone"]["llm.lm_head.weight"]
    write_native(tmp_path, components)
    other = small_model(seed=5, **BODIES[body])
    load_native_weights(other, tmp_path)
    for name, value in model.state_dict().items():
        assert name == "action_queries.weight" or torch.equal(other.state_dict()[name], value)
    components["llm_backbone"].pop("llm.lm_head.weight", None)
    write_native(tmp_path, components)
    if body == "llama":
        with pytest.raises(ValueError, match=LM_HEAD):
            load_native_weights(other, tmp_path)


def test_another_body_is_refused_by_name(tmp_path):
    mistral = {"text_config": LLAMA_TEXT | {"model_type": "mistral"}, "llm_backbone_id": "mistral-v0.1-7b-pure"}
    config = small_config(**mistral)
    with pytest.raises(ValueError, match="text_config.model_type is 'mistral', expected llama or qwen2"):
        OpenVLAForActionPrediction(config)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config.json: text_config.model_type is 'mistral'"):
        read_config(tmp_path)


def test_a_llama_body_is_not_exported(model, body):
    """The public code would run it with attention in both directions."""
    head = L1RegressionActionHead(hidden_dim=32, num_blocks=2, num_heads=4, num_task_tokens=8)
    with pytest.raises(ValueError, match="--export_published_layout") as refused:
        check_exportable(VLAPolicyModel(model, head))
    assert ("attends to the past alone" in str(refused.value)) == (body == "llama")


# ------------------------------------------------------------------------------------------------ the published size


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_openvla_7b_has_the_published_number_of_parameters():
    with torch.device("meta"):
        vla = OpenVLAForActionPrediction(build_config("openvla-7b"))
    queries = count(vla.action_queries)
    assert queries == 64 * 4096 and vla.bridge_layout.num_vision_tokens == 256
    assert count(vla) - queries == 7_541_237_184
    assert vla.vocab_size == 32000


def test_the_head_for_openvla_7b_is_as_wide_as_its_body_and_as_deep():
    """It holds nothing that only the public code reads: that code trains no such policy."""
    config = build_config("openvla-7b")
    options = head_options("openvla-7b", config)
    assert (options["hidden_dim"], options["num_blocks"], options["num_task_tokens"]) == (4096, 32, 256)
    assert not options["published_layout"]
    with torch.device("meta"):
        pro, plain = (L1RegressionActionHead(**options | {"use_pro_version": pro}) for pro in (True, False))
    assert not [name for name, _ in pro.named_parameters() if "film_gen" in name]
    assert count(plain) < count(pro)


def test_openvla_7b_needs_a_tokenizer_with_a_bos_token(tmp_path, llama_tokenizer):
    with pytest.raises(ValueError, match="--tokenizer_path.*meta-llama/Llama-2-7b-hf"):
        build_processor("openvla-7b")
    llama_tokenizer.save_pretrained(tmp_path / "llama")
    assert build_processor("openvla-7b", str(tmp_path / "llama")).tokenizer.bos_token_id == 1
    build_processor("tiny").tokenizer.save_pretrained(tmp_path / "qwen")
    with pytest.raises(ValueError, match=f"--tokenizer_path {tmp_path / 'qwen'}: the tokenizer has no BOS token"):
        build_processor("openvla-7b", str(tmp_path / "qwen"))
