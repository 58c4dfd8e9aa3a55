"""Pooling, masks and distances against loops over samples and tokens."""

import pytest
import torch
from craft_fixtures import quick, seeds
from hypothesis import given
from hypothesis import strategies as st

from prismatic.craft import (
    AnchorType,
    BridgeFeatures,
    CRaFTConfig,
    CRaFTFeatureExtractor,
    PartFeatures,
    RetentionMetric,
    compute_retention_loss,
    retention_loss,
)
from prismatic.craft.distances import drift_of_parts

B, T, Q, D = 4, 5, 3, 6
METRICS = list(RetentionMetric)
metrics = st.sampled_from(METRICS)
weights = st.floats(0.01, 10)


def draw_tokens(generator, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=generator)


def draw_mask(generator, *shape):
    """Ragged, with at least one token in every row."""
    mask = torch.rand(shape, generator=generator) < 0.5
    mask[torch.arange(shape[0]), torch.randint(shape[1], (shape[0],), generator=generator)] = True
    return mask


def features(raw, aq, mask=None, **settings) -> BridgeFeatures:
    return CRaFTFeatureExtractor(CRaFTConfig(**settings)).parts(raw, aq, mask)


def distance_of_sample(metric: RetentionMetric, x: torch.Tensor, y: torch.Tensor) -> float:
    """Distance of the tokens (T, D) of one sample, written out."""
    x, y = x.double(), y.double()
    if metric is RetentionMetric.TOKEN_REL_MSE:
        return float((x - y).pow(2).sum() / y.pow(2).sum())
    if metric is RetentionMetric.GRAM:
        k, m = x @ x.T, y @ y.T
        return float(1 - (k * m).sum() / (k.norm() * m.norm()))
    x, y = x.mean(0), y.mean(0)
    return {
        RetentionMetric.MSE: lambda: float((x - y).pow(2).sum() / len(x)),
        RetentionMetric.REL_MSE: lambda: float((x - y).pow(2).sum() / y.pow(2).sum()),
        RetentionMetric.COSINE: lambda: float(1 - x @ y / (x.norm() * y.norm())),
    }[metric]()


class TestPooling:
    @given(seeds, st.booleans(), st.integers(1, 4), st.integers(1, 7), st.booleans())
    @quick
    def test_masked_pooling_is_a_loop_over_the_kept_tokens(self, seed, mean, batch, length, bf16):
        generator = torch.Generator().manual_seed(seed)
        tokens, mask = draw_tokens(generator, batch, length, 3), draw_mask(generator, batch, length)
        tokens = tokens.bfloat16() if bf16 else tokens
        pooled = CRaFTFeatureExtractor(CRaFTConfig(use_mean_pooling=mean)).pool_features(tokens, mask)
        assert pooled.dtype == torch.float32
        for b in range(batch):
            kept = [tokens[b, t].float() for t in range(length) if mask[b, t]]
            expected = sum(kept) / len(kept) if mean else torch.stack(kept).max(dim=0).values
            torch.testing.assert_close(pooled[b], expected)

    @given(seeds, st.booleans(), st.sampled_from([(2,), (2, 3)]))
    @quick
    def test_pooling_without_a_mask_takes_all_tokens_of_each_layer(self, seed, mean, leading):
        tokens = draw_tokens(torch.Generator().manual_seed(seed), *leading, 4, 3)
        pooled = CRaFTFeatureExtractor(CRaFTConfig(use_mean_pooling=mean)).pool_features(tokens)
        for index in torch.cartesian_prod(*(torch.arange(n) for n in leading)).reshape(-1, len(leading)).tolist():
            kept = tokens[tuple(index)]
            torch.testing.assert_close(pooled[tuple(index)], kept.mean(0) if mean else kept.max(0).values)

    @given(seeds, st.booleans())
    @quick
    def test_a_full_mask_is_no_mask(self, seed, mean):
        tokens = draw_tokens(torch.Generator().manual_seed(seed), B, T, D)
        extractor = CRaFTFeatureExtractor(CRaFTConfig(use_mean_pooling=mean))
        full = extractor.pool_features(tokens, torch.ones(B, T, dtype=torch.bool))
        torch.testing.assert_close(full, extractor.pool_features(tokens))

    @pytest.mark.parametrize("mean", [True, False])
    def test_an_empty_row_is_an_error(self, mean):
        mask = torch.tensor([[True, False, False], [False, False, False]])
        with pytest.raises(ValueError, match="empty"):
            CRaFTFeatureExtractor(CRaFTConfig(use_mean_pooling=mean)).pool_features(torch.randn(2, 3, 4), mask)

    def test_bf16_tokens_are_averaged_in_fp32(self):
        # The sum of 1000 ones and 0.5 is not a bf16 number, and bf16 sums stop growing at 256.
        tokens = torch.ones(1, 1000, 1).bfloat16()
        tokens[0, 0] = 1.5
        assert float(CRaFTFeatureExtractor(CRaFTConfig()).pool_features(tokens)) == pytest.approx(1.0005, abs=1e-6)


