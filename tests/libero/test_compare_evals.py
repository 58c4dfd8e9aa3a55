"""Reading recorded runs, pairing, verdicts, protocol checks, command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.robot.libero.compare_evals import (
    NotComparableError,
    compare_runs,
    format_ranges,
    format_text,
    main,
    to_json,
    verdict,
)
from prismatic.evidence.episodes import EpisodeId, RecordedRun, RecordsError, protocol, read_run

ROOT = Path(__file__).parents[2]
VERSIONS = {"mujoco": "3.3.0", "torch": "2.6"}
CONFIG = {"num_open_loop_steps": 8, "num_workers": 1, "reset_mode": "hard"}


def row(task_id: int, init_idx: int, status: str, **more) -> dict:
    fields = {"suite": "libero_goal", "task_id": task_id, "init_idx": init_idx, "seed": 7, "status": status}
    return fields | {"control": "none", "render_mode": "lazy", "versions": VERSIONS, "instruction": "go"} | more


def run_of(*rows: dict, config: dict | None = None) -> RecordedRun:
    keys = [EpisodeId(r["suite"], r.get("perturbation") or "", r["task_id"], r["init_idx"], r["seed"]) for r in rows]
    facts = ({"config": CONFIG | (config or {}), "missing": 0},)
    return RecordedRun("run", (), dict(zip(keys, rows, strict=True)), facts, ())


def outcomes(*tasks: str, **more) -> RecordedRun:
    """One string per task, a letter per initial state: s, f, e."""
    names = {"s": "success", "f": "failure", "e": "error"}
    rows = [row(task, i, names[letter], **more) for task, text in enumerate(tasks) for i, letter in enumerate(text)]
    return run_of(*rows)


def write(folder: Path, rows: list[dict], tail: str = "", facts: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "episodes.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + tail)
    if facts is not None:
        (folder / "results.json").write_text(json.dumps(facts))
    return folder


def test_counts_difference_and_p_by_hand():
    # Task 0: both, only A, only B, neither. Task 1: 8 pairs only B.
    result = compare_runs(outcomes("ssff", "f" * 8), outcomes("sfsf", "s" * 8))
    total = result.total
    assert (total.both, total.only_a, total.only_b, total.neither) == (1, 1, 9, 1)
    assert result.difference == pytest.approx(8 / 12) and result.discordance == pytest.approx(10 / 12)
    assert result.p_value == pytest.approx(22 / 1024)  # 2 (C(10,0) + C(10,1)) / 2^10
    assert result.per_task["libero_goal", "", 1].only_b == 8
    assert verdict(result).startswith("B succeeds more often, by 66.7 points: more than noise")
    assert "single tasks: libero_goal task 1 (+100 points)" in verdict(result)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text("sfe", min_size=1, max_size=9), st.text("sfe", min_size=1, max_size=9)), min_size=1))
def test_exchange_of_the_runs_mirrors_everything_and_a_run_equals_itself(tasks):
    a, b = outcomes(*(pair[0] for pair in tasks)), outcomes(*(pair[1] for pair in tasks))
    for run in (a, b):
        if run.count("error") < len(run.episodes):
            same = compare_runs(run, run, repetitions=50)
            assert same.p_value == 1.0 and same.difference == 0.0 and same.stratified_95 == (0.0, 0.0)
            assert "no difference" in verdict(same) and not same.distinguishable
    try:
        there, back = compare_runs(a, b, repetitions=50), compare_runs(b, a, repetitions=50)
    except NotComparableError:
        return
    assert there.p_value == back.p_value and there.difference == -back.difference
    assert there.pairs_needed() == back.pairs_needed()
    low, high = there.stratified_95
    assert back.stratified_95 == pytest.approx((-high, -low), abs=1e-12)
    assert there.total.pairs + len(there.unpaired) == len(a.episodes.keys() | b.episodes.keys())
    json.dumps(to_json(there))


def test_errors_are_excluded_and_counted():
    result = compare_runs(outcomes("sse"), outcomes("sfs"))
    assert result.total.pairs == 2
    assert [(item.episode.init_idx, item.reason) for item in result.unpaired] == [(2, "error in A")]
    text = format_text(result)
    assert "1 error(s): NOT VALID" in text and "initial states 2: error in A" in text


def test_few_discordant_pairs_and_opposite_tasks_are_said():
    assert "With fewer than 6 discordant pairs (here 5)" in verdict(compare_runs(outcomes("s" * 5), outcomes("f" * 5)))
    opposite = verdict(compare_runs(outcomes("s" * 12, "f" * 12), outcomes("f" * 12, "s" * 12)))
    assert "cannot be told from noise" in opposite
    assert "libero_goal task 0 (-100 points), libero_goal task 1 (+100 points)" in opposite


def test_the_tasks_can_disagree():
    a, b = outcomes("f" * 10, "s" * 2, "s" * 2), outcomes("s" * 10, "f" * 2, "s" * 2)
    result = compare_runs(a, b)
    assert result.distinguishable and "The tasks disagree" in verdict(result)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"render_mode": "published"}, "render_mode"),
        ({"versions": VERSIONS | {"mujoco": "3.9.0"}}, "versions.mujoco"),
        ({"instruction": "stop"}, "instruction"),
    ],
)
def test_decisive_differences_of_the_records_are_refused_by_name(change, field):
    a, b = outcomes("sf"), outcomes("sf", **change)
    with pytest.raises(NotComparableError, match=field):
        compare_runs(a, b)
    for allowed in (field, "all"):
        result = compare_runs(a, b, allow=[allowed])
        assert f"**decisive**, {field}" in format_text(result)
    with pytest.raises(NotComparableError):
        compare_runs(a, b, allow=["num_steps_wait"])


@pytest.mark.parametrize("field", ["num_open_loop_steps", "num_steps_wait", "init_noise_mm", "initial_states_path"])
def test_decisive_differences_of_the_flags_are_refused_by_name(field):
    rows = [row(0, 0, "success")]
    with pytest.raises(NotComparableError, match=f"{field}: A 1, B 2"):
        compare_runs(run_of(*rows, config={field: 1}), run_of(*rows, config={field: 2}))
    unknown = compare_runs(run_of(*rows), run_of(*rows, config={field: 3, "num_open_loop_steps": 8}))
    if field != "num_open_loop_steps":
        assert f"{field}: A not recorded, B 3" in format_text(unknown)


def test_other_differences_are_warnings_and_the_split_of_work_is_none():
    rows = [row(0, 0, "success")]
    other = [row(0, 0, "success", versions=VERSIONS | {"torch": "2.13"})]
    result = compare_runs(run_of(*rows), run_of(*other, config={"reset_mode": "soft", "num_workers": 4}))
    assert [difference.field for difference in result.protocol] == ["reset_mode", "versions.torch"]
    assert "num_workers" not in protocol(result.a)
    assert "Warning, the runs differ in more than the policy" in format_text(result)


def test_perturbation_and_seed_are_part_of_the_pair():
    a = run_of(row(0, 0, "success"), row(0, 0, "failure", perturbation="swap"))
    b = run_of(row(0, 0, "success", perturbation="swap"))
    assert compare_runs(a, b).total.pairs == 1
    with pytest.raises(NotComparableError, match="seed: A 7, B 8"):
        compare_runs(run_of(row(0, 0, "success")), run_of(row(0, 0, "success", seed=8)))


def test_reading_keeps_the_last_attempt_drops_a_torn_line_and_ignores_unknown_fields(tmp_path):
    rows = [row(0, 0, "error"), row(0, 1, "failure", later_field=[1]), row(0, 0, "success")]
    folder = write(tmp_path / "a", rows, tail='{"suite": "libe', facts={"missing": 3})
    run = read_run(folder)
    assert run.count("success") == run.count("failure") == 1 and run.count("error") == 0
    assert run.missing == 3 and "not finished" in run.notes[0]
    assert read_run(folder / "episodes.jsonl").episodes == run.episodes
    # A record of an earlier version has no perturbation; the suite's name says it.
    swaps = [row(1, 0, "success", suite="libero_goal_swap"), row(1, 1, "success", suite="libero_goal_swap")]
    swaps[1]["perturbation"] = "swap"
    second = write(tmp_path / "b", swaps[:1])
    assert {key.perturbation for key in read_run(write(tmp_path / "c", swaps)).episodes} == {""}
    assert len(read_run(f"{folder}, {second}").episodes) == 3
    both = write(tmp_path / "a, b", rows)  # a folder itself: not two of them
    assert read_run(str(both)).episodes == run.episodes


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0, 0, "success"), row(0, 0, "failure")], "line 2: .* is recorded twice"),
        ([row(0, 0, "won")], "line 1: status: found 'won'"),
        ([{"suite": "x"}], r"line 1: missing fields \['task_id'"),
        ([row("0", 0, "success")], "line 1: task_id: found '0'"),
        ([[1]], "line 1: expected an object, found list"),
        ([], "found no episode"),
    ],
)
def test_unusable_records_name_file_and_line(tmp_path, rows, message):
    with pytest.raises(RecordsError, match=message):
        read_run(write(tmp_path / "a", rows))


def test_a_broken_line_in_the_middle_and_a_missing_file_are_errors(tmp_path):
    folder = write(tmp_path / "a", [], tail="{rubbish\n" + json.dumps(row(0, 0, "success")) + "\n")
    with pytest.raises(RecordsError, match=r"episodes.jsonl: line 1"):
        read_run(folder)
    with pytest.raises(FileNotFoundError, match="folders below hold some"):
        read_run(tmp_path)
    write(tmp_path / "b", [row(0, 0, "success")])
    (tmp_path / "b" / "results.json").write_text("{")
    with pytest.raises(RecordsError, match=r"results.json: expected JSON"):
        read_run(tmp_path / "b")


def test_ranges():
    assert format_ranges([3, 1, 0, 7, 2, 7]) == "0-3, 7" and format_ranges([]) == ""


def test_command_line_on_recorded_runs(tmp_path, capsys):
    evaluations = ROOT / "results" / "demo" / "evaluations"
    a, b, playback = (str(evaluations / name) for name in ("plain-target", "keep-target", "playback-target"))
    published = tmp_path / "published"
    shutil.copytree(playback, published)
    episodes = published / "episodes.jsonl"
    episodes.write_text(episodes.read_text().replace('"render_mode": "lazy"', '"render_mode": "published"'))
    assert main([a, b, "--output", str(tmp_path / "c.json")]) == 0
    data = json.loads((tmp_path / "c.json").read_text())
    assert (data["pairs"], data["only_a"], data["only_b"], data["distinguishable"]) == (10, 3, 2, False)
    assert data["pairs_for_2_points"] == 9809 and data["unpaired"] == []
    shown = capsys.readouterr().out
    assert main([a, b, "--output", str(tmp_path / "c.md")]) == 0
    assert (tmp_path / "c.md").read_text() == shown
    capsys.readouterr()
    assert main([a, str(published)]) == 2 and "render_mode: A lazy, B published" in capsys.readouterr().err
    assert main([a, str(published), "--allow", "render_mode"]) == 0
    assert main([a, "nowhere"]) == 2
    assert main([a, b, "--allow", "renderer"]) == 2 and "allow: found renderer" in capsys.readouterr().err


def test_documented_example_is_the_commands_output(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    folder = "results/demo/evaluations"
    assert main([f"{folder}/plain-memory", f"{folder}/keep-memory"]) == 0
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert page.split("<!-- output of the command above -->\n```\n")[1].startswith(capsys.readouterr().out + "```")
