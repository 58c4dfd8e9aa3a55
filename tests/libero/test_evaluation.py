"""Whole evaluations in the toy world: files, retries, workers, resuming, exit codes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_libero_world import LANGUAGES, FakeBackend, RaiseAt, comparable, lines_of, text_log

from experiments.robot.libero import eval_backend, evaluation, run_libero_eval, scheduler
from experiments.robot.libero.controls import Control
from experiments.robot.libero.episode import with_policy_protocol
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.eval_fingerprint import checkpoint_fingerprint, run_fingerprint
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.scheduler import WorkerFailedError
from experiments.robot.libero.surroundings import SimulatorUnavailableError
from experiments.robot.libero.video import SaveVideos
from prismatic.evidence import files
from prismatic.evidence.episodes import protocol_differences, read_run
from prismatic.evidence.files import write_json
from prismatic.training.checkpoint_folder import MANIFEST
from prismatic.training.writers import WRITERS, Service


def lose_the_device(task, start):
    raise SimulatorUnavailableError("the device is gone")


def test_complete_run(cfg, capsys):
    backend = FakeBackend(limit=22)  # 20, 21, 22 steps are needed from states 0, 1, 2
    results = evaluate(replace(cfg, num_trials_per_task=4), backend)
    assert results["valid"] and results["overall"]["successes"] == 9 and results["overall"]["trials"] == 12
    assert [r["init_idx"] for r in lines_of(cfg)] == [0, 1, 2, 3] * 3
    assert {r["status"] for r in lines_of(cfg) if r["init_idx"] == 3} == {"failure"}
    assert json.loads((Path(cfg.results_dir) / "results.json").read_text()) == results
    log = text_log(cfg)
    assert log.startswith("Task suite: toy_suite\nUsing default initial states\n\nTask: push the Red.Block\n")
    assert log.endswith(
        "Final results:\nTotal episodes: 12\nTotal successes: 9\nOverall success rate: 0.7500 (75.0%)\n"
    )
    console = capsys.readouterr().out
    assert console.startswith("Logging to local log file: ") and console.endswith(log)
    assert len(backend.policies) == 1 and len(backend.envs) == 3 and all(env.closed for env in backend.envs)
    assert all(seed == 0 for env in backend.envs for _, _, seed in env.log)


class Told(Service):
    """A service that keeps what it is told; `fault` is raised instead."""

    name, package, fault = "told", "json", None

    def __init__(self, facts):
        self.facts, self.seen = facts, []
        type(self).last = self

    def tell(self, *what):
        if self.fault is not None:
            raise self.fault
        self.seen.append(what)

    def log(self, step, metrics):
        self.tell(step, dict(metrics))

    def attach(self, file):
        self.tell(file.read_text())

    def close(self):
        self.tell("closed")


@pytest.mark.parametrize("fault", [None, ConnectionError("no route")])
def test_a_service_gets_the_results_and_its_faults_change_nothing(cfg, monkeypatch, capsys, fault):
    monkeypatch.setitem(WRITERS, "trackio", Told)
    monkeypatch.setattr(Told, "fault", fault)
    results = evaluate(replace(cfg, use_trackio=True, wandb_project="p"), FakeBackend(limit=21))
    assert results["valid"] and results["overall"]["successes"] == 6
    facts = Told.last.facts
    assert (facts.run_id, facts.project, facts.folder) == (results["run_id"], "p", Path(cfg.results_dir))
    assert facts.flags["seed"] == cfg.seed and json.dumps(facts.flags)
    if fault is not None:
        assert capsys.readouterr().out.count("WARNING: told cannot be written (ConnectionError: no route)") == 1
        return
    (step, metrics), (log,), closed = Told.last.seen
    assert step == 9 and log == text_log(cfg) and closed == ("closed",)
    assert metrics["success_rate/total"] == 6 / 9 and metrics["num_errors/total"] == 0
    assert {name for name in metrics if name.startswith("num_episodes/")} == {
        f"num_episodes/{name}" for name in ("total", *(task["instruction"] for task in results["per_task"]))
    }


def test_a_service_that_cannot_be_opened_is_refused_before_an_episode_is_run(cfg, monkeypatch):
    class Closed(Told):
        def __init__(self, facts):
            raise RuntimeError("no account")

    monkeypatch.setitem(WRITERS, "trackio", Closed)
    backend = FakeBackend()
    with pytest.raises(EvalInputError, match="--use_trackio True: RuntimeError: no account"):
        evaluate(replace(cfg, use_trackio=True), backend)
    assert backend.policies == [] and not (Path(cfg.results_dir) / "results.json").exists()
    assert list(Path(cfg.local_log_dir).glob("*.txt")) == []


def test_an_episode_does_not_depend_on_the_ones_before_it(cfg, tmp_path):
    evaluate(cfg, FakeBackend())
    alone = replace(cfg, task_ids="1", initial_state_offset=2, num_trials_per_task=1, results_dir=str(tmp_path / "b"))
    backend = FakeBackend()
    evaluate(replace(alone, run_id_note="alone"), backend)
    assert comparable(alone)[1, 2] == comparable(cfg)[1, 2]
    whole = FakeBackend()
    evaluate(replace(cfg, results_dir=str(tmp_path / "c"), run_id_note="again"), whole)
    # the noise in the state comes from the global generator: equal only when every episode seeds it
    assert backend.policies[0].seen[0][2][-1] == whole.policies[0].seen[-1][2][-1]


def test_an_exception_is_retried_in_a_new_environment(cfg, tmp_path):
    backend = FakeBackend(mishap=RaiseAt([-0.05], once_file=str(tmp_path / "once")))
    results = evaluate(cfg, backend)
    assert results["valid"] and results["overall"]["successes"] == 9
    retried = [r for r in lines_of(cfg) if r["attempts"] == 2]
    assert [(r["task_id"], r["init_idx"], r["status"]) for r in retried] == [(0, 1, "success")]
    assert retried[0]["error"] == "RuntimeError: the renderer is gone"
    assert len(backend.envs) == 4 and "Episode error" not in text_log(cfg)


def test_a_lasting_exception_is_an_error_and_invalidates_the_run(cfg):
    results = evaluate(cfg, FakeBackend(mishap=RaiseAt([-0.05])))
    assert not results["valid"] and results["complete"]
    assert (results["overall"]["errors"], results["overall"]["trials"], results["overall"]["failures"]) == (3, 6, 0)
    assert results["overall"]["success_rate"] == 1.0
    assert text_log(cfg).count("Episode error: RuntimeError: the renderer is gone\nSuccess: False\n") == 3


def test_many_errors_in_a_row_stop_the_run(cfg):
    with pytest.raises(RuntimeError, match="4 episodes in a row.*--resume"):
        evaluate(replace(cfg, max_consecutive_errors=4), FakeBackend(mishap=RaiseAt([0.0, -0.05, -0.1])))
    assert len(lines_of(cfg)) == 4
    assert json.loads((Path(cfg.results_dir) / "results.json").read_text())["missing"] == 5


def test_resume_runs_only_what_is_missing_or_failed_with_an_error(cfg):
    evaluate(replace(cfg, task_ids="0,1"), FakeBackend(mishap=RaiseAt([-0.05])))
    with pytest.raises(EvalInputError, match="--resume"):
        evaluate(cfg, FakeBackend())
    backend = FakeBackend()
    resumed = replace(cfg, resume=True, run_id_note="second")
    results = evaluate(resumed, backend)
    starts = [(env.task.task_id, start) for env in backend.envs for _, start, _ in env.log]
    assert starts == [(0, -0.05), (1, -0.05), (2, 0.0), (2, -0.05), (2, -0.1)]
    assert results["valid"] and results["episodes_run"] == 5 and results["overall"]["trials"] == 9
    (log,) = Path(cfg.local_log_dir).glob("*--second.txt")
    assert "Total episodes: 9" in log.read_text()
    idle = FakeBackend()
    assert evaluate(replace(resumed, run_id_note="third"), idle)["valid"] and not idle.policies


@pytest.mark.parametrize("change", [{"seed": 8}, {"num_open_loop_steps": 4}, {"control": Control.GREY_IMAGES}])
def test_resume_refuses_other_settings(cfg, change):
    evaluate(cfg, FakeBackend())
    with pytest.raises(EvalInputError, match="fingerprint"):
        evaluate(replace(cfg, resume=True, **change), FakeBackend())


def test_changed_checkpoint_changes_the_fingerprint(cfg):
    before = checkpoint_fingerprint(cfg.pretrained_checkpoint)
    assert before == checkpoint_fingerprint(cfg.pretrained_checkpoint)
    (Path(cfg.pretrained_checkpoint) / "config.json").write_text("[]")
    assert checkpoint_fingerprint(cfg.pretrained_checkpoint) != before
    with pytest.raises(EvalInputError, match="no such directory"):
        checkpoint_fingerprint("no/where")


def test_recorded_instructions_do_not_change_the_fingerprint(cfg):
    folder, manifest = Path(cfg.pretrained_checkpoint), {"step": 3, "datasets": {}, "versions": {}}
    write_json(folder / MANIFEST, manifest)
    before = checkpoint_fingerprint(str(folder))
    for entry in ({"a": ["open the drawer"]}, {}):
        write_json(folder / MANIFEST, manifest | {"instructions": entry})
        assert checkpoint_fingerprint(str(folder)) == before
    write_json(folder / MANIFEST, manifest | {"instructions": {}, "step": 4})
    assert checkpoint_fingerprint(str(folder)) != before
    for damaged in ("[]", "{"):  # loading says what is wrong with them
        (folder / MANIFEST).write_text(damaged)
        assert checkpoint_fingerprint(str(folder)) != before


def test_videos(cfg, tmp_path, dead_process):
    machine = files.writer().partition("-")[0]
    left = Path(cfg.rollout_dir, cfg.save_version, "2025_01_01", f".a.mp4.{machine}-{dead_process}.tmp")
    left.parent.mkdir(parents=True)
    left.touch()
    pytest.importorskip("imageio_ffmpeg")
    cfg = replace(cfg, save_videos=SaveVideos.FAILURES, task_ids="0,2")
    evaluate(cfg, FakeBackend(limit=21))  # state 2 fails
    assert not left.exists()
    videos = [r["video"] for r in lines_of(cfg)]
    assert [bool(v) for v in videos] == [False, False, True] * 2 and all(Path(v).is_file() for v in videos if v)
    assert "--episode=3--success=False--task=push_the_red_block.mp4" in videos[2]
    assert "--episode=6--success=False--task=stack_the_bowls.mp4" in videos[5]
    assert f"Saved rollout MP4 at path {videos[2]}\nSuccess: False" in text_log(cfg)


def test_initial_states_from_json_skip_failed_demonstrations(cfg, tmp_path):
    path = tmp_path / "states.json"
    demo = {"success": True, "initial_state": [0.0, 0.0]}
    demos = {"demo_0": demo, "demo_1": {**demo, "success": False}, "demo_2": demo}
    path.write_text(json.dumps({language.replace(" ", "_"): demos for language in LANGUAGES}))
    cfg = replace(cfg, initial_states_path=str(path))
    results = evaluate(cfg, FakeBackend())
    assert results["overall"]["trials"] == 6 and [t["skipped"] for t in results["per_task"]] == [1, 1, 1]
    log = text_log(cfg)
    assert f"Using initial states from {path}" in log and "Skipping task 2 episode 1 due to failed expert demo!" in log
    with pytest.raises(EvalInputError, match="demo_3"):
        evaluate(replace(cfg, num_trials_per_task=4), FakeBackend())


def test_replay_needs_no_checkpoint_and_no_renderer(cfg):
    demos = SimpleNamespace(
        num_episodes=2,
        episode=lambda i: SimpleNamespace(
            instruction=LANGUAGES[i], actions=np.tile([0.05, 0, 0, 0, 0, 0, 1.0], (25, 1))
        ),
    )
    cfg = replace(cfg, pretrained_checkpoint="", control=Control.REPLAY, replay_dataset="demos/1.0.0", task_ids="0,1")
    backend = FakeBackend(demos=demos)
    results = evaluate(cfg, backend)
    assert results["overall"]["successes"] == 6 and not backend.policies and not backend.envs[0].settings.render
    assert results["checkpoint"] == "replay:demos/1.0.0#auto" and results["control"] == "replay"
    assert results["render_mode"] == "lazy"
    with pytest.raises(EvalInputError, match="stack the bowls"):
        evaluate(replace(cfg, task_ids="2", results_dir=cfg.results_dir + "2", run_id_note="x"), backend)


def recorded(mode, size):
    return {"render_mode": mode, "image_size": size}


def test_a_replay_is_rendered_as_the_policy_it_stands_beside(cfg):
    """The demonstrations' own mode, that of the checkpoint where one is named, and what the flags say before both."""
    demos = SimpleNamespace(
        metadata=recorded("lazy", 96),
        num_episodes=1,
        episode=lambda _: SimpleNamespace(instruction=LANGUAGES[0], actions=np.tile([0.05, 0, 0, 0, 0, 0, 1], (9, 1))),
    )
    write_json(Path(cfg.pretrained_checkpoint) / MANIFEST, {"datasets": {"a": recorded("every_step", 128)}})
    cfg = replace(cfg, control=Control.REPLAY, replay_dataset="d", render_mode=None, task_ids="0")
    for change, expected in [
        ({"pretrained_checkpoint": ""}, ("lazy", 96)),
        ({}, ("every_step", 128)),
        ({"render_mode": RenderMode.PUBLISHED}, ("published", 128)),
        ({"pretrained_checkpoint": "", "env_img_res": 64}, ("lazy", 64)),
    ]:
        folder = f"{cfg.results_dir}-{len(change)}-{'-'.join(change)}"
        run = replace(cfg, results_dir=folder, **change)
        results = evaluate(run, FakeBackend(demos=demos))
        assert (results["render_mode"], results["env_img_res"]) == expected
        assert {record["render_mode"] for record in lines_of(run)} == {expected[0]}
    with pytest.raises(EvalInputError, match="--pretrained_checkpoint no/such"):
        evaluate(replace(cfg, pretrained_checkpoint="no/such"), FakeBackend(demos=demos))
    demos.metadata = recorded("by_hand", 96)
    with pytest.raises(EvalInputError, match="--render_mode.*by_hand"):
        evaluate(replace(cfg, pretrained_checkpoint=""), FakeBackend(demos=demos))


