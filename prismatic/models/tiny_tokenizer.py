"""Byte-level BPE tokenizer of the tiny preset: trained on the benchmark's prompts, able to encode any text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from prismatic.command_line import OneLineParser
from prismatic.extern.hf.tokenizer_files import load_tokenizer, save_tokenizer

TOKENIZER_DIR = Path(__file__).parent / "assets" / "tiny_tokenizer"
PAD_TOKEN = "<|endoftext|>"
SPECIAL_TOKENS = (PAD_TOKEN, "<|im_start|>", "<|im_end|>")
# Text every prompt contains: one token each keeps a prompt at 20-30 tokens.
FIXED_PHRASES = (
    "system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "user\nWhat action should the robot take to",
    "assistant\n",
)
LIBERO_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
VOCAB_SIZE = 1024
MODEL_MAX_LENGTH = 2048


def train_tiny_tokenizer(instructions: Iterable[str], directory: str | Path = TOKENIZER_DIR) -> PreTrainedTokenizerFast:
    """Train on task instructions and write tokenizer.json and its configs to `directory`.

    The alphabet holds all 256 bytes, so any text can be encoded. Instructions are lower-cased and sorted first: the
    result does not depend on their order. Raises ValueError without instructions.
    """
    corpus = sorted({" " + text.lower() for text in instructions})
    if not corpus:
        raise ValueError("train_tiny_tokenizer: no instructions given")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    core.add_tokens([AddedToken(phrase, normalized=False) for phrase in FIXED_PHRASES])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=PAD_TOKEN,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right",
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    save_tokenizer(tokenizer, Path(directory))
    return tokenizer


def load_tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The packaged tokenizer; needs no network."""
    return load_tokenizer(TOKENIZER_DIR)


def libero_instructions() -> list[str]:
    """Language instructions of the five LIBERO suites, from the installed benchmark's task names.

    Task names are instructions with underscores; names of kitchen, living-room and study tasks start with the scene
    in capitals. Raises ImportError without the benchmark.
    """
    from libero.libero.benchmark.libero_suite_task_map import libero_task_map

    names = {name for suite in LIBERO_SUITES for name in libero_task_map[suite]}
    words = ([word for word in name.split("_") if not word.isupper() and not _is_scene(word)] for name in names)
    return sorted({" ".join(parts) for parts in words})


def _is_scene(word: str) -> bool:
    return word.startswith("SCENE")


if __name__ == "__main__":
    OneLineParser(description=train_tiny_tokenizer.__doc__).parse_args()
    train_tiny_tokenizer(libero_instructions())
