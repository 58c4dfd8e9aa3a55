"""Prompts against reference texts and token ids; without the tokenizer the ids are checked through their markup."""

import itertools
import os
import re
from pathlib import Path

import pytest
from parity_fixtures import read_json

from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.prompts import build_prompt

TOKENIZER_VARIABLE = "CRAFT_QWEN_TOKENIZER"


@pytest.fixture(scope="module")
def golden(golden_dir):
    return read_json(golden_dir / "prompts" / "prompts.json")


@pytest.fixture(scope="module")
def markup(golden):
    """{mark: id} of the chat markup; every prompt ends with a newline."""
    (newline,) = {case["input_ids"][-1] for case in golden["prompts"]}
    facts = golden["tokenizer"]
    return {"<|im_start|>": facts["im_start"], "<|im_end|>": facts["im_end"], "\n": newline}


def single_strings(golden):
    """{text: ids}."""
    return {entry["text"]: entry["ids"] for entry in golden["single_strings"]}


def test_texts(golden):
    assert golden["prompts"]
    for case in golden["prompts"]:
        assert build_prompt(case["instruction"]) == case["prompt"]


def test_lengths_and_id_ranges(golden):
    facts = golden["tokenizer"]
    for case in golden["prompts"]:
        assert case["length"] == len(case["input_ids"]) <= facts["model_max_length"]
        special = {i for i in case["input_ids"] if i >= facts["vocab_size"]}
        assert special == {facts["im_start"], facts["im_end"]}
        assert max(special) < facts["length"]


def test_markup_stands_at_the_places_of_the_text(golden, markup):
    names = {token: mark for mark, token in markup.items()}
    for case in golden["prompts"]:
        if "\n" in case["instruction"]:
            continue  # such a newline may share a token with its neighbours
        parts = re.split(r"(<\|im_start\|>|<\|im_end\|>|\n)", build_prompt(case["instruction"]))
        expected = [part if part in markup else None for part in parts if part]
        found = [names.get(token) for token in case["input_ids"]]
        assert [mark for mark, _ in itertools.groupby(found)] == expected, case["instruction"]


def turns(ids, markup):
    """Ids of each chat turn after its im_start."""
    starts = [i for i, token in enumerate(ids) if token == markup["<|im_start|>"]]
    return [ids[a + 1 : b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def test_turns_are_system_user_assistant_and_only_the_user_turn_depends_on_the_instruction(golden, markup):
    end = [markup["<|im_end|>"], markup["\n"]]
    split = [turns(case["input_ids"], markup) for case in golden["prompts"]]
    for system, user, assistant in split:
        assert system == split[0][0] and assistant == split[0][2]
        assert system[-2:] == user[-2:] == end
        assert system[1] == user[1] == assistant[1] == markup["\n"]
        assert len(assistant) == 2
    users = [tuple(user) for _, user, _ in split]
    assert len(set(users)) == len({case["prompt"] for case in golden["prompts"]})
    assert len({user[0] for user in users}) == 1


def test_training_tail_is_space_end_of_turn_end_of_text(golden, markup):
    tails = {tuple(case["removed_training_tail"]) for case in golden["prompts"] if case["removed_training_tail"]}
    ((space, *rest),) = tails
    assert rest == [markup["<|im_end|>"], golden["tokenizer"]["eos_token_id"]]
    assert single_strings(golden).get(" ", [space]) == [space]


def test_single_strings_occur_only_in_prompts_that_contain_their_text(golden, markup):
    table = single_strings(golden)
    assert table.get("\n", [markup["\n"]]) == [markup["\n"]]
    assert len({tuple(ids) for ids in table.values()}) == len(table)
    for text, ids in table.items():
        for case in golden["prompts"]:
            found = any(case["input_ids"][i : i + len(ids)] == ids for i in range(case["length"]))
            assert not found or text in case["prompt"], (text, case["instruction"])


# With the tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    folder = os.environ.get(TOKENIZER_VARIABLE)
    if not folder:
        pytest.skip(f"{TOKENIZER_VARIABLE} is not set: the Qwen2.5 tokenizer files are not part of the repository")
    if not Path(folder).is_dir():
        pytest.fail(f"{TOKENIZER_VARIABLE}={folder} is not a folder")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_tokenizer_facts(golden, tokenizer):
    facts = golden["tokenizer"]
    for name in ("vocab_size", "pad_token", "pad_token_id", "eos_token_id", "bos_token_id"):
        assert getattr(tokenizer, name) == facts[name], name
    assert len(tokenizer) == facts["length"]
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [facts["im_start"], facts["im_end"]]


def test_token_ids_of_prompts(golden, tokenizer):
    for case in golden["prompts"]:
        ids = tokenizer(build_prompt(case["instruction"]), add_special_tokens=False)["input_ids"]
        assert ids == case["input_ids"], case["instruction"]
    for text, ids in single_strings(golden).items():
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids, text


def test_collated_prompts_end_where_the_action_queries_begin(golden, tokenizer):
    cases, queries = golden["prompts"], 3
    batch = VLACollator(tokenizer, None, queries).tokenize([case["instruction"] for case in cases])
    for row, case in enumerate(cases):
        length = case["length"]
        assert batch["input_ids"][row, :length].tolist() == case["input_ids"]
        assert batch["action_mask"][row].nonzero().flatten().tolist() == list(range(length, length + queries))
        assert int(batch["attention_mask"][row].sum()) == length + queries
