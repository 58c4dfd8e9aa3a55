"""Properties of the CRaFT algorithm on small tensors and modules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prismatic.training.craft_utils import (
    AnchorType,
    CRaFTConfig,
    CRaFTConstraint,
    CRaFTDualOptimizer,
    CRaFTFeatureExtractor,
    CRaFTGradientProjector,
    CRaFTWeightManager,
    compute_retention_loss,
    extract_anchor_features_online,
)

EXACT = CRaFTConfig(projection_eps=0.0)


def gradient_pair(seed: int, scale_a: float = 1.0, scale_r: float = 1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (7,), (2, 3, 2), (1,)]
    a = [torch.randn(s, generator=generator) * scale_a for s in shapes]
    r = [torch.randn(s, generator=generator) * scale_r for s in shapes]
    return a, r


def dot(x, y):
    return float((x.double() * y.double()).sum())


scales = st.sampled_from([1e-6, 1e-3, 1.0, 1e3])
seeds = st.integers(0, 10_000)


class TestProjection:
    @given(seeds, scales, scales)
    @settings(max_examples=60, deadline=None)
    def test_no_conflict_is_left(self, seed, scale_a, scale_r):
        a, r = gradient_pair(seed, scale_a, scale_r)
        for p, ri, ai in zip(CRaFTGradientProjector(EXACT).project_gradients(a, r), r, a, strict=True):
            assert dot(p, ri) >= -1e-5 * float(ai.norm() * ri.norm())

    @given(seeds)
    @settings(max_examples=30, deadline=None)
    def test_residual_with_delta_is_the_closed_form(self, seed):
        delta = 0.5
        a, r = gradient_pair(seed)
        projected = CRaFTGradientProjector(CRaFTConfig(projection_eps=delta)).project_gradients(a, r)
        for p, ai, ri in zip(projected, a, r, strict=True):
            d, n = dot(ai, ri), dot(ri, ri)
            expected = d if d >= 0 else d * delta / (n + delta)
            assert dot(p, ri) == pytest.approx(expected, rel=1e-4, abs=1e-5)

    @given(seeds)
    @settings(max_examples=30, deadline=None)
    def test_agreeing_tensors_are_untouched_and_conflicting_ones_move_along_r(self, seed):
        a, r = gradient_pair(seed)
        for p, ai, ri in zip(CRaFTGradientProjector(EXACT).project_gradients(a, r), a, r, strict=True):
            if dot(ai, ri) >= 0:
                assert torch.equal(p, ai)
            else:
                change = (p - ai).flatten()
                cosine = torch.nn.functional.cosine_similarity(change, ri.flatten(), dim=0)
                assert float(cosine) == pytest.approx(1.0, abs=1e-4)

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_idempotent(self, seed):
        a, r = gradient_pair(seed)
        projector = CRaFTGradientProjector(EXACT)
        once = projector.project_gradients(a, r)
        for first, second in zip(once, projector.project_gradients(once, r), strict=True):
            torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)

    @given(seeds, st.sampled_from([1e-4, 10.0]), st.sampled_from([1e-4, 10.0]))
    @settings(max_examples=20, deadline=None)
    def test_scale_covariant(self, seed, c, k):
        a, r = gradient_pair(seed)
        projector = CRaFTGradientProjector(EXACT)
        scaled = projector.project_gradients([c * x for x in a], [k * x for x in r])
        for p, q in zip(projector.project_gradients(a, r), scaled, strict=True):
            torch.testing.assert_close(c * p, q, rtol=1e-4, atol=1e-5 * c)

    def test_zero_and_missing_gradients_change_nothing(self):
        a, r = gradient_pair(0)
        r = [torch.zeros_like(r[0]), None, -a[2], r[3]]
        a_missing = [a[0], a[1], a[2], None]
        projected = CRaFTGradientProjector(EXACT).project_gradients(a_missing, r)
        assert torch.equal(projected[0], a[0])
        assert projected[1] is a[1]
        torch.testing.assert_close(projected[2], torch.zeros_like(a[2]), atol=1e-6, rtol=0)
        assert projected[3] is None

    def test_conflict_ratio_counts_tensors(self):
        a = [torch.ones(2), torch.ones(3), torch.ones(1), torch.ones(4)]
        r = [-torch.ones(2), torch.ones(3), None, -torch.ones(4)]
        projector = CRaFTGradientProjector(CRaFTConfig())
        projector.project_gradients(a, r)
        assert float(projector.conflict_ratio) == 0.5

    @pytest.mark.parametrize("enable", [True, False])
    def test_combine_is_projection_plus_lambda_r(self, enable):
        config = CRaFTConfig(enable_projection=enable)
        a, r = gradient_pair(3)
        parameters = [nn.Parameter(torch.zeros_like(x)) for x in a]
        for p, x in zip(parameters, a, strict=True):
            p.grad = x.clone()
        CRaFTGradientProjector(config).combine_(parameters, r, multiplier=0.7)
        base = CRaFTGradientProjector(config).project_gradients(a, r) if enable else a
        for p, b, ri in zip(parameters, base, r, strict=True):
            torch.testing.assert_close(p.grad, b + 0.7 * ri)

    def test_bf16_gradients_stay_bf16_and_lose_their_conflict(self):
        a, r = gradient_pair(5)
        a = [x.bfloat16() for x in a]
        for p, ri, ai in zip(CRaFTGradientProjector(EXACT).project_gradients(a, r), r, a, strict=True):
            assert p.dtype == torch.bfloat16
            assert dot(p, ri) >= -2e-2 * float(ai.float().norm() * ri.norm())


class TestDual:
    @given(st.lists(st.floats(0, 10), min_size=1, max_size=50), st.floats(0, 5))
    @settings(max_examples=50, deadline=None)
    def test_never_negative_and_follows_the_violation(self, losses, budget):
        dual = CRaFTDualOptimizer(CRaFTConfig(retention_budget=budget))
        for loss in losses:
            before = dual.get_lambda()
            after = dual.step(loss)
            assert after == pytest.approx(max(0.0, before + 0.01 * (loss - budget)))
            assert after >= 0

    def test_stops_at_zero_and_rises_from_there(self):
        dual = CRaFTDualOptimizer(CRaFTConfig(retention_weight=0.05, retention_budget=10.0, dual_lr=0.01))
        assert dual.step(0.0) == 0.0
        assert dual.step(11.0) == pytest.approx(0.01)

    def test_reset_fixed_lambda_and_infinite_budget(self):
        dual = CRaFTDualOptimizer(CRaFTConfig(retention_weight=2.0))
        dual.step(100.0)
        dual.reset()
        assert dual.get_lambda() == 2.0
        fixed = CRaFTDualOptimizer(CRaFTConfig(enable_dual=False, fixed_lambda=0.3))
        assert fixed.step(100.0) == 0.3
        monitor = CRaFTDualOptimizer(CRaFTConfig(retention_weight=0.0, retention_budget=math.inf))
        assert monitor.step(100.0) == 0.0

    def test_converges_to_the_multiplier_of_a_convex_problem(self):
        # minimise (x - 3)^2 subject to x^2 <= 1: x* = 1, 2 (x* - 3) + lambda 2 x* = 0 -> lambda* = 2.
        x = torch.tensor(0.0, requires_grad=True)
        dual = CRaFTDualOptimizer(CRaFTConfig(retention_weight=0.0, retention_budget=1.0, dual_lr=0.05))
        for _ in range(4000):
            gradient = 2 * (x.item() - 3) + dual.get_lambda() * 2 * x.item()
            x.data -= 0.05 * gradient
            dual.step(x.item() ** 2)
        assert x.item() == pytest.approx(1.0, rel=1e-2)
        assert dual.get_lambda() == pytest.approx(2.0, rel=5e-2)


class TestFeatures:
    def test_pooling_matches_a_loop(self):
        tokens, mask = torch.randn(3, 5, 4), torch.tensor([[1, 1, 0, 0, 1], [0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
        for mean in (True, False):
            pooled = CRaFTFeatureExtractor(CRaFTConfig(use_mean_pooling=mean)).pool_features(tokens, mask)
            for b in range(3):
                kept = tokens[b][mask[b]]
                torch.testing.assert_close(pooled[b], kept.mean(0) if mean else kept.max(0).values)

    def test_empty_mask_row_is_an_error(self):
        with pytest.raises(ValueError, match="empty"):
            CRaFTFeatureExtractor(CRaFTConfig()).pool_features(torch.randn(2, 3, 4), torch.zeros(2, 3).bool())

    @pytest.mark.parametrize(("kind", "width"), [("concat", 8), ("aq_only", 4), ("raw_only", 4)])
    def test_anchor_type_selects_the_parts(self, kind, width):
        raw, aq = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
        f = CRaFTFeatureExtractor(CRaFTConfig(anchor_type=kind))(raw.bfloat16(), aq.bfloat16())
        assert f.shape == (2, width)
        assert f.dtype == torch.float32
        if AnchorType(kind) is not AnchorType.AQ_ONLY:
            torch.testing.assert_close(f[:, :4], raw.bfloat16().float().mean(1))

    def test_retention_loss(self):
        f, anchor = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
        loss = compute_retention_loss(f, anchor)
        assert loss.item() == pytest.approx(float((f - anchor).detach().pow(2).mean()))
        loss.backward()
        assert anchor.grad is None
        with pytest.raises(ValueError, match="differ in shape"):
            compute_retention_loss(f, anchor[:2])


class Trunk(nn.Module):
    """A small policy: trunk with dropout whose output is the feature, and a head on top."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)

    def features(self, x):
        z = self.trunk(x)
        return z.unsqueeze(1), z.unsqueeze(1), None

    def forward(self, x):
        raw, aq, _ = self.features(x)
        return self.head(raw[:, 0]), raw, aq


