import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.prompts import build_prompt

QUERIES = 5


class FakeImageProcessor:
    """Channel concatenation without scaling."""

    def preprocess_batch(self, images):
        batch, count, height, width, _ = images.shape
        planes = torch.from_numpy(images).permute(0, 1, 4, 2, 3).float()
        return planes.reshape(batch, count * 3, height, width)


class CountingTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.calls = 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.tokenizer(*args, **kwargs)


def make_tokenizer(**settings):
    texts = [build_prompt(text) for text in ("open the drawer", "put the bowl on the plate now")]
    words = sorted({word for text in texts for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)})
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **({"pad_token": "<pad>"} | settings))


def make_sample(instruction="open the drawer", side=4, images=2, number=0):
    rng = np.random.default_rng(number)
    return {
        "images": rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8),
        "proprio": rng.normal(size=8).astype(np.float32),
        "actions": rng.normal(size=(8, 7)).astype(np.float32),
        "instruction": instruction,
        "dataset_name": "demo",
        "sample_id": (number, 3),
    }


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def batch(tokenizer):
    collate = VLACollator(tokenizer, FakeImageProcessor(), QUERIES)
    return collate([make_sample("open the drawer", number=1), make_sample("Put the bowl on the plate now", number=2)])


def test_types_and_shapes(batch):
    length = batch["input_ids"].shape[1]
    assert batch["input_ids"].dtype == torch.int64
    for name in ("attention_mask", "action_mask"):
        assert batch[name].dtype == torch.bool and batch[name].shape == (2, length)
    assert batch["pixel_values"].shape == (2, 6, 4, 4) and batch["pixel_values"].dtype == torch.float32
    assert batch["proprio"].shape == (2, 8) and batch["proprio"].dtype == torch.float32
    assert batch["actions"].shape == (2, 8, 7) and batch["actions"].dtype == torch.float32
    assert batch["dataset_names"] == ["demo", "demo"] and batch["sample_ids"] == [(1, 3), (2, 3)]


def test_rows_are_prompt_queries_padding(batch, tokenizer):
    prompts = [tokenizer(build_prompt(text))["input_ids"] for text in batch["instructions"]]
    assert len(prompts[0]) != len(prompts[1])
    assert batch["input_ids"].shape[1] == max(map(len, prompts)) + QUERIES
    for row, prompt in enumerate(prompts):
        assert batch["input_ids"][row, : len(prompt)].tolist() == prompt
        positions = torch.arange(batch["input_ids"].shape[1])
        assert torch.equal(batch["attention_mask"][row], positions < len(prompt) + QUERIES)
        assert torch.nonzero(batch["action_mask"][row]).ravel().tolist() == list(
            range(len(prompt), len(prompt) + QUERIES)
        )
    assert batch["action_mask"].sum(dim=1).tolist() == [QUERIES, QUERIES]


def test_attention_mask_is_not_a_comparison_with_the_pad_id(batch, tokenizer):
    compared = batch["input_ids"] != tokenizer.pad_token_id
    assert batch["attention_mask"][batch["action_mask"]].all()
    assert not torch.equal(batch["attention_mask"], compared)


def test_values_stay_with_their_row(batch):
    for row, number in enumerate((1, 2)):
        sample = make_sample(number=number)
        np.testing.assert_array_equal(batch["proprio"][row], sample["proprio"])
        np.testing.assert_array_equal(batch["actions"][row], sample["actions"])
        np.testing.assert_array_equal(batch["pixel_values"][row, 3:], sample["images"][1].transpose(2, 0, 1))


def test_one_sample_keeps_the_batch_axis(tokenizer):
    batch = VLACollator(tokenizer, FakeImageProcessor(), QUERIES)([make_sample()])
    assert batch["proprio"].shape == (1, 8) and batch["attention_mask"].all()


def test_a_prompt_is_tokenised_once():
    counting = CountingTokenizer(make_tokenizer())
    collate = VLACollator(counting, FakeImageProcessor(), QUERIES)
    for _ in range(3):
        collate([make_sample(), make_sample("put the bowl on the plate now")])
    assert counting.calls == 2


def test_different_numbers_of_images(tokenizer):
    collate = VLACollator(tokenizer, FakeImageProcessor(), QUERIES)
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\), \(2, 4, 4, 3\)"):
        collate([make_sample(images=1), make_sample(images=2)])


def test_prompt_longer_than_the_tokenizer_allows():
    collate = VLACollator(make_tokenizer(model_max_length=30), FakeImageProcessor(), QUERIES)
    with pytest.raises(ValueError, match="'open the drawer' has .* tokens and 5 action queries.* allows 30"):
        collate([make_sample()])


def test_tokenizer_without_pad_token():
    with pytest.raises(ValueError, match="pad token"):
        VLACollator(make_tokenizer(pad_token=None), FakeImageProcessor(), QUERIES)
    with pytest.raises(ValueError, match="num_action_queries is 0"):
        VLACollator(make_tokenizer(), FakeImageProcessor(), 0)
