"""Hugging Face conventions: Auto classes without remote code, save and load bit for bit, visible loading problems."""

import builtins
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from model_fixtures import ragged_batch, small_config, small_model, vlm_inputs
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from prismatic.extern.hf import register_auto_classes
from prismatic.extern.hf.configuration_prismatic import OpenVLAConfig, PrismaticConfig
from prismatic.extern.hf.modeling_prismatic import OpenVLAForActionPrediction, PrismaticForConditionalGeneration
from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.models.presets import build_config, build_processor
from prismatic.vla.prompts import build_prompt

HEAD = "language_model.lm_head.weight"
TABLE = "language_model.model.embed_tokens.weight"
# transformers 5 dropped AutoModelForVision2Seq, the name in published files.
MODEL_AUTO_CLASSES = [
    auto_class
    for name in ("AutoModelForImageTextToText", "AutoModelForVision2Seq")
    if (auto_class := getattr(transformers, name, None)) is not None
]
PUBLISHED_CONFIG = {
    "architectures": ["OpenVLAForActionPrediction"],
    "auto_map": {
        "AutoConfig": "configuration_prismatic.OpenVLAConfig",
        "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        "AutoModelForImageTextToText": "modeling_prismatic.OpenVLAForActionPrediction",
    },
    "model_type": "openvla",
    "vision_backbone_id": "dinosiglip-vit-so-224px",
    "llm_backbone_id": "qwen25-0_5b-extra",
    "arch_specifier": "no-align+fused-gelu-mlp",
    "use_fused_vision_backbone": True,
    "image_resize_strategy": "resize-naive",
    "image_sizes": [224, 224],
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "timm_override_act_layers": [None, None],
    "hf_llm_id": "",
    "llm_max_length": 2048,
    "pad_token_id": 32000,
    "pad_to_multiple_of": 64,
    "output_projector_states": False,
    "n_action_bins": 256,
    "norm_stats": {"bridge_orig": {"action": {"q01": [-1.0], "q99": [1.0], "mask": [True]}, "num_trajectories": 3}},
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
}
PUBLISHED_PROCESSOR_MAP = {
    "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
    "AutoProcessor": "processing_prismatic.PrismaticProcessor",
}


@pytest.fixture(autouse=True)
def registered_and_offline(monkeypatch):
    """Auto classes know ours; nobody opens a connection or asks a question (`trust_remote_code` is a prompt)."""
    attempts = []

    def refuse(*args, **_):
        attempts.append(args)
        raise OSError("no network and no prompt in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(builtins, "input", refuse)
    register_auto_classes()
    yield
    assert not attempts


@pytest.fixture(scope="module")
def model():
    return small_model(norm_stats={"a": {"action": {"q01": [0.5, -0.25]}}})


def base_model():
    """The class without action prediction, with the geometry of `small_config`."""
    values = small_config().to_dict()
    for name in ("model_type", "norm_stats", "n_action_bins"):
        values.pop(name)
    torch.manual_seed(0)
    return PrismaticForConditionalGeneration(PrismaticConfig(**values)).eval()


def load(folder, **options):
    """(model, report without its empty entries), through the Auto class."""
    loaded, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True, **options)
    return loaded, {name: set(keys) for name, keys in report.items() if keys}


def assert_same_weights(found, expected):
    assert found.keys() == expected.keys()
    differing = [k for k, v in expected.items() if found[k].dtype != v.dtype or not torch.equal(found[k], v)]
    assert not differing


