"""Combination of the two gradients against closed forms in fp64, TorchJD's PCGrad and PyTorch's AdamW."""

import math

import pytest
import torch
from craft_fixtures import dot, gradient_lists, norm, quick, scales, seeds
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torchjd.aggregation import PCGrad

from prismatic.craft import CRaFTConfig, CRaFTGradientProjector
from prismatic.craft.gradients import adam_scaling, adam_updates, inner_products
from prismatic.craft.projection import Groups, group_label, part_label, threshold
from prismatic.craft.rules import RULES, RuleInputs, kappa
from prismatic.craft.settings import Granularity

LAYER = "vla.base_model.model.language_model.model.layers.3"
NAMES = [
    f"{LAYER}.self_attn.q_proj.lora_A.default.weight",
    f"{LAYER}.self_attn.q_proj.lora_B.default.weight",
    f"{LAYER}.mlp.up_proj.lora_A.default.weight",
    "vla.base_model.model.action_queries.weight",
]
GRANULARITIES = list(Granularity)
granularities = st.sampled_from(GRANULARITIES)
GATED = [name for name, rule in RULES.items() if not rule.separates(False)]
# Not below what fp32 can hold.
violations = st.just(0.0) | st.floats(1e-6, 2) | st.floats(-2, -1e-6)
anything = gradient_lists(("full", "zero_a", "zero_r", "no_a", "no_r", "bf16"))


def projector(granularity="tensor", count=4, **kwargs) -> CRaFTGradientProjector:
    kwargs = {"projection_guard": "exact"} | kwargs
    return CRaFTGradientProjector(CRaFTConfig(projection_granularity=granularity, **kwargs), NAMES[:count])


def members(granularity, count) -> list[list[int]]:
    """Indices of each group among the first `count` of NAMES, written out."""
    groups = {
        Granularity.TENSOR: [[0], [1], [2], [3]],
        Granularity.MODULE: [[0, 1], [2], [3]],
        Granularity.LAYER: [[0, 1, 2], [3]],
        Granularity.GLOBAL: [[0, 1, 2, 3]],
    }[Granularity(granularity)]
    kept = [[i for i in group if i < count] for group in groups]
    return [group for group in kept if group]


def pick(tensors, group):
    """The tensors of a group, a missing one as zero."""
    return [torch.zeros(1) if tensors[i] is None else tensors[i].flatten() for i in group]


def pair_up(a, r):
    return list(zip(a, r, strict=True))


def tolerance(a) -> float:
    """Relative rounding error of a gradient that is stored in the dtype of `a`."""
    return 4e-3 if any(x is not None and x.dtype is torch.bfloat16 for x in a) else 1e-6


def is_informative(a, r) -> bool:
    """Whether ||r||^2 is clearly above tau; at tau itself rounding decides."""
    return dot(r, r) > 1.01e-20 * (1 + dot(a, a))