class TestParts:
    @pytest.mark.parametrize(("kind", "width"), [("concat", 2 * D), ("aq_only", D), ("raw_only", D)])
    @pytest.mark.parametrize("layers", [None, 4])
    def test_the_anchor_type_selects_and_orders_the_parts(self, kind, width, layers):
        leading = (B,) if layers is None else (B, layers)
        raw, aq = torch.randn(*leading, T, D).bfloat16(), torch.randn(*leading, Q, D).bfloat16()
        parts = features(raw, aq, anchor_type=kind)
        assert (parts.raw is None, parts.aq is None) == (kind == "aq_only", kind == "raw_only")
        assert parts.f.shape == (B, width * (layers or 1))
        assert parts.f.dtype == torch.float32
        expected = {
            "concat": torch.cat([raw.float().mean(-2).flatten(1), aq.float().mean(-2).flatten(1)], dim=1),
            "raw_only": raw.float().mean(-2).flatten(1),
            "aq_only": aq.float().mean(-2).flatten(1),
        }[kind]
        torch.testing.assert_close(parts.f, expected)
        assert torch.equal(CRaFTFeatureExtractor(CRaFTConfig(anchor_type=kind))(raw, aq), parts.f)

    def test_raw_only_needs_no_queries(self):
        assert features(torch.randn(B, T, D), None, anchor_type="raw_only").aq is None

    @pytest.mark.parametrize("metric", METRICS)
    def test_tokens_are_kept_for_token_metrics_only(self, metric):
        parts = features(torch.randn(B, T, D), torch.randn(B, Q, D), retention_metric=metric)
        needed = metric in (RetentionMetric.TOKEN_REL_MSE, RetentionMetric.GRAM)
        assert (parts.raw.tokens is not None) == (parts.aq.tokens is not None) == needed

    def test_requires_grad_when_any_part_does(self):
        raw, aq = torch.randn(B, T, D), torch.randn(B, Q, D, requires_grad=True)
        assert features(raw, aq).requires_grad
        assert not features(raw, aq, anchor_type="raw_only").requires_grad
        assert not features(raw, aq.detach()).requires_grad


