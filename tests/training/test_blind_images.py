"""`--blind_images`: a run in which no image is looked at, and which sees what the evaluation's control shows."""

import dataclasses
import json
from types import SimpleNamespace

import micro
import numpy as np
import pytest
import torch

from experiments.robot.libero.controls import Control, PolicyActor
from prismatic.models.presets import PRESETS, build_processor
from prismatic.training.config import FinetuneConfig
from prismatic.training.retention.observed import observations
from prismatic.vla.datasets import dataset_part
from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.rlds import RLDSReader, write_rlds
from prismatic.vla.datasets.rlds_versions import find_version_directory
from prismatic.vla.images import ImageSpec, decode_jpeg, encode_jpeg, prepare_eval_image

SIDE = 32


@pytest.fixture
def two_data_sets(tmp_path):
    """Roots of two data sets that differ in their images only: the second one holds the negatives."""
    reader = RLDSReader(find_version_directory(micro.DATA, "libero_mini_no_noops"))
    episodes = [reader.episode(i) for i in range(2)]
    negatives = [
        dataclasses.replace(e, images={key: [negative(f) for f in frames] for key, frames in e.images.items()})
        for e in episodes
    ]
    shape = decode_jpeg(episodes[0].images["image"][0]).shape
    for root, content in (("first", episodes), ("second", negatives)):
        write_rlds(tmp_path / root / "libero_a_no_noops" / "1.0.0", "libero_a_no_noops", content, 1, shape)
    return tmp_path / "first", tmp_path / "second"


def negative(frame: bytes) -> bytes:
    return encode_jpeg(255 - decode_jpeg(frame))


@pytest.fixture
def micro_trainer(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    return lambda name="run", **flags: make_trainer(name, **flags)


def batch_of(root, blind: bool, monkeypatch) -> dict:
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    processor = build_processor("tiny")
    data = VLADataset(root, "libero_a", DatasetSettings(image_spec=ImageSpec(size=SIDE), blind_images=blind))
    collate = VLACollator(processor.tokenizer, processor.image_processor, 4)
    return collate([data[(1, index)] for index in range(4)])


def differing(first: dict, second: dict) -> set[str]:
    assert first.keys() == second.keys()
    return {
        name
        for name, value in first.items()
        if not (torch.equal(value, second[name]) if torch.is_tensor(value) else value == second[name])
    }


def test_data_sets_that_differ_in_images_only_give_the_same_batches(two_data_sets, monkeypatch):
    blind = [batch_of(root, True, monkeypatch) for root in two_data_sets]
    seeing = [batch_of(root, False, monkeypatch) for root in two_data_sets]
    assert differing(*blind) == set()
    assert differing(*seeing) == differing(seeing[0], blind[0]) == {"pixel_values"}


def test_pixels_are_those_of_the_evaluation_control(two_data_sets, monkeypatch):
    pixels = batch_of(two_data_sets[0], True, monkeypatch)["pixel_values"]
    seen = []

    def predict(image, wrist_image, state, instruction):
        seen.extend((image, wrist_image))
        return np.zeros((8, 7))

    actor = PolicyActor(SimpleNamespace(predict=predict), 8, Control.GREY_IMAGES)
    actor.reset("push the plate")
    frame = np.random.default_rng(0).integers(0, 256, (2, 256, 256, 3), dtype=np.uint8)
    actor.act(SimpleNamespace(image=frame[0], wrist_image=frame[1], state=np.zeros(8)))
    processor = build_processor("tiny").image_processor
    for quality in (None, 20, 80, 95):
        for crop in (False, True):
            spec = ImageSpec(size=SIDE, jpeg_quality=quality, center_crop=crop)
            images = np.stack([prepare_eval_image(image, spec) for image in seen])
            expected = processor.preprocess_batch(images[None])
            assert all(torch.equal(sample, expected[0]) for sample in pixels), spec


def test_no_frame_is_read(two_data_sets, monkeypatch):
    def refuse(*_):
        raise AssertionError("a frame was decoded")

    monkeypatch.setattr(dataset_part, "frame_pixels", refuse)
    settings = DatasetSettings(image_spec=ImageSpec(size=SIDE), blind_images=True)
    data = VLADataset(two_data_sets[0], "libero_a", settings)
    monkeypatch.setattr(type(data._parts[0].source), "frame", refuse)
    assert (data[(0, 0)]["images"] == data[(3, 1)]["images"]).all()
    with pytest.raises(AssertionError, match="decoded"):
        VLADataset(two_data_sets[0], "libero_a", dataclasses.replace(settings, blind_images=False))[(0, 0)]


def test_a_run_is_blind_everywhere_and_says_so(micro_trainer, tmp_path):
    probe = str(micro.DATA / "libero_mini_no_noops")
    trainer = micro_trainer(blind_images=True, use_val_set=True, val_fraction=0.5, val_batches=1, max_steps=1)
    memory = observations("--craft_memory_data", probe, trainer.setup, trainer.cfg)
    grey, other = (trainer._collator()([memory[(0, index)]])["pixel_values"] for index in (0, 1))
    assert torch.equal(grey, other)
    for data in (trainer.setup.dataset, trainer.setup.val_dataset):
        assert torch.equal(trainer._collator()([data[(0, 0)]])["pixel_values"], grey)
    trainer.fit()
    manifest = json.loads((tmp_path / "runs" / "run--1_chkpt" / "craft_checkpoint.json").read_text())
    assert manifest["training"]["blind_images"] is True
    assert FinetuneConfig(blind_images=True).run_id != FinetuneConfig().run_id
