import json

import pytest
from data_fixtures import GOLDEN, GOLDEN_RLDS

from prismatic.vla.prompts import build_prompt


def test_golden_prompt_texts():
    cases = json.loads((GOLDEN / "prompts" / "prompts.json").read_text())["prompts"]
    assert cases
    for case in cases:
        assert build_prompt(case["instruction"]) == case["prompt"]
    for episode in json.loads((GOLDEN_RLDS / "expected.json").read_text())["episodes"]:
        assert build_prompt(episode["instruction"]) == episode["prompt"]


def test_instruction_is_lower_cased_and_markup_is_not():
    prompt = build_prompt("Pick up the CUP")
    assert "take to pick up the cup?" in prompt
    assert "You are Qwen, created by Alibaba Cloud" in prompt


@pytest.mark.parametrize("instruction", ["", "  \n"])
def test_empty_instruction(instruction):
    with pytest.raises(ValueError, match="non-empty"):
        build_prompt(instruction)
