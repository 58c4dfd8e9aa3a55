"""Replay: old data sets in the batches of a new task."""

from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from data_fixtures import make_episode, write_data_set
from hypothesis import given, settings
from hypothesis import strategies as st
from test_collator import FakeImageProcessor, make_tokenizer
from torch.utils.data import DataLoader

from prismatic.vla.datasets.collator import VLACollator
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
from prismatic.vla.datasets.replay import ReplayMixture, _weights
from prismatic.vla.datasets.sampler import EpochSampler
from prismatic.vla.images import ImageSpec

SHIPPED = Path(__file__).parents[2] / "datasets" / "rlds"
SPATIAL, OBJECT = "libero_spatial_scripted_no_noops", "libero_object_scripted_no_noops"
SETTINGS = DatasetSettings(image_spec=ImageSpec(size=32))


@pytest.fixture(scope="module")
def new():
    return VLADataset(SHIPPED, SPATIAL, SETTINGS)


@pytest.fixture(scope="module")
def old():
    return VLADataset(SHIPPED, OBJECT, SETTINGS)


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("replay")
    for name, count in (("libero_a", 1), ("libero_b", 2), ("libero_c", 6)):
        write_data_set(root, name, [make_episode(i, length=10 + i) for i in range(count)])
    return root


def sampler_of(data, **places) -> EpochSampler:
    return EpochSampler(data.group_sizes, 3, weights=data.weights, **places)


def old_share(data, first_old: int) -> float:
    """Share of samples from the group `first_old` on, in one epoch."""
    sampler = sampler_of(data)
    start = sum(data.group_sizes[:first_old])
    keys = islice(iter(sampler), sampler.epoch_length)
    return sum(index >= start for _, index in keys) / sampler.epoch_length


# Shares


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.75])
def test_the_sampler_gives_the_fraction_on_shipped_data(new, old, fraction):
    mixture = ReplayMixture(new, [old], fraction)
    assert old_share(mixture, 1) == pytest.approx(fraction, rel=0.01)


groups = st.lists(st.integers(1, 400), min_size=1, max_size=3)


@given(groups, groups, st.floats(0.01, 0.9))
@settings(max_examples=40, deadline=None)
def test_shares_hold_for_sizes_of_any_kind(new_sizes, old_sizes, fraction):
    weights = _weights(SimpleNamespace(group_sizes=new_sizes, weights=[1.0] * len(new_sizes)), old_sizes, fraction)
    mixture = SimpleNamespace(group_sizes=new_sizes + old_sizes, weights=weights)
    assert old_share(mixture, len(new_sizes)) == pytest.approx(fraction, rel=0.01)
    # Old sets in proportion to their sizes, new ones as without replay.
    assert len(set(weights[: len(new_sizes)])) == 1 and len(set(weights[len(new_sizes) :])) == 1


def test_new_sets_keep_their_own_weights_among_each_other(small_root, old):
    new = VLADataset(small_root, "libero_b:3,libero_c:0.5", SETTINGS)
    weights = ReplayMixture(new, [old], 0.25).weights
    assert weights[0] / weights[1] == pytest.approx(6)


def test_a_large_share_leaves_the_new_samples_as_often_as_without_replay(new, old):
    assert ReplayMixture(new, [old], 0.2).weights[:1] == new.weights


# Samples