def fields(config):
    """The configuration as JSON values, without what names the folder and the run-time dtype."""
    values = json.loads(json.dumps(config.to_dict()))
    for name in ("_name_or_path", "dtype", "transformers_version"):
        values.pop(name, None)
    values["text_config"].pop("dtype", None)
    return values


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def images(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 120, 100, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


# ------------------------------------------------------------------------------------------------- Auto classes


def test_importing_the_package_registers_nothing_and_is_cheap():
    code = "import sys, prismatic.extern.hf as hf; print(sorted({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("[]\n", "")


def test_registration_can_be_repeated(capfd):
    register_auto_classes()
    register_auto_classes()
    assert capfd.readouterr() == ("", "")
    assert isinstance(AutoConfig.for_model("openvla"), OpenVLAConfig)
    assert isinstance(AutoConfig.for_model("prismatic"), PrismaticConfig)


@pytest.mark.filterwarnings("ignore:The class `AutoModelForVision2Seq`:FutureWarning")
@pytest.mark.parametrize("auto_class", MODEL_AUTO_CLASSES)
@pytest.mark.parametrize("build", [small_model, base_model])
def test_auto_classes_load_a_saved_folder(tmp_path, auto_class, build):
    saved, processor = build(), build_processor("tiny")
    saved.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is type(saved.config)
    loaded = auto_class.from_pretrained(tmp_path)
    assert type(loaded) is type(saved)
    assert not loaded.training
    assert_same_weights(loaded.state_dict(), saved.state_dict())
    assert type(AutoProcessor.from_pretrained(tmp_path)) is PrismaticProcessor
    for options in ({}, {"local_files_only": True}):
        image_processor = AutoImageProcessor.from_pretrained(tmp_path, **options)
        assert type(image_processor) is PrismaticImageProcessor
        assert image_processor.to_dict() == processor.image_processor.to_dict()


@pytest.fixture
def published_folder(tmp_path):
    """Published configuration files around small weights; the folder's code raises when executed."""
    small_model().save_pretrained(tmp_path)
    towers = small_config().vision_towers
    geometry = {
        "vision_towers": towers,
        "num_action_queries": 5,
        "projector_hidden_multiplier": 1,
        "text_config": small_config().text_config.to_dict(),
    }
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG | geometry))
    build_processor("tiny").save_pretrained(tmp_path)
    edit_json(tmp_path / "preprocessor_config.json", auto_map=PUBLISHED_PROCESSOR_MAP)
    edit_json(tmp_path / "processor_config.json", auto_map={"AutoProcessor": PUBLISHED_PROCESSOR_MAP["AutoProcessor"]})
    edit_json(
        tmp_path / "tokenizer_config.json", auto_map=PUBLISHED_PROCESSOR_MAP, processor_class="PrismaticProcessor"
    )
    for name in ("configuration", "modeling", "processing"):
        (tmp_path / f"{name}_prismatic.py").write_text("raise RuntimeError('code of the folder was executed')\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore:The class `AutoModelForVision2Seq`:FutureWarning")
@pytest.mark.parametrize("auto_class", MODEL_AUTO_CLASSES)
def test_published_folder_needs_no_remote_code(published_folder, auto_class):
    assert type(AutoConfig.from_pretrained(published_folder)) is OpenVLAConfig
    # Without `dtype`, transformers 4 loads as float32 and 5 as the file says.
    loaded = auto_class.from_pretrained(published_folder, dtype=torch.float32)
    assert type(loaded) is OpenVLAForActionPrediction
    assert_same_weights(loaded.state_dict(), small_model().state_dict())
    assert loaded.norm_stats == PUBLISHED_CONFIG["norm_stats"]
    assert type(AutoImageProcessor.from_pretrained(published_folder)) is PrismaticImageProcessor
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]


@pytest.mark.parametrize("without", [None, "processor_config.json"])
def test_published_folder_gives_the_processor(published_folder, without):
    """Older published folders name the processor in preprocessor_config.json only."""
    if without:
        (published_folder / without).unlink()
    assert type(AutoProcessor.from_pretrained(published_folder)) is PrismaticProcessor


