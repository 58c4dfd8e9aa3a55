"""The demo's plan: what each row trains and is asked, and that the flags it passes are flags that exist."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from prismatic.command_line import parse
from prismatic.output_folder import release

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("run_demo", ROOT / "craft_experiments" / "00_demo" / "run_demo.py")
run_demo = importlib.util.module_from_spec(spec)
sys.modules["run_demo"] = run_demo
spec.loader.exec_module(run_demo)
Config = run_demo.DemoConfig


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def flags(command: list[str]) -> dict[str, str]:
    """Flag -> the last value given, as the programs read it."""
    return dict(zip(command[2::2], command[3::2], strict=True))


def planned(cfg) -> dict[str, dict[str, str]]:
    return {job.name: flags(job.command) for job in run_demo.plan(cfg)}


def test_every_planned_command_parses():
    from experiments.robot.libero.eval_config import parse_flags as parse_eval_flags
    from prismatic.training.command_line import parse_flags

    jobs = run_demo.plan(Config(old_init_noise_mm=50.0))
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names) == 5 + 6 * 3 + 2
    for job in jobs:
        assert set(job.after) <= set(names)
        for words in (job.command[2:], [*job.command[2:], *job.resume]):
            if job.kind == "train":
                parse_flags(words)
            else:
                parse_eval_flags(words).validate()


def test_the_rows_are_the_methods():
    from prismatic.training.command_line import parse_flags

    cfg = Config()
    jobs = {job.name: job for job in run_demo.plan(cfg)}
    found = {row: parse_flags(jobs[f"train-{row}"].command[2:]) for row in run_demo.TRAINED}
    assert [row for row, run in found.items() if run.use_craft] == ["keep", "keep_data", "features"]
    assert [row for row, run in found.items() if run.replay_data] == ["replay"]
    assert {row: run.craft_signal for row, run in found.items() if run.use_craft} == {
        "keep": "actions",
        "keep_data": "actions",
        "features": "features",
    }
    assert found["keep"].memories == ["instructions"]
    assert set(found["keep_data"].memories) == {"instructions", "data"}
    assert found["keep_data"].craft_memory_data == found["replay"].replay_data == cfg.old_data
    assert len({run.seed for run in found.values()} | {run.max_steps for run in found.values()}) == 2


def test_each_column_asks_its_task_in_the_units_of_its_policy():
    jobs = planned(Config(old_init_noise_mm=50.0, trials=4, sentence_trials=3))
    new, old = jobs["eval-keep-target"], jobs["eval-keep-memory"]
    assert (new["--task_suite_name"], new["--task_ids"]) == ("libero_spatial", "9")
    assert (old["--task_suite_name"], old["--task_ids"]) == ("libero_object", "3")
    assert jobs["eval-keep-sentence"]["--task_ids"] == "7"
    assert new["--unnorm_key"] == Config.dataset_name and old["--unnorm_key"] == Config.start_statistics
    assert jobs["eval-start-target"]["--unnorm_key"] == Config.start_statistics
    assert float(new["--init_noise_mm"]) == 0 and float(old["--init_noise_mm"]) == 50
    assert [jobs[f"eval-plain-{column}"]["--num_trials_per_task"] for column in run_demo.COLUMNS] == ["4", "4", "3"]
    assert jobs["eval-grey-target"]["--pretrained_checkpoint"] == jobs["eval-plain-target"]["--pretrained_checkpoint"]
    assert jobs["eval-playback-target"]["--control"] == "replay"


def test_rows_can_be_chosen_and_given_flags():
    cfg = parse(
        Config,
        ["--rows", "keep, start", "--train_flags", "--image_aug False --learning_rate 1e-4", "--row_flags"]
        + ["keep: --craft_every 2 --learning_rate 2e-4; replay: --replay_fraction 0.5"],
    )
    jobs = planned(cfg)
    assert list(jobs) == ["train-keep"] + [f"eval-{row}-{c}" for row in ("start", "keep") for c in run_demo.COLUMNS]
    keep = jobs["train-keep"]
    assert (keep["--image_aug"], keep["--craft_every"], keep["--learning_rate"]) == ("False", "2", "2e-4")
    assert "--replay_fraction" not in keep


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rows": "start,kept"}, r"--rows: found \['kept'\], expected some of"),
        ({"row_flags": "kept: --craft_every 1"}, "--row_flags: found 'kept: --craft_every 1', expected ROW: FLAGS"),
        ({"row_flags": "--craft_every 1"}, "--row_flags: found"),
        ({"train_flags": "--max_steps=3"}, r"found \['--max_steps=3'\], which the demo sets itself"),
        ({"data_root_dir": "absent"}, "no data set in absent/"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        run_demo.plan(Config(**settings))


def finish(jobs) -> None:
    """Write what the jobs would have left."""
    for job in jobs:
        job.progress.parent.mkdir(parents=True, exist_ok=True)
        job.result.parent.mkdir(parents=True, exist_ok=True)
        row = {"suite": "s", "task_id": 0, "init_idx": 0, "status": "success"} if job.kind == "eval" else {"step": 800}
        job.progress.write_text(json.dumps(row) + "\n")
        facts = {"complete": True, "valid": True, "training": {"use_craft": False}, "base": f"{ROOT}/start"}
        job.result.write_text(json.dumps(facts))


def test_everything_is_written_below_the_work_folder(tmp_path):
    for job in run_demo.plan(Config(work_dir=str(tmp_path))):
        named = flags(job.command)
        written = [named.get(f"--{name}") for name in ("run_root_dir", "rollout_dir", "local_log_dir", "results_dir")]
        for path in [job.result, job.progress, *filter(None, written)]:
            assert Path(path).is_relative_to(tmp_path)


def test_the_record_holds_what_the_report_needs_and_nothing_of_an_earlier_one(tmp_path):
    work, record = tmp_path / "work", tmp_path / "record"
    cfg = Config(work_dir=str(work), record_dir=str(record), rows="start,keep")
    jobs = run_demo.plan(cfg)
    finish(jobs)
    (work / "logs").mkdir()
    (work / "logs" / "train-keep.seconds").write_text("1.5\n")
    for name in ("keep--800_chkpt/model.safetensors", "videos/a/1.mp4", "videos/a/2.mp4", "report.md", "drift.png"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).touch()
    for name in ("evaluations/plain-target/episodes.jsonl", "videos/old.mp4", "training_curves.png", "README.md"):
        (record / name).parent.mkdir(parents=True, exist_ok=True)
        (record / name).touch()
    run_demo.write_manifest(cfg, jobs)
    run_demo.copy_record(work, record)
    names = {path.relative_to(record).as_posix() for path in record.rglob("*") if path.is_file()}
    evaluations = {
        f"evaluations/{row}-{column}/{name}"
        for row in ("start", "keep")
        for column in run_demo.COLUMNS
        for name in ("episodes.jsonl", "results.json")
    }
    figures = {"manifest.json", "report.md", "drift.png", "README.md", "videos/a/1.mp4"}
    assert names == evaluations | figures | {"metrics/keep.jsonl", "metrics/keep.json"}
    manifest = json.loads((record / "manifest.json").read_text())
    assert manifest["seconds"] == {"train-keep": 1.5}
    assert set(manifest["commands"]) == {job.name for job in jobs}
    assert all(str(ROOT) not in command for command in manifest["commands"].values())
    assert json.loads((record / "metrics" / "keep.json").read_text())["base"] == "start"


def test_the_record_has_one_writer_from_the_first_job_on(tmp_path, monkeypatch, capsys, held_elsewhere):
    record, seen = tmp_path / "record", []
    monkeypatch.setattr("sys.argv", ["run_demo.py", "--work_dir", str(tmp_path / "w"), "--record_dir", str(record)])

    def run_jobs(*_, **__):
        seen.append((tmp_path / ".record.lock").exists())
        raise SystemExit(1)

    monkeypatch.setattr(run_demo, "run_jobs", run_jobs)
    with held_elsewhere(record) as other, pytest.raises(SystemExit, match="2"):
        run_demo.main()
    error = capsys.readouterr().err
    assert f"--record_dir {record}: process {other.pid}" in error and error.count("\n") == 1 and seen == []
    with pytest.raises(SystemExit, match="1"):
        run_demo.main()
    release(record)
    assert seen == [True] and list(tmp_path.iterdir()) == []


def test_jobs_begun_with_other_flags_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train-plain.command").write_text("python vla-scripts/finetune.py --seed 8\n")
    monkeypatch.setattr("sys.argv", ["run_demo.py", "--work_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        run_demo.main()
    error = capsys.readouterr().err
    assert "train-plain was begun with other settings: found --seed 8, expected --config" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("record", ["work", ".", "sub/.."])
def test_the_record_may_not_replace_the_results(tmp_path, monkeypatch, record):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    with pytest.raises(ValueError, match="--record_dir .*: holds --work_dir"):
        run_demo.check_record_dir(run_demo.DemoConfig(work_dir="work", record_dir=record))
    run_demo.check_record_dir(run_demo.DemoConfig(work_dir="work", record_dir="work/record"))


def test_the_record_may_not_replace_folders_of_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = run_demo.DemoConfig(work_dir="work", record_dir="mine")
    (tmp_path / "mine" / "metrics").mkdir(parents=True)
    with pytest.raises(ValueError, match="--record_dir mine: found metrics and no manifest.json"):
        run_demo.check_record_dir(cfg)
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    run_demo.check_record_dir(cfg)


def test_records_name_no_place_of_a_machine():
    """They are read elsewhere."""
    files = sorted((ROOT / "results").rglob("*.json"))
    assert len(files) > 300
    assert [f for f in files if re.search(r'"/(tmp|root|home|work|Users)/', f.read_text(encoding="utf-8"))] == []
