"""Damaged statistics files give a working Normalizer, StatisticsError or KeyError, nothing else."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from mutations import FUZZ, byte_damage, damage_bytes, damage_json, json_damage, quickly

from prismatic.vla.action_spec import ActionSpec, NormalizationType
from prismatic.vla.normalization import Normalizer, StatisticsError, compute_statistics, load_statistics

RNG = np.random.default_rng(0)
STATISTICS = {
    "demo": compute_statistics([RNG.normal(size=(9, 3))], [RNG.normal(size=(9, 2))], [True, True, False]),
}
TEXT = json.dumps(STATISTICS)
SPECS = [ActionSpec(4, 3, 2, kind) for kind in NormalizationType]


def read(path, content: bytes, spec=SPECS[0]):
    path.write_bytes(content)
    with quickly():
        try:
            statistics = load_statistics(path)
            assert all(isinstance(name, str) and isinstance(entry, dict) for name, entry in statistics.items())
            normalizer = Normalizer.from_json(path, "demo", spec)
        except (StatisticsError, KeyError) as error:
            assert str(path) in str(error)
            return error
        assert normalizer.normalize_action(np.zeros((4, 3), np.float32)).shape == (4, 3)
        assert normalizer.unnormalize_action(np.zeros((4, 3))).shape == (4, 3)
        assert normalizer.normalize_proprio(np.zeros(2)).shape == (2,)
        return None


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.normalization.value)
def test_the_undamaged_file_is_read(spec, tmp_path):
    assert read(tmp_path / "statistics.json", TEXT.encode(), spec) is None


@given(byte_damage)
@settings(FUZZ, max_examples=200)
def test_damaged_bytes(tmp_path, operations):
    read(tmp_path / "statistics.json", damage_bytes(TEXT.encode(), operations))


@given(json_damage)
@settings(FUZZ, max_examples=200)
def test_damaged_values(tmp_path, operations):
    read(tmp_path / "statistics.json", damage_json(TEXT, operations).encode())


# Defects the tests above found, each once by name.


@pytest.mark.parametrize("content", [b"\xff{}", b"[" * 100_000, b"[]", b'{"demo": 1}', b'{"demo": {"action": 1}}'])
def test_content_that_is_no_statistics(content, tmp_path):
    assert isinstance(read(tmp_path / "statistics.json", content), StatisticsError)


@pytest.mark.parametrize("value", [None, 3, "abc", {"a": 1}, [1, 2, None], ["1", "2", "3"], [True, 1, 2], [1, 2, [3]]])
@pytest.mark.parametrize("name", ["mean", "q99", "mask"])
def test_a_quantity_that_is_no_list_of_numbers(name, value, tmp_path):
    changed = json.loads(TEXT)
    changed["demo"]["action"][name] = value
    error = read(tmp_path / "statistics.json", json.dumps(changed).encode())
    assert isinstance(error, StatisticsError) and f"action.{name}" in str(error)


def test_a_number_that_is_too_large(tmp_path):
    changed = json.loads(TEXT)
    changed["demo"]["proprio"]["max"][1] = 10**400
    assert isinstance(read(tmp_path / "statistics.json", json.dumps(changed).encode()), StatisticsError)


def test_statistics_that_json_cannot_hold():
    with pytest.raises(StatisticsError, match="JSON"):
        Normalizer({"action": np.zeros(3)}, SPECS[0])
