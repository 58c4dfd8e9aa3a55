"""The multiplier against its formulas, Cooper's nuPI, and what it must never do."""

import json
import math

import cooper
import numpy as np
import pytest
import torch
from cooper.optim import nuPI
from craft_fixtures import quick
from hypothesis import given
from hypothesis import strategies as st

from prismatic.craft import CRaFTConfig, CRaFTDualOptimizer

losses = st.lists(st.floats(0, 1e6), min_size=1, max_size=15)
budgets = st.floats(1e-6, 1e3)
kinds = st.sampled_from(["ascent", "pi"])
errors = st.sampled_from(["absolute", "relative"])


def make_dual(**settings) -> CRaFTDualOptimizer:
    return CRaFTDualOptimizer(CRaFTConfig(**settings))


class TestRange:
    @given(losses, budgets, kinds, errors, st.floats(0, 0.99), st.floats(0.5, 100), st.floats(0, 0.5))
    @quick
    def test_lambda_stays_in_its_range(self, values, budget, kind, error, nu, lambda_max, start):
        dual = make_dual(
            retention_budget=budget, dual=kind, dual_error=error, dual_nu=nu, dual_kp=3.0, dual_lr=0.5,
            lambda_max=lambda_max, retention_weight=start,
        )  # fmt: skip
        for value in values:
            assert 0 <= dual.step(value) <= lambda_max
            assert dual.get_lambda() == dual.step(math.nan)

    def test_it_reaches_both_ends_and_leaves_them(self):
        dual = make_dual(retention_weight=0.05, retention_budget=10.0, dual_lr=0.01, lambda_max=0.2)
        assert dual.step(0.0) == 0.0
        assert dual.step(11.0) == pytest.approx(0.01)
        assert dual.step(1000.0) == 0.2
        assert dual.step(9.0) == pytest.approx(0.19)


class TestFormulas:
    @given(losses, budgets, st.floats(0, 5), errors)
    @quick
    def test_ascent_follows_the_violation(self, values, budget, start, error):
        dual = make_dual(retention_budget=budget, retention_weight=start, dual_lr=0.01, dual_error=error)
        for value in values:
            before = dual.get_lambda()
            violation = value - budget if error == "absolute" else value / budget - 1
            assert dual.step(value) == pytest.approx(max(0.0, before + 0.01 * violation), rel=1e-9, abs=1e-9)

    @given(st.floats(0, 1e3), st.floats(0, 1e3), losses, kinds)
    @quick
    def test_a_larger_loss_never_gives_a_smaller_lambda(self, low, high, history, kind):
        low, high = min(low, high), max(low, high)
        results = []
        for value in (low, high):
            dual = make_dual(dual=kind, retention_budget=0.5)
            for earlier in history:
                dual.step(earlier)
            results.append(dual.step(value))
        assert results[0] <= results[1]

    @given(losses, budgets, errors, st.floats(0, 0.99))
    @quick
    def test_pi_without_proportional_part_is_ascent(self, values, budget, error, nu):
        shared = {"retention_budget": budget, "dual_error": error, "dual_lr": 0.1, "lambda_max": 50.0}
        ascent = make_dual(dual="ascent", **shared)
        pi = make_dual(dual="pi", dual_kp=0.0, dual_ki=1.0, dual_nu=nu, **shared)
        assert [ascent.step(v) for v in values] == [pi.step(v) for v in values]

    @given(losses, budgets, st.sampled_from([0.0, 0.5, 0.9]))
    @quick
    def test_relative_errors_are_absolute_ones_in_units_of_the_budget(self, values, budget, nu):
        shared = {"dual": "pi", "dual_nu": nu, "retention_weight": 0.0, "retention_budget": budget}
        relative = make_dual(dual_error="relative", dual_lr=0.1, **shared)
        absolute = make_dual(dual_error="absolute", dual_lr=0.1 / budget, **shared)
        rounding = 1e-15 * max(values) / budget  # a large error that came and went leaves its last digits
        for value in values:
            tolerance = rounding + 1e-6 * (1 + value / budget)
            assert relative.step(value) == pytest.approx(absolute.step(value), rel=1e-6, abs=tolerance)

    def test_the_proportional_part_reacts_to_change_only(self):
        with_p, without = (make_dual(dual="pi", dual_kp=kp, dual_nu=0.5, dual_lr=0.1) for kp in (2.0, 0.0))
        for _ in range(5):  # a constant error: xi is that error from the first step on
            assert with_p.step(1.1) == without.step(1.1)
        # The error rises by 2, xi by half of it.
        assert with_p.step(3.1) - without.step(3.1) == pytest.approx(0.1 * 2.0 * (0.5 * 2.0))

    @pytest.mark.parametrize("settings", [{"enable_dual": False}, {"dual": "off"}])
    def test_off_keeps_the_fixed_lambda(self, settings):
        dual = make_dual(fixed_lambda=0.3, **settings)
        assert [dual.step(v) for v in (0.0, 100.0, math.inf)] == [0.3, 0.3, 0.3]

    @given(losses, kinds, errors, st.floats(0, 3))
    @quick
    def test_an_infinite_budget_only_monitors(self, values, kind, error, start):
        dual = make_dual(retention_budget=math.inf, dual=kind, dual_error=error, retention_weight=start)
        assert {dual.step(v) for v in values} == {start}
        assert not dual.is_active


