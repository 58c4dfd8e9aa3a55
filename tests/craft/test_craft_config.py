"""What the settings of the constraint refuse, and what the presets mean."""

import json
import math
from dataclasses import fields

import pytest
from craft_fixtures import quick
from hypothesis import given
from hypothesis import strategies as st

from prismatic.craft import PRESET_FIELDS, PRESETS, CRaFTConfig, plain_values
from prismatic.craft.duals import DUALS
from prismatic.craft.rules import RULES
from prismatic.craft.settings import (
    AnchorKind,
    AnchorType,
    ConflictMetric,
    DualError,
    FeatureSource,
    Granularity,
    Guard,
    RetentionMetric,
    SignalKind,
    When,
)

CHOICES = {
    "signal": SignalKind,
    "anchor_type": AnchorType,
    "feature_source": FeatureSource,
    "retention_metric": RetentionMetric,
    "dual_error": DualError,
    "projection_granularity": Granularity,
    "projection_when": When,
    "projection_guard": Guard,
    "projection_metric": ConflictMetric,
    "anchor": AnchorKind,
}
NON_NEGATIVE = [
    "w_raw", "w_aq", "retention_weight", "dual_lr", "dual_ki", "dual_kp", "fixed_lambda", "projection_eps",
]  # fmt: skip
POSITIVE = ["retention_budget", "lambda_max", "projection_gamma", "barrier_phi"]


class TestRanges:
    @pytest.mark.parametrize(("field", "kind"), CHOICES.items())
    def test_an_unknown_choice_is_named_with_the_known_ones(self, field, kind):
        with pytest.raises(ValueError, match=field) as error:
            CRaFTConfig(**{field: "no_such_choice"})
        assert "no_such_choice" in str(error.value)
        assert all(member.value in str(error.value) for member in kind)

    @pytest.mark.parametrize(
        ("field", "member"), [(field, member) for field, kind in CHOICES.items() for member in kind]
    )
    def test_choices_are_taken_by_name_and_by_member(self, field, member):
        by_name, by_member = (CRaFTConfig(**{field: value}) for value in (member.value, member))
        assert getattr(by_name, field) is member
        assert by_name == by_member

    @pytest.mark.parametrize(("field", "known"), [("projection_rule", RULES), ("dual", DUALS)])
    def test_rules_and_duals_are_taken_by_their_names_in_the_tables(self, field, known):
        for name in known:
            assert getattr(CRaFTConfig(**{field: name}, projection_granularity="global"), field) == name
        with pytest.raises(ValueError, match=f"{field} is 'none', expected one of {', '.join(known)}$"):
            CRaFTConfig(**{field: "none"})

    def test_every_enum_field_is_covered_here(self):
        assert set(CHOICES) == {f.name for f in fields(CRaFTConfig) if hasattr(f.default, "value")}

    def test_an_unknown_token_mode_is_refused(self):
        with pytest.raises(ValueError, match="cr_token_mode.*vision_plus_prompt"):
            CRaFTConfig(cr_token_mode="prompt_only")

    @pytest.mark.parametrize("field", NON_NEGATIVE + POSITIVE)
    @pytest.mark.parametrize("value", [-1.0, -1e-12, math.nan, -math.inf])
    def test_negative_and_nan_are_refused_by_name(self, field, value):
        with pytest.raises(ValueError, match=field):
            CRaFTConfig(**{field: value})

    @pytest.mark.parametrize("field", POSITIVE)
    def test_zero_is_refused_where_it_divides_or_disables(self, field):
        with pytest.raises(ValueError, match=field):
            CRaFTConfig(**{field: 0.0}, retention_weight=0.0)

    @pytest.mark.parametrize("field", NON_NEGATIVE)
    def test_zero_is_allowed_elsewhere(self, field):
        assert getattr(CRaFTConfig(**{field: 0.0}), field) == 0.0

    @pytest.mark.parametrize("value", [1.0, 1.5, -0.1, math.nan])
    def test_the_averaging_factor_is_below_one(self, value):
        with pytest.raises(ValueError, match="dual_nu"):
            CRaFTConfig(dual_nu=value)

    def test_an_infinite_budget_monitors(self):
        assert CRaFTConfig(retention_budget=math.inf).retention_budget == math.inf


