"""Metrics of the bench `keep` against matrices worked out by hand, and tests over seeds against known numbers."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from craft_experiments.keep_metrics import (
    Course,
    area_under_curve,
    backward_transfer,
    final_success,
    forward_transfer,
    steps_to_recover,
)
from craft_experiments.paired_seeds import (
    PowerConfig,
    draw_rates,
    flip_p,
    lines,
    power,
    simulated_differences,
    smallest_difference,
    t_p,
)

LEARNED = {"old 0": 0, "old 3": 0, "near": 1, "far": 2}
#            old 0  old 3  near  far
MATRIX = [
    {"old 0": 1.0, "old 3": 0.8},
    {"old 0": 0.6, "old 3": 0.4, "near": 0.7},
    {"old 0": 0.2, "old 3": 0.6, "near": 0.5, "far": 0.9},
]
CURVE = {"near": (0.3, 0.7), "far": (0.1, 0.9)}


def course(matrix=MATRIX, curve=CURVE):
    return Course(LEARNED, tuple(matrix), curve)


def test_metrics_of_a_matrix_worked_out_by_hand():
    found = course()
    assert final_success(found) == pytest.approx((0.2 + 0.6 + 0.5 + 0.9) / 4)
    assert forward_transfer(found) == pytest.approx((0.5 + 0.5) / 2)
    # old 0: (1 - .6 + 1 - .2)/2 = .6; old 3: (.8 - .4 + .8 - .6)/2 = .3; near: .7 - .5 = .2; far: nothing follows.
    assert backward_transfer(found) == pytest.approx((0.6 + 0.3 + 0.2) / 3)
    # old 0: (1 + .6 + .2)/3; old 3: (.8 + .4 + .6)/3; near: (.5 + .5)/2; far: .5.
    assert area_under_curve(found) == pytest.approx((0.6 + 0.6 + 0.5 + 0.5) / 4)


def test_backward_transfer_is_negative_where_old_tasks_gain_and_zero_where_nothing_changes():
    kept = [MATRIX[0], MATRIX[0] | {"near": 0.5}, MATRIX[0] | {"near": 0.5, "far": 0.0}]
    assert backward_transfer(course(kept)) == 0
    gained = [MATRIX[0] | {"old 3": 0.2}, *kept[1:]]
    assert backward_transfer(course(gained)) == pytest.approx(-0.6 / 3)


def test_a_missing_rate_leaves_open_what_needs_it_and_nothing_else():
    without = [*MATRIX[:1], {k: v for k, v in MATRIX[1].items() if k != "old 3"}, MATRIX[2]]
    found = course(without)
    assert final_success(found) is not None and forward_transfer(found) is not None
    assert backward_transfer(found) is None and area_under_curve(found) is None
    assert forward_transfer(course(curve={"near": (0.3, 0.7)})) is None
    assert final_success(course(MATRIX[:2])) is None


def test_recovery_is_the_first_step_at_the_goal():
    assert steps_to_recover({0: 0.0, 100: 0.9, 25: 0.5, 50: 0.8}, 0.8) == 50
    assert steps_to_recover({0: 0.0, 25: 0.5}, 0.8) is None


# --- Tests over seeds ---------------------------------------------------------------------------------------------


def test_t_test_is_students_and_its_bound_and_sides_count():
    values = [0.3, 0.5, 0.1, 0.4, 0.2]
    statistic = np.mean(values) / (np.std(values, ddof=1) / 5**0.5)
    assert t_p(values) == pytest.approx(1 - stats.t.cdf(statistic, 4))
    assert t_p(values, two_sided=True) == pytest.approx(2 * t_p(values))
    assert t_p(values, -0.1) < t_p(values) < t_p(values, 0.1)
    assert t_p([-v for v in values]) == pytest.approx(1 - t_p(values))
    assert (t_p([0.2] * 3), t_p([0.0] * 3), t_p([-0.2] * 3)) == (0, 1, 1)
    assert (t_p([0.0] * 3, -0.1), t_p([-0.2] * 3, two_sided=True)) == (0, 0)
    with pytest.raises(ValueError, match="found 1, expected two or more"):
        t_p([0.1])


def test_five_seeds_of_one_sign_are_one_of_32_signs():
    assert flip_p([0.1, 0.2, 0.3, 0.4, 0.5]) == 1 / 32
    assert flip_p([-0.1, 0.2, 0.3, 0.4, 0.5]) == 2 / 32
    assert flip_p([0.0, 0.0]) == 1
    values, bound = [0.1, -0.3, 0.2], -0.1
    every = [sum(s * (v - bound) for s, v in zip(signs, values, strict=True)) for signs in product((1, -1), repeat=3)]
    assert flip_p(values, bound) == np.mean([total >= sum(values) + 0.3 - 1e-9 for total in every])


def test_drawn_rates_have_their_mean_and_spread():
    rng = np.random.default_rng(0)
    rates = draw_rates(rng, 0.3, 0.1, (100_000,))
    assert (rates.mean(), rates.std()) == (pytest.approx(0.3, abs=2e-3), pytest.approx(0.1, abs=2e-3))
    assert set(draw_rates(rng, 0.0, 0.3, (5,))) == {0.0} and set(draw_rates(rng, 0.5, 0.0, (5,))) == {0.5}


def test_power_grows_with_the_difference_and_is_alpha_without_one():
    cfg = PowerConfig(repetitions=2000)
    rates = [power(simulated_differences(cfg, (0.5 + d, 0.5), (0.1, 0.1), 160), 0.05) for d in (0.0, 0.1, 0.2, 0.4)]
    assert rates == sorted(rates) and rates[0] == pytest.approx(0.05, abs=0.015) and rates[-1] > 0.99
    # Against a closed form: normal differences, many seeds.
    wide = SimpleNamespace(seeds=40, repetitions=2000, seed=1)
    spread = (2 * 0.1**2 + 2 * 0.25 / 160) ** 0.5  # of one seed's difference
    expected = 1 - stats.nct.cdf(stats.t.ppf(0.95, 39), 39, 0.05 * 40**0.5 / spread)
    found = power(simulated_differences(wide, (0.525, 0.475), (0.1, 0.1), 160), 0.05)
    assert found == pytest.approx(expected, abs=0.04)


def test_a_wider_spread_needs_a_larger_difference():
    cfg = PowerConfig(repetitions=400)
    small, large = (smallest_difference(cfg, 0.0, (spread, 0.0), 0.05) for spread in (0.05, 0.3))
    assert small < large
    assert smallest_difference(cfg, 0.9, (0.3, 0.3), 0.01) is None
    assert small == smallest_difference(cfg, 0.0, (0.05, 0.0), 0.05)  # seeded


def test_the_page_has_the_numbers_of_the_command():
    page = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines(PowerConfig()) if line.startswith("|")]
    assert len(rows) == 13 and set(rows) <= set(page)