class TestOneSidedProjection:
    @given(gradient_lists(("full", "zero_a", "zero_r", "bf16")), granularities)
    @quick
    def test_no_conflict_is_left_in_any_group(self, pair, granularity):
        a, r = pair
        projected = projector(granularity, len(a)).project_gradients(a, r)
        for group in members(granularity, len(a)):
            x, y, p = pick(a, group), pick(r, group), pick(projected, group)
            if is_informative(x, y):
                assert dot(p, y) >= -tolerance(x) * norm(x) * norm(y)

    @given(anything)
    @quick
    def test_missing_gradients_do_not_disturb_the_other_tensors(self, pair):
        a, r = pair
        projected = projector().project_gradients(a, r)
        for x, y, p in zip(a, r, projected, strict=True):
            if x is None or y is None:
                assert p is x
            elif is_informative([x], [y]):
                assert dot([p], [y]) >= -tolerance([x]) * norm([x]) * norm([y])

    @pytest.mark.parametrize("granularity", ["module", "global"])
    def test_missing_action_gradients_do_not_disturb_their_group(self, granularity):
        a, r = [torch.tensor([1.0]), None], [torch.tensor([-1.0]), torch.tensor([3.0])]
        projected = projector(granularity, 2).project_gradients(a, r)
        assert projected[1] is None
        assert dot(projected[:1], r[:1]) == pytest.approx(0.0, abs=1e-6)

    @given(gradient_lists())
    @quick
    def test_no_conflict_per_tensor_means_none_in_the_sum(self, pair):
        a, r = pair
        assume(all(is_informative([x], [y]) for x, y in zip(a, r, strict=True)))
        projected = projector("tensor").project_gradients(a, r)
        slack = sum(norm([x]) * norm([y]) for x, y in zip(a, r, strict=True))
        assert dot(projected, r) >= -1e-6 * slack
        agreeing = [x if dot([x], [y]) >= 0 else -x for x, y in zip(a, r, strict=True)]
        for granularity in GRANULARITIES:
            for p, x in zip(projector(granularity, len(a)).project_gradients(agreeing, r), agreeing, strict=True):
                assert torch.equal(p, x)

    @given(gradient_lists(), granularities, st.sampled_from([1e-8, 1e-3, 0.5, 10.0]))
    @quick
    def test_with_delta_the_closed_form_of_the_conflict_is_left(self, pair, granularity, delta):
        a, r = pair
        additive = projector(granularity, len(a), projection_guard="additive", projection_eps=delta)
        projected = additive.project_gradients(a, r)
        for group in members(granularity, len(a)):
            x, y, p = pick(a, group), pick(r, group), pick(projected, group)
            d, n = dot(x, y), dot(y, y)
            expected = d if d >= 0 else d * delta / (n + delta)
            assert dot(p, y) == pytest.approx(expected, rel=1e-5, abs=1e-6 * norm(x) * norm(y))

    @given(gradient_lists(("full", "zero_a", "zero_r", "bf16")), granularities, st.sampled_from(["exact", "additive"]))
    @quick
    def test_it_moves_along_r_by_a_factor_that_is_never_negative(self, pair, granularity, guard):
        a, r = pair
        tool = projector(granularity, len(a), projection_guard=guard)
        coefficients = tool.coefficients(a, r)
        assert coefficients.shape == (len(a),)
        assert (coefficients >= 0).all() and coefficients.isfinite().all()
        for x, y, p, c in zip(a, r, tool.project_gradients(a, r), coefficients, strict=True):
            assert p.dtype == x.dtype and p.shape == x.shape
            if x.dtype is torch.float32:
                # Rounding of the sum is relative to its larger term.
                torch.testing.assert_close(p, x + c * y, rtol=1e-6, atol=1e-6 * float(x.abs().max()))

    @given(anything, st.sampled_from(["exact", "additive"]))
    @quick
    def test_without_a_conflict_nothing_is_written(self, pair, guard):
        a, r = pair
        before = [None if x is None else x.clone() for x in a]
        projected = projector(projection_guard=guard).project_gradients(a, r)
        for x, y, p, b in zip(a, r, projected, before, strict=True):
            assert x is None or torch.equal(x, b)  # the argument is never written
            untouched = x is None or y is None or not y.any() or dot([x], [y]) > 1e-6 * norm([x]) * norm([y])
            if untouched and x is not None:
                assert torch.equal(p, x)

    @pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
    @pytest.mark.parametrize("guard", ["exact", "additive"])
    def test_a_retention_gradient_that_is_not_finite_is_not_used(self, bad, guard):
        a = [torch.tensor([1.0, 2.0])]
        (projected,) = projector(count=1, projection_guard=guard).project_gradients(a, [torch.tensor([bad, 0.0])])
        assert torch.equal(projected, a[0])

    @given(gradient_lists())
    @quick
    def test_the_exact_guard_skips_gradients_without_information(self, pair):
        a, r = pair
        r = [y / max(norm([y]), 1e-30) * 1e-11 for y in r]  # ||r||^2 = 1e-22 < tau
        for p, x in zip(projector().project_gradients(a, r), a, strict=True):
            assert torch.equal(p, x)

    @given(seeds, granularities, st.sampled_from([1e-3, 0.5, 3.0, 1e3]), st.sampled_from([1e-3, 0.5, 3.0, 1e3]))
    @quick
    def test_scale_covariant(self, seed, granularity, c, k):
        generator = torch.Generator().manual_seed(seed)
        a, r = ([torch.randn(4, 3, generator=generator) for _ in range(4)] for _ in range(2))
        tool = projector(granularity)
        scaled = tool.project_gradients([c * x for x in a], [k * y for y in r])
        for p, q in zip(tool.project_gradients(a, r), scaled, strict=True):
            torch.testing.assert_close(c * p, q, rtol=1e-5, atol=1e-5 * c)

    @given(gradient_lists(), granularities)
    @quick
    def test_idempotent(self, pair, granularity):
        a, r = pair
        tool = projector(granularity, len(a))
        once = tool.project_gradients(a, r)
        twice = tool.project_gradients(once, r)
        for group in members(granularity, len(a)):
            if is_informative(pick(a, group), pick(r, group)):
                difference = [x - y for x, y in zip(pick(once, group), pick(twice, group), strict=True)]
                assert norm(difference) <= 1e-5 * norm(pick(a, group))

    def test_conflict_ratio_counts_tensors(self):
        a = [torch.ones(2), torch.ones(3), torch.ones(1), torch.ones(4)]
        r = [-torch.ones(2), torch.ones(3), None, -torch.ones(4)]
        tool = projector()
        tool.project_gradients(a, r)
        assert float(tool.conflict_ratio) == 0.5


