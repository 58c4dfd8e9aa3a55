"""Interval of a macro mean, paired bootstraps, sample size."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prismatic.evidence.statistics import (
    cluster_bootstrap_interval,
    mcnemar_exact,
    mean_rate_interval,
    pairs_for_difference,
    stratified_bootstrap_interval,
    wilson_interval,
)

COUNTS = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
CLUSTERS = st.lists(st.lists(st.sampled_from((-1, 0, 1)), min_size=1, max_size=12), min_size=2, max_size=6)


def test_macro_interval_by_hand():
    # Wilson of 0/20: [0, 0.16113], of 20/20: [0.83887, 1]; each distance 0.16113 or 0.
    low, high = mean_rate_interval([(0, 20), (20, 20)])
    assert (low, high) == pytest.approx((0.5 - 0.161125 / 2, 0.5 + 0.161125 / 2), abs=1e-5)
    # Four times the same 10/20, Wilson [0.29930, 0.70070]: half the distance.
    assert mean_rate_interval([(10, 20)] * 4) == pytest.approx((0.5 - 0.2007 / 2, 0.5 + 0.2007 / 2), abs=1e-4)


@given(st.lists(COUNTS, min_size=1, max_size=8))
def test_macro_interval_contains_the_mean(counts):
    low, high = mean_rate_interval(counts)
    mean = sum(k / n for k, n in counts) / len(counts)
    assert 0.0 <= low <= mean + 1e-12 and mean - 1e-12 <= high <= 1.0
    assert mean_rate_interval(counts[:1]) == pytest.approx(wilson_interval(*counts[0]), abs=1e-12)


def test_cluster_bootstrap_enumerated_by_hand():
    # Two tasks, all +1 and all 0: a draw gives 1 (1/4), 0.5 (1/2) or 0 (1/4), so the 95 % interval is the whole range.
    assert cluster_bootstrap_interval([[1] * 5, [0] * 5]) == (0.0, 1.0)
    # Unequal sizes, pooled estimator: both drawn give 8/10; only draws of one task give 0 or 1.
    assert cluster_bootstrap_interval([[1] * 8, [0] * 2]) == (0.0, 1.0)
    assert cluster_bootstrap_interval([[1, 0, -1]]) is None


def test_stratified_bootstrap_against_the_normal_approximation():
    # 400 pairs, 60 of +1 and 20 of -1: mean 0.1, standard error sqrt((0.2 - 0.01) / 400) = 0.02179.
    low, high = stratified_bootstrap_interval([[1] * 60 + [-1] * 20 + [0] * 320])
    assert (low, high) == pytest.approx((0.1 - 1.96 * 0.02179, 0.1 + 1.96 * 0.02179), abs=0.004)
    # Tasks that never vary leave nothing to resample, however much they differ.
    assert stratified_bootstrap_interval([[1] * 5, [0] * 5]) == (0.5, 0.5)


@settings(max_examples=30, deadline=None)
@given(CLUSTERS)
def test_bootstraps_are_mirrored_when_the_runs_are_exchanged(clusters):
    mirrored = [[-value for value in cluster] for cluster in clusters]
    for bootstrap in (cluster_bootstrap_interval, stratified_bootstrap_interval):
        low, high = bootstrap(clusters, repetitions=400)
        assert bootstrap(mirrored, repetitions=400) == pytest.approx((-high, -low), abs=1e-12)
        assert -1.0 <= low <= high <= 1.0


@settings(max_examples=30, deadline=None)
@given(CLUSTERS, st.integers(0, 5))
def test_bootstraps_repeat_with_their_seed_and_are_zero_for_identical_runs(clusters, seed):
    for bootstrap in (cluster_bootstrap_interval, stratified_bootstrap_interval):
        assert bootstrap(clusters, seed, 50) == bootstrap(clusters, seed, 50)
        assert bootstrap([[0] * len(cluster) for cluster in clusters], seed, 50) == (0.0, 0.0)


@pytest.mark.parametrize("bootstrap", [cluster_bootstrap_interval, stratified_bootstrap_interval])
@pytest.mark.parametrize("clusters", [[], [[]], [[1], []], [[2]]])
def test_bootstraps_reject_what_is_no_paired_difference(bootstrap, clusters):
    with pytest.raises(ValueError, match="clusters"):
        bootstrap(clusters)
    with pytest.raises(ValueError, match="repetitions"):
        bootstrap([[1], [0]], repetitions=0)


@pytest.mark.parametrize(
    ("discordance", "difference", "pairs"),
    [
        # (1.959964 sqrt(0.1) + 0.841621 sqrt(0.0996))^2 / 0.0004 = 0.885405^2 / 0.0004
        (0.1, 0.02, 1960),
        # (1.959964 sqrt(0.3) + 0.841621 sqrt(0.26))^2 / 0.04 = 1.502661^2 / 0.04
        (0.3, 0.2, 57),
        # No discordant pair observed: a difference of 2 points takes at least a share of 0.02.
        # (1.959964 sqrt(0.02) + 0.841621 sqrt(0.0196))^2 / 0.0004 = 0.395008^2 / 0.0004
        (0.0, 0.02, 391),
    ],
)
def test_pairs_for_a_difference_by_hand(discordance, difference, pairs):
    assert pairs_for_difference(discordance, difference) == pairs


@given(st.floats(0.05, 0.9), st.floats(0.01, 0.04))
def test_more_discordance_and_smaller_differences_take_more_pairs(discordance, difference):
    pairs = pairs_for_difference(discordance, difference)
    assert pairs_for_difference(discordance + 0.1, difference) > pairs
    assert pairs_for_difference(discordance, difference / 2) > pairs
    assert pairs_for_difference(discordance, difference, power=0.9) > pairs


@pytest.mark.parametrize(
    "arguments", [(-0.1,), (1.1,), (0.1, 0.0), (0.1, 1.0), (0.1, 0.1, 0.0), (0.1, 0.1, 0.05, 0.01)]
)
def test_sample_size_rejects_impossible_arguments(arguments):
    with pytest.raises(ValueError, match="expected"):
        pairs_for_difference(*arguments)


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_symmetric_and_one_for_balanced_pairs(b, c):
    assert mcnemar_exact(b, c) == mcnemar_exact(c, b)
    assert 0.0 < mcnemar_exact(b, c) <= 1.0
    assert mcnemar_exact(b, b) == 1.0