class TestRetentionLoss:
    @given(seeds, metrics, st.sampled_from(list(AnchorType)), weights, weights, st.booleans(), st.booleans())
    @quick
    def test_it_is_the_weighted_mean_of_a_loop_over_samples(self, seed, metric, kind, w_raw, w_aq, masked, bf16):
        generator = torch.Generator().manual_seed(seed)
        raw, aq = draw_tokens(generator, B, T, D), draw_tokens(generator, B, Q, D)
        raw0, aq0 = (x + 0.5 * draw_tokens(generator, *x.shape) for x in (raw, aq))
        if bf16:
            raw, aq, raw0, aq0 = (x.bfloat16() for x in (raw, aq, raw0, aq0))
        mask = draw_mask(generator, B, T) if masked else None
        settings = {"anchor_type": kind, "retention_metric": metric, "w_raw": w_raw, "w_aq": w_aq}
        loss = retention_loss(
            features(raw, aq, mask, **settings), features(raw0, aq0, mask, **settings), CRaFTConfig(**settings)
        )
        kept = [slice(None) if mask is None else mask[b] for b in range(B)]
        per_part = {
            "raw": sum(distance_of_sample(metric, raw[b][kept[b]], raw0[b][kept[b]]) for b in range(B)) / B,
            "aq": sum(distance_of_sample(metric, aq[b], aq0[b]) for b in range(B)) / B,
        }
        w = {"raw": 0 if kind is AnchorType.AQ_ONLY else w_raw, "aq": 0 if kind is AnchorType.RAW_ONLY else w_aq}
        expected = sum(w[name] * per_part[name] for name in w) / sum(w.values())
        assert float(loss) == pytest.approx(expected, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("metric", METRICS)
    @given(seed=seeds, layers=st.sampled_from([None, 3]), masked=st.booleans())
    @quick
    def test_zero_with_zero_gradient_at_the_anchor_and_positive_elsewhere(self, metric, seed, layers, masked):
        generator = torch.Generator().manual_seed(seed)
        leading = (B,) if layers is None else (B, layers)
        raw = draw_tokens(generator, *leading, T, D).requires_grad_()
        aq = draw_tokens(generator, *leading, Q, D).requires_grad_()
        mask = None
        if masked and layers is None:
            mask = draw_mask(generator, B, T)
            mask[:, :2] = True  # the Gram matrix of one token is always the same
        config = CRaFTConfig(retention_metric=metric)
        extract = CRaFTFeatureExtractor(config).parts
        anchor = extract(raw.detach(), aq.detach(), mask)
        loss = retention_loss(extract(raw, aq, mask), anchor, config)
        gradients = torch.autograd.grad(loss, [raw, aq])
        # The cosine of a vector with itself is 1 up to rounding; the other differences are exact zeros.
        tolerance = 1e-6 if metric is RetentionMetric.COSINE else 0.0
        assert abs(float(loss.detach())) <= tolerance
        assert all(float(g.abs().max()) <= tolerance * 10 for g in gradients)
        moved = [x.detach() + 0.3 * draw_tokens(generator, *x.shape) for x in (raw, aq)]
        assert float(retention_loss(extract(*moved, mask), anchor, config)) > 1e-6

    @given(seeds, metrics, st.booleans())
    @quick
    def test_it_is_a_mean_over_samples(self, seed, metric, masked):
        generator = torch.Generator().manual_seed(seed)
        raw, aq = draw_tokens(generator, B, T, D), draw_tokens(generator, B, Q, D)
        # Samples of different size: a ratio of batch sums would not be the mean of the samples' ratios.
        raw0, aq0 = ((x + 1) * torch.logspace(-2, 2, B)[:, None, None] for x in (raw, aq))
        mask, config = draw_mask(generator, B, T) if masked else None, CRaFTConfig(retention_metric=metric)
        extract = CRaFTFeatureExtractor(config).parts

        def loss(rows):
            m = None if mask is None else mask[rows]
            return float(retention_loss(extract(raw[rows], aq[rows], m), extract(raw0[rows], aq0[rows], m), config))

        halves = [loss(slice(0, B // 2)), loss(slice(B // 2, B))]
        assert loss(slice(0, B)) == pytest.approx(sum(halves) / 2, rel=1e-5)

    @given(seeds, metrics)
    @quick
    def test_it_is_a_mean_over_layers(self, seed, metric):
        generator = torch.Generator().manual_seed(seed)
        now, then = ([draw_tokens(generator, B, 3, n, D) for n in (T, Q)] for _ in range(2))
        config = CRaFTConfig(retention_metric=metric)
        extract = CRaFTFeatureExtractor(config).parts
        layers = [
            float(retention_loss(extract(*(x[:, k] for x in now)), extract(*(x[:, k] for x in then)), config))
            for k in range(3)
        ]
        total = float(retention_loss(extract(*now), extract(*then), config))
        assert total == pytest.approx(sum(layers) / 3, rel=1e-5)

    @given(seeds, metrics, st.floats(-1e3, 1e3))
    @quick
    def test_masked_tokens_have_no_influence(self, seed, metric, value):
        generator = torch.Generator().manual_seed(seed)
        raw, aq = draw_tokens(generator, B, T, D), draw_tokens(generator, B, Q, D)
        mask, config = draw_mask(generator, B, T), CRaFTConfig(retention_metric=metric)
        extract = CRaFTFeatureExtractor(config).parts
        anchor = extract(draw_tokens(generator, B, T, D), draw_tokens(generator, B, Q, D), mask)
        other = torch.where(mask[..., None], raw, torch.full_like(raw, value)).requires_grad_()
        loss = retention_loss(extract(other, aq, mask), anchor, config)
        assert torch.equal(loss.detach(), retention_loss(extract(raw, aq, mask), anchor, config))
        (gradient,) = torch.autograd.grad(loss, other)
        assert not gradient[~mask].any()

    @given(seeds, weights, st.booleans(), st.floats(0.1, 10))
    @quick
    def test_mse_with_equal_weights_is_the_original_loss(self, seed, weight, layered, scale):
        generator = torch.Generator().manual_seed(seed)
        shape = (B, 3, T, D) if layered else (B, T, D)
        now, then = ([draw_tokens(generator, *shape, scale=scale) for _ in range(2)] for _ in range(2))
        f, f0 = features(*now), features(*then)
        loss = retention_loss(f, f0, CRaFTConfig(w_raw=weight, w_aq=weight))
        torch.testing.assert_close(loss, compute_retention_loss(f.f, f0.f), rtol=1e-5, atol=0)

    @given(seeds, metrics, weights)
    @quick
    def test_a_weight_of_zero_is_the_other_anchor_type(self, seed, metric, weight):
        generator = torch.Generator().manual_seed(seed)
        now, then = ([draw_tokens(generator, B, n, D) for n in (T, Q)] for _ in range(2))

        def loss(**settings):
            settings |= {"retention_metric": metric}
            return retention_loss(features(*now, **settings), features(*then, **settings), CRaFTConfig(**settings))

        raw, aq = loss(anchor_type="raw_only"), loss(anchor_type="aq_only")
        torch.testing.assert_close(loss(w_raw=weight, w_aq=0.0), raw)
        torch.testing.assert_close(loss(w_raw=0.0, w_aq=weight), aq)
        torch.testing.assert_close(loss(w_raw=weight, w_aq=weight), (raw + aq) / 2)
        torch.testing.assert_close(loss(w_raw=3 * weight, w_aq=weight), 0.75 * raw + 0.25 * aq)

    def test_no_gradient_reaches_the_anchor(self):
        for metric in METRICS:
            raw, aq, raw0, aq0 = (torch.randn(B, n, D, requires_grad=True) for n in (T, Q, T, Q))
            config = CRaFTConfig(retention_metric=metric)
            extract = CRaFTFeatureExtractor(config).parts
            retention_loss(extract(raw, aq), extract(raw0, aq0), config).backward()
            assert raw0.grad is None and aq0.grad is None
            assert raw.grad.abs().sum() > 0 and aq.grad.abs().sum() > 0

    @pytest.mark.parametrize("metric", METRICS)
    def test_different_shapes_are_refused(self, metric):
        config = CRaFTConfig(retention_metric=metric, anchor_type="raw_only")
        extract = CRaFTFeatureExtractor(config).parts
        # Broadcasting would make a number of it.
        with pytest.raises(ValueError, match="differ in shape"):
            retention_loss(extract(torch.randn(B, T, D), None), extract(torch.randn(1, T, D), None), config)
        with pytest.raises(ValueError, match="differ in shape"):
            compute_retention_loss(torch.randn(B, D), torch.randn(1, D))

    @pytest.mark.parametrize("metric", METRICS)
    def test_features_of_norm_zero_stay_finite(self, metric):
        config = CRaFTConfig(retention_metric=metric)
        extract = CRaFTFeatureExtractor(config).parts
        raw, aq = torch.zeros(B, T, D, requires_grad=True), torch.zeros(B, Q, D, requires_grad=True)
        for reference in (torch.zeros, torch.ones):
            anchor = extract(reference(B, T, D), reference(B, Q, D))
            loss = retention_loss(extract(raw, aq), anchor, config)
            assert torch.isfinite(loss)
            assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [raw, aq]))


class TestInvariances:
    @given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
    @quick
    def test_cosine_ignores_the_scale_of_either_side(self, seed, c, k):
        generator = torch.Generator().manual_seed(seed)
        raw, raw0 = draw_tokens(generator, B, T, D), draw_tokens(generator, B, T, D)
        config = CRaFTConfig(retention_metric="cosine", anchor_type="raw_only")
        extract = CRaFTFeatureExtractor(config).parts
        expected = retention_loss(extract(raw, None), extract(raw0, None), config)
        scaled = retention_loss(extract(c * raw, None), extract(k * raw0, None), config)
        torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=1e-5)

    @given(seeds, st.sampled_from(["rel_mse", "token_rel_mse"]), st.floats(1e-2, 1e3))
    @quick
    def test_relative_metrics_ignore_a_common_scale(self, seed, metric, c):
        generator = torch.Generator().manual_seed(seed)
        raw, raw0 = draw_tokens(generator, B, T, D), draw_tokens(generator, B, T, D)
        config = CRaFTConfig(retention_metric=metric, anchor_type="raw_only")
        extract = CRaFTFeatureExtractor(config).parts
        expected = retention_loss(extract(raw, None), extract(raw0, None), config)
        scaled = retention_loss(extract(c * raw, None), extract(c * raw0, None), config)
        torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=0)

    @given(seeds, st.floats(0.1, 1e3), st.booleans())
    @quick
    def test_gram_ignores_rotations_and_scale_of_the_feature_space(self, seed, c, masked):
        generator = torch.Generator().manual_seed(seed)
        raw, raw0 = draw_tokens(generator, B, T, D), draw_tokens(generator, B, T, D)
        rotation = torch.linalg.qr(draw_tokens(generator, D, D)).Q
        mask = draw_mask(generator, B, T) if masked else None
        config = CRaFTConfig(retention_metric="gram", anchor_type="raw_only")
        extract = CRaFTFeatureExtractor(config).parts
        anchor = extract(raw0, None, mask)
        expected = retention_loss(extract(raw, None, mask), anchor, config)
        torch.testing.assert_close(
            retention_loss(extract(c * raw @ rotation, None, mask), anchor, config), expected, rtol=1e-4, atol=1e-5
        )
        rotated = retention_loss(extract(raw0 @ rotation, None, mask), anchor, config)
        assert float(rotated) == pytest.approx(0.0, abs=1e-5)

    @given(seeds)
    @quick
    def test_only_token_metrics_see_a_change_that_leaves_the_mean(self, seed):
        generator = torch.Generator().manual_seed(seed)
        raw, noise = draw_tokens(generator, B, T, D), draw_tokens(generator, B, T, D)
        moved = raw + noise - noise.mean(dim=1, keepdim=True)
        for metric in METRICS:
            config = CRaFTConfig(retention_metric=metric, anchor_type="raw_only")
            extract = CRaFTFeatureExtractor(config).parts
            loss = float(retention_loss(extract(moved, None), extract(raw, None), config))
            assert (loss > 1e-3) == metric.needs_tokens


