"""The benchmarks: statistics, floors and pages; short runs."""

from pathlib import Path

import craft_overhead
import pytest
import torch
import train_step
from benchmark_page import put_section
from overhead_config import OverheadConfig
from overhead_flops import floor_flops
from overhead_memory import RandomPrompts, memory_of
from overhead_page import DERIVED, report, summary
from overhead_rows import ROWS
from paired_times import paired_ratio, per_step

from prismatic.command_line import UsageError, parse
from prismatic.craft import Plan

ROOT = Path(__file__).parents[1]
PARTS = {"shared": 5, "forward": 10, "backward": 20, "anchor": 9, "retention": 18, "fused": 21}
MEMORY_PARTS = {"reference": 3, "memory_forward": 4, "memory_backward": 8}


def test_ratio_is_paired_by_round():
    machine = [1.0, 3.0, 1.0, 2.0, 10.0]
    median, low, high = paired_ratio([1.5 * m for m in machine], machine)
    assert (median, low, high) == pytest.approx((1.5, 1.5, 1.5))


def test_interval_encloses_the_median_and_depends_on_the_spread():
    median, low, high = paired_ratio([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert low <= median <= high and low < high


def test_time_of_several_steps_is_averaged():
    assert per_step([[3.0, 1.0], [1.0, 1.0]]) == [2.0, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("plain", 35),
        ("plain_logits", 35),
        ("closed", 44),
        ("priced", 45),
        ("open", 62),
        ("original", 62),
        ("procedure", 62),
        ("open_every4", 35 + 27 / 4),
        ("keep_quarter", 50),
        ("keep_batch", 50),
        ("keep_half_every2", 35 + 15 / 2),
        ("frozen_keep_quarter_every2", 35 + 15 / 2),
    ],
)
def test_floor_counts_what_the_plan_needs(name, expected):
    assert floor_flops(ROWS[name], PARTS | MEMORY_PARTS) == pytest.approx(expected)


def test_rows_are_valid_settings_and_have_a_baseline():
    for row in ROWS.values():
        assert ROWS[row.baseline].method == "plain"
        if row.method == "craft":
            assert row.plan in Plan
            assert row.config.signal.value == ("actions" if row.holds_actions else "features")
        if row.instructions:
            assert row.holds_actions
    assert set(DERIVED) <= set(ROWS)


def test_unknown_rows_are_refused_and_memory_is_that_of_measured_ones():
    with pytest.raises(UsageError, match="--rows is 'fast', expected one of plain, .*"):
        parse(OverheadConfig, ["--rows", "plain,fast"])
    with pytest.raises(UsageError, match="--memory_rows open: expected some of --rows"):
        OverheadConfig(rows=("plain",), memory_rows=("open",))
    assert OverheadConfig(rows=("plain", "open")).memory_names == ["plain", "open"]
    assert OverheadConfig().names == list(ROWS) and OverheadConfig(memory_rows=("none",)).memory_names == []


def test_memory_of_a_row_has_its_share_of_the_batch_under_prompts_of_the_same_length():
    batch = {name: torch.ones(4, 6, dtype=torch.bool) for name in ("attention_mask", "action_mask")}
    batch |= {"input_ids": torch.zeros(4, 6, dtype=torch.int64), "keys": [(0, i) for i in range(4)]}
    prompts = RandomPrompts(batch, vocab_size=50)
    for name, rows in {"keep_quarter": 1, "keep_half_every2": 2, "keep_whole": 4, "keep_batch": 4, "open": 4}.items():
        row = ROWS[name]
        held = memory_of(row, 4, prompts).batch(batch)
        assert held["input_ids"].shape == held["action_mask"].shape == (rows, 6)
        assert ("instructions" in held) == bool(row.instructions)


def test_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="--batch_size 6: row .*a multiple of 4"):
        memory_of(ROWS["keep_quarter"], 6, None)


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_holding_the_actions_executes_no_more_than_its_floor(tuning):
    names = ["keep_quarter_every2", "keep_batch", "frozen_keep_quarter"]
    cfg = OverheadConfig(tuning=tuning, rounds=0, threads=1, lora_rank=4, rows=("plain", *names), memory_rows=("none",))
    result = craft_overhead.run_all(cfg)
    for name in names:
        flops = result["flops"][name]
        assert flops["floor"] <= flops["executed"] <= 1.05 * flops["floor"], name
    parts = result["flops"]["parts"]
    assert parts["all_memory_0"]["memory_forward"] == 0 < parts["all_memory_0.25"]["memory_forward"]
    page = report([result])
    assert "FLOPs only" in page and "--rounds 0" in page
    assert all(f"| {ROWS[name].label} |" in page for name in names)


