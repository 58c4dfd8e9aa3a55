"""The anchors: equal features, nothing left behind, and no exchange of weights under a live graph."""

import copy

import pytest
import torch
from craft_fixtures import ANCHORS, Policy, action_loss, make_batch, make_policy, perturb
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from prismatic.craft import (
    AnchorKind,
    CRaFTWeightManager,
    DisableAdapterAnchor,
    build_anchor,
    extract_anchor_features_online,
)
from prismatic.craft.reference import adapter_parameter_names, quiet_pass

SWAPPING = [kind for kind in ANCHORS if kind is not AnchorKind.FROZEN_COPY]
WITHOUT_ADAPTERS = [kind for kind in ANCHORS if kind is not AnchorKind.DISABLE_ADAPTER]


def backbone(name: str) -> bool:
    return name.startswith("vla.")


def read(bare, batch):
    """The features of a pass, joined."""
    raw, aq, _ = bare.anchor_features(batch)
    return torch.cat([raw, aq], dim=1)


def anchored(policy, anchor, batch):
    return extract_anchor_features_online(policy, lambda bare: read(bare, batch), anchor)


def train(policy, steps: int = 3, seed: int = 5) -> None:
    """Steps with dropout off, so that the policy only depends on its weights; B leaves zero."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.05)
    for i in range(steps):
        batch = make_batch(seed + i)
        optimizer.zero_grad()
        action_loss(policy(batch)[0], batch).backward()
        optimizer.step()


def state_of(policy) -> dict:
    """Everything that an anchor pass must leave as it was."""
    named = list(policy.named_parameters())
    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    return {
        "weights": {n: p.detach().clone() for n, p in named},
        "storage": {n: (id(p), p.data_ptr(), p.shape, p.dtype) for n, p in named},
        "requires_grad": {n: p.requires_grad for n, p in named},
        "training": {n: m.training for n, m in policy.named_modules()},
        "adapters": [(layer.disable_adapters, list(layer.active_adapters)) for layer in layers],
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def assert_state(policy, before: dict) -> None:
    after = state_of(policy)
    weights, rng = after.pop("weights"), after.pop("rng")
    assert after == {k: v for k, v in before.items() if k in after}
    assert torch.equal(rng, before["rng"])
    assert weights.keys() == before["weights"].keys()
    assert all(torch.equal(weights[n], w) for n, w in before["weights"].items())


def make_mixed(lora: bool, fresh: bool = True, dropout: float = 0.0) -> Policy:
    """Parts in training and in eval mode, one trainable part frozen."""
    policy = make_policy(lora=lora, fresh=fresh, dropout=dropout)
    policy.vla.language_model.layers[0].eval()
    frozen = [p for n, p in policy.named_parameters() if "layers.0.q_proj" in n and ("lora_A" in n or not lora)]
    assert frozen
    for p in frozen:
        p.requires_grad_(False)
    return policy


def cases():
    """(kind, lora, fresh adapters) for every combination that exists."""
    combinations = [(kind, True, True) for kind in ANCHORS]
    combinations += [(kind, lora, False) for kind in WITHOUT_ADAPTERS for lora in (True, False)]
    return pytest.mark.parametrize(("kind", "lora", "fresh"), combinations)


class TestEqualFeatures:
    @cases()
    @pytest.mark.parametrize("trained", [False, True])
    def test_they_are_those_of_the_start_model(self, kind, lora, fresh, trained):
        policy, batch = make_policy(lora=lora, fresh=fresh), make_batch()
        start = copy.deepcopy(policy).eval()
        anchor = build_anchor(kind, policy, backbone)
        assert anchor.kind is kind
        if trained:
            train(policy)
        features = anchored(policy, anchor, batch)
        with torch.no_grad():
            expected, current = read(start, batch), read(policy.eval(), batch)
        if not lora or fresh or kind is AnchorKind.FROZEN_COPY:
            # Adapters with B = 0 add exact zeros.
            assert torch.equal(features, expected)
        torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
        assert torch.equal(features, current) == (not trained)
        assert not features.requires_grad

    def test_all_kinds_agree_bit_for_bit_with_fresh_adapters_after_training(self):
        policy, batch = make_policy(lora=True), make_batch()
        anchors = [build_anchor(kind, policy, backbone) for kind in ANCHORS]
        train(policy)
        features = [anchored(policy, anchor, batch) for anchor in anchors]
        assert all(torch.equal(f, features[0]) for f in features)
        assert not torch.equal(features[0], read(policy, batch))

    @cases()
    def test_dropout_and_training_mode_do_not_matter(self, kind, lora, fresh):
        policy, batch = make_policy(lora=lora, fresh=fresh, dropout=0.5), make_batch()
        with torch.no_grad():
            expected = read(copy.deepcopy(policy).eval(), batch)
        anchor = build_anchor(kind, policy, backbone)
        for seed, module in enumerate((policy, policy, policy.eval())):
            torch.manual_seed(seed)
            torch.testing.assert_close(anchored(module, anchor, batch), expected)

    @pytest.mark.parametrize("kind", ANCHORS)
    def test_a_restored_snapshot_is_what_they_compute(self, kind):
        policy, other, batch = make_policy(0, lora=True), make_policy(0, lora=True), make_batch()
        perturb(other.vla.base_model.model.action_queries)
        snapshot = {n: t.clone() for n, t in build_anchor(kind, other, backbone).weights.state_dict().items()}
        anchor = build_anchor(kind, policy, backbone)
        before = anchored(policy, anchor, batch)
        anchor.weights.load_state_dict(snapshot)
        with torch.no_grad():
            expected = read(other.eval(), batch)
        assert torch.equal(anchored(policy, anchor, batch), expected)
        assert not torch.equal(before, expected)


class TestMemory:
    def test_frozen_copy_shares_the_frozen_weights_and_the_buffers(self):
        policy = make_policy(lora=True)
        policy.vla.register_buffer("table", torch.ones(3))
        anchor = build_anchor(AnchorKind.FROZEN_COPY, policy, backbone)
        copies = dict(anchor._copy.named_parameters())
        snapshot = anchor.weights.state_dict()
        assert anchor._copy.vla.table is policy.vla.table
        for name, p in policy.named_parameters():
            assert not copies[name].requires_grad
            expected = snapshot.get(name, p)
            assert copies[name].data_ptr() == expected.data_ptr()
            assert (copies[name].data_ptr() == p.data_ptr()) == (name not in snapshot)
        assert set(snapshot) == {n for n, p in policy.named_parameters() if p.requires_grad and backbone(n)}

    def test_disable_adapter_keeps_only_what_is_trained_beside_the_adapters(self):
        policy = make_policy(lora=True)
        anchor = build_anchor(AnchorKind.DISABLE_ADAPTER, policy, backbone)
        assert list(anchor.weights.state_dict()) == ["vla.base_model.model.action_queries.weight"]
        assert anchor.weights.num_parameters == policy.vla.base_model.model.action_queries.weight.numel()

    def test_names_of_adapter_parameters(self):
        policy = make_policy(lora=True)
        assert adapter_parameter_names(policy) == {n for n, _ in policy.named_parameters() if "lora_" in n}
        assert adapter_parameter_names(make_policy()) == set()

    @pytest.mark.parametrize("kind", ANCHORS)
    def test_no_gradient_buffers_are_made(self, kind):
        policy = make_policy(lora=True)
        anchored(policy, build_anchor(kind, policy, backbone), make_batch())
        assert all(p.grad is None for p in policy.parameters())


class TestChoice:
    @pytest.mark.parametrize(
        ("lora", "fresh", "expected"),
        [
            (True, True, AnchorKind.DISABLE_ADAPTER),
            (True, False, AnchorKind.ONLINE_SWAP),
            (False, False, AnchorKind.ONLINE_SWAP),
        ],
    )
    def test_auto(self, lora, fresh, expected):
        assert build_anchor(AnchorKind.AUTO, make_policy(lora=lora, fresh=fresh)).kind is expected

    def test_disable_adapter_needs_adapters_that_change_nothing(self):
        with pytest.raises(ValueError, match="no adapters"):
            build_anchor(AnchorKind.DISABLE_ADAPTER, make_policy())
        with pytest.raises(ValueError, match="do not start at zero"):
            DisableAdapterAnchor(make_policy(lora=True, fresh=False))
        policy = make_policy(lora=True)
        train(policy)
        with pytest.raises(ValueError, match="do not start at zero"):
            build_anchor(AnchorKind.DISABLE_ADAPTER, policy)


class InjectedError(Exception):
    """What the tests raise inside of an anchor pass."""


class TestNothingIsLeftBehind:
    @cases()
    def test_after_a_pass(self, kind, lora, fresh):
        policy = make_mixed(lora, fresh, dropout=0.5)
        anchor = build_anchor(kind, policy, backbone)
        perturb(policy)
        before = state_of(policy)
        anchored(policy, anchor, make_batch())
        assert_state(policy, before)
        assert not anchor.weights.is_swapped

    @cases()
    @pytest.mark.parametrize("stage", ["before the forward", "half-way", "nested", "half-way in nested"])
    @pytest.mark.parametrize("grad_mode", [True, False])
    def test_after_an_exception(self, kind, lora, fresh, stage, grad_mode):
        policy, batch = make_mixed(lora, fresh, dropout=0.5), make_batch()
        anchor = build_anchor(kind, policy, backbone)
        perturb(policy)
        features, before = anchored(policy, anchor, batch), state_of(policy)

        def compute(bare):
            torch.rand(3)  # some layers draw numbers whatever their mode
            if stage == "nested":
                anchored(policy, anchor, batch)
            elif stage == "half-way in nested":
                anchored(policy, anchor, batch | {"interrupt": InjectedError("half-way")})
            elif stage == "half-way":
                read(bare, batch | {"interrupt": InjectedError("half-way")})
            raise InjectedError("in compute")

        # An exchange of weights cannot be nested and says so; the other anchors reach the injected error.
        swaps = kind in (AnchorKind.ONLINE_SWAP, AnchorKind.DISABLE_ADAPTER)
        expected = RuntimeError if swaps and "nested" in stage else InjectedError
        with torch.set_grad_enabled(grad_mode):
            before["grad_mode"] = grad_mode
            with pytest.raises(expected):
                extract_anchor_features_online(policy, compute, anchor)
            assert_state(policy, before)
        assert not anchor.weights.is_swapped
        assert torch.equal(anchored(policy, anchor, batch), features)

    @pytest.mark.parametrize("kind", [AnchorKind.FUNCTIONAL, AnchorKind.FROZEN_COPY])
    def test_nested_passes_are_right_where_they_are_allowed(self, kind):
        policy, batch = make_policy(lora=True), make_batch()
        anchor = build_anchor(kind, policy, backbone)
        train(policy)
        expected = anchored(policy, anchor, batch)

        def compute(bare):
            inner = anchored(policy, anchor, batch)
            return inner, read(bare, batch)

        inner, outer = extract_anchor_features_online(policy, compute, anchor)
        assert torch.equal(inner, expected)
        assert torch.equal(outer, expected)

    def test_quiet_pass(self):
        policy = make_mixed(lora=False, dropout=0.5)
        before = state_of(policy)
        with quiet_pass(policy):
            assert not torch.is_grad_enabled()
            assert not any(m.training for m in policy.modules())
            torch.rand(7)
        assert_state(policy, before)


class TestLiveGraph:
    @pytest.mark.parametrize("kind", SWAPPING)
    def test_no_anchor_pass_between_forward_and_backward(self, kind):
        policy, batch = make_policy(lora=True), make_batch()
        anchor = build_anchor(kind, policy, backbone)
        perturb(policy)
        before = state_of(policy)
        with anchor.weights.live_graph():
            loss = policy(batch)[0].square().mean()
            with pytest.raises(RuntimeError, match="between a forward pass and its backward pass"):
                anchored(policy, anchor, batch)
            loss.backward()
        assert_state(policy, before)
        anchored(policy, anchor, batch)

    def test_a_frozen_copy_exchanges_nothing(self):
        policy, batch = make_policy(lora=True), make_batch()
        anchor = build_anchor(AnchorKind.FROZEN_COPY, policy, backbone)
        with anchor.weights.live_graph():
            anchored(policy, anchor, batch)

    def test_an_error_in_the_backward_pass_ends_it(self):
        weights = CRaFTWeightManager(make_policy())
        with pytest.raises(InjectedError), weights.live_graph():
            raise InjectedError
        with weights.initial_weights():
            assert weights.is_swapped

    @pytest.mark.parametrize("kind", ANCHORS)
    def test_gradients_are_those_without_an_anchor_pass_before(self, kind):
        policy, batch = make_policy(lora=True), make_batch()
        anchor = build_anchor(kind, policy, backbone)
        perturb(policy)

        def gradients():
            named = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
            grads = torch.autograd.grad(action_loss(policy(batch)[0], batch), [p for _, p in named])
            return {n: g for (n, _), g in zip(named, grads, strict=True)}

        expected = gradients()
        anchored(policy, anchor, batch)
        actual = gradients()
        assert all(torch.equal(actual[n], g) for n, g in expected.items())


class TestWeightManager:
    def test_swapping_moves_pointers_and_copies_nothing(self):
        policy = make_policy()
        weights = CRaFTWeightManager(policy)
        perturb(policy)
        parameters = dict(policy.named_parameters())
        pointers = {n: p.data_ptr() for n, p in parameters.items()}
        with weights.initial_weights():
            for name, tensor in weights.state_dict().items():
                assert parameters[name].data_ptr() == tensor.data_ptr() != pointers[name]
        assert {n: p.data_ptr() for n, p in policy.named_parameters()} == pointers
        # The optimizer is keyed by parameter object.
        assert all(parameters[n] is p for n, p in policy.named_parameters())

    def test_nested_swaps_are_refused(self):
        policy = make_policy()
        weights = CRaFTWeightManager(policy)
        perturb(policy)
        before = state_of(policy)
        with weights.initial_weights(), pytest.raises(RuntimeError, match="nested"):
            weights.swap_to_initial()
        assert not weights.is_swapped
        assert_state(policy, before)
        weights.swap_to_current()  # nothing to do
        assert_state(policy, before)

    def test_the_snapshot_does_not_follow_training(self):
        policy = make_policy()
        policy.action_head.requires_grad_(False)
        weights = CRaFTWeightManager(policy)
        before = {n: t.clone() for n, t in weights.state_dict().items()}
        train(policy)
        assert all(torch.equal(t, before[n]) for n, t in weights.state_dict().items())
        assert set(before) == {n for n, _ in policy.named_parameters() if backbone(n)}
        assert weights.num_parameters == sum(p.numel() for p in policy.vla.parameters())

    def test_keep_selects_by_name(self):
        policy = make_policy()
        weights = CRaFTWeightManager(policy, lambda name: "queries" in name)
        assert list(weights.state_dict()) == ["vla.action_queries.weight"]

    def test_a_foreign_snapshot_is_refused_by_name(self):
        weights = CRaFTWeightManager(make_policy())
        state = {n: t.clone() for n, t in weights.state_dict().items()}
        with pytest.raises(ValueError, match="missing.*action_head"):
            weights.load_state_dict({k: v for k, v in state.items() if "head" not in k})
        with pytest.raises(ValueError, match="unexpected.*other"):
            weights.load_state_dict(state | {"other": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"vla\.projector\.weight"):
            weights.load_state_dict(state | {"vla.projector.weight": torch.zeros(1)})

    def test_a_manager_is_an_anchor_too(self):
        policy, batch = make_policy(), make_batch()
        weights = CRaFTWeightManager(policy)
        with torch.no_grad():
            expected = read(copy.deepcopy(policy).eval(), batch)
        perturb(policy)
        before = state_of(policy)
        assert torch.equal(anchored(policy, weights, batch), expected)
        assert_state(policy, before)

    def test_ddp_is_unwrapped(self):
        class Wrapper(nn.parallel.DistributedDataParallel):
            def __init__(self, module):
                nn.Module.__init__(self)
                self.module = module

        policy = make_policy()
        assert set(CRaFTWeightManager(Wrapper(policy)).state_dict()) == {n for n, _ in policy.named_parameters()}
        seen = []
        anchor = build_anchor(AnchorKind.FUNCTIONAL, Wrapper(policy))
        extract_anchor_features_online(Wrapper(policy), lambda bare: seen.append(bare), anchor)
        assert seen == [policy]
