"""`--proprio_dropout`: some training samples carry no robot state; nothing else changes."""

import micro
import numpy as np
import pytest

from prismatic.models.presets import PRESETS
from prismatic.training.config import FinetuneConfig
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.images import ImageSpec


def data_set(share: float, **settings) -> VLADataset:
    spec = ImageSpec(size=32)
    return VLADataset(micro.DATA, "libero_mini", DatasetSettings(image_spec=spec, proprio_dropout=share, **settings))


def test_dropped_states_are_zeros_and_everything_else_is_unchanged():
    with_state, without, half = data_set(0.0), data_set(1.0), data_set(0.5)
    for key in [(0, 0), (0, 3), (2, 1)]:
        first, second = with_state[key], without[key]
        assert np.abs(first["proprio"]).max() > 0 and not second["proprio"].any()
        for name in first.keys() - {"proprio"}:
            np.testing.assert_array_equal(first[name], second[name])
        np.testing.assert_array_equal(half[key]["proprio"], half[key]["proprio"])  # drawn from the key, not from time


def test_the_share_is_met_and_differs_between_epochs_and_seeds():
    half = data_set(0.5)
    dropped = [[not half[(epoch, index)]["proprio"].any() for index in range(len(half))] for epoch in range(4)]
    share = np.mean(dropped)
    assert 0.5 - 3 * 0.5 / np.sqrt(np.size(dropped)) < share < 0.5 + 3 * 0.5 / np.sqrt(np.size(dropped))
    assert dropped[0] != dropped[1]
    other = data_set(0.5, seed=8)
    assert dropped[0] != [not other[(0, index)]["proprio"].any() for index in range(len(half))]


def test_validation_keeps_the_state(make_trainer, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", micro.MICRO)
    trainer = make_trainer("run", proprio_dropout=1.0, use_val_set=True, val_fraction=0.5, val_batches=1, max_steps=1)
    setup = trainer.setup
    assert not setup.dataset[(0, 0)]["proprio"].any() and setup.val_dataset[(0, 0)]["proprio"].any()


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_share_outside_its_range(share):
    with pytest.raises(ValueError, match="proprio_dropout"):
        data_set(share)
    with pytest.raises(ValueError, match="--proprio_dropout"):
        FinetuneConfig(proprio_dropout=share)