def nupi_trace(values, start, kp, ki, nu, lr, first_xi) -> list[float]:
    """lambda after each error with Cooper's optimizer and its projection onto lambda >= 0."""
    multiplier = cooper.multipliers.DenseMultiplier(
        init=torch.tensor([start], dtype=torch.float64), dtype=torch.float64
    )
    multiplier.constraint_type = cooper.ConstraintType.INEQUALITY
    gains = [torch.tensor(gain, dtype=torch.float64) for gain in (kp, ki)]
    optimizer = nuPI(multiplier.parameters(), lr=lr, Kp=gains[0], Ki=gains[1], ema_nu=nu, maximize=True)
    trace = []
    for i, value in enumerate(values):
        multiplier.weight.grad = torch.tensor([value], dtype=torch.float64)
        optimizer.step()
        multiplier.post_step_()
        if i == 0 and "xi" in optimizer.state[multiplier.weight]:
            optimizer.state[multiplier.weight]["xi"].fill_(first_xi)
        trace.append(float(multiplier.weight.detach()))
    return trace


class TestAgainstCooper:
    @pytest.mark.parametrize(("kp", "ki", "nu"), [(1.0, 1.0, 0.9), (5.0, 0.5, 0.0), (0.0, 1.0, 0.0), (2.0, 1.0, 0.5)])
    @pytest.mark.parametrize("starts_at_zero", [True, False])
    def test_pi_equals_nupi(self, kp, ki, nu, starts_at_zero):
        values = np.random.default_rng(0).normal(-0.05, 1.0, size=200)
        if starts_at_zero:
            values[0] = 0.0
        budget = 10.0  # losses are errors + budget and must not be negative
        dual = make_dual(
            dual="pi", dual_kp=kp, dual_ki=ki, dual_nu=nu, dual_lr=0.2, retention_budget=budget, retention_weight=0.4
        )
        ours = [dual.step(value + budget) for value in values]
        # The paper and Cooper's documentation start the average at the first error, its code (1.0.1) at zero. The two
        # are the same for a first error of zero; otherwise the average is set to what is documented.
        theirs = nupi_trace(values, 0.4, kp, ki, nu, 0.2, first_xi=values[0])
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
        assert min(ours) == 0.0 < max(ours)  # the trace touches the bound


class TestConditionalIntegration:
    def test_pi_does_not_raise_a_price_without_effect(self):
        dual = make_dual(dual="pi", retention_weight=0.5, retention_budget=0.1)
        assert [dual.step(5.0, can_reduce=False) for _ in range(4)] == [0.5] * 4
        assert dual.step(0.0, can_reduce=False) < 0.5  # falling is always allowed
        assert dual.step(50.0) > 0.5

    def test_the_average_goes_on_meanwhile(self):
        # Otherwise the first effective step would count the change of all the skipped ones.
        dual = make_dual(dual="pi", dual_ki=0.0, dual_kp=1.0, dual_nu=0.0, dual_lr=1.0, retention_budget=0.1)
        dual.step(0.1)
        dual.step(5.1, can_reduce=False)
        assert dual.step(5.1) == pytest.approx(1.0)

    def test_ascent_is_the_original_rule(self):
        first, second = make_dual(), make_dual()
        assert first.step(5.0, can_reduce=False) == second.step(5.0)


class TestNotFinite:
    @given(losses, kinds, st.sampled_from([math.nan, math.inf, -math.inf]))
    @quick
    def test_a_loss_that_is_not_finite_changes_nothing(self, values, kind, bad):
        dual = make_dual(dual=kind)
        for value in values:
            dual.step(value)
            before = dual.state_dict()
            dual.step(bad)
            assert dual.state_dict() == before


class TestGate:
    @given(losses, budgets, st.floats(0.1, 3), st.floats(0, 0.99))
    @quick
    def test_it_is_open_while_the_average_is_above_gamma_eps(self, values, budget, gamma, nu):
        dual = make_dual(retention_budget=budget, projection_gamma=gamma, dual_nu=nu)
        assert not dual.is_active  # before the first measurement
        average = values[0]
        for i, value in enumerate(values):
            average = value if i == 0 else nu * average + (1 - nu) * value
            dual.step(value)
            if abs(average - gamma * budget) > 1e-9 * (average + gamma * budget):
                assert dual.is_active == (average > gamma * budget)

    def test_it_works_without_a_dual(self):
        dual = make_dual(dual="off", retention_budget=0.1)
        dual.step(0.2)
        assert dual.is_active


class TestState:
    @given(losses, losses, kinds)
    @quick
    def test_restored_state_goes_on_bit_for_bit(self, before, after, kind):
        dual = make_dual(dual=kind)
        for value in before:
            dual.step(value)
        resumed = make_dual(dual=kind)
        resumed.load_state_dict(json.loads(json.dumps(dual.state_dict())))
        for value in after:
            assert resumed.step(value) == dual.step(value)
            assert resumed.is_active == dual.is_active

    @pytest.mark.parametrize("value", [-0.1, 2.1, math.nan])
    def test_a_lambda_outside_its_range_is_refused(self, value):
        dual = make_dual(lambda_max=2.0)
        with pytest.raises(ValueError, match="lambda"):
            dual.load_state_dict({"lambda": value, "xi": None, "loss_ema": None})

    @given(losses, kinds)
    @quick
    def test_reset_forgets(self, values, kind):
        dual, fresh = make_dual(dual=kind, retention_weight=2.0), make_dual(dual=kind, retention_weight=2.0)
        for value in values:
            dual.step(value)
        dual.reset()
        assert dual.state_dict() == fresh.state_dict()
        assert [dual.step(v) for v in values] == [fresh.step(v) for v in values]
