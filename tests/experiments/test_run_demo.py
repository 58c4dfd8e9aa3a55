"""The demo's job runner: order, skipping, failure; and the flags it passes are flags that exist."""

import importlib.util
import json
import sys
from pathlib import Path

import draccus
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "craft_experiments" / "00_demo" / "run_demo.py"
spec = importlib.util.spec_from_file_location("run_demo", SCRIPT)
run_demo = importlib.util.module_from_spec(spec)
sys.modules["run_demo"] = run_demo
spec.loader.exec_module(run_demo)


def touch_job(folder: Path, name: str, after=(), code: str = "") -> "run_demo.Job":
    result = folder / f"{name}.done"
    program = f"{code}; open({str(result)!r}, 'w').close(); open({str(folder / 'order')!r}, 'a').write({name!r} + ' ')"
    return run_demo.Job(name, [sys.executable, "-c", program.lstrip("; ")], result, list(after))


def order(folder: Path) -> list[str]:
    return (folder / "order").read_text().split()


def test_jobs_wait_for_their_predecessors_and_finished_ones_are_skipped(tmp_path):
    jobs = [touch_job(tmp_path, "c", ["b"]), touch_job(tmp_path, "b", ["a"]), touch_job(tmp_path, "a")]
    run_demo.run_jobs(jobs, tmp_path / "logs", slots=2)
    assert order(tmp_path) == ["a", "b", "c"]
    assert {path.stem for path in (tmp_path / "logs").glob("*.seconds")} == {"a", "b", "c"}
    run_demo.run_jobs(jobs, tmp_path / "logs", slots=2)
    assert order(tmp_path) == ["a", "b", "c"]


def test_a_failed_job_stops_the_demo_and_shows_its_log(tmp_path, capsys):
    bad = touch_job(tmp_path, "bad", code="raise SystemExit('no such data set')")
    with pytest.raises(SystemExit):
        run_demo.run_jobs([bad, touch_job(tmp_path, "next", ["bad"])], tmp_path / "logs", slots=1)
    assert "no such data set" in capsys.readouterr().err
    assert not (tmp_path / "order").exists()


def test_a_job_without_its_result_file_has_failed(tmp_path, capsys):
    job = run_demo.Job("quiet", [sys.executable, "-c", "pass"], tmp_path / "never")
    with pytest.raises(SystemExit):
        run_demo.run_jobs([job], tmp_path / "logs", slots=1)
    assert "quiet" in capsys.readouterr().err


def test_every_planned_command_parses(monkeypatch):
    from experiments.robot.libero.eval_config import EvalConfig
    from prismatic.training.config import FinetuneConfig

    monkeypatch.chdir(SCRIPT.parents[2])
    jobs = run_demo.plan(run_demo.DemoConfig())
    names = {job.name for job in jobs}
    assert {"train-plain", "train-craft", "eval-start-retention", "eval-craft-target", "eval-replay-target"} <= names
    for job in jobs:
        config = FinetuneConfig if job.name.startswith("train") else EvalConfig
        monkeypatch.setattr(sys, "argv", job.command[1:])
        parsed = draccus.parse(config)
        if config is EvalConfig:
            parsed.validate()
        assert set(job.after) <= names


@pytest.mark.parametrize(("complete", "valid"), [(False, True), (True, False), (True, True)])
def test_an_unfinished_or_invalid_evaluation_is_not_done(tmp_path, complete, valid):
    result = tmp_path / "results.json"
    job = run_demo.Job("eval", [], result)
    assert not job.is_done()
    result.write_text(json.dumps({"complete": complete, "valid": valid}))
    assert job.is_done() == (complete and valid)


def test_no_result_of_an_earlier_demo_is_reused_or_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(SCRIPT.parents[2])
    cfg = run_demo.DemoConfig(work_dir=str(tmp_path / "work"), results_dir=str(tmp_path / "results"))
    jobs = run_demo.plan(cfg)
    assert all(job.result.is_relative_to(tmp_path / "work") for job in jobs)
    old = tmp_path / "results" / "evaluations" / "plain-target" / "episodes.jsonl"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier demo")
    for name in ("evaluations/plain-target", "videos", "plain", "craft", "logs"):
        (tmp_path / "work" / name).mkdir(parents=True)
    for name in ("plain", "craft"):
        (tmp_path / "work" / name / "metrics.jsonl").write_text(name)
    for job in jobs:
        (tmp_path / "work" / "logs" / f"{job.name}.seconds").write_text("1.5\n")
    run_demo.publish(cfg, jobs)
    assert not old.exists()
    assert (tmp_path / "results" / "metrics" / "craft.jsonl").read_text() == "craft"
    manifest = json.loads((tmp_path / "results" / "manifest.json").read_text())
    assert manifest["seconds"] == {job.name: 1.5 for job in jobs}
