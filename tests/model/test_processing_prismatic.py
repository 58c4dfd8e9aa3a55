"""Image processor, processor files and the tiny tokenizer."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from prismatic.extern.hf.processing_prismatic import PrismaticImageProcessor, PrismaticProcessor
from prismatic.models.presets import build_processor
from prismatic.models.tiny_tokenizer import load_tiny_tokenizer, train_tiny_tokenizer
from prismatic.vla.prompts import build_prompt


def test_channels_are_image_major_then_tower():
    processor = PrismaticImageProcessor(input_sizes=[[3, 2, 2]] * 2)
    images = torch.randint(0, 256, (2, 3, 2, 2, 3), dtype=torch.uint8)
    pixels = processor.preprocess_batch(images)
    assert pixels.shape == (2, 18, 2, 2)
    assert pixels.dtype == torch.float32
    for image in range(3):
        for tower in range(2):
            for channel in range(3):
                mean, std = processor.means[tower][channel], processor.stds[tower][channel]
                expected = (images[:, image, :, :, channel] / 255.0 - mean) / std
                found = pixels[:, 6 * image + 3 * tower + channel]
                torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(processor.preprocess_batch(images.numpy()), pixels)


def test_statistics_are_representable_in_bfloat16():
    processor = PrismaticImageProcessor()
    for values in (processor.means, processor.stds):
        tensor = torch.tensor(values)
        assert torch.equal(tensor.bfloat16().float(), tensor)


def test_stored_normalisation_wins():
    stored = [{"mean": [0.1] * 3, "std": [0.2] * 3, "inplace": False}] * 2
    assert PrismaticImageProcessor(tvf_normalize_params=stored).means == [[0.1] * 3] * 2


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((1, 1, 224, 224, 3), np.float32),
        np.zeros((1, 224, 224, 3), np.uint8),
        np.zeros((1, 1, 96, 96, 3), np.uint8),
    ],
)
def test_wrong_images_are_refused(images):
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, n, 224, 224, 3\)"):
        PrismaticImageProcessor().preprocess_batch(images)


def test_processor_round_trip(tmp_path):
    processor = build_processor("tiny")
    processor.save_pretrained(tmp_path)
    again = PrismaticProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    prompt = build_prompt("open the middle drawer of the cabinet")
    assert again.tokenizer(prompt)["input_ids"] == processor.tokenizer(prompt)["input_ids"]
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    published = {"image_processor_type", "image_resize_strategy", "input_sizes", "interpolations", "means", "stds"}
    assert published | {"tvf_normalize_params", "tvf_resize_params", "use_fused_vision_backbone"} <= set(stored)
    with pytest.raises(FileNotFoundError, match="preprocessor_config.json"):
        PrismaticProcessor.from_pretrained(tmp_path / "nothing")


def test_processor_call():
    processor = build_processor("tiny")
    output = processor(["a", "b"], [Image.new("RGB", (50, 40), (255, 0, 0))] * 2, padding=True)
    assert output["pixel_values"].shape == (2, 6, 96, 96)
    with pytest.raises(ValueError, match="2 texts but 1 images"):
        processor(["a", "b"], Image.new("RGB", (96, 96)), padding=True)


def test_tiny_prompts_are_short_and_reversible():
    tokenizer = load_tiny_tokenizer()
    prompt = build_prompt("pick up the black bowl between the plate and the ramekin and place it on the plate")
    ids = tokenizer(prompt)["input_ids"]
    assert 14 <= len(ids) <= 32
    assert tokenizer.decode(ids) == prompt
    assert tokenizer.unk_token_id is None


@pytest.mark.parametrize("text", ["Grasp the 抹茶 cup!", "zebra\tqux\n", "naïve 🤖"])
def test_any_text_is_encodable(text):
    tokenizer = load_tiny_tokenizer()
    prompt = build_prompt(text)
    assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def test_tokenizer_conventions():
    tokenizer = load_tiny_tokenizer()
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.padding_side == "right"
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert tokenizer(build_prompt("x"))["input_ids"][0] == 1


def test_training_is_independent_of_order(tmp_path):
    texts = ["open the drawer", "put the bowl on the plate", "Close the drawer"]
    vocabularies = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        vocabularies.append(train_tiny_tokenizer(order, tmp_path / name).get_vocab())
    assert vocabularies[0] == vocabularies[1]
    with pytest.raises(ValueError, match="no instructions"):
        train_tiny_tokenizer([], tmp_path / "c")
