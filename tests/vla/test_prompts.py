import pytest

from prismatic.vla.prompts import build_prompt


def test_instruction_is_lower_cased_and_markup_is_not():
    prompt = build_prompt("Pick up the CUP")
    assert "take to pick up the cup?" in prompt
    assert "You are Qwen, created by Alibaba Cloud" in prompt


@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_empty_instruction(instruction):
    with pytest.raises(ValueError, match="non-empty"):
        build_prompt(instruction)
