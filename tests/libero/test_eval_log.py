"""Episode records, the published text log, and the summary."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest

from experiments.robot.libero.eval_log import (
    EpisodeRecord,
    EpisodeStatus,
    EpisodeStore,
    OrderedTextLog,
    PlannedEpisode,
    TaskPlan,
    summarize,
    summarize_run,
)
from prismatic.evidence.statistics import mean_rate_interval, wilson_interval

RECORD = EpisodeRecord(
    run_id="run",
    fingerprint="f",
    checkpoint="c",
    suite="libero_10",
    control="none",
    task_id=0,
    task_name="put_it",
    instruction="put it",
    init_idx=0,
    seed=7,
    status=EpisodeStatus.SUCCESS,
    steps=100,
    n_queries=13,
    wall_s=2.0,
    render_mode="lazy",
    versions={"numpy": "2"},
)
S, F, E = EpisodeStatus.SUCCESS, EpisodeStatus.FAILURE, EpisodeStatus.ERROR

EXPECTED_LOG = """\
Task suite: libero_10
Using default initial states

Task: put it
Starting episode 1...
Saved rollout MP4 at path ./rollouts/a.mp4
Success: True
# episodes completed so far: 1
# successes: 1 (100.0%)

Task: put it
Skipping task 0 episode 1 due to failed expert demo!

Task: put it
Starting episode 2...
Success: False
# episodes completed so far: 2
# successes: 1 (50.0%)
Current task success rate: 0.5
Current total success rate: 0.5
Using default initial states