def test_a_sample_is_that_of_its_data_set_in_the_same_epoch(new, old):
    mixture = ReplayMixture(new, [old], 0.2)
    assert len(mixture) == len(new) + len(old)
    for key, data, inner, is_replay in (
        ((3, 17), new, 17, False),
        ((0, len(new) - 1), new, len(new) - 1, False),
        ((5, len(new)), old, 0, True),
        ((5, len(new) + 40), old, 40, True),
    ):
        sample, plain = mixture[key], data[key[0], inner]
        assert sample.pop("is_replay") is is_replay
        assert sample.pop("key") == key and plain.pop("key") == (key[0], inner)
        assert sample.keys() == plain.keys()
        for name, value in plain.items():
            np.testing.assert_array_equal(sample[name], value, err_msg=name)
    assert (mixture[0, len(new)]["images"] != mixture[1, len(new)]["images"]).any()  # augmented anew in every epoch
    for index in (-1, len(mixture)):
        with pytest.raises(IndexError, match=str(len(mixture))):
            mixture[0, index]


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_say_what_is_replayed(new, old, workers):
    mixture = ReplayMixture(new, [old], 0.5)
    collate = VLACollator(make_tokenizer(), FakeImageProcessor(), 3)
    loader = DataLoader(mixture, 8, sampler=sampler_of(mixture), num_workers=workers, collate_fn=collate)
    keys = iter(sampler_of(mixture))
    for batch in islice(loader, 3):
        assert batch["keys"] == list(islice(keys, 8))
        assert [name == OBJECT for name in batch["dataset_names"]] == batch["is_replay"]
    assert "is_replay" not in collate([new[0, 0]])


def test_two_processes_share_what_one_would_use(new, old):
    mixture = ReplayMixture(new, [old], 0.3)
    one = list(islice(iter(sampler_of(mixture)), 200))
    ranks = [islice(iter(sampler_of(mixture, rank=rank, world_size=2)), 100) for rank in range(2)]
    assert [key for pair in zip(*ranks, strict=True) for key in pair] == one
    assert Counter(mixture.group_sizes[0] <= index for _, index in one)[True] > 0


# What the trainer asks


def test_descriptions_cover_all_data_sets(small_root, new, old):
    third = VLADataset(small_root, "libero_a,libero_c", SETTINGS)
    mixture = ReplayMixture(new, [old, third], 0.2)
    names = [SPATIAL, OBJECT, "libero_a", "libero_c"]
    assert mixture.data_set_names == names and mixture.settings is new.settings
    assert mixture.group_sizes == new.group_sizes + old.group_sizes + third.group_sizes
    assert len(mixture.weights) == 4
    for what in ("normalizers", "statistics", "metadata", "fingerprints", "episode_ids", "window_counts"):
        merged = getattr(mixture, what)
        assert list(merged) == names
        for data in (new, old, third):
            assert getattr(data, what).items() <= merged.items()
    assert list(mixture.manifest()) == names
    assert [bool(entry.get("replay")) for entry in mixture.manifest().values()] == [False, True, True, True]
    assert [sum(counts) for counts in mixture.window_counts.values()] == mixture.group_sizes


def test_a_known_data_set_is_replayed_with_its_statistics_and_its_contradiction_is_said(new, old):
    known = VLADataset(SHIPPED, SPATIAL, SETTINGS).statistics[SPATIAL]
    settings_known = replace(SETTINGS, known_statistics={OBJECT: known})
    mixture = ReplayMixture(new, [VLADataset(SHIPPED, OBJECT, settings_known)], 0.2)
    assert mixture.statistics == {SPATIAL: known, OBJECT: known}
    assert all(line.startswith(f"{OBJECT}: ") for line in mixture.warnings)
    assert len(mixture.warnings) == 1  # the two suites' tables are at different heights


# Bad input


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_the_fraction_is_between_nothing_and_everything(new, old, fraction):
    with pytest.raises(ValueError, match=f"fraction is {fraction}"):
        ReplayMixture(new, [old], fraction)


def test_a_data_set_is_named_once(new, old):
    again = VLADataset(SHIPPED, SPATIAL, SETTINGS)
    for others, name in (([again], SPATIAL), ([old, old], OBJECT)):
        with pytest.raises(ValueError, match=f"{name!r}"):
            ReplayMixture(new, others, 0.2)


def test_replay_needs_old_data_with_actions(new):
    with pytest.raises(ValueError, match="no old data set"):
        ReplayMixture(new, [], 0.2)
    seen = VLADataset(SHIPPED, OBJECT, replace(SETTINGS, observations_only=True))
    with pytest.raises(ValueError, match=f"{OBJECT}.*actions"):
        ReplayMixture(new, [seen], 0.2)
