from collections import Counter
from itertools import islice

import pytest

from prismatic.vla.datasets.sampler import EpochSampler


def take(sampler, count):
    return list(islice(sampler, count))


def test_every_epoch_is_another_permutation():
    keys = take(EpochSampler(50, seed=1), 150)
    orders = []
    for epoch in range(3):
        part = keys[50 * epoch : 50 * (epoch + 1)]
        assert {key[0] for key in part} == {epoch}
        orders.append([key[1] for key in part])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1] != orders[2] != list(range(50))


def test_seed_fixes_the_order():
    assert take(EpochSampler(20, seed=3), 60) == take(EpochSampler(20, seed=3), 60)
    assert take(EpochSampler(20, seed=3), 20) != take(EpochSampler(20, seed=4), 20)


@pytest.mark.parametrize(("size", "world"), [(12, 3), (10, 4), (3, 5), (7, 1)])
def test_ranks_deal_out_the_single_process_order(size, world):
    per_rank = [take(EpochSampler(size, 5, rank, world), 3 * size) for rank in range(world)]
    dealt = [key for group in zip(*per_rank, strict=True) for key in group]
    assert dealt == take(EpochSampler(size, 5), 3 * size * world)
    assert len(set(dealt)) == len(dealt)


@pytest.mark.parametrize("consumed", [0, 1, 9, 10, 37])
def test_start_at_equals_skipping(consumed):
    everything = take(EpochSampler(10, 2, rank=1, world_size=3), 60)
    resumed = EpochSampler(10, 2, rank=1, world_size=3)
    resumed.start_at(consumed)
    assert take(resumed, 60 - consumed) == everything[consumed:]
    assert take(resumed, 5) == everything[consumed : consumed + 5]


def test_state_round_trip_and_change_of_world_size():
    state = EpochSampler(10, 2, rank=1, world_size=2).state_dict(samples_seen=12)
    resumed = EpochSampler(10, 2)
    resumed.load_state_dict(state)
    assert take(resumed, 10) == take(EpochSampler(10, 2), 22)[12:]
    # 12 is not a multiple of five ranks: they go on dealing from there all the same.
    ranks = [EpochSampler(10, 2, rank=rank, world_size=5) for rank in range(5)]
    for rank in ranks:
        rank.load_state_dict(state)
    dealt = [key for group in zip(*(take(rank, 2) for rank in ranks), strict=True) for key in group]
    assert dealt == take(EpochSampler(10, 2), 22)[12:]


def test_a_weight_is_how_often_a_group_is_used_and_no_sample_lags_behind():
    sampler = EpochSampler([6, 10, 4], seed=3, weights=[1, 0.5, 2.5])
    assert sampler.epoch_length == 6 + 5 + 10
    keys = take(sampler, 4 * sampler.epoch_length)
    assert len(set(keys)) == len(keys)
    uses = Counter(index for _, index in keys)
    assert {uses[i] for i in range(6)} == {4}
    assert {uses[i] for i in range(6, 16)} == {2}  # two epochs of halves are one pass
    assert {uses[i] for i in range(16, 20)} == {10}
    first = Counter(index for _, index in keys[: sampler.epoch_length])
    assert sum(first[i] for i in range(6, 16)) == 5 and max(first[i] for i in range(6, 16)) == 1
    assert {first[i] for i in range(16, 20)} <= {2, 3}


def test_weighted_ranks_and_resume_follow_the_single_process_order():
    def make(rank=0, world=1):
        return EpochSampler([7, 5], 5, rank, world, [1.0, 0.3])

    per_rank = [take(make(rank, 2), 30) for rank in range(2)]
    everything = take(make(), 60)
    assert [key for group in zip(*per_rank, strict=True) for key in group] == everything
    resumed = make()
    resumed.load_state_dict(make(0, 2).state_dict(samples_seen=22))
    assert take(resumed, 20) == everything[22:42]


def test_state_tells_epoch_and_position():
    state = EpochSampler(10, 2, world_size=2).state_dict(samples_seen=12)
    assert (state["epoch"], state["position"]) == (1, 2)


@pytest.mark.parametrize(("weights", "message"), [([1.0], "1 weights"), ([1.0, 0.01], "no sample")])
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        EpochSampler([5, 5], weights=weights)


def test_state_of_another_run():
    state = EpochSampler(10, seed=2).state_dict(4)
    with pytest.raises(ValueError, match="seed 2, expected 3"):
        EpochSampler(10, seed=3).load_state_dict(state)
    with pytest.raises(ValueError, match=r"sizes \[10\], expected \[11\]"):
        EpochSampler(11, seed=2).load_state_dict(state)


@pytest.mark.parametrize(("size", "rank", "world"), [(0, 0, 1), (5, 2, 2), (5, -1, 2)])
def test_bad_arguments(size, rank, world):
    with pytest.raises(ValueError, match="expected"):
        EpochSampler(size, 0, rank, world)


def test_negative_position():
    with pytest.raises(ValueError, match="-2 samples"):
        EpochSampler(5).load_state_dict(EpochSampler(5).state_dict(-2))
    with pytest.raises(ValueError, match="-1"):
        EpochSampler(5).start_at(-1)
