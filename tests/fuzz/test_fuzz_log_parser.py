"""Damaged evaluation logs and result lists give figures of the declared types or LogFormatError, quickly."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import FUZZ, byte_damage, damage_bytes, quickly

from craft_experiments.common_utils.log_parser import (
    FailureCode,
    LogFormatError,
    extract_success_rate_from_log,
    parse_all_results,
    parse_eval_log,
)

DATA = Path(__file__).parents[1] / "experiments" / "data"
LOGS = {path.name: path.read_bytes() for path in sorted(DATA.iterdir())}
RESULTS = b"# results\nlibero_spatial: 0.8500\nlibero_goal: EVAL_FAILED\n\nlibero_10: 1.0\n"
PIECES = ("Task: ", "Task suite: ", "Success: True\n", "Success: False\n", "Current task success rate: 0.5\n")
PIECES += ("Total episodes: ", "Total successes: ", "Overall success rate: ", "10", "1e999", "9" * 5000, "0.5", "\n")
PIECES += (
    "Episode error: ",
    "Caught exception: ",
    "--success=True--task=x",
    "\x1b[0m",
    "\x1b[",
    "a.py:1",
    "INFO ",
    "٣",
)


def parse(path, content: bytes):
    path.write_bytes(content)
    with quickly():
        try:
            log = parse_eval_log(path)
            rate = extract_success_rate_from_log(path)
        except LogFormatError as error:
            assert str(path) in str(error)
            return error
    assert rate == (log.overall_success_rate if log.complete else None)
    assert log.overall_success_rate is None or 0 <= log.overall_success_rate <= 1
    assert isinstance(log.total_episodes, int) and isinstance(log.total_successes, int)
    assert set(log.success_sequence) <= {0, 1}
    for task in log.tasks:
        assert task.success_rate is None or 0 <= task.success_rate <= 1
    log.to_dict()
    return None


@pytest.mark.parametrize("name", LOGS)
def test_the_undamaged_logs_are_read(name, tmp_path):
    assert parse(tmp_path / "log", LOGS[name]) is None


@pytest.mark.slow
@given(st.sampled_from(sorted(LOGS)), byte_damage)
@settings(FUZZ, max_examples=150)
def test_damaged_logs(tmp_path, name, operations):
    parse(tmp_path / "log", damage_bytes(LOGS[name], operations))


@pytest.mark.slow
@given(st.lists(st.sampled_from(PIECES), max_size=12), st.booleans())
@settings(FUZZ, max_examples=300)
def test_logs_of_random_messages(tmp_path, pieces, wide):
    parse(tmp_path / "log", "".join(pieces).encode("utf-16" if wide else "utf-8"))


@given(byte_damage)
@settings(FUZZ, max_examples=200)
def test_damaged_result_lists(tmp_path, operations):
    path = tmp_path / "results"
    path.write_bytes(damage_bytes(RESULTS, operations))
    with quickly():
        try:
            results = parse_all_results(path)
        except LogFormatError as error:
            assert str(path) in str(error)
            return
    for value in results.values():
        assert isinstance(value, FailureCode) or 0 <= value <= 1


@pytest.mark.parametrize(
    "piece", ["x", "\x1b[", "\x1b[0", "Task: ", "Task: x ", ".py:", "a.py:1", "[", "Success: ", "1."]
)
def test_repetitions_take_linear_time(piece, tmp_path):
    content = (piece * (1_000_000 // len(piece))).encode()
    parse(tmp_path / "log", content)
    parse(tmp_path / "log", b"Overall success rate: " + content)


# Defects the tests above found, each once by name.


def test_a_number_with_thousands_of_digits(tmp_path):
    text = f"Success: True\nTotal episodes: {'9' * 5000}\nTotal successes: 1\nOverall success rate: 1.0\n"
    assert "Total episodes" in str(parse(tmp_path / "log", text.encode()))


@pytest.mark.parametrize("rate", ["1e999", "7", "1.5", "85.0"])
def test_a_rate_that_is_none(rate, tmp_path):
    assert "Overall success rate" in str(parse(tmp_path / "log", f"Overall success rate: {rate}".encode()))
    text = f"Current task success rate: {rate}".encode()
    assert "Current task success rate" in str(parse(tmp_path / "log", text))


def test_a_result_list_that_is_not_text(tmp_path):
    (tmp_path / "results").write_bytes(b"libero_goal: 0.5\n\xff\n")
    with pytest.raises(LogFormatError, match="results.*UTF-8"):
        parse_all_results(tmp_path / "results")
