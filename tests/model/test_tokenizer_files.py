"""Tokenizer files of both versions of transformers, read as data."""

import json

import pytest
from transformers import AutoTokenizer

from prismatic.extern.hf.tokenizer_files import load_tokenizer, save_tokenizer
from prismatic.model_files import CheckpointError, MissingFileError
from prismatic.models.presets import build_processor
from prismatic.models.tiny_tokenizer import TOKENIZER_DIR
from prismatic.vla.prompts import build_prompt

TEXTS = (build_prompt("open the drawer"), "<|im_end|>naïve 🤖\n")
SPECIAL = ["<|im_start|>", "<|im_end|>"]
PAD = {"pad_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "model_max_length": 2048}
DESCRIPTIONS = {
    "transformers 4": PAD | {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": SPECIAL},
    "transformers 5": PAD | {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": SPECIAL, "is_local": True},
    "Qwen of 4": PAD
    | {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"a": SPECIAL[0], "b": SPECIAL[1]}},
    "tokens as objects": {k: {"content": v} if "token" in k else v for k, v in PAD.items()}
    | {"additional_special_tokens": [{"content": token, "special": True} for token in SPECIAL]},
    "no limit": PAD | {"model_max_length": int(1e30), "extra_special_tokens": SPECIAL},
    "nothing": None,
}


def folder_with(tmp_path, description):
    (tmp_path / "tokenizer.json").write_bytes((TOKENIZER_DIR / "tokenizer.json").read_bytes())
    if description is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(description))
    return tmp_path


@pytest.mark.parametrize("kind", DESCRIPTIONS)
def test_every_description_gives_the_same_tokens(tmp_path, kind):
    found, expected = load_tokenizer(folder_with(tmp_path, DESCRIPTIONS[kind])), load_tokenizer(TOKENIZER_DIR)
    for text in TEXTS:
        assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert (found.pad_token_id, found.padding_side, len(found)) == (expected.pad_token_id, "right", len(expected))
    limit = 2048 if kind not in ("no limit", "nothing") else None
    assert (found.model_max_length == limit) is (limit is not None)


def test_the_library_reads_what_is_written(tmp_path):
    save_tokenizer(load_tokenizer(TOKENIZER_DIR), tmp_path)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert stored["tokenizer_class"] == "PreTrainedTokenizerFast" and stored["additional_special_tokens"] == SPECIAL
    library = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        assert library(text)["input_ids"] == load_tokenizer(tmp_path)(text)["input_ids"]


@pytest.mark.parametrize(
    "changes",
    [
        {"padding_side": "middle"},
        {"model_max_length": "x"},
        {"model_max_length": float("nan")},
        {"pad_token": 5},
        {"pad_token": {"content": ""}},
        {"extra_special_tokens": "x"},
        {"extra_special_tokens": [5]},
    ],
)
def test_descriptions_are_checked(tmp_path, changes):
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        load_tokenizer(folder_with(tmp_path, PAD | changes))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "BPE"}}'])
def test_a_tokenizer_file_that_is_none_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_folders_without_a_tokenizer_are_named_with_the_flag(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError, match="--tokenizer_path.*tokenizer.json does not exist.*vocab.json"):
        (tmp_path / "vocab.json").write_text("{}")
        build_processor("qwen25-0_5b", str(tmp_path))
    with pytest.raises(MissingFileError, match="hf download Qwen/Qwen2.5-0.5B"):
        build_processor("qwen25-0_5b", "Qwen/Qwen2.5-0.5B")
    with pytest.raises(MissingFileError, match="--tokenizer_path: .*absent does not exist"):
        build_processor("qwen25-0_5b", str(tmp_path / "absent"))