class TestAgainstTorchJD:
    @given(seeds, st.integers(2, 20), scales, scales)
    @quick
    def test_both_directions_sum_to_pcgrad(self, seed, size, scale_a, scale_r):
        # PCGrad projects each objective against the other and sums: P(a|r) + P(r|a). Ours is the first term.
        generator = torch.Generator().manual_seed(seed)
        a = scale_a * torch.randn(size, generator=generator)
        r = scale_r * torch.randn(size, generator=generator)
        assume(is_informative([a], [r]) and is_informative([r], [a]))
        ours, mirrored = (projector(count=1).project_gradients([x], [y])[0] for x, y in ((a, r), (r, a)))
        theirs = PCGrad()(torch.stack([a, r]).double())
        assert norm([ours.double() + mirrored.double() - theirs]) <= 1e-5 * (norm([a]) + norm([r]))

    @given(seeds, scales)
    @quick
    def test_the_coefficient_is_the_one_pcgrad_gives_r_in_the_first_projection(self, seed, scale):
        # PCGrad's weights of [a, r] are 1 + c and 1 + c', with c of P(r|a) and c' of P(a|r), which is ours.
        generator = torch.Generator().manual_seed(seed)
        a, r = torch.randn(7, generator=generator), scale * torch.randn(7, generator=generator)
        assume(is_informative([a], [r]))
        matrix = torch.stack([a, r]).double()
        weights = PCGrad().gramian_weighting(matrix @ matrix.T)
        (ours,) = projector(count=1).coefficients([a], [r]).tolist()
        assert ours == pytest.approx(float(weights[1]) - 1, rel=1e-4, abs=1e-5 * norm([a]) / norm([r]))


class TestGroups:
    @pytest.mark.parametrize(
        ("name", "module", "layer"),
        [
            (f"{LAYER}.self_attn.q_proj.lora_A.default.weight", f"{LAYER}.self_attn.q_proj", LAYER),
            (f"{LAYER}.self_attn.q_proj.lora_B.default.weight", f"{LAYER}.self_attn.q_proj", LAYER),
            (f"{LAYER}.self_attn.q_proj.base_layer.bias", f"{LAYER}.self_attn.q_proj", LAYER),
            (f"{LAYER}.input_layernorm.weight", f"{LAYER}.input_layernorm", LAYER),
            (
                "vla.vision_backbone.featurizer.blocks.11.attn.qkv.weight",
                "vla.vision_backbone.featurizer.blocks.11.attn.qkv",
                "vla.vision_backbone.featurizer.blocks.11",
            ),
            ("vla.projector.fc1.bias", "vla.projector.fc1", "vla.projector.fc1"),
            ("vla.action_queries.weight", "vla.action_queries", "vla.action_queries"),
            ("vla.embed.lora_embedding_A.default", "vla.embed", "vla.embed"),
        ],
    )
    def test_labels(self, name, module, layer):
        assert group_label(name, Granularity.TENSOR) == name
        assert group_label(name, Granularity.MODULE) == module
        assert group_label(name, Granularity.LAYER) == layer
        assert group_label(name, Granularity.GLOBAL) == ""

    def test_layer_one_is_not_layer_eleven(self):
        labels = [group_label(f"model.layers.{i}.mlp.weight", Granularity.LAYER) for i in (1, 11)]
        assert len(set(labels)) == 2

    @pytest.mark.parametrize("granularity", GRANULARITIES)
    @pytest.mark.parametrize("count", [1, 2, 3, 4])
    def test_groups_of_the_projector(self, granularity, count):
        groups = projector(granularity, count).groups(count)
        found = [[i for i in range(count) if groups.index[i] == g] for g in range(groups.count)]
        assert found == members(granularity, count)

    @given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=12), seeds)
    @quick
    def test_sum_is_a_loop_over_equal_labels(self, labels, seed):
        values = torch.randn(len(labels), generator=torch.Generator().manual_seed(seed))
        groups = Groups.of_labels(labels)
        unique = list(dict.fromkeys(labels))
        assert groups.count == len(unique)
        expected = [sum(float(v) for v, n in zip(values, labels, strict=True) if n == label) for label in unique]
        torch.testing.assert_close(groups.sum(values), torch.tensor(expected))
        assert [unique[i] for i in groups.index] == labels

    @pytest.mark.parametrize("granularity", ["module", "layer"])
    def test_names_are_needed(self, granularity):
        config = CRaFTConfig(projection_granularity=granularity)
        for names in (None, NAMES[:2]):
            with pytest.raises(ValueError, match="names"):
                CRaFTGradientProjector(config, names).groups(3)

    @pytest.mark.parametrize(
        ("name", "part"),
        [
            (NAMES[0], "language_model"),
            ("module.vla.vision_backbone.featurizer.blocks.0.attn.qkv.weight", "vision_backbone"),
            ("vla.projector.fc1.weight", "projector"),
            (NAMES[3], "action_queries"),
            ("weight", "weight"),
        ],
    )
    def test_parts_of_the_model(self, name, part):
        assert part_label(name) == part