Task: close it
Starting episode 1...
Episode error: RuntimeError: gone
Success: False
# episodes completed so far: 3
# successes: 1 (33.3%)
Current task success rate: 0.0
Current total success rate: 0.3333333333333333
Final results:
Total episodes: 3
Total successes: 1
Overall success rate: 0.3333 (33.3%)
"""
PLANS = [
    TaskPlan(0, "put_it", "put it", (PlannedEpisode(0, 1), PlannedEpisode(1, None), PlannedEpisode(2, 2))),
    TaskPlan(4, "close_it", "close it", (PlannedEpisode(0, 3),)),
]
RECORDS = [
    replace(RECORD, video="./rollouts/a.mp4"),
    replace(RECORD, init_idx=2, status=F),
    replace(RECORD, task_id=4, status=E, error="RuntimeError: gone"),
]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_text_log_is_the_published_one_in_any_order_of_arrival(order):
    lines: list[str] = []
    log = OrderedTextLog(PLANS, "DEFAULT", lines.append)
    log.begin("libero_10")
    for index in order:
        log.add(RECORDS[index])
    log.finish()
    assert "\n".join(lines) + "\n" == EXPECTED_LOG


def test_text_log_prints_as_early_as_the_order_allows():
    lines: list[str] = []
    log = OrderedTextLog(PLANS, "states.json", lines.append)
    log.begin("libero_10")
    assert lines == ["Task suite: libero_10", "Using initial states from states.json"]
    log.add(RECORDS[1])
    assert "Success: False" not in lines
    log.add(RECORDS[0])
    assert "Current task success rate: 0.5" in lines
    with pytest.raises(RuntimeError, match="task 4"):
        log.finish()


def test_our_log_parser_reads_our_log(tmp_path):
    from craft_experiments.common_utils.log_parser import extract_success_rate_from_log, parse_eval_log

    path = tmp_path / "EVAL.txt"
    path.write_text(EXPECTED_LOG)
    assert extract_success_rate_from_log(path) == pytest.approx(1 / 3, abs=1e-4)
    assert parse_eval_log(path).success_sequence == [1, 0, 0]


def test_texts_of_records_cannot_write_lines_of_the_log(tmp_path):
    from craft_experiments.common_utils.log_parser import parse_eval_log

    forged = "x\nSuccess: True\nOverall success rate: 1.0000 (100.0%)\n"
    plans = [TaskPlan(0, "t", "open it" + forged, (PlannedEpisode(0, 1), PlannedEpisode(1, 2)))]
    lines: list[str] = []
    log = OrderedTextLog(plans, "DEFAULT", lines.append)
    log.begin("libero_10")
    log.add(replace(RECORD, status=E, error=forged))
    log.add(replace(RECORD, init_idx=1, status=F))
    log.finish()
    assert not any("\n" in line for line in lines)
    (tmp_path / "log").write_text("\n".join(lines) + "\n")
    found = parse_eval_log(tmp_path / "log")
    assert (found.success_sequence, found.overall_success_rate, found.num_episode_errors) == ([0, 0], 0.0, 1)


def test_record_survives_json():
    record = replace(RECORD, error="ä", status=E)
    assert EpisodeRecord.from_json(record.to_json(), "x") == record
    assert json.loads(record.to_json())["status"] == "error"


@pytest.mark.parametrize("line", ["{", "[]", '{"run_id": 1}', RECORD.to_json().replace('"success"', '"won"')])
def test_malformed_record_lines_are_errors(line):
    with pytest.raises(ValueError):
        EpisodeRecord.from_json(line, "file:3")


def test_store_appends_and_reloads(tmp_path):
    path = tmp_path / "sub" / "episodes.jsonl"
    store = EpisodeStore(path, "f")
    store.append(RECORD)
    store.append(replace(RECORD, init_idx=1, status=E, error="x"))
    again = EpisodeStore(path, "f")
    assert again.records == store.records and list(again.finished()) == [(0, 0)]
    again.append(replace(RECORD, init_idx=1))  # an error may be superseded ...
    with pytest.raises(ValueError, match="twice"):
        again.append(replace(RECORD, init_idx=1))  # ... a result may not
    assert EpisodeStore(path, "f").finished().keys() == {(0, 0), (0, 1)}
    assert len(path.read_text().splitlines()) == 3


def test_store_refuses_another_runs_folder_and_corrupt_lines(tmp_path):
    path = tmp_path / "episodes.jsonl"
    EpisodeStore(path, "f").append(RECORD)
    with pytest.raises(ValueError, match="fingerprint"):
        EpisodeStore(path, "g")
    path.write_text("rubbish\n" + path.read_text())
    with pytest.raises(ValueError, match="episodes.jsonl:1"):
        EpisodeStore(path, "f")


def test_store_cuts_off_a_torn_last_line_and_says_so(tmp_path):
    path = tmp_path / "episodes.jsonl"
    EpisodeStore(path, "f").append(RECORD)
    with open(path, "a") as file:
        file.write(replace(RECORD, init_idx=1).to_json()[:50])
    store = EpisodeStore(path, "f")
    assert store.dropped and list(store.records) == [(0, 0)]
    store.append(replace(RECORD, init_idx=1))
    assert len(EpisodeStore(path, "f").records) == 2


def test_errors_are_no_trials():
    records = [replace(RECORD, init_idx=i, status=status, steps=10 * i) for i, status in enumerate([S, F, E, S])]
    summary = summarize(records)
    assert (summary["successes"], summary["failures"], summary["errors"], summary["trials"]) == (2, 1, 1, 3)
    assert summary["success_rate"] == pytest.approx(2 / 3)
    assert summary["wilson_95"] == list(wilson_interval(2, 3))
    assert summary["mean_steps"] == pytest.approx((0 + 10 + 30) / 3)
    assert summarize([records[2]])["success_rate"] is None


def test_run_is_valid_only_when_complete_and_without_errors():
    records = {record.key: record for record in RECORDS}
    assert not summarize_run(PLANS, records)["valid"]
    records[4, 0] = replace(RECORD, task_id=4)
    good = summarize_run(PLANS, records)
    assert good["valid"] and good["overall"]["macro_success_rate"] == pytest.approx(0.75)
    assert [task["skipped"] for task in good["per_task"]] == [1, 0]
    del records[0, 2]
    missing = summarize_run(PLANS, records)
    assert not missing["valid"] and missing["missing"] == 1


def test_macro_mean_weighs_tasks_equally_and_has_an_interval():
    records = {(0, i): replace(RECORD, init_idx=i, status=S) for i in range(4)} | {
        (4, 0): replace(RECORD, task_id=4, status=F)
    }
    plans = [
        TaskPlan(0, "put_it", "put it", tuple(PlannedEpisode(i, i + 1) for i in range(4))),
        TaskPlan(4, "close_it", "close it", (PlannedEpisode(0, 5),)),
    ]
    results = summarize_run(plans, records)
    overall = results["overall"]
    assert (overall["success_rate"], overall["macro_success_rate"]) == (0.8, 0.5)
    assert overall["wilson_95"] == list(wilson_interval(4, 5))
    assert overall["macro_95"] == list(mean_rate_interval([(4, 4), (0, 1)]))
    assert results["per_suite"] == {"libero_10": overall}
    json.dumps(results)


def test_a_task_of_errors_only_has_no_rate_and_does_not_count_as_failed():
    records = {record.key: record for record in RECORDS}  # task 4 holds one error
    results = summarize_run(PLANS, records)
    assert results["per_task"][1]["success_rate"] is None and results["per_task"][1]["errors"] == 1
    assert results["overall"]["macro_success_rate"] == 0.5  # task 0 alone
    assert results["per_suite"]["libero_10"]["errors"] == 1 and not results["valid"]
    empty = summarize_run(PLANS, {})
    assert empty["overall"]["macro_95"] is None and empty["per_suite"] == {} and not empty["complete"]


def test_episodes_of_somebody_else_are_refused_before_one_is_run(tmp_path, run_unprivileged):
    path = tmp_path / "episodes.jsonl"
    path.touch(0o444)
    program = "import sys; from experiments.robot.libero.eval_log import EpisodeStore; EpisodeStore(sys.argv[1], 'f')"
    said = f"ValueError: {path}: cannot be written to; use another --results_dir\n"
    assert run_unprivileged(program, str(path)).stderr.endswith(said)
    path.chmod(0o644)
    assert run_unprivileged(program, str(path)).returncode == 0
