import math
import random

import pytest

from prismatic.evidence.statistics import intervals_overlap, mcnemar_exact, wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # LIBERO-sized counts
        (489, 500, 0.961, 0.988),
        (475, 500, 0.927, 0.966),
    ],
)
def test_wilson_matches_published_values(successes, trials, low, high):
    digits = 4 if trials != 500 else 3
    assert tuple(round(v, digits) for v in wilson_interval(successes, trials)) == (low, high)


def test_wilson_ends_solve_the_score_equation():
    # The interval's ends are the p with |p_hat - p| = z sqrt(p (1 - p) / n): an independent definition.
    rng, z = random.Random(0), 1.959963984540054
    for _ in range(200):
        n = rng.randint(1, 600)
        k = rng.randint(0, n)
        for end in wilson_interval(k, n):
            assert math.isclose(abs(k / n - end), z * math.sqrt(end * (1 - end) / n), abs_tol=1e-12)


def test_wilson_is_symmetric_and_contains_the_rate():
    for n in (1, 7, 50):
        for k in range(n + 1):
            low, high = wilson_interval(k, n)
            mirrored = wilson_interval(n - k, n)
            assert 0.0 <= low <= k / n <= high <= 1.0
            assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-15)


@pytest.mark.parametrize("arguments", [(1, 0), (3, 2), (-1, 2), (0.5, 2), (True, 2), (1, 2, 0.0)])
def test_wilson_rejects_impossible_counts(arguments):
    with pytest.raises(ValueError, match="expected"):
        wilson_interval(*arguments)


@pytest.mark.parametrize(
    ("b", "c", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (0, 1, 1.0), (0, 5, 0.0625), (0, 6, 0.03125), (1, 9, 22 / 1024), (12, 2, 212 / 16384)],
)
def test_mcnemar_known_values(b, c, p):
    assert mcnemar_exact(b, c) == pytest.approx(p, rel=1e-12)
    assert mcnemar_exact(c, b) == mcnemar_exact(b, c)


def test_mcnemar_large_counts_do_not_overflow():
    assert 0.0 < mcnemar_exact(1000, 1500) < 1e-20


def test_mcnemar_rejects_negative_counts():
    with pytest.raises(ValueError, match="b: expected"):
        mcnemar_exact(-1, 3)


def test_overlap_counts_a_shared_end():
    assert intervals_overlap((0.1, 0.3), (0.3, 0.5))
    assert not intervals_overlap((0.1, 0.29), (0.3, 0.5))