class TestInnerProducts:
    @given(anything, st.booleans())
    @quick
    def test_they_are_sums_in_fp64(self, pair, scaled):
        a, r = pair
        scaling = [None] * len(a)
        if scaled:  # every other tensor
            sized = [x if x is not None else y for x, y in pair_up(a, r)]
            scaling = [
                torch.linspace(0.5, 2, x.numel()).view_as(x) if i % 2 == 0 else None for i, x in enumerate(sized)
            ]
        products = inner_products(a, r, scaling if scaled else None)
        for i, (x, y) in enumerate(pair_up(a, r)):
            both = x is not None and y is not None
            x, y = torch.zeros(1) if x is None else x.double(), torch.zeros(1) if y is None else y.double()
            scale = 1.0 if scaling[i] is None or not both else scaling[i].double()
            size = norm([x]) * norm([y])
            expected = {
                "dot": (dot([scale * x], [y]) if both else 0.0, size),
                "dot_euclid": (dot([x], [y]) if both else 0.0, size),
                "ret": (dot([scale * y], [y]), 0.0),
                "ret_euclid": (dot([y], [y]), 0.0),
                "act": (dot([x], [x]), 0.0),
            }
            for name, (value, cancelled) in expected.items():
                assert float(getattr(products, name)[i]) == pytest.approx(value, rel=1e-5, abs=4e-6 * cancelled), name


