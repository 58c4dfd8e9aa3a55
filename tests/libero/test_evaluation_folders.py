"""Where an evaluation writes: folders of any name, and one writer per folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fake_libero_world import FakeBackend, lines_of

from experiments.robot.libero import compare_evals, evaluation, make_report, merge_shards, run_libero_eval
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.video import SaveVideos


def test_an_evaluation_may_lie_in_folders_with_any_name(cfg, odd_folder, capsys):
    pytest.importorskip("imageio_ffmpeg")
    shutil.copytree(cfg.pretrained_checkpoint, odd_folder / "policy")
    places = {name: str(odd_folder / name) for name in ("local_log_dir", "results_dir", "rollout_dir")}
    cfg = replace(cfg, pretrained_checkpoint=str(odd_folder / "policy"), save_videos=SaveVideos.FIRST, **places)
    results = evaluate(cfg, FakeBackend())
    assert results["valid"] and Path(lines_of(cfg)[0]["video"]).is_file()
    assert evaluate(replace(cfg, resume=True), FakeBackend())["episodes_run"] == 0
    merged = odd_folder / "merged"
    assert merge_shards.main([cfg.results_dir, "--output", str(merged)]) == 0
    assert compare_evals.main([cfg.results_dir, str(merged), "--output", str(odd_folder / "a.md")]) == 0
    page = odd_folder / "report.html"
    assert make_report.main([cfg.results_dir, "--output", str(page)]) == 0
    assert page.read_text().count("<video") == 3


@pytest.mark.parametrize("resume", [False, True])
def test_the_second_of_two_runs_into_one_folder_ends_in_one_line(cfg, monkeypatch, capsys, held_elsewhere, resume):
    folder = Path(cfg.results_dir)
    if resume:  # the first has recorded something
        evaluate(replace(cfg, num_trials_per_task=1), FakeBackend())
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    capsys.readouterr()
    backend = FakeBackend()
    monkeypatch.setattr(evaluation, "LiberoBackend", lambda: backend)
    flags = {name: getattr(cfg, name) for name in ("pretrained_checkpoint", "task_suite_name", "results_dir")}
    flags |= {"local_log_dir": cfg.local_log_dir, "num_trials_per_task": "1", "resume": str(resume)}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", ["run_libero_eval.py", *words])
    with held_elsewhere(folder) as other, pytest.raises(SystemExit) as ended:
        run_libero_eval.main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--results_dir {folder}: process {other.pid} on host" in line and "writes to it at this moment" in line
    after = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    del after[folder.with_name(f".{folder.name}.lock")]  # of the killed first one
    assert after == before and not backend.envs
