"""The controller of the share: its bounds, its units, its way back, and what it says of a budget out of reach."""

import json
import math

import pytest
from craft_fixtures import quick
from hypothesis import given
from hypothesis import strategies as st

from prismatic.craft import CRaFTConfig, CRaFTDualOptimizer

norms = st.floats(1e-6, 1e6)
# (loss, |a|, |r|) of a step
steps = st.lists(st.tuples(st.floats(0, 1e3), norms, norms), min_size=1, max_size=60)


def make_share(**settings) -> CRaFTDualOptimizer:
    return CRaFTDualOptimizer(CRaFTConfig.from_preset("keep", **{"signal": "features", **settings}))


def run(dual: CRaFTDualOptimizer, trace) -> list[float]:
    """lambda of each step."""
    prices = []
    for loss, act, ret in trace:
        prices.append(dual.controller.multiplier_for(act, ret))
        dual.step(loss)
    return prices


def reference(trace, budget: float) -> list[float]:
    """The rule as docs/IDEA.md writes it, without the bound by the step's own norms."""
    drift = act = ret = None
    z = u = -4.0
    prices = []
    for loss, a, r in trace:
        act = a if act is None else 0.95 * act + 0.05 * a
        ret = r if ret is None else 0.95 * ret + 0.05 * r
        w = 1 / (1 + math.exp(-u))
        prices.append(w / (1 - w) * act / ret)
        drift = loss if drift is None else 0.9 * drift + 0.1 * loss
        error = max(-1.0, min(1.0, math.log(drift) - math.log(budget))) if drift else -1.0
        z = max(-5.0, min(1.0, z + 0.05 * error))
        u = max(-5.0, min(1.0, z + 4 * error))
    return prices


@given(steps, st.floats(1e-3, 1e3))
@quick
def test_it_follows_the_formula_up_to_the_bound_of_each_step(trace, budget):
    for found, wanted, (_, act, ret) in zip(
        run(make_share(retention_budget=budget), trace), reference(trace, budget), trace, strict=True
    ):
        assert found == pytest.approx(min(wanted, math.e * act / ret), rel=1e-9)


@given(steps, st.floats(1e-3, 1e3), st.floats(-2, 3))
@quick
def test_the_retention_gradient_never_exceeds_its_largest_share(trace, budget, limit):
    prices = run(make_share(retention_budget=budget, share_limit=limit), trace)
    for price, (_, act, ret) in zip(prices, trace, strict=True):
        assert 0 <= price * ret <= math.exp(limit) * act * (1 + 1e-9)


@given(steps, st.integers(-20, 20), st.integers(-20, 20), st.integers(-20, 20))
@quick
def test_it_has_no_unit(trace, loss_unit, act_unit, ret_unit):
    """Another unit of the loss (and the budget) and of either gradient leaves lambda |r| / |a| as it was."""
    scaled = [(x * 2.0**loss_unit, a * 2.0**act_unit, r * 2.0**ret_unit) for x, a, r in trace]
    plain = run(make_share(retention_budget=0.5), trace)
    other = run(make_share(retention_budget=0.5 * 2.0**loss_unit), scaled)
    for x, y, (_, a, r), (_, b, s) in zip(plain, other, trace, scaled, strict=True):
        assert x * r / a == pytest.approx(y * s / b, rel=1e-6)


@given(steps)
@quick
def test_within_the_budget_it_comes_back_from_its_limit_within_120_steps_whatever_was_before(trace):
    dual = make_share(retention_budget=1.0)
    run(dual, [(1e9, act, ret) for _, act, ret in trace] * 8)
    dual.controller.drift = 0.0  # the averaged loss is within the budget from now on
    run(dual, [(0.0, 1.0, 1.0)] * 120)
    assert dual.controller.z == pytest.approx(-5.0)
    dual.controller.act = dual.controller.ret = 1.0  # the means need not have forgotten the norms before
    assert dual.controller.multiplier_for(1.0, 1.0) == pytest.approx(math.exp(-5), rel=1e-9)


def test_it_is_never_away_from_a_loss_within_the_budget_for_long():
    """From the limit, the proportional part lets go as soon as the averaged loss is below the budget."""
    dual = make_share(retention_budget=1.0)
    run(dual, [(10.0, 1.0, 1.0)] * 300)
    before = dual.controller.multiplier_for(1.0, 1.0)
    run(dual, [(0.0, 1.0, 1.0)] * 40)
    assert before == pytest.approx(math.e)
    assert dual.controller.multiplier_for(1.0, 1.0) < 0.1


@given(st.floats(0.01, 100))
@quick
def test_a_higher_loss_never_gives_a_lower_price(loss):
    low, high = (make_share(retention_budget=1.0) for _ in range(2))
    run(low, [(loss, 1.0, 1.0)] * 30)
    run(high, [(2 * loss, 1.0, 1.0)] * 30)
    assert low.controller.multiplier_for(1.0, 1.0) <= high.controller.multiplier_for(1.0, 1.0)


class TestOutOfReach:
    def test_it_is_said_after_100_steps_at_the_limit_above_the_budget(self):
        dual, said = make_share(retention_budget=1.0), []
        for _ in range(250):
            dual.step(2.0)
            said.append(dual.controller.out_of_reach)
        # z climbs from -4 to 1 by 0.05 ln 2 a step.
        first_at_limit = math.ceil(5 / (0.05 * math.log(2)))
        assert abs(said.index(True) - (first_at_limit + 99)) <= 1

    def test_a_budget_that_is_met_takes_it_back(self):
        dual = make_share(retention_budget=1.0)
        run(dual, [(2.0, 1.0, 1.0)] * 300)
        assert dual.controller.out_of_reach
        run(dual, [(0.1, 1.0, 1.0)] * 10)
        assert not dual.controller.out_of_reach

    def test_an_infinite_budget_only_monitors(self):
        dual = make_share(retention_budget=math.inf)
        run(dual, [(1e6, 1.0, 1.0)] * 300)
        assert not dual.controller.out_of_reach
        assert dual.controller.multiplier_for(1.0, 1.0) == pytest.approx(math.exp(-4))


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf])
def test_norms_that_say_nothing_have_no_price_and_leave_the_means(nothing):
    dual = make_share(retention_budget=1.0)
    assert dual.controller.multiplier_for(1.0, nothing) == 0.0  # as at theta_0
    price = dual.controller.multiplier_for(2.0, 1.0)
    assert dual.controller.multiplier_for(1.0, nothing) == 0.0
    assert dual.controller.multiplier_for(nothing, 1.0) == 0.0
    assert dual.controller.multiplier_for(2.0, 1.0) == pytest.approx(price)


@given(steps, steps)
@quick
def test_a_restored_controller_goes_on_to_the_bit(before, after):
    dual = make_share(retention_budget=0.5)
    run(dual, before)
    other = make_share(retention_budget=0.5)
    other.load_state_dict(json.loads(json.dumps(dual.state_dict(), allow_nan=False)))
    assert run(other, after) == run(dual, after)
    assert other.state_dict() == dual.state_dict()


@given(st.floats(1e-3, 10), st.floats(1, 2))
@quick
def test_the_budget_of_actions_is_a_root_mean_square(budget, aim):
    config = CRaFTConfig.from_preset("keep", retention_budget=budget, aim=aim)
    assert config.loss_budget == pytest.approx((aim * budget) ** 2)
    assert config.drift_of(config.loss_budget) == pytest.approx(aim * budget)
