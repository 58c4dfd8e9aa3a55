"""The constraint over whole steps: plans, combination, accumulation, scaling, optimality and telemetry."""

import itertools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from craft_fixtures import (
    ANCHORS,
    PLANS,
    action_loss,
    constrained_backward,
    dot,
    gradients,
    make_batch,
    make_constraint,
    make_policy,
    make_trained,
    norm,
    perturb,
    reference,
    split,
)
from torch import nn

from prismatic.craft import (
    PRESETS,
    AnchorKind,
    CRaFTConfig,
    CRaFTConstraint,
    NonFiniteRetentionError,
    Plan,
    RetentionMetric,
)
from prismatic.craft.rules import RULES

# `keep` holds another signal and always tells the gradients apart: test_own_passes.py.
FEATURE_PRESETS = ["original", "budget"]
METRICS = list(RetentionMetric)
# Whether kappa may differ from lambda with the gate closed, and with the gate open.
SEPARATES = {"off": (False, False), "add": (False, True), "max": (False, True), "barrier": (True, True)}
# Seeds of `make_batch` for which all, or some, gradients of `make_trained()` are in conflict.
CONFLICT, MIXED = 2, 3


def assert_close(actual: dict, expected: dict, rtol: float) -> None:
    """Equal names, and per tensor a difference below `rtol` of its norm."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        difference = norm([actual[name].double() - value.double()])
        assert difference <= rtol * norm([value]) + 1e-12, f"{name}: {difference} of {norm([value])}"


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(actual[name], value)] == []


def plain_gradients(policy, batches) -> dict:
    for batch in batches:
        (action_loss(policy(batch)[0], batch) / len(batches)).backward()
    found = gradients(policy)
    policy.zero_grad()
    return found


def combined(a: dict, r: dict, kappa: dict | float) -> dict:
    """a + kappa r, with a or r missing as zero."""
    factor = kappa if isinstance(kappa, dict) else dict.fromkeys(r, kappa)
    g = {n: x.clone() for n, x in a.items()}
    for name, y in r.items():
        g[name] = g.get(name, torch.zeros_like(y)) + factor[name] * y
    return g


def weight_names(policy) -> set[str]:
    return {n for n, p in policy.named_parameters() if p.requires_grad}


class TestPlan:
    @pytest.mark.parametrize("when", ["always", "active"])
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("multiplier", [0.0, 0.5])
    @pytest.mark.parametrize("drifted", [False, True])
    def test_it_separates_the_gradients_only_when_kappa_may_differ_from_lambda(self, when, rule, multiplier, drifted):
        granularity = "global" if RULES[rule].one_group else "tensor"
        policy = make_policy()
        constraint = make_constraint(
            policy, projection_when=when, projection_rule=rule, projection_granularity=granularity,
            dual="off", fixed_lambda=multiplier, retention_budget=1e-6,
        )  # fmt: skip
        if drifted:
            perturb(policy)
        # The gate follows the losses of earlier steps.
        constrained_backward(policy, constraint, [make_batch()])
        constraint.combine_()
        gate = when == "always" or drifted
        if SEPARATES[rule][gate]:
            assert constraint.plan is Plan.SEPARATE
        else:
            assert constraint.plan is (Plan.FUSED if multiplier > 0 else Plan.MEASURE)

    def test_the_gate_is_closed_before_the_first_measurement(self):
        _, constraint = make_trained(preset="budget", retention_budget=1e-6)
        assert constraint.plan is Plan.MEASURE

    @pytest.mark.parametrize("plan", PLANS)
    def test_accumulate_returns_what_the_action_loss_lacks(self, plan):
        policy, constraint = make_trained(**PLANS[plan])
        batch = make_batch()
        a, r, loss = reference(policy, constraint, batch)
        assert constraint.plan is plan
        features = constraint.signal.extractor.parts(*policy(batch)[1])
        added = constraint.accumulate(features, constraint.reference(batch), 0.25)
        if plan is Plan.FUSED:
            added.backward()
            assert float(added.detach()) == pytest.approx(0.3 * float(loss))
            assert_close(gradients(policy), {n: 0.3 * y for n, y in r.items()}, rtol=1e-5)
        else:
            assert added == 0.0
            assert not gradients(policy)

    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    @pytest.mark.parametrize("metric", METRICS)
    def test_fused_equals_separate_with_kappa_lambda(self, preset, metric):
        results = []
        for plan in (Plan.FUSED, Plan.SEPARATE):
            policy, constraint = make_trained(preset=preset, retention_metric=metric, **PLANS[Plan.FUSED])
            expected = combined(*reference(policy, constraint, make_batch())[:2], 0.3)
            assert constraint.plan is Plan.FUSED
            constraint.plan = plan
            constrained_backward(policy, constraint, split(make_batch(), 2))
            metrics = constraint.combine_()
            assert_close(gradients(policy), expected, rtol=1e-5)
            results.append((gradients(policy), constraint.dual.state_dict(), metrics["CRaFT/Retention Loss"]))
        assert_close(results[0][0], results[1][0], rtol=1e-5)
        assert results[0][1:] == results[1][1:]

    @pytest.mark.parametrize("lora", [False, True])
    def test_measure_leaves_the_gradient_of_plain_fine_tuning_bit_for_bit(self, lora):
        policy, constraint = make_trained(lora=lora, **PLANS[Plan.MEASURE])
        batches = split(make_batch(), 2)
        expected = plain_gradients(policy, batches)
        constrained_backward(policy, constraint, batches)
        metrics = constraint.combine_()
        assert_equal(gradients(policy), expected)
        assert metrics["CRaFT/Retention Loss"] > 0

    @pytest.mark.parametrize("plan", PLANS)
    def test_every_plan_measures_the_same(self, plan):
        policy, constraint = make_trained(**PLANS[plan])
        loss = float(reference(policy, constraint, make_batch())[2])
        constrained_backward(policy, constraint, [make_batch()])
        before = constraint.dual.get_lambda()
        metrics = constraint.combine_()
        assert metrics["CRaFT/Retention Loss"] == pytest.approx(loss, rel=1e-6)
        assert metrics["CRaFT/Lambda"] == before  # of this step
        assert constraint.dual.get_lambda() == pytest.approx(max(0.0, before + 0.01 * (loss - 0.1)), rel=1e-9)


class TestStart:
    @pytest.mark.parametrize("kind", ANCHORS)
    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    @pytest.mark.parametrize("plan", PLANS)
    def test_without_drift_a_step_is_a_plain_one(self, kind, preset, plan):
        # r is an exact zero: no rule and no lambda can do anything.
        policy = make_policy(lora=True)
        constraint = make_constraint(policy, CRaFTConfig.from_preset(preset, anchor=kind, **PLANS[plan]))
        expected = plain_gradients(policy, [make_batch()])
        constrained_backward(policy, constraint, [make_batch()])
        metrics = constraint.combine_()
        assert metrics["CRaFT/Retention Loss"] == 0.0
        assert metrics.get("CRaFT/Retention Gradient Norm", 0.0) == 0.0
        assert_equal(gradients(policy), expected)

    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    def test_without_drift_a_step_with_the_cosine_metric_is_a_plain_one(self, preset):
        policy = make_policy()
        constraint = make_constraint(
            policy, CRaFTConfig.from_preset(preset, retention_metric="cosine", **PLANS[Plan.SEPARATE])
        )
        expected = plain_gradients(policy, [make_batch()])
        constrained_backward(policy, constraint, [make_batch()])
        metrics = constraint.combine_()
        assert metrics["CRaFT/Retention Loss"] == 0.0
        assert_equal(gradients(policy), expected)

    def test_nothing_to_constrain_is_an_error(self):
        policy = make_policy()
        policy.vla.requires_grad_(False)
        with pytest.raises(ValueError, match="nothing to constrain"):
            make_constraint(policy)

    def test_features_without_a_graph_are_an_error(self):
        policy, constraint = make_trained()
        parts = constraint.signal.extractor.parts(*(None if x is None else x.detach() for x in policy(make_batch())[1]))
        with pytest.raises(ValueError, match="nothing to constrain"):
            constraint.accumulate(parts, parts, 1.0)

    def test_current_features_are_those_of_the_training_pass(self):
        policy, constraint = make_trained()
        batch = make_batch()
        own = constraint.current(batch)
        assert own.requires_grad
        assert torch.equal(own.f, constraint.signal.extractor.parts(*policy(batch)[1]).f)


def kappa_by_hand(a, r, groups, rule, multiplier, violation=0.0) -> dict[str, float]:
    """The rules with the exact guard, in fp64, written out; `groups`: lists of names."""
    kappa = {}
    for names in groups:
        x, y = [a[n] for n in names], [r[n] for n in names]
        d, n = dot(x, y), dot(y, y)
        bracket = max(0.0, -d / n)
        value = {
            "off": multiplier,
            "add": multiplier + bracket,
            "max": max(multiplier, bracket),
            "barrier": max(0.0, (violation - d) / n),
        }[rule]
        kappa |= dict.fromkeys(names, value)
    return kappa


class TestCombine:
    @pytest.mark.parametrize(
        ("rule", "granularity"),
        [*itertools.product(["off", "add", "max"], ["tensor", "module", "layer", "global"]), ("barrier", "global")],
    )
    @pytest.mark.parametrize("lora", [False, True])
    @pytest.mark.parametrize("seed", [CONFLICT, MIXED])
    def test_gradients_are_a_plus_kappa_r(self, rule, granularity, lora, seed):
        settings = {"projection_rule": rule, "projection_granularity": granularity, "projection_guard": "exact"}
        policy, constraint = make_trained(lora=lora, retention_weight=0.4, retention_budget=0.001, **settings)
        constraint.plan = Plan.SEPARATE  # also for the rule off
        batch = make_batch(seed)
        a, r, loss = reference(policy, constraint, batch)
        owner = lambda n: n.split(".lora_")[0] if ".lora_" in n else n.rpartition(".")[0]  # noqa: E731
        label = {
            "tensor": lambda n: n,
            "module": owner,
            "layer": lambda n: n[: n.index("layers.") + 8] if "layers." in n else owner(n),
            "global": lambda n: "",
        }[granularity]
        groups = {}
        for name in r:
            groups.setdefault(label(name), []).append(name)
        assert 1 <= len(groups) <= len(r)
        kappa = kappa_by_hand(a, r, groups.values(), rule, 0.4, float(loss) - 0.001)
        constrained_backward(policy, constraint, [batch])
        constraint.combine_()
        assert_close(gradients(policy), combined(a, r, kappa), rtol=1e-4)
        if rule in ("add", "max") and seed == CONFLICT:
            assert all(k > 0.4 for k in kappa.values())

    def test_gradients_of_the_head_are_not_touched(self):
        policy, constraint = make_trained()
        expected = plain_gradients(policy, [make_batch()])
        constrained_backward(policy, constraint, [make_batch()])
        constraint.combine_()
        actual = gradients(policy)
        for name, value in expected.items():
            assert torch.equal(actual[name], value) == name.startswith("action_head.")

    def test_parameters_that_do_not_reach_the_signal_are_neither_kept_nor_changed(self):
        policy = make_policy()
        reaches = lambda name: ".layers.0." in name  # noqa: E731
        constraint = make_constraint(policy, reaches=reaches)
        assert set(constraint.weights.state_dict()) == {n for n in weight_names(policy) if reaches(n)}
        perturb(policy)
        expected = plain_gradients(policy, [make_batch()])
        constrained_backward(policy, constraint, [make_batch()])
        constraint.combine_()
        assert {n for n, g in gradients(policy).items() if not torch.equal(g, expected[n])} == {
            n for n in weight_names(policy) if reaches(n)
        }

    def test_agreement_without_lambda_changes_no_bit(self):
        for rule, guard in (("add", "additive"), ("add", "exact"), ("max", "exact")):
            policy, constraint = make_trained(
                projection_rule=rule, projection_guard=guard, dual="off", fixed_lambda=0.0, retention_budget=1e-6
            )
            _, r, _ = reference(policy, constraint, make_batch())
            constrained_backward(policy, constraint, [make_batch()])
            agreeing = {n: 3.0 * y for n, y in r.items()}
            for name, p in policy.named_parameters():
                p.grad = agreeing[name].clone() if name in agreeing else None
            constraint.combine_()
            assert_equal(gradients(policy), agreeing)

    def test_a_missing_action_gradient_counts_as_zero(self):
        policy, constraint = make_trained(retention_weight=0.5)
        _, r, _ = reference(policy, constraint, make_batch())
        constrained_backward(policy, constraint, [make_batch()])
        policy.zero_grad()
        constraint.combine_()
        assert_close(gradients(policy), {n: 0.5 * y for n, y in r.items()}, rtol=1e-5)

    def test_p_grad_is_changed_in_place(self):
        # DDP's buckets are views of it.
        policy, constraint = make_trained()
        constrained_backward(policy, constraint, [make_batch()])
        before = {n: p.grad for n, p in policy.named_parameters()}
        constraint.combine_()
        assert all(p.grad is before[n] for n, p in policy.named_parameters())

    def test_bf16_weights_keep_their_type_and_lose_their_conflict(self):
        policy = make_policy().to(torch.bfloat16)
        constraint = make_constraint(policy, projection_guard="exact", dual="off", fixed_lambda=0.0)
        perturb(policy)
        batch = {n: x.bfloat16() for n, x in make_batch().items()}
        a, r, _ = reference(policy, constraint, batch)
        conflicts = [n for n in r if dot([a[n]], [r[n]]) < 0]
        assert conflicts
        constrained_backward(policy, constraint, [batch])
        constraint.combine_()
        for name, g in gradients(policy).items():
            assert g.dtype is torch.bfloat16
            if name in conflicts:
                assert dot([g], [r[name]]) >= -1e-2 * norm([a[name]]) * norm([r[name]])

    def test_the_adam_metric_needs_the_optimizer_and_leaves_no_conflict_in_it(self):
        settings = {"projection_metric": "adam", "projection_guard": "exact", "dual": "off", "fixed_lambda": 0.0}
        policy, constraint = make_trained(**settings)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, eps=1e-8)
        for seed in (7, 8):  # second moments
            plain = make_batch(seed)
            optimizer.zero_grad()
            action_loss(policy(plain)[0], plain).backward()
            optimizer.step()
        optimizer.zero_grad()
        a, r, _ = reference(policy, constraint, make_batch())
        constrained_backward(policy, constraint, [make_batch()])
        with pytest.raises(ValueError, match="needs the optimizer"):
            constraint.combine_()
        constraint.combine_(None, optimizer)
        parameters, conflicts = dict(policy.named_parameters()), 0
        for name, y in r.items():
            root = (1 / ((optimizer.state[parameters[name]]["exp_avg_sq"] / (1 - 0.999**2)).sqrt() + 1e-8)).sqrt()
            x, y, z = ([(root * t).double()] for t in (a[name], y, parameters[name].grad))
            conflicts += dot(x, y) < 0
            assert dot(z, y) >= -1e-5 * norm(x) * norm(y)
        assert conflicts > 0


def undecided(a: dict, r: dict) -> set[str]:
    """Tensors of which rounding may decide whether their gradients are in conflict."""
    names = {n for n in r if abs(dot([a[n]], [r[n]])) < 1e-4 * norm([a[n]]) * norm([r[n]])}
    assert len(names) <= 1
    return names


def combine_together(constraints: list[CRaFTConstraint]) -> tuple[list[dict], int]:
    """`combine_` of several processes at once, with an average over them; the metrics and the number of averages."""
    barrier, sent = threading.Barrier(len(constraints), timeout=600), []

    def mean(tensor):
        sent.append(tensor)
        barrier.wait()
        average = sum(sent[-len(constraints) :]) / len(constraints)
        barrier.wait()
        return average

    with ThreadPoolExecutor(len(constraints)) as pool:
        metrics = list(pool.map(lambda constraint: constraint.combine_(mean), constraints))
    return metrics, len(sent) // len(constraints)


class TestAccumulation:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    @pytest.mark.parametrize("metric", METRICS)
    def test_micro_batches_equal_one_batch(self, plan, preset, metric):
        results = []
        for count in (1, 4):
            policy, constraint = make_trained(preset=preset, retention_metric=metric, **PLANS[plan])
            assert constraint.plan is plan
            a, r, _ = reference(policy, constraint, make_batch(MIXED))
            constrained_backward(policy, constraint, split(make_batch(MIXED), count))
            metrics = constraint.combine_()
            metrics.pop("CRaFT/Anchor Seconds")
            results.append((gradients(policy), constraint.dual.state_dict(), metrics))
        one, many = results
        unclear = undecided(a, r)
        assert_close(*({n: g for n, g in x[0].items() if n not in unclear} for x in (many, one)), rtol=1e-5)
        assert list(many[1]) == list(one[1])
        for name, value in one[1].items():
            # L_ret is summed in fp32, and lambda moves by eta times its relative or absolute distance from eps.
            assert many[1][name] == (None if value is None else pytest.approx(value, rel=1e-6, abs=1e-7))
        assert many[2] == pytest.approx(one[2], rel=1e-4, abs=1e-6)

    def test_lambda_moves_once_per_step(self):
        policy, constraint = make_trained(retention_budget=1e-3, dual_lr=1.0)
        constrained_backward(policy, constraint, split(make_batch(), 4))
        assert constraint.dual.get_lambda() == 1.0
        loss = constraint.combine_()["CRaFT/Retention Loss"]
        assert constraint.dual.get_lambda() == pytest.approx(1.0 + loss - 1e-3)

    def test_the_next_step_starts_from_nothing(self):
        policy, constraint = make_trained(dual="off", fixed_lambda=0.3)
        results = []
        for _ in range(2):
            policy.zero_grad()
            constrained_backward(policy, constraint, split(make_batch(), 2))
            metrics = constraint.combine_()
            metrics.pop("CRaFT/Anchor Seconds")
            results.append((gradients(policy), metrics))
        assert_equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]

    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    def test_averages_over_processes_equal_one_process(self, plan, preset):
        settings = {"preset": preset, **PLANS[plan]}
        whole, constraint = make_trained(**settings)
        a, r, _ = reference(whole, constraint, make_batch(MIXED))
        constrained_backward(whole, constraint, [make_batch(MIXED)])
        expected = constraint.combine_()
        ranks = [make_trained(**settings) for _ in range(2)]
        for (policy, part), batch in zip(ranks, split(make_batch(MIXED), 2), strict=True):
            constrained_backward(policy, part, [batch])
        for p, q in zip(ranks[0][0].parameters(), ranks[1][0].parameters(), strict=True):  # what DDP does
            p.grad.add_(q.grad).mul_(0.5)
            q.grad.copy_(p.grad)
        metrics, collectives = combine_together([part for _, part in ranks])
        assert collectives == 1
        unclear = undecided(a, r)
        for (policy, part), measured in zip(ranks, metrics, strict=True):
            actual, wanted = ({n: g for n, g in gradients(m).items() if n not in unclear} for m in (policy, whole))
            assert_close(actual, wanted, rtol=1e-5)
            assert part.dual.get_lambda() == pytest.approx(constraint.dual.get_lambda(), rel=1e-6)
            assert measured["CRaFT/Retention Loss"] == pytest.approx(expected["CRaFT/Retention Loss"], rel=1e-5)
        assert_equal(gradients(ranks[0][0]), gradients(ranks[1][0]))
        assert ranks[0][1].dual.state_dict() == ranks[1][1].dual.state_dict()


def scaled_step(scale: float, weight: float = 1.0, dtype: torch.dtype | None = None, **settings):
    """A step with a loss scale, in fp32 or under autocast: gradients before and after combining, and metrics."""
    policy, constraint = make_trained(**settings)
    autocast = nullcontext if dtype is None else lambda: torch.autocast("cpu", dtype)
    constrained_backward(policy, constraint, [make_batch()], scale, weight, autocast)
    for p in policy.parameters():  # what GradScaler.unscale_ does
        p.grad.mul_(1 / scale)
    a = gradients(policy)
    metrics = constraint.combine_(None, None, scale)
    metrics.pop("CRaFT/Anchor Seconds")
    return a, gradients(policy), metrics


class TestLossScale:
    @pytest.mark.parametrize("plan", PLANS)
    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    def test_powers_of_two_change_no_bit_in_fp32(self, plan, preset):
        results = [scaled_step(scale, preset=preset, **PLANS[plan]) for scale in (1.0, 2.0**16)]
        assert_equal(results[1][1], results[0][1])
        assert results[1][2] == results[0][2]

    def test_fp16_with_loss_scale_gives_the_kappa_of_fp32(self):
        settings = {"projection_rule": "max", "projection_guard": "exact", "dual": "off", "fixed_lambda": 0.0}
        weight = 1e-4  # action gradients that underflow in fp16 without a loss scale
        policy, constraint = make_trained(**settings)
        a, r, _ = reference(policy, constraint, make_batch(), weight)
        clear = [n for n in r if dot([a[n]], [r[n]]) < -0.1 * norm([a[n]]) * norm([r[n]])]
        assert len(clear) >= 3

        def kappas(scale, dtype):
            before, after, _ = scaled_step(scale, weight, dtype, **settings)
            moved = {n: [after[n].double() - before[n].double()] for n in clear}
            return {n: dot(moved[n], [r[n]]) / dot([r[n]], [r[n]]) for n in clear}

        expected = kappas(1.0, None)
        assert kappas(2.0**13, torch.float16) == pytest.approx(expected, rel=1e-2)
        assert kappas(1.0, torch.float16) != pytest.approx(expected, rel=1e-2)


def poisoned_backward(policy, constraint, batch, factor: float, forward: bool = False) -> None:
    """A step in which the retention gradient, or the features themselves, are multiplied by a factor."""
    anchor = constraint.reference(batch)
    with constraint.live_graph():
        actions, (raw, aq, mask) = policy(batch)
        if forward:
            raw = raw * factor
        else:
            raw.register_hook(lambda gradient: gradient * factor)  # `raw` is not on the way to the actions
        loss = action_loss(actions, batch)
        (loss + constraint.accumulate(constraint.signal.extractor.parts(raw, aq, mask), anchor, 1.0)).backward()


class TestNotFinite:
    SETTINGS = {"projection_rule": "max", "projection_guard": "exact", "dual": "off", "fixed_lambda": 0.2}  # noqa: RUF012

    @pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("forward", [False, True])
    @pytest.mark.parametrize("granularity", ["tensor", "global"])
    def test_the_step_is_a_plain_one_and_counted(self, factor, forward, granularity):
        policy, constraint = make_trained(projection_granularity=granularity, **self.SETTINGS)
        expected = plain_gradients(policy, [make_batch()])
        poisoned_backward(policy, constraint, make_batch(), factor, forward)
        constraint.combine_()
        assert_equal(gradients(policy), expected)
        assert constraint.statistics == {"constrained_steps": 1, "non_finite_steps": 1, "non_finite_in_a_row": 1}

    def test_the_step_after_it_is_not_affected(self):
        policy, constraint = make_trained(**self.SETTINGS)
        poisoned_backward(policy, constraint, make_batch(), math.nan)
        constraint.combine_()
        policy.zero_grad()
        a, r, _ = reference(policy, constraint, make_batch())
        constrained_backward(policy, constraint, [make_batch()])
        constraint.combine_()
        expected = combined(a, r, kappa_by_hand(a, r, [[n] for n in r], "max", 0.2))
        assert_close(gradients(policy), expected, rtol=1e-4)
        assert constraint.statistics == {"constrained_steps": 2, "non_finite_steps": 1, "non_finite_in_a_row": 0}

    def test_a_loss_that_is_not_finite_does_not_move_lambda(self):
        policy, constraint = make_trained()
        before = constraint.dual.state_dict()
        poisoned_backward(policy, constraint, make_batch(), math.nan, forward=True)
        constraint.combine_()
        assert constraint.dual.state_dict() == before

    def test_too_many_in_a_row_stop_the_run(self):
        policy, constraint = make_trained(**self.SETTINGS)
        assert constraint.max_non_finite == 10
        for bad in [True] * 9 + [False] + [True] * 9:
            poisoned_backward(policy, constraint, make_batch(), math.nan if bad else 1.0)
            constraint.combine_()
        poisoned_backward(policy, constraint, make_batch(), math.nan)
        with pytest.raises(NonFiniteRetentionError, match="10 constrained steps in a row"):
            constraint.combine_()
        assert constraint.statistics["non_finite_steps"] == 19


class Point(nn.Module):
    """A policy that is its feature: four numbers."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.clone())

    def anchor_features(self, _batch):
        return self.x[None, None], None, None