class TestRules:
    @staticmethod
    def closed_form(a, r, config, price) -> tuple[float, float]:
        """kappa of one group in fp64, and the size of its rounding error in fp32."""
        d, n = dot(a, r), dot(r, r)
        informative = n > 1e-20 * (1 + dot(a, a))
        error = 1e-5 * norm(a) / norm(r) if n > 0 else 0.0
        if config.projection_rule == "barrier":
            if not informative:
                return 0.0, 0.0
            wanted = (config.barrier_phi * price.violation - d) / n
            return min(max(wanted, 0.0), config.lambda_max), error
        bracket = 0.0
        if d < 0 and price.gate_is_open:
            if config.projection_guard == "additive":
                bracket = -d / (n + config.projection_eps)
            elif informative:
                bracket = -d / n
        return {
            "off": price.multiplier,
            "add": price.multiplier + bracket,
            "max": max(price.multiplier, bracket),
        }[config.projection_rule], error

    @pytest.mark.parametrize("rule", RULES)
    @given(
        pair=gradient_lists(("full", "zero_a", "zero_r")),
        granularity=granularities,
        guard=st.sampled_from(["exact", "additive"]),
        multiplier=st.just(0.0) | st.floats(1e-6, 5),
        violation=violations,
        gate=st.booleans(),
        phi=st.floats(0.1, 10),
    )
    @quick
    def test_closed_forms(self, rule, pair, granularity, guard, multiplier, violation, gate, phi):
        a, r = pair
        granularity = Granularity.GLOBAL if RULES[rule].one_group else granularity
        tool = projector(
            granularity, len(a), projection_rule=rule, projection_guard=guard, barrier_phi=phi, lambda_max=100.0
        )
        price = RuleInputs(multiplier, violation, gate)
        groups = tool.groups(len(a))
        actual, projection = kappa(inner_products(a, r), groups, price, tool.config)
        assert actual.shape == projection.shape == (groups.count,)
        assert (actual >= 0).all() and (projection >= 0).all()
        for group, value in zip(members(granularity, len(a)), actual.tolist(), strict=True):
            x, y = pick(a, group), pick(r, group)
            if 0.99e-20 < dot(y, y) / (1 + dot(x, x)) < 1.01e-20:
                continue
            expected, error = self.closed_form(x, y, tool.config, price)
            assert value == pytest.approx(expected, rel=1e-5, abs=error)

    @given(anything, granularities, st.sampled_from(GATED), st.floats(0, 5))
    @quick
    def test_with_the_gate_closed_kappa_is_lambda(self, pair, granularity, rule, multiplier):
        a, r = pair
        tool = projector(granularity, len(a), projection_rule=rule)
        actual, projection = kappa(
            inner_products(a, r), tool.groups(len(a)), RuleInputs(multiplier, 1.0, False), tool.config
        )
        assert not projection.any()
        assert torch.equal(actual, torch.full_like(actual, multiplier))

    @given(gradient_lists(("full", "zero_a")), st.floats(0.1, 10), violations, st.sampled_from([0.5, math.inf]))
    @quick
    def test_the_barrier_solves_its_problem(self, pair, phi, violation, lambda_max):
        # argmin ||g - a||^2 subject to <g, r> >= phi (L_ret - eps), with the multiplier bounded by lambda_max.
        a, r = pair
        assume(is_informative(a, r))
        tool = projector("global", len(a), projection_rule="barrier", barrier_phi=phi, lambda_max=lambda_max,
                         retention_weight=0.0)  # fmt: skip
        price = RuleInputs(3.0, torch.tensor(violation), False)  # neither lambda nor the gate enter
        value = float(kappa(inner_products(a, r), tool.groups(len(a)), price, tool.config)[0])
        g = [x.double() + value * y.double() for x, y in zip(a, r, strict=True)]
        target, scale = phi * violation, norm(a) * norm(r) + abs(phi * violation)
        slack = dot(g, r) - target
        assert value >= 0
        if value < lambda_max:
            assert slack >= -1e-5 * scale  # feasible
        assert value == 0 or slack <= 1e-5 * scale  # complementary: never further than needed
        if value < lambda_max:
            # No feasible point is nearer to a. g + t y with <y, r> >= 0 are feasible, and g itself is the nearest.
            generator = torch.Generator().manual_seed(0)
            for _ in range(5):
                move = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in a]
                if dot(move, r) < 0:
                    move = [-m for m in move]
                # ||g + t m - a||^2 >= ||g - a||^2 for all t > 0  <=>  <g - a, m> >= 0
                difference = [x - y.double() for x, y in zip(g, a, strict=True)]
                assert dot(difference, move) >= -1e-5 * norm(difference) * norm(move)

    def test_the_barrier_without_information_does_nothing(self):
        tool = projector("global", 1, projection_rule="barrier")
        products = inner_products([torch.ones(3)], [torch.zeros(3)])
        value, _ = kappa(products, tool.groups(1), RuleInputs(0.5, torch.tensor(7.0)), tool.config)
        assert value.tolist() == [0.0]

    def test_an_infinite_budget_never_makes_the_barrier_act(self):
        tool = projector("global", 1, projection_rule="barrier", retention_budget=math.inf)
        products = inner_products([-torch.ones(3)], [torch.ones(3)])
        value, _ = kappa(products, tool.groups(1), RuleInputs(0.0, torch.tensor(-math.inf)), tool.config)
        assert value.tolist() == [0.0]

    @pytest.mark.parametrize(("size", "projects"), [(0.9e-7, False), (1.1e-7, True)])
    def test_the_exact_guard_is_relative_to_a_large_action_gradient(self, size, projects):
        # ||a||^2 = 1e6, so that ||r||^2 has to be above 1e-14.
        products = inner_products([torch.tensor([1e3])], [torch.tensor([-size])])
        value, _ = kappa(products, projector(count=1).groups(1), RuleInputs(0.0), projector(count=1).config)
        assert bool(value > 0) == projects

    def test_tau(self):
        torch.testing.assert_close(threshold(torch.tensor([0.0, 1e6])), torch.tensor([1e-20, 1e-14]), rtol=1e-5, atol=0)