def test_published_configuration_loads_and_is_kept(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.bfloat16
    assert [spec.depth for spec in config.tower_specs()] == [24, 27]
    config.save_pretrained(tmp_path / "again")
    assert fields(AutoConfig.from_pretrained(tmp_path / "again")) == fields(config)
    stored = json.loads((tmp_path / "again" / "config.json").read_text())
    unchanged = PUBLISHED_CONFIG.keys() - {"text_config", "torch_dtype", "transformers_version", "architectures"}
    assert {name: stored[name] for name in unchanged} == {name: PUBLISHED_CONFIG[name] for name in unchanged}
    text = PUBLISHED_CONFIG["text_config"]
    kept = text.keys() - {"torch_dtype"}
    assert {name: stored["text_config"][name] for name in kept} == {name: text[name] for name in kept}


# ------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    "config",
    [
        PrismaticConfig(),
        OpenVLAConfig(),
        build_config("tiny"),
        build_config("qwen25-0_5b"),
        OpenVLAConfig(
            vision_backbone_id="dinosiglip-vit-so-384px", num_action_queries=8, norm_stats={}, n_action_bins=9
        ),
    ],
)
def test_configuration_round_trip(tmp_path, config):
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is type(config)
    assert fields(again) == fields(config)


def test_rotary_base_is_read_from_either_spelling():
    """transformers 5 writes `rope_parameters`; 4 and the published code look for `rope_theta`."""
    for rope in ({"rope_theta": 7e5}, {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}):
        config = OpenVLAConfig(llm_backbone_id="qwen25-0_5b-pure", text_config={"model_type": "qwen2", **rope})
        theta = getattr(config.text_config, "rope_theta", None)
        assert (theta or config.text_config.rope_parameters["rope_theta"]) == 7e5
        assert json.loads(config.to_json_string())["text_config"]["rope_theta"] == 7e5


# ---------------------------------------------------------------------------------------------- model round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_model_round_trip_bit_for_bit(tmp_path, model, dtype, max_shard_size):
    saved = small_model(seed=3, norm_stats=model.norm_stats)
    # Not `saved.to(dtype)`: that would round the rotary frequencies too, which no file holds and loading keeps exact.
    for parameter in saved.parameters():
        parameter.data = parameter.data.to(dtype)
    saved.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if max_shard_size == "1GB" else len(files) > 2
    assert HEAD not in {name for file in files for name in load_file(file)}
    loaded, report = load(tmp_path, dtype="auto")
    assert not report
    assert loaded.dtype is dtype
    assert_same_weights(loaded.state_dict(), saved.state_dict())
    assert fields(loaded.config) == fields(saved.config)
    batch = vlm_inputs(ragged_batch(saved))
    batch["pixel_values"] = batch["pixel_values"].to(dtype)
    with torch.no_grad():
        found, expected = (m(**batch, output_craft_features=True, output_logits=True) for m in (loaded, saved))
    assert torch.equal(found.action_query_features, expected.action_query_features)
    assert torch.equal(found.logits, expected.logits)