class TestOptimality:
    """minimise 1/2 sum A (x - C)^2 subject to mean (x - X0)^2 <= eps: the solution is known but for lambda."""

    A, C, X0 = (
        torch.tensor([1.0, 2.0, 0.5, 1.5]),
        torch.tensor([2.0, -1.0, 3.0, 1.0]),
        torch.tensor([1.0, 1.0, 1.0, -1.0]),
    )

    def solution(self, multiplier: float) -> torch.Tensor:
        # A (x - C) + lambda 2 (x - X0) / 4 = 0
        return (self.A * self.C + multiplier / 2 * self.X0) / (self.A + multiplier / 2)

    def optimal_lambda(self, budget: float) -> float:
        low, high = 0.0, 1e4
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if self.drift(self.solution(middle)) > budget else (low, middle)
        return low

    def drift(self, x) -> float:
        return float((x.detach() - self.X0).square().mean())

    def train(self, steps: int, **settings):
        point = Point(self.X0)
        config = CRaFTConfig(anchor_type="raw_only", **settings)
        constraint = make_constraint(point, config, reaches=None)
        optimizer = torch.optim.SGD(point.parameters(), lr=0.05)
        for _ in range(steps):
            anchor = constraint.reference({})
            with constraint.live_graph():
                loss = 0.5 * (self.A * (point.x - self.C).square()).sum()
                features = constraint.signal.extractor.parts(*point.anchor_features({}))
                (loss + constraint.accumulate(features, anchor, 1.0)).backward()
            constraint.combine_()
            optimizer.step()
            optimizer.zero_grad()
        return point.x.detach(), constraint

    @pytest.mark.parametrize(
        "settings",
        [
            {"projection_rule": "off", "dual_lr": 0.5, "retention_weight": 0.0},
            {"projection_rule": "off", "dual_lr": 0.5, "retention_weight": 9.0},
            {"projection_rule": "off", "dual": "pi", "dual_error": "relative", "dual_lr": 0.2, "retention_weight": 0.0},
            {**PRESETS["budget"], "retention_metric": "mse"},
        ],
        ids=["ascent", "ascent from above", "pi", "budget preset"],
    )
    def test_lambda_and_drift_of_the_solution(self, settings):
        budget = 0.5
        x, constraint = self.train(300, **(settings | {"retention_budget": budget}))
        best = self.optimal_lambda(budget)
        assert best > 1
        assert constraint.dual.get_lambda() == pytest.approx(best, rel=0.05)
        assert self.drift(x) == pytest.approx(budget, rel=0.02)
        torch.testing.assert_close(x, self.solution(best), rtol=0.02, atol=0.02)

    def test_the_barrier_meets_the_budget_without_lambda(self):
        settings = {"projection_rule": "barrier", "projection_granularity": "global", "retention_budget": 0.5}
        x, _ = self.train(300, dual="off", fixed_lambda=0.0, **settings)
        assert self.drift(x) == pytest.approx(0.5, rel=0.02)
        torch.testing.assert_close(x, self.solution(self.optimal_lambda(0.5)), rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("preset", ["budget", "ascent"])
    def test_a_loose_budget_has_no_price(self, preset):
        budget = 4.0
        assert self.drift(self.C) < budget
        settings = {"projection_rule": "off", "dual_lr": 0.5, "retention_weight": 1.0}
        if preset == "budget":
            settings = {**PRESETS["budget"], "retention_metric": "mse"}
        x, constraint = self.train(300, **(settings | {"retention_budget": budget}))
        assert constraint.dual.get_lambda() == 0.0
        torch.testing.assert_close(x, self.C, rtol=1e-3, atol=1e-3)

    def test_a_price_without_effect_does_not_grow(self):
        class Dead(nn.Module):
            """Beyond the budget, where the features have no slope."""

            def __init__(self):
                super().__init__()
                self.x = nn.Parameter(torch.ones(3))

            def anchor_features(self, _batch):
                return self.x.relu()[None, None], None, None

        lambdas = {}
        for dual in ("pi", "ascent"):
            module = Dead()
            config = CRaFTConfig(anchor_type="raw_only", dual=dual, retention_budget=0.1, retention_weight=0.5)
            constraint = make_constraint(module, config, reaches=None)
            with torch.no_grad():
                module.x.neg_()
            anchor = constraint.reference({})
            constraint.accumulate(constraint.signal.extractor.parts(*module.anchor_features({})), anchor, 1.0)
            assert constraint.combine_()["CRaFT/Retention Loss"] == 1.0
            lambdas[dual] = constraint.dual.get_lambda()
        assert lambdas["pi"] == 0.5 < lambdas["ascent"]


class TestTelemetry:
    @pytest.mark.parametrize("rule", ["add", "max"])
    @pytest.mark.parametrize("granularity", ["tensor", "module", "global"])
    @pytest.mark.parametrize("lora", [False, True])
    def test_shed_energy_cosine_and_norm(self, rule, granularity, lora):
        policy, constraint = make_trained(
            lora=lora, projection_rule=rule, projection_guard="exact", projection_granularity=granularity,
            dual="off", fixed_lambda=0.0,
        )  # fmt: skip
        a, r, _ = reference(policy, constraint, make_batch())
        constrained_backward(policy, constraint, [make_batch()])
        metrics = constraint.combine_()
        after = gradients(policy)
        x, y, z = ([t[n] for n in r] for t in (a, r, after))  # of the constrained parameters
        shed = 1 - dot(z, z) / dot(x, x)
        assert metrics["CRaFT/Shed Energy"] == pytest.approx(shed, rel=1e-4, abs=1e-6)
        assert shed > 1e-4 or granularity == "global"
        assert metrics["CRaFT/Gradient Cosine"] == pytest.approx(dot(x, y) / (norm(x) * norm(y)), rel=1e-4)
        assert metrics["CRaFT/Retention Gradient Norm"] == pytest.approx(norm(y), rel=1e-5)

    def test_shed_energy_is_euclidean_with_the_adam_metric_too(self):
        settings = {"projection_metric": "adam", "projection_guard": "exact", "dual": "off", "fixed_lambda": 0.0}
        policy, constraint = make_trained(**settings)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
        action_loss(policy(make_batch(MIXED))[0], make_batch(MIXED)).backward()
        optimizer.step()
        optimizer.zero_grad()
        a, r, _ = reference(policy, constraint, make_batch())
        constrained_backward(policy, constraint, [make_batch()])
        metrics = constraint.combine_(None, optimizer)
        after = gradients(policy)
        x, y, z = ([t[n] for n in r] for t in (a, r, after))
        assert metrics["CRaFT/Shed Energy"] == pytest.approx(1 - dot(z, z) / dot(x, x), rel=1e-4, abs=1e-6)
        assert metrics["CRaFT/Gradient Cosine"] == pytest.approx(dot(x, y) / (norm(x) * norm(y)), rel=1e-4)

    @pytest.mark.parametrize("size", [1e-12, 1e-6, 1e6, 1e10])
    def test_the_cosine_does_not_depend_on_the_size_of_the_gradients(self, size):
        # One coordinate: r = 2 x at x = size / 2.
        point = Point(torch.zeros(1))
        config = CRaFTConfig(anchor_type="raw_only")
        constraint = make_constraint(point, config, reaches=None)
        with torch.no_grad():
            point.x.add_(size / 2)
        anchor = constraint.reference({})
        constraint.accumulate(constraint.signal.extractor.parts(*point.anchor_features({})), anchor, 1.0)
        point.x.grad = torch.full_like(point.x, -size)
        metrics = constraint.combine_()
        assert metrics["CRaFT/Retention Gradient Norm"] == pytest.approx(size)
        assert metrics["CRaFT/Gradient Cosine"] == pytest.approx(-1.0)

    @pytest.mark.parametrize("lora", [False, True])
    def test_conflict_ratio_as_a_whole_and_per_part(self, lora):
        policy, constraint = make_trained(lora=lora)
        a, r, _ = reference(policy, constraint, make_batch(MIXED))
        constrained_backward(policy, constraint, [make_batch(MIXED)])
        metrics = constraint.combine_()
        conflicts = {n: dot([a[n]], [r[n]]) < 0 for n in r}
        assert 0 < sum(conflicts.values()) < len(conflicts)
        assert metrics["CRaFT/Conflict Ratio"] == pytest.approx(sum(conflicts.values()) / len(conflicts))
        parts = {"language_model", "action_queries"} | (set() if lora else {"projector"})
        prefix = "CRaFT/Conflict Ratio/"
        assert {name.removeprefix(prefix) for name in metrics if name.startswith(prefix)} == parts
        for part in parts:
            own = [c for n, c in conflicts.items() if f".{part}." in n]
            assert metrics[prefix + part] == pytest.approx(sum(own) / len(own))

    def test_drift_gate_and_time(self):
        policy, constraint = make_trained(preset="budget", retention_budget=1e-6)
        loss = float(reference(policy, constraint, make_batch())[2])
        seen = []
        for _ in range(2):
            policy.zero_grad()
            constrained_backward(policy, constraint, split(make_batch(), 2))
            seen.append(constraint.combine_())
        assert [m["CRaFT/Gate Open"] for m in seen] == [0.0, 1.0]
        assert all(m["CRaFT/Anchor Seconds"] > 0 for m in seen)
        relative = [seen[0][f"CRaFT/Drift/{part}_relative"] for part in ("raw", "aq")]
        assert sum(relative) / 2 == pytest.approx(loss, rel=1e-5)
        constraint.reference(make_batch())
        constraint.forget_anchor_time()
        assert constraint._anchor_seconds == 0.0

    @pytest.mark.parametrize("weight_decay", [0.0, 0.5])
    def test_raising_updates_are_counted_from_the_change_of_the_weights(self, weight_decay):
        policy, constraint = make_trained()
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01, weight_decay=weight_decay)
        shares = []
        for seed in range(4):
            optimizer.zero_grad()
            _, r, _ = reference(policy, constraint, make_batch(seed))
            constrained_backward(policy, constraint, [make_batch(seed)])
            constraint.combine_()
            before = {n: p.detach().clone() for n, p in policy.named_parameters()}
            optimizer.step()
            parameters = dict(policy.named_parameters())
            raising = [dot([parameters[n] - before[n]], [y]) > 0 for n, y in r.items()]
            shares.append(sum(raising) / len(raising))
            assert constraint.raising_updates(optimizer) == pytest.approx(shares[-1])
        assert 0 < sum(shares) < len(shares)

    @pytest.mark.parametrize("plan", [Plan.FUSED, Plan.MEASURE])
    def test_without_a_retention_gradient_there_is_no_such_share(self, plan):
        policy, constraint = make_trained(**PLANS[plan])
        optimizer = torch.optim.AdamW(policy.parameters(), lr=0.01)
        constrained_backward(policy, constraint, [make_batch()])
        constraint.combine_()
        optimizer.step()
        assert constraint.raising_updates(optimizer) is None