def constraint(module, **settings_):
    return CRaFTConstraint(module, CRaFTConfig(**settings_), lambda bare, batch: bare.features(batch["x"]))


def perturb(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))


class TestWeightManager:
    def test_current_weights_return_bit_for_bit_even_after_an_exception(self):
        module = Trunk()
        weights = CRaFTWeightManager(module)
        initial = {n: p.clone() for n, p in module.named_parameters()}
        perturb(module)
        current = {n: p.clone() for n, p in module.named_parameters()}

        def fail(bare):
            assert all(torch.equal(p, initial[n]) for n, p in bare.named_parameters())
            raise KeyError("inside the anchor pass")

        with pytest.raises(KeyError, match="inside the anchor pass"):
            extract_anchor_features_online(module, fail, weights)
        assert all(torch.equal(p, current[n]) for n, p in module.named_parameters())
        assert module.training
        assert not weights.is_swapped
        assert torch.is_grad_enabled()

    def test_nested_swap_is_refused(self):
        weights = CRaFTWeightManager(Trunk())
        with weights.initial_weights(), pytest.raises(RuntimeError, match="nested"):
            weights.swap_to_initial()
        assert not weights.is_swapped

    def test_snapshot_does_not_follow_training_and_counts_trainable_only(self):
        module = Trunk()
        module.head.requires_grad_(False)
        weights = CRaFTWeightManager(module)
        before = {n: t.clone() for n, t in weights.state_dict().items()}
        perturb(module)
        assert all(torch.equal(t, before[n]) for n, t in weights.state_dict().items())
        assert weights.num_parameters == sum(p.numel() for p in module.trunk.parameters())

    def test_a_foreign_anchor_is_refused(self):
        weights = CRaFTWeightManager(Trunk())
        state = weights.state_dict()
        with pytest.raises(ValueError, match="missing"):
            weights.load_state_dict({k: v for k, v in state.items() if "head" not in k})
        with pytest.raises(ValueError, match=r"trunk\.0\.weight"):
            weights.load_state_dict(state | {"trunk.0.weight": torch.zeros(1)})

    def test_anchor_pass_has_no_dropout_and_leaves_the_rng_alone(self):
        module, x = Trunk(dropout=0.5), torch.randn(3, 4)
        constraint_ = constraint(module)
        anchor = constraint_.anchor_features({"x": x})
        assert all(m.training for m in module.modules())
        assert not anchor.requires_grad
        with torch.no_grad():
            raw, aq, _ = module.eval().features(x)
        assert torch.equal(anchor, constraint_.extractor(raw, aq))

        def draws(bare):
            torch.rand(5)  # some layers draw numbers whatever their mode
            return bare.features(x)[0]

        state = torch.get_rng_state()
        extract_anchor_features_online(module, draws, constraint_.weights)
        assert torch.equal(torch.get_rng_state(), state)