class TestDrift:
    @given(seeds, metrics, st.sampled_from(list(AnchorType)))
    @quick
    def test_both_units_per_part_whatever_the_metric(self, seed, metric, kind):
        generator = torch.Generator().manual_seed(seed)
        now, then = ([draw_tokens(generator, B, n, D) for n in (T, Q)] for _ in range(2))
        settings = {"retention_metric": metric, "anchor_type": kind}
        drifts = drift_of_parts(features(*now, **settings), features(*then, **settings))
        expected = {}
        for name, x, y in (("raw", now[0], then[0]), ("aq", now[1], then[1])):
            if kind is not (AnchorType.AQ_ONLY if name == "raw" else AnchorType.RAW_ONLY):
                for unit, m in (("mse", RetentionMetric.MSE), ("relative", RetentionMetric.REL_MSE)):
                    expected[f"{name}_{unit}"] = sum(distance_of_sample(m, x[b], y[b]) for b in range(B)) / B
        assert {k: float(v) for k, v in drifts.items()} == pytest.approx(expected, rel=1e-4)

    def test_it_leaves_no_graph(self):
        pooled = torch.randn(B, 1, D, requires_grad=True)
        part = PartFeatures(pooled)
        drifts = drift_of_parts(BridgeFeatures(part, None), BridgeFeatures(PartFeatures(torch.zeros(B, 1, D)), None))
        assert not any(value.requires_grad for value in drifts.values())
