"""Shards of an evaluation, and joining them, in the toy world."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from fake_libero_world import FakeBackend, RaiseAt, comparable, lines_of, text_log

from experiments.robot.libero.eval_plan import plan_tasks, shard_plans
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.merge_shards import MergeError, main, merge


def run_shards(cfg, tmp_path, parts: int, backend: FakeBackend) -> list[Path]:
    folders = []
    for part in range(1, parts + 1):
        folders.append(tmp_path / f"shard_{part}")
        shard = replace(cfg, shard=f"{part}/{parts}", results_dir=str(folders[-1]), run_id_note=f"s{part}")
        evaluate(replace(shard, local_log_dir=str(tmp_path / "shard_logs")), backend)
    return folders


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 20])
def test_every_episode_belongs_to_one_shard(cfg, parts):
    whole = plan_tasks(cfg, FakeBackend())
    numbers = [[e.number for plan in shard_plans(whole, k, parts) for e in plan.episodes] for k in range(1, parts + 1)]
    assert sorted(number for shard in numbers for number in shard) == list(range(1, 10))
    assert max(map(len, numbers)) - min(map(len, numbers)) <= 1


@pytest.mark.parametrize("parts", [2, 3])
def test_merged_shards_are_the_whole_run(cfg, tmp_path, parts):
    backend = FakeBackend(limit=21)
    results = evaluate(cfg, backend)
    folders = run_shards(cfg, tmp_path, parts, backend)
    merged = replace(cfg, results_dir=str(tmp_path / "merged"))
    joined = merge(folders[::-1], Path(merged.results_dir))
    assert comparable(merged) == comparable(cfg)
    for part in ("valid", "complete", "missing"):
        assert joined[part] == results[part]
    counts = ("successes", "failures", "errors", "trials", "wilson_95", "macro_success_rate")
    assert {name: joined["overall"][name] for name in counts} == {name: results["overall"][name] for name in counts}
    (log,) = (tmp_path / "merged").glob("EVAL-*.txt")
    assert log.read_text() == text_log(cfg)


def test_overlapping_folders_count_an_episode_once_and_a_finished_one_first(cfg, tmp_path):
    evaluate(cfg, FakeBackend(mishap=RaiseAt([-0.05])))  # three errors
    folders = [Path(cfg.results_dir), *run_shards(cfg, tmp_path, 2, FakeBackend())]
    joined = merge(folders, tmp_path / "merged")
    assert joined["valid"] and joined["overall"]["trials"] == 9 and joined["conflicts"] == 0
    assert len((tmp_path / "merged" / "episodes.jsonl").read_text().splitlines()) == 9


def test_a_missing_shard_a_cut_line_and_a_conflict_are_reported(cfg, tmp_path, capsys):
    first, second = run_shards(cfg, tmp_path, 2, FakeBackend())
    assert main([str(first), "--output", str(tmp_path / "a")]) == 1
    assert "4 missing" in capsys.readouterr().out
    lines = (second / "episodes.jsonl").read_text()
    (second / "episodes.jsonl").write_text(lines[:-10])
    assert main([str(first), str(second), "--output", str(tmp_path / "b")]) == 1
    assert "1 missing" in capsys.readouterr().out
    record = json.loads(lines.splitlines()[0])
    (second / "episodes.jsonl").write_text(lines + json.dumps(record | {"steps": 7}) + "\n")
    assert main([str(first), str(second), "--output", str(tmp_path / "c")]) == 1
    assert "1 conflicts" in capsys.readouterr().out


def test_folders_of_other_runs_are_refused(cfg, tmp_path, capsys):
    first, second = run_shards(cfg, tmp_path, 2, FakeBackend())
    other = replace(cfg, seed=8, shard="2/2", results_dir=str(tmp_path / "other"), run_id_note="o")
    evaluate(other, FakeBackend())
    with pytest.raises(MergeError, match="other: fingerprint"):
        merge([first, tmp_path / "other"], tmp_path / "m")
    longer = replace(cfg, num_trials_per_task=4, results_dir=str(tmp_path / "longer"), run_id_note="l")
    evaluate(longer, FakeBackend())
    with pytest.raises(MergeError, match="plan.json"):
        merge([first, tmp_path / "longer"], tmp_path / "m")
    with pytest.raises(MergeError, match="nowhere"):
        merge([first, tmp_path / "nowhere"], tmp_path / "m")
    assert main([str(first), str(second), "--output", str(first)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert len(lines_of(replace(cfg, results_dir=str(first)))) == 5