def test_a_replay_of_published_demonstrations_is_rendered_as_published(cfg):
    plain = SimpleNamespace(metadata=None, num_episodes=0)
    cfg = replace(cfg, pretrained_checkpoint="", control=Control.REPLAY, replay_dataset="d", render_mode=None)
    kept = with_policy_protocol(cfg, FakeBackend(demos=plain))
    assert kept == cfg, "nothing is recorded, so the defaults stay"


def test_render_mode_of_the_checkpoint_reaches_environment_and_records(cfg):
    metadata = {"datasets": {"demos": {"render_mode": "lazy", "image_size": 96}}}
    backend = FakeBackend(metadata=metadata)
    results = evaluate(replace(cfg, render_mode=None, task_ids="0"), backend)
    settings = backend.envs[0].settings
    assert settings.render_mode is RenderMode.LAZY and settings.image_size == 96
    assert lines_of(cfg)[0]["render_mode"] == "lazy" and results["policy_metadata"] == metadata


def stopped_clock(monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(evaluation, "datetime", Clock)


def test_runs_that_start_in_the_same_second_share_no_name(cfg, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    stopped_clock(monkeypatch)
    cfg = replace(cfg, results_dir=None, task_ids="0", save_videos=SaveVideos.ALL)
    runs = [replace(cfg, shard="1/2"), replace(cfg, shard="2/2"), cfg, replace(cfg, seed=8), replace(cfg, seed=9)]
    results = [evaluate(run, FakeBackend()) for run in runs]
    start = "EVAL-toy_suite-openvla-2026_01_02-03_04_05"
    names = [start + end for end in ("--shard1of2", "--shard2of2", "", "-2", "-3")]
    assert [result["run_id"] for result in results] == names
    for name, episodes in zip(names, (2, 1, 3, 3, 3), strict=True):
        folder = Path(cfg.local_log_dir) / name
        records = [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]
        assert len(records) == episodes and {record["run_id"] for record in records} == {name}
        assert f"Total episodes: {episodes}\n" in folder.with_name(name + ".txt").read_text()
        assert all(Path(record["video"]).stat().st_size > 0 for record in records)
    videos = [path.name for path in Path(cfg.rollout_dir).rglob("*.mp4")]
    assert len(videos) == len(set(videos)) == 12


def test_a_run_that_is_refused_leaves_no_log(cfg, monkeypatch):
    evaluate(cfg, FakeBackend())
    logs = sorted(Path(cfg.local_log_dir).iterdir())
    for change in ({}, {"seed": 8, "resume": True}):
        with pytest.raises(EvalInputError):
            evaluate(replace(cfg, **change), FakeBackend())
    assert sorted(Path(cfg.local_log_dir).iterdir()) == logs


def test_what_the_machine_lacks_is_found_before_anything_is_written(cfg):
    class Bare(FakeBackend):
        def check_machine(self, cfg):
            raise SimulatorUnavailableError("no renderer")

    with pytest.raises(SimulatorUnavailableError):
        evaluate(cfg, Bare())
    assert not Path(cfg.local_log_dir).exists() and not Path(cfg.results_dir).exists()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unusable_simulator_is_no_outcome_of_an_episode(cfg, workers):
    with pytest.raises(SimulatorUnavailableError, match="the device is gone"):
        evaluate(replace(cfg, num_workers=workers), FakeBackend(mishap=lose_the_device))
    assert lines_of(cfg) == [] if (Path(cfg.results_dir) / "episodes.jsonl").exists() else True


@pytest.mark.parametrize("device", ["gpu", "cuda:77", "CUDA", "", "cuda:-1", "../x"])
def test_a_device_that_does_not_exist_is_named(cfg, device):
    with pytest.raises(EvalInputError, match="--device is .*expected (one of )?cpu") as caught:
        replace(cfg, device=device).validate()
        eval_backend.usable_device(device)
    assert "\n" not in str(caught.value)
    assert eval_backend.usable_device("cpu") == "cpu"


@pytest.mark.slow
def test_workers_give_the_same_records_and_the_same_log(cfg, tmp_path):
    mishap = RaiseAt([-0.05])
    evaluate(cfg, FakeBackend(mishap=mishap, limit=21))
    two = replace(
        cfg, num_workers=2, results_dir=str(tmp_path / "two"), local_log_dir=str(tmp_path / "logs_two"), task_ids=""
    )
    evaluate(two, FakeBackend(mishap=mishap, limit=21))
    assert comparable(two) == comparable(cfg) and text_log(two) == text_log(cfg)


class HangClock:
    """Stands still, and passes with every look at it from when a worker hangs until it is ended."""

    def __init__(self, hangs: Path, monkeypatch) -> None:
        self.hangs, self.ended, self.now, end = hangs, 0, 0.0, scheduler._end

        def counted(*worker) -> None:
            end(*worker)
            self.ended += 1

        monkeypatch.setattr(scheduler, "_end", counted)

    def monotonic(self) -> float:
        self.now += 1e5 * (len(self.hangs.read_text()) > self.ended)
        return self.now


@pytest.mark.slow
@pytest.mark.parametrize("action", ["exit", "hang"])
def test_a_dying_or_hanging_worker_costs_one_episode(cfg, tmp_path, monkeypatch, action):
    hangs = tmp_path / "hangs"
    hangs.touch()
    if action == "hang":
        monkeypatch.setattr(scheduler, "time", HangClock(hangs, monkeypatch))
    cfg = replace(cfg, num_workers=2 if action == "exit" else 1, task_ids="1")
    results = evaluate(cfg, FakeBackend(mishap=RaiseAt([-0.05], action=action, hangs=str(hangs))))
    assert [(r["init_idx"], r["status"]) for r in sorted(lines_of(cfg), key=lambda r: r["init_idx"])] == [
        (0, "success"),
        (1, "error"),
        (2, "success"),
    ]
    assert not results["valid"] and "worker process" in text_log(cfg)
    assert len(hangs.read_text()) == (2 if action == "hang" else 0)


@pytest.mark.slow
def test_a_worker_that_cannot_start_stops_the_run(cfg):
    with pytest.raises(WorkerFailedError, match="exit code 9 while starting"):
        evaluate(replace(cfg, num_workers=2, run_id_note="a"), FakeBackend(load_error="exit"))
    with pytest.raises(OSError, match="weights are missing"):
        evaluate(replace(cfg, num_workers=2), FakeBackend(load_error="weights are missing"))
    with pytest.raises(EvalInputError, match="--use_proprio"):
        evaluate(
            replace(cfg, num_workers=2, use_proprio=False, run_id_note="b"), FakeBackend(metadata={"use_proprio": True})
        )


@pytest.mark.parametrize(
    ("backend", "extra", "code"),
    [
        (FakeBackend(), [], 0),
        (FakeBackend(mishap=RaiseAt([0.0])), [], 1),
        (FakeBackend(), ["--num_trials_per_task", "7"], 2),
        (FakeBackend(), ["--task_ids", "3"], 2),
        (FakeBackend(metadata={"use_proprio": False}), ["--use_proprio", "True"], 2),
    ],
)
def test_command_line_exit_codes(cfg, monkeypatch, capsys, backend, extra, code):
    monkeypatch.setattr(evaluation, "LiberoBackend", lambda: backend)
    flags = ["pretrained_checkpoint", "task_suite_name", "local_log_dir", "results_dir", "rollout_dir"]
    argv = [word for name in flags for word in (f"--{name}", getattr(cfg, name))]
    argv += ["--num_trials_per_task", "1", "--save_videos", "none"]
    monkeypatch.setattr("sys.argv", ["run_libero_eval.py", *argv, *extra])
    try:
        ended = run_libero_eval.main()
    except SystemExit as end:
        ended = end.code
    assert ended == code
    captured = capsys.readouterr()
    assert ("error: " in captured.err) == (code != 0)
    if code == 0:
        assert "Overall success rate: 1.0000 (100.0%)" in captured.out


def test_a_suite_without_statistics_names_the_flag_and_the_keys():
    checkpoint = str(Path(__file__).parents[2] / "pretrained_models" / "tiny-libero-object")
    cfg = EvalConfig(pretrained_checkpoint=checkpoint, task_suite_name="libero_goal", device="cpu")
    with pytest.raises(EvalInputError, match=r"--unnorm_key: .*'libero_goal'.*libero_object_scripted_no_noops"):
        eval_backend.LiberoBackend().load_policy(cfg)


def states_file(path: Path, state=(0.0, 0.5)) -> str:
    demos = {f"demo_{i}": {"success": True, "initial_state": list(state)} for i in range(3)}
    names = [language.replace(" ", "_") for language in LANGUAGES]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict.fromkeys(names, demos)))
    return str(path)