class TestLiveGraph:
    @pytest.mark.parametrize("kind", ANCHORS)
    @pytest.mark.parametrize("plan", PLANS)
    def test_weights_are_not_written_between_forward_and_backward(self, kind, plan):
        policy, constraint = make_trained(lora=True, anchor=kind, **PLANS[plan])
        batch = make_batch()
        anchor = constraint.reference(batch)
        state = lambda: {n: (p.data_ptr(), p._version) for n, p in policy.named_parameters()}  # noqa: E731
        with constraint.live_graph():
            actions, parts = policy(batch)
            before = state()
            if kind is not AnchorKind.FROZEN_COPY:
                with pytest.raises(RuntimeError, match="between a forward pass and its backward pass"):
                    constraint.reference(batch)
            loss = action_loss(actions, batch)
            (loss + constraint.accumulate(constraint.signal.extractor.parts(*parts), anchor, 1.0)).backward()
            assert state() == before
        constraint.combine_()
        assert state() == before
        constraint.reference(batch)


class TestState:
    @pytest.mark.parametrize("kind", ANCHORS)
    @pytest.mark.parametrize("preset", FEATURE_PRESETS)
    def test_a_restored_constraint_goes_on_bit_for_bit(self, kind, preset):
        def step(policy, constraint, seed):
            policy.zero_grad()
            constrained_backward(policy, constraint, [make_batch(seed)])
            metrics = constraint.combine_()
            metrics.pop("CRaFT/Anchor Seconds")
            return metrics

        policy, constraint = make_trained(lora=True, preset=preset, anchor=kind, retention_budget=1e-3)
        step(policy, constraint, 1)
        resumed = make_policy(seed=0, lora=True)
        # As at resume: the adapters start at zero, and the saved weights are loaded afterwards.
        other = make_constraint(resumed, constraint.config)
        resumed.load_state_dict(policy.state_dict())
        state = json.loads(json.dumps(constraint.state_dict(), allow_nan=False))
        other.load_state_dict(state, {n: t.clone() for n, t in constraint.weights.state_dict().items()})
        assert other.plan is constraint.plan
        assert other.statistics == constraint.statistics
        for seed in (2, 3):
            assert step(resumed, other, seed) == step(policy, constraint, seed)
            assert_equal(gradients(resumed), gradients(policy))
            assert other.state_dict() == constraint.state_dict()

    def test_a_foreign_anchor_is_refused(self):
        _, constraint = make_trained()
        with pytest.raises(ValueError, match="does not fit"):
            constraint.load_state_dict(constraint.state_dict(), {})