def test_loading_as_bfloat16(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded, report = load(tmp_path, dtype=torch.bfloat16)
    assert not report
    assert_same_weights(loaded.state_dict(), {k: v.bfloat16() for k, v in model.state_dict().items()})


def test_settings_made_after_construction_are_saved(tmp_path):
    saved = small_model()
    saved.vision_backbone.set_num_images_in_input(3)
    statistics = {"b": {"action": {"q01": [0.125]}, "num_transitions": 4}}
    saved.norm_stats = statistics
    saved.save_pretrained(tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.vision_backbone.get_num_images_in_input() == loaded.config.num_images_in_input == 3
    assert loaded.norm_stats == loaded.config.norm_stats == statistics
    assert loaded.config.vision_towers == small_config().vision_towers
    assert load(tmp_path, num_images_in_input=1)[0].vision_backbone.num_vision_tokens == 4


def test_tied_head_is_tied_again(tmp_path, model):
    model.save_pretrained(tmp_path)
    loaded, report = load(tmp_path)
    assert not report
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict()) - {HEAD}
    with torch.no_grad():
        loaded.get_input_embeddings().weight[7] = 5.0
    assert bool((loaded.get_output_embeddings().weight[7] == 5.0).all())


def test_untied_head_is_stored(tmp_path):
    text_config = small_config().text_config.to_dict() | {"tie_word_embeddings": False}
    saved = small_model(text_config=text_config)
    saved.save_pretrained(tmp_path)
    assert {HEAD, TABLE} <= set(load_file(tmp_path / "model.safetensors"))
    loaded, report = load(tmp_path)
    assert not report
    assert_same_weights(loaded.state_dict(), saved.state_dict())
    assert not torch.equal(loaded.state_dict()[HEAD], loaded.state_dict()[TABLE])
    # The top-level field is the one that the published code reads.
    assert loaded.config.tie_word_embeddings is False


# ---------------------------------------------------------------------------------------------- loading problems


@pytest.mark.parametrize(
    "key",
    [
        "action_queries.weight",
        "projector.fc1.bias",
        "vision_backbone.featurizer.cls_token",
        "vision_backbone.featurizer.norm.weight",
        "vision_backbone.fused_featurizer.attn_pool.latent",
        "vision_backbone.fused_featurizer.blocks.0.mlp.fc2.bias",
    ],
)
def test_missing_key_is_reported_and_others_are_kept(tmp_path, model, key):
    """The missing tensor gets its initial distribution; no other tensor of its module is drawn again."""
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != key}, file, metadata={"format": "pt"})
    loaded, report = load(tmp_path)
    assert report == {"missing_keys": {key}}
    state = loaded.state_dict()
    value = state.pop(key)
    assert_same_weights(state, {k: v for k, v in model.state_dict().items() if k != key})
    assert bool(value.isfinite().all())
    assert value.std() < 3 * small_config().text_config.initializer_range


def test_unexpected_key_is_reported(tmp_path, model):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"projector.fc9.weight": torch.ones(2)}, file, metadata={"format": "pt"})
    assert load(tmp_path)[1] == {"unexpected_keys": {"projector.fc9.weight"}}


def test_wrong_shape_is_an_error(tmp_path, model):
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path, num_action_queries=7)


def test_every_parameter_has_an_initial_value():
    """What a file lacks is filled by `_init_weights`; memory nobody wrote to would stay otherwise."""
    built = small_model()
    for module in built.modules():
        vars(module).pop("_is_hf_initialized", None)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(math.nan)
    built.initialize_weights()
    assert not [name for name, parameter in built.named_parameters() if bool(parameter.isnan().any())]


# ---------------------------------------------------------------------------------------------------- processor


def test_processor_round_trip(tmp_path):
    processor = build_processor("tiny")
    processor.save_pretrained(tmp_path)
    prompts = [build_prompt("put the black bowl on the plate"), build_prompt("open the drawer")]
    expected = processor(prompts, images(2), padding=True)
    for loader in (AutoProcessor, PrismaticProcessor):
        found = loader.from_pretrained(tmp_path)(prompts, images(2), padding=True)
        assert_same_weights(dict(found), dict(expected))
    assert expected["pixel_values"].unique().numel() > 100


def test_processor_output_moves_like_published_code_expects():
    inputs = build_processor("tiny")(build_prompt("open the drawer"), images(1)).to("cpu", dtype=torch.bfloat16)
    assert inputs["pixel_values"].dtype is torch.bfloat16
    assert inputs["input_ids"].dtype is torch.int64
    assert set({**inputs}) == {"input_ids", "attention_mask", "pixel_values"}


def test_image_processor_called_the_hugging_face_way():
    processor = PrismaticImageProcessor(input_sizes=[[3, 32, 32]] * 2)
    found = processor(images(2), return_tensors="pt")["pixel_values"]
    resized = np.stack([np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC))[None] for image in images(2)])
    assert torch.equal(found, processor.preprocess_batch(resized))
    assert torch.equal(found, processor.preprocess(images(2)).pixel_values)


def test_stored_preprocessing_cannot_be_replaced_silently(tmp_path):
    build_processor("tiny").save_pretrained(tmp_path)
    for auto_class in (AutoProcessor, AutoImageProcessor):
        with pytest.raises(TypeError, match=r"preprocessor_config.json: fields \['means'\]"):
            auto_class.from_pretrained(tmp_path, means=[[0.0] * 3] * 2)