class TestConstraint:
    def accumulate(self, constraint_, module, batches):
        losses = []
        for x in batches:
            anchor = constraint_.anchor_features({"x": x})
            out, raw, aq = module(x)
            features = constraint_.extractor(raw, aq)
            losses.append(float(constraint_.accumulate(features, anchor, 1 / len(batches))))
            (out.square().mean() / len(batches)).backward()
        return losses

    def test_drift_is_zero_at_the_start(self):
        module = Trunk()
        constraint_ = constraint(module)
        plain = Trunk()
        plain.load_state_dict(module.state_dict())
        x = torch.randn(6, 4)
        assert self.accumulate(constraint_, module, [x]) == [0.0]
        constraint_.combine_()
        plain(x)[0].square().mean().backward()
        for p, q in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)

    def test_micro_batches_equal_one_batch(self):
        results = []
        for splits in (1, 4):
            torch.manual_seed(0)
            module = Trunk()
            constraint_ = constraint(module)
            perturb(module)
            self.accumulate(constraint_, module, torch.randn(8, 4).chunk(splits))
            metrics = constraint_.combine_()
            results.append(([p.grad for p in module.parameters()], constraint_.dual.get_lambda(), metrics))
        for g, h in zip(results[0][0], results[1][0], strict=True):
            torch.testing.assert_close(g, h, rtol=1e-4, atol=1e-6)
        assert results[0][1] == pytest.approx(results[1][1], rel=1e-6)
        assert results[0][2]["CRaFT/Conflict Ratio"] == results[1][2]["CRaFT/Conflict Ratio"]

    def test_head_gradient_is_not_touched(self):
        module = Trunk()
        constraint_ = constraint(module)
        perturb(module)
        x = torch.randn(5, 4)
        expected = torch.autograd.grad(module(x)[0].square().mean(), list(module.head.parameters()))
        self.accumulate(constraint_, module, [x])
        constraint_.combine_()
        assert all(torch.equal(p.grad, g) for p, g in zip(module.head.parameters(), expected, strict=True))

    def test_nothing_to_constrain_is_an_error(self):
        module = Trunk()
        module.trunk.requires_grad_(False)
        constraint_ = constraint(module)
        with pytest.raises(ValueError, match="nothing to constrain"):
            self.accumulate(constraint_, module, [torch.randn(2, 4)])

    def test_state_survives_a_round_trip(self):
        module = Trunk()
        constraint_ = constraint(module, retention_weight=0.5)
        constraint_.dual.step(1000.0)
        other = constraint(Trunk())
        other.load_state_dict(constraint_.state_dict(), constraint_.weights.state_dict())
        assert other.dual.get_lambda() == constraint_.dual.get_lambda()
        for name, tensor in constraint_.weights.state_dict().items():
            assert torch.equal(other.weights.state_dict()[name], tensor)


@pytest.mark.parametrize("field", ["retention_weight", "retention_budget", "dual_lr", "projection_eps", "fixed_lambda"])
def test_negative_settings_are_refused(field):
    with pytest.raises(ValueError, match=field):
        CRaFTConfig(**{field: -1.0})
