"""The cut of C_R, C_AQ and the head's input against a loop over masks, one token at a time."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_fixtures import ragged_batch, small_model, vlm_inputs

from prismatic.models.bridge import BridgeLayout, CrTokenMode, gather_tokens, resolve_craft_layer

D = 3
quick = settings(max_examples=100, deadline=None)


@dataclass
class Rows:
    """Right-padded rows; `kinds[b][s]` says what lies at multimodal position s: prompt, patch, query or padding."""

    layout: BridgeLayout
    attention: torch.Tensor
    action: torch.Tensor
    kinds: list[list[str]]

    def states(self, seed=0):
        """(B, S, D), no two values alike."""
        shape = (len(self.kinds), len(self.kinds[0]), D)
        count = shape[0] * shape[1] * D
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).float().reshape(shape)

    def pick(self, state, kind, shift=0):
        """(B, tokens, D): the tokens `shift` positions after those of one kind, in order."""
        return torch.stack(
            [
                torch.stack([state[b, s + shift] for s, k in enumerate(row) if k == kind])
                for b, row in enumerate(self.kinds)
            ]
        )


@st.composite
def rows(draw):
    """Ragged prompts, 1 or 2 images; the slots follow the prompt or are scattered behind text 0."""
    images, patches, queries = draw(st.integers(1, 2)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    prompts = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    length = max(prompts) + queries + draw(st.integers(0, 3))
    attention = torch.zeros(len(prompts), length, dtype=torch.bool)
    action, kinds = attention.clone(), []
    for b, prompt in enumerate(prompts):
        used, scattered = prompt + queries, draw(st.booleans())
        columns = draw(st.permutations(range(1, used)))[:queries] if scattered else range(prompt, used)
        text = ["prompt"] * used + ["padding"] * (length - used)
        for column in columns:
            text[column] = "query"
            action[b, column] = True
        attention[b, :used] = True
        kinds.append(text[:1] + ["patch"] * (images * patches) + text[1:])
    return Rows(BridgeLayout(images * patches, queries), attention, action, kinds)


@given(rows())
@quick
def test_positions_and_masks_are_those_of_the_loop(r):
    positions = [[s for s, kind in enumerate(row) if kind == "query"] for row in r.kinds]
    assert r.layout.query_positions(r.action).tolist() == positions
    for text_mask, kinds in ((r.action, {"query"}), (r.attention, {"query", "prompt"})):
        for value in (True, False):
            wanted = [[kind in kinds or (value and kind == "patch") for kind in row] for row in r.kinds]
            mask = r.layout.multimodal_mask(text_mask, value)
            assert mask.dtype == torch.bool
            assert mask.tolist() == wanted


@given(rows())
@quick
def test_sequence_is_built_like_the_loop(r):
    """Text, queries and patches land where the kinds say, each in its own order."""
    b, length = r.action.shape
    text = torch.arange(b * length * D).float().reshape(b, length, D)
    patches = -1 - torch.arange(b * r.layout.num_vision_tokens * D).float().reshape(b, -1, D)
    queries = 0.5 + torch.arange(r.layout.num_action_queries * D).float().reshape(-1, D)
    joint = r.layout.insert_patches(r.layout.fill_query_slots(text, queries, r.action), patches)
    for row, kinds in enumerate(r.kinds):
        columns, seen, patch = iter(range(length)), iter(queries), iter(patches[row])
        for s, kind in enumerate(kinds):
            if kind == "patch":
                assert torch.equal(joint[row, s], next(patch))
                continue
            column = next(columns)
            assert torch.equal(joint[row, s], next(seen) if kind == "query" else text[row, column])


@given(rows(), st.sampled_from([torch.bool, torch.int64]))
@quick
def test_raw_latent_is_the_patches_or_the_masked_state(r, dtype):
    state, attention = r.states(), r.attention.to(dtype)
    raw, mask = r.layout.raw_latent(state, attention, r.action, CrTokenMode.VISION_ONLY)
    assert mask is None
    assert torch.equal(raw, r.pick(state, "patch"))
    raw, mask = r.layout.raw_latent(state, attention, r.action, CrTokenMode.VISION_PLUS_PROMPT)
    assert raw is state
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[kind in ("patch", "prompt") for kind in row] for row in r.kinds]


@given(rows())
@quick
def test_no_attention_mask_means_no_padding(r):
    state, full = r.states(), torch.ones_like(r.attention)
    for mode in CrTokenMode:
        without, with_ones = (r.layout.raw_latent(state, mask, r.action, mode) for mask in (None, full))
        assert torch.equal(without[0], with_ones[0])
        assert without[1] is with_ones[1] is None or torch.equal(without[1], with_ones[1])


@given(rows(), st.integers(1, 3), st.sampled_from([torch.bool, torch.int64]))
@quick
def test_bridge_states_are_patches_and_queries_of_every_layer(r, layers, dtype):
    states = [r.states(seed) for seed in range(layers + 1)]
    for legacy in (False, True):
        task, action = r.layout.bridge_states(states, r.action.to(dtype), legacy_slices=legacy)
        assert task.shape == (len(r.kinds), layers + 1, r.layout.num_vision_tokens, D)
        assert action.shape == (len(r.kinds), layers + 1, r.layout.num_action_queries, D)
        for layer, state in enumerate(states):
            assert torch.equal(task[:, layer], r.pick(state, "patch", -legacy))
            assert torch.equal(action[:, layer], r.pick(state, "query", -legacy))
    assert torch.equal(r.layout.action_query_latent(states[-1], r.action), r.pick(states[-1], "query"))


@given(rows())
@quick
def test_gradients_reach_the_cut_tokens_and_no_other(r):
    state = r.states().requires_grad_()
    r.layout.action_query_latent(state, r.action).sum().backward()
    expected = torch.tensor([[float(kind == "query") for kind in row] for row in r.kinds])
    assert torch.equal(state.grad, expected.unsqueeze(-1).expand_as(state))


@given(rows(), st.data())
@quick
def test_a_wrong_number_of_slots_is_named(r, data):
    r.layout.require_query_slots(r.action)
    row = data.draw(st.integers(0, len(r.kinds) - 1))
    column = data.draw(st.integers(0, r.action.shape[1] - 1))
    r.action[row, column] ^= True
    counts = [sum(row) for row in r.action.tolist()]
    with pytest.raises(ValueError) as error:
        r.layout.require_query_slots(r.action)
    assert f"expected {r.layout.num_action_queries} slots per row, found {counts}" in str(error.value)


def test_gather_takes_each_row_at_its_own_positions():
    states = torch.arange(2 * 4).reshape(2, 4, 1)
    assert gather_tokens(states, torch.tensor([[3, 0], [1, 1]])).squeeze(-1).tolist() == [[3, 0], [5, 5]]


@given(st.integers(1, 40), st.integers(-50, 50))
@quick
def test_layer_index_counts_like_a_list(count, index):
    layers = list(range(count))
    assert resolve_craft_layer(None, count) == layers[len(layers) // 2]
    try:
        expected = layers[index]
    except IndexError:
        with pytest.raises(ValueError, match=f"craft_layer_idx: expected {-count}..{count - 1} .*got {index}$"):
            resolve_craft_layer(index, count)
    else:
        assert resolve_craft_layer(index, count) == expected


# ------------------------------------------------------------------------------------------------ in the model


@pytest.fixture(scope="module", params=[1, 2])
def model(request):
    return small_model(num_images_in_input=request.param)


@pytest.mark.parametrize("mode", list(CrTokenMode))
@pytest.mark.parametrize("layer", [None, 0, -1])
def test_forward_returns_the_cut_of_its_own_hidden_states(model, layer, mode):
    batch, layout = ragged_batch(model), model.bridge_layout
    assert layout.num_vision_tokens == 4 * model.vision_backbone.num_images_in_input
    with torch.no_grad():
        output = model(
            **vlm_inputs(batch),
            output_hidden_states=True,
            output_craft_features=True,
            craft_layer_idx=layer,
            craft_cr_token_mode=mode.value,
        )
    state = output.hidden_states[{None: 1, 0: 0, -1: 2}[layer]]
    raw, mask = layout.raw_latent(state, batch["attention_mask"], batch["action_mask"], mode)
    assert torch.equal(output.raw_latent_features, raw)
    assert (mask is None and output.raw_latent_mask is None) or torch.equal(output.raw_latent_mask, mask)
    queries = layout.action_query_latent(output.hidden_states[-1], batch["action_mask"])
    assert torch.equal(output.action_query_features, queries)
    # The head's input without the published shift holds the same tokens.
    task, action = model.bridge_states(output.hidden_states, batch["action_mask"])
    assert torch.equal(action[:, -1], queries)
    if mode is CrTokenMode.VISION_ONLY:
        assert torch.equal(task[:, {None: 1}.get(layer, layer)], raw)


def test_old_places_still_have_the_names():
    from prismatic.extern.hf import modeling_prismatic
    from prismatic.models import vla_policy

    for place in (modeling_prismatic, vla_policy):
        assert place.CrTokenMode is CrTokenMode
    assert modeling_prismatic.resolve_craft_layer is resolve_craft_layer
    for name in (
        "ACTION_TOKEN_BEGIN_IDX",
        "IGNORE_INDEX",
        "PrismaticProjector",
        "PrismaticVisionBackbone",
        "action_mask_from_labels",
        "first_layers",
        "hide_right_padding",
        "plain_causal_mask",
    ):
        assert hasattr(modeling_prismatic, name)


def test_the_module_needs_torch_alone():
    program = (
        "import sys, prismatic.models.bridge\n"
        "ours = {m for m in sys.modules if m.split('.')[0] == 'prismatic'}\n"
        "assert ours == {'prismatic', 'prismatic.models', 'prismatic.models.bridge'}, ours\n"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