def adam_run(seed, steps, dtype=torch.float32, missing=False, **options):
    """Parameters after AdamW steps with random gradients, the optimizer, and the parameters before the last step."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((3, 4), (5,), (2, 2))]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 3e-4, "betas": (0.8, 0.95)}]
    optimizer = torch.optim.AdamW(groups, **options)
    before = None
    for _ in range(steps):
        before = [p.detach().clone() for p in parameters]
        for i, p in enumerate(parameters):
            size = 10.0 ** float(torch.empty(()).uniform_(-4, 2, generator=generator))
            p.grad = None if missing and i == 2 else (size * torch.randn(p.shape, generator=generator)).to(dtype)
        optimizer.step()
    return parameters, optimizer, before


class TestAdamMetric:
    @given(seeds, st.integers(1, 4), granularities)
    @quick
    def test_no_conflict_is_left_in_the_metric_of_the_update(self, seed, steps, granularity):
        parameters, optimizer, _ = adam_run(seed, steps, lr=1e-3, eps=1e-8)
        generator = torch.Generator().manual_seed(seed + 1)
        a, r = ([torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(2))
        # D from the optimizer's state, by its definition.
        scaling = []
        for p in parameters:
            beta2 = 0.999 if p is parameters[0] else 0.95
            second = optimizer.state[p]["exp_avg_sq"].double() / (1 - beta2**steps)
            scaling.append(1 / (second.sqrt() + 1e-8))
        for ours, expected in zip(adam_scaling(optimizer, parameters), scaling, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
        tool = projector(granularity, 3, projection_metric="adam")
        groups = tool.groups(3)
        products = inner_products(a, r, adam_scaling(optimizer, parameters))
        c = kappa(products, groups, RuleInputs(0.0), tool.config)[0][groups.index]
        g = [x + k * y for x, y, k in zip(a, r, c, strict=True)]
        for group in members(granularity, 3):
            root = [scaling[i].sqrt() for i in group]
            x, y, z = ([t[i].double() * s for i, s in zip(group, root, strict=True)] for t in (a, r, g))
            assert dot(z, y) >= -1e-5 * norm(x) * norm(y)
            conflict = dot(x, y) < -1e-5 * norm(x) * norm(y)
            if conflict:
                assert dot(z, y) <= 1e-5 * norm(x) * norm(y)

    def test_before_the_first_step_the_metric_is_euclidean(self):
        p = nn.Parameter(torch.randn(3))
        assert adam_scaling(torch.optim.AdamW([p]), [p]) == [None]
        a, r = [torch.randn(3)], [torch.randn(3)]
        products = inner_products(a, r, [None])
        assert torch.equal(products.dot, products.dot_euclid)
        assert torch.equal(products.ret, products.ret_euclid)

    @pytest.mark.parametrize(
        "momentum",
        [0.0, 0.9],
    )
    def test_an_optimizer_without_second_moments_is_refused(self, momentum):
        p = nn.Parameter(torch.randn(3))
        optimizer = torch.optim.SGD([p], lr=0.1, momentum=momentum)
        p.grad = torch.randn(3)
        optimizer.step()
        with pytest.raises(ValueError, match="SGD without exp_avg_sq"):
            adam_scaling(optimizer, [p])


class TestAdamUpdates:
    @given(seeds, st.integers(1, 4), st.sampled_from([1e-4, 1e-2]), st.sampled_from([0.0, 0.01, 0.5]))
    @quick
    def test_they_are_the_change_of_the_weights(self, seed, steps, lr, weight_decay):
        # fp64 weights: in fp32 the difference of two weights is itself only good to about 1e-3 of a small update.
        parameters, optimizer, before = adam_run(seed, steps, torch.float64, lr=lr, weight_decay=weight_decay)
        for p, b, update in zip(parameters, before, adam_updates(optimizer, parameters), strict=True):
            actual = p.detach() - b
            assert update.dtype == torch.float32
            torch.testing.assert_close(update.double(), actual, rtol=1e-4, atol=1e-6 * float(actual.abs().max()))

    def test_fp32_weights_to_their_own_rounding(self):
        parameters, optimizer, before = adam_run(0, 3, lr=1e-2, weight_decay=0.1)
        for p, b, update in zip(parameters, before, adam_updates(optimizer, parameters), strict=True):
            torch.testing.assert_close(update, p.detach() - b, rtol=1e-4, atol=2.4e-7 * float(b.abs().max()))

    def test_a_parameter_without_gradient_has_none(self):
        parameters, optimizer, _ = adam_run(0, 2, missing=True)
        assert [u is None for u in adam_updates(optimizer, parameters)] == [False, False, True]
