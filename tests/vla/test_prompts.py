import os

import pytest
from transformers import PreTrainedTokenizerFast

from prismatic.extern.hf.language_body import BODIES
from prismatic.extern.hf.tokenizer_files import load_tokenizer
from prismatic.models.tiny_tokenizer import load_tiny_tokenizer
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.prompts import PromptKind, build_prompt, encode_prompt, prompt_kind_of

LLAMA_VARIABLE = "CRAFT_LLAMA_TOKENIZER"
QUESTION = "In: What action should the robot take to pick up the cup?\nOut:"


def test_instruction_is_lower_cased_and_markup_is_not():
    prompt = build_prompt("Pick up the CUP")
    assert "take to pick up the cup?" in prompt
    assert "You are Qwen, created by Alibaba Cloud" in prompt
    assert build_prompt("Pick up the CUP", PromptKind.OPENVLA_TEXT) == f"{QUESTION} "


@pytest.mark.parametrize("kind", PromptKind)
@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_empty_instruction(instruction, kind):
    with pytest.raises(ValueError, match="non-empty"):
        build_prompt(instruction, kind)


def test_smollm2_is_asked_in_its_markup_whatever_its_body():
    kind = prompt_kind_of("llama", "smollm2-135m-instruct")
    question = QUESTION.removeprefix("In: ").removesuffix("\nOut:")
    assert build_prompt("Pick up the CUP", kind) == (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    assert prompt_kind_of("llama", "llama2-7b-pure") is PromptKind.OPENVLA_TEXT


def test_every_body_has_a_prompt_of_its_own():
    assert len({prompt_kind_of(body) for body in BODIES}) == len(BODIES)


def openvla_ids(tokenizer) -> list[int]:
    """As OpenVLA's inference makes them: BOS and text from the tokenizer, then the token of a lone space."""
    text = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    return [tokenizer.bos_token_id, *text(QUESTION, add_special_tokens=False)["input_ids"], space(tokenizer)]


def space(tokenizer) -> int:
    return tokenizer.convert_tokens_to_ids("▁")


def test_openvlas_prompt_begins_with_bos_and_ends_with_the_space(llama_tokenizer):
    assert space(llama_tokenizer) != llama_tokenizer.unk_token_id
    ids = encode_prompt(llama_tokenizer, "Pick up the CUP", PromptKind.OPENVLA_TEXT)
    assert ids == openvla_ids(llama_tokenizer) and ids[0] == 1 and ids.count(1) == 1


def test_openvlas_prompt_with_llamas_own_tokenizer():
    folder = os.environ.get(LLAMA_VARIABLE)
    if not folder:
        pytest.skip(f"{LLAMA_VARIABLE} is not set: the Llama-2 tokenizer files are not part of the repository")
    tokenizer = load_tokenizer(folder)
    ids = encode_prompt(tokenizer, "Pick up the CUP", PromptKind.OPENVLA_TEXT)
    assert ids == openvla_ids(tokenizer) and (ids[0], ids[-1]) == (1, 29871)


def test_queries_follow_the_prompt_and_pads_the_queries(llama_tokenizer):
    batch = VLACollator(llama_tokenizer, None, 3, PromptKind.OPENVLA_TEXT).tokenize(["pick up the bowl", "pick up"])
    longer, shorter = (
        len(encode_prompt(llama_tokenizer, text, PromptKind.OPENVLA_TEXT)) for text in ("pick up the bowl", "pick up")
    )
    assert batch["action_mask"][1].nonzero()[:, 0].tolist() == list(range(shorter, shorter + 3))
    assert int(batch["attention_mask"][0].sum()) == longer + 3
    assert (batch["input_ids"][1, shorter + 3 :] == llama_tokenizer.pad_token_id).all()


def test_a_tokenizer_without_bos_is_refused():
    with pytest.raises(ValueError, match="no BOS token"):
        VLACollator(load_tiny_tokenizer(), None, 3, PromptKind.OPENVLA_TEXT)