def test_the_fingerprint_is_of_what_files_hold_not_of_where_they_lie(cfg, tmp_path):
    def fingerprint(**changes):
        return run_fingerprint(replace(cfg, **changes))[0]

    one, copy = states_file(tmp_path / "a@b" / "states.json"), states_file(tmp_path / "c" / "other.json")
    before = fingerprint(initial_states_path=one)
    assert before == fingerprint(initial_states_path=copy) != fingerprint()
    states_file(Path(one), (0.0, 0.25))
    assert fingerprint(initial_states_path=one) != before

    shutil.copytree(cfg.pretrained_checkpoint, tmp_path / "moved" / "checkpoint")
    assert fingerprint(pretrained_checkpoint=str(tmp_path / "moved" / "checkpoint")) == fingerprint()

    replay = {"control": Control.REPLAY, "pretrained_checkpoint": ""}
    for name in ("x", "y@z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"one")
    first = fingerprint(replay_dataset=str(tmp_path / "x"), **replay)
    assert first == fingerprint(replay_dataset=str(tmp_path / "y@z"), **replay)
    assert first != fingerprint(replay_dataset=str(tmp_path / "x"), replay_episode=1, **replay)
    (tmp_path / "x" / ".craft_index").mkdir()
    (tmp_path / "x" / ".craft_index" / "index.json").write_text("{}")  # ours, written when it is opened
    assert first == fingerprint(replay_dataset=str(tmp_path / "x"), **replay)
    (tmp_path / "x" / "data").write_bytes(b"two")
    assert first != fingerprint(replay_dataset=str(tmp_path / "x"), **replay)


def test_the_middle_of_a_large_file_counts(cfg):
    weights = Path(cfg.pretrained_checkpoint) / "model.safetensors"
    with open(weights, "wb") as file:
        file.truncate(1 << 25)  # sparse
    before = checkpoint_fingerprint(cfg.pretrained_checkpoint)
    with open(weights, "r+b") as file:
        file.seek(1 << 24)
        file.write(b"1")
    assert checkpoint_fingerprint(cfg.pretrained_checkpoint) != before


def test_runs_from_copies_of_one_file_compare(cfg, tmp_path):
    runs = []
    for name, state in (("a", (0.0, 0.5)), ("b", (0.0, 0.5)), ("c", (0.0, 0.25))):
        own = {"results_dir": str(tmp_path / f"r_{name}"), "local_log_dir": str(tmp_path / f"l_{name}")}
        states = states_file(tmp_path / name / "states.json", state)
        sets = Path(states).with_name("sets.py")
        sets.write_text(f"# {state}")
        evaluate(replace(cfg, initial_states_path=states, data_set_file=str(sets), **own), FakeBackend())
        runs.append(read_run(own["results_dir"]))
    a, b, c = runs
    named = {"initial_states_path", "data_set_file"}
    assert named.isdisjoint(d.field for d in protocol_differences(a, b, a.episodes))
    different = protocol_differences(a, c, a.episodes)
    assert named <= {d.field for d in different} and "initial_states_path" in {d.field for d in different if d.decisive}
