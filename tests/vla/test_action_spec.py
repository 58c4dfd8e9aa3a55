import json

import pytest

from prismatic.vla.action_spec import ACTION_SPECS, ActionSpec, NormalizationType, get_action_spec


@pytest.mark.parametrize("platform", sorted(ACTION_SPECS))
def test_dict_round_trip_through_json(platform):
    spec = get_action_spec(platform)
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_published_platform_numbers():
    bounds, q99 = NormalizationType.BOUNDS, NormalizationType.BOUNDS_Q99
    assert {
        "libero": ActionSpec(8, 7, 8, q99),
        "calvin": ActionSpec(8, 7, 8, q99),
        "aloha": ActionSpec(25, 14, 14, bounds),
        "bridge": ActionSpec(5, 7, 7, q99),
    } == ACTION_SPECS


def test_unknown_platform_lists_known_ones():
    with pytest.raises(KeyError, match="'mars'.*libero"):
        get_action_spec("mars")


@pytest.mark.parametrize(("field", "value"), [("chunk_len", 0), ("action_dim", 2.5), ("proprio_dim", True)])
def test_bad_sizes(field, value):
    with pytest.raises(ValueError, match=field):
        ActionSpec(**{field: value})


def test_unknown_normalization_and_fields():
    with pytest.raises(ValueError, match="'q95'.*bounds_q99"):
        ActionSpec(normalization="q95")
    with pytest.raises(ValueError, match="extra"):
        ActionSpec.from_dict({**ActionSpec().to_dict(), "extra": 1})