class TestCombinations:
    @pytest.mark.parametrize(
        "settings",
        [
            {"w_raw": 0, "w_aq": 0},
            {"w_aq": 0, "anchor_type": "aq_only"},
            {"w_raw": 0, "anchor_type": "raw_only"},
        ],
    )
    def test_nothing_to_anchor_is_refused(self, settings):
        with pytest.raises(ValueError, match="nothing to anchor"):
            CRaFTConfig(**settings)

    @pytest.mark.parametrize("granularity", [g for g in Granularity if g is not Granularity.GLOBAL])
    def test_the_barrier_needs_one_group(self, granularity):
        with pytest.raises(ValueError, match="barrier.*global"):
            CRaFTConfig(projection_rule="barrier", projection_granularity=granularity)
        # A rule that is switched off is no contradiction.
        CRaFTConfig(projection_rule="barrier", projection_granularity=granularity, enable_projection=False)

    @pytest.mark.parametrize("settings", [{"anchor_layer_idx": 0}, {"cr_token_mode": "vision_plus_prompt"}])
    def test_bridge_features_take_no_layer_and_no_token_mode(self, settings):
        CRaFTConfig(**settings)
        with pytest.raises(ValueError, match="bridge"):
            CRaFTConfig(feature_source="bridge", **settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"retention_weight": 2.0},
            {"retention_weight": 0.0, "enable_dual": False, "fixed_lambda": 2.0},
            {"retention_weight": 0.0, "dual": "off", "fixed_lambda": 2.0},
        ],
    )
    def test_lambda_may_not_start_above_its_maximum(self, settings):
        with pytest.raises(ValueError, match=r"(retention_weight|fixed_lambda) is 2\.0, expected at most lambda_max"):
            CRaFTConfig(lambda_max=1.0, **settings)
        CRaFTConfig(lambda_max=2.0, **settings)

    @given(st.floats(0, 10), st.floats(0, 10), st.sampled_from(AnchorType))
    @quick
    def test_the_anchor_type_sets_the_other_weight_to_zero(self, w_raw, w_aq, kind):
        weights = {AnchorType.CONCAT: (w_raw, w_aq), AnchorType.AQ_ONLY: (0, w_aq), AnchorType.RAW_ONLY: (w_raw, 0)}
        if sum(weights[kind]) > 0:
            assert CRaFTConfig(anchor_type=kind, w_raw=w_raw, w_aq=w_aq).part_weights == weights[kind]

    def test_switches_override_the_choices(self):
        config = CRaFTConfig(enable_projection=False, enable_dual=False, fixed_lambda=0.3, retention_weight=0.7)
        assert (config.rule, config.dual_kind, config.initial_lambda) == ("off", "off", 0.3)
        config = CRaFTConfig(projection_rule="max", dual="pi", fixed_lambda=0.3, retention_weight=0.7)
        assert (config.rule, config.dual_kind, config.initial_lambda) == ("max", "pi", 0.7)
        assert CRaFTConfig(dual="off", fixed_lambda=0.3).initial_lambda == 0.3


class TestPresets:
    def test_the_defaults_are_the_original_preset(self):
        assert CRaFTConfig.from_preset("original") == CRaFTConfig()

    def test_presets_name_the_same_fields_of_the_config(self):
        assert set(PRESETS["budget"]) == set(PRESETS["original"]) == set(PRESET_FIELDS)
        assert set(PRESET_FIELDS) <= {f.name for f in fields(CRaFTConfig)}

    def test_the_presets_are_the_specified_ones(self):
        original, budget = CRaFTConfig.from_preset("original"), CRaFTConfig.from_preset("budget")
        assert (original.retention_weight, original.retention_budget, original.dual_lr) == (1.0, 0.1, 0.01)
        assert (original.rule, original.projection_when, original.projection_guard) == ("add", "always", "additive")
        assert (original.projection_eps, original.retention_metric, original.dual) == (1e-8, "mse", "ascent")
        assert (budget.retention_weight, budget.retention_budget, budget.dual_lr) == (0.0, 0.05, 0.05)
        assert (budget.rule, budget.projection_when, budget.projection_guard) == ("max", "active", "exact")
        assert (budget.dual, budget.dual_error, budget.retention_metric) == ("pi", "relative", "rel_mse")
        assert (budget.dual_ki, budget.dual_kp, budget.dual_nu, budget.projection_gamma) == (1.0, 1.0, 0.9, 1.0)

    @pytest.mark.parametrize("preset", PRESETS)
    def test_overrides_change_their_fields_only(self, preset):
        base = CRaFTConfig.from_preset(preset)
        changed = CRaFTConfig.from_preset(preset, retention_budget=0.25, w_aq=0.0)
        assert (changed.retention_budget, changed.w_aq) == (0.25, 0.0)
        different = {f.name for f in fields(base) if getattr(base, f.name) != getattr(changed, f.name)}
        assert different == {"retention_budget", "w_aq"}

    def test_overrides_are_checked_too(self):
        with pytest.raises(ValueError, match="retention_budget"):
            CRaFTConfig.from_preset("budget", retention_budget=0.0)

    def test_an_unknown_preset_lists_the_known_ones(self):
        with pytest.raises(ValueError, match="'strict'.*original, budget"):
            CRaFTConfig.from_preset("strict")


class TestSerialisation:
    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("budget", [0.5, math.inf])
    def test_to_dict_is_strict_json_and_loses_nothing(self, preset, budget):
        config = CRaFTConfig.from_preset(preset, retention_budget=budget)
        plain = json.loads(json.dumps(config.to_dict(), allow_nan=False))
        # Infinities are texts there, which float() takes back.
        numbers = {name: float(value) if value == "inf" else value for name, value in plain.items()}
        assert CRaFTConfig(**numbers) == config

    def test_plain_values(self):
        values = plain_values({"a": When.ACTIVE, "b": math.inf, "c": -math.inf, "d": None, "e": 0.5, "f": True})
        assert values == {"a": "active", "b": "inf", "c": "-inf", "d": None, "e": 0.5, "f": True}
        assert type(values["a"]) is str