@pytest.mark.slow
def test_short_run_makes_a_page():
    names = ["plain", "procedure", "open", "frozen_plain", "frozen_raw_closed"]
    cfg = OverheadConfig(
        rounds=1, warmup=0, batch_size=1, threads=1, lora_rank=4, rows=tuple(names), memory_rows=("none",)
    )
    result = craft_overhead.run_all(cfg)
    assert list(result["seconds"]) == names
    flops = result["flops"]
    assert flops["plain"]["executed"] == flops["plain"]["floor"]
    assert flops["open"]["executed"] == flops["open"]["floor"]
    assert flops["procedure"]["executed"] > flops["procedure"]["floor"]
    page = report([result])
    assert all(ROWS[name].label in page for name in names)
    assert "--rows plain,procedure,open,frozen_plain,frozen_raw_closed" in page
    short = summary([result, result | {"seconds": {"plain": [[1.0]]}}], "details.md").splitlines()
    shown = [line for line in short if line.startswith("| ") and "setting" not in line]
    assert [line.split(" | ")[0] for line in shown] == [f"| {ROWS[name].label}" for name in ("procedure", "open")]
    assert all(line.endswith(") |  |") for line in shown)  # the second result has a plain row alone


def test_the_committed_page_has_the_summary_of_the_committed_results():
    results = craft_overhead.read_results(ROOT / "results" / "craft_overhead")
    page = (ROOT / "docs" / "performance.md").read_text()
    assert summary(results, "../results/craft_overhead/report.md") in page
    assert (ROOT / "results" / "craft_overhead" / "report.md").read_text() == report(results)


def test_sections_of_a_page_are_replaced_alone():
    page = put_section("", "first", "one")
    page = put_section(page, "second", "two")
    changed = put_section(page, "first", "new\nlines")
    assert changed == page.replace("one", "new\nlines")
    assert put_section(changed, "first", "one") == page
    with pytest.raises(ValueError, match=r"section first: found \(2, 1\)"):
        put_section(page + "<!-- begin first -->", "first", "x")


def test_time_inside_a_part_belongs_to_the_outer_one(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(train_step.time, "perf_counter", lambda: next(now))
    watch = train_step.Stopwatch()
    with watch.part("outer"), watch.part("inner"):
        pass
    with watch.part("inner"):
        pass
    assert watch.seconds == {"outer": 1, "inner": 1}


def test_share_of_a_part_is_that_of_its_own_step():
    rounds = [{"vision": 1.0, "other": 1.0}, {"vision": 30.0, "other": 10.0}, {"vision": 6.0, "other": 4.0}]
    assert train_step.shares(rounds) == {"vision": 0.6, "other": 0.4}


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_short_run_times_every_part_of_a_step(tuning):
    backward = torch.Tensor.backward
    cfg = train_step.StepTimesConfig(tuning=tuning, rounds=1, warmup=0, batch_size=4, threads=1, lora_rank=4)
    result = train_step.run_all(cfg)
    assert torch.Tensor.backward is backward
    for name, (seconds,) in result["seconds"].items():
        missing = set() if name == "keep_quarter" else {"CRaFT: memory pass"}
        if name == "plain":
            missing = {part for part in train_step.PARTS if part.startswith("CRaFT")}
        assert list(train_step.shares([seconds])) == [part for part in train_step.PARTS if part not in missing]
        assert all(value >= 0 for value in seconds.values())
    section = train_step.report([result])
    assert f"--tuning {tuning} --rounds 1" in section
    assert "| whole step, ratio to plain (95 %) | 1.00 (1.00-1.00) |" in section
