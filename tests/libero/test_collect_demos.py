"""Collecting demonstrations: starts, recording, scratch files, resuming, and the written data set."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments.robot.libero import collect_demos, collect_workers
from experiments.robot.libero.action_noise import NoiseProcess
from experiments.robot.libero.collect_demos import REPORT_FILE, collect, parse_arguments
from experiments.robot.libero.collect_episode import ExpertLimits, run_expert
from experiments.robot.libero.collect_scratch import (
    collection_report,
    episode_path,
    finished_episodes,
    load_episode,
    write_npz,
)
from experiments.robot.libero.collect_settings import CollectSettings, standard_states
from experiments.robot.libero.collect_starts import episode_start, is_noisy
from experiments.robot.libero.collect_workers import CollectionError, run_shares
from experiments.robot.libero.expert import Command, ExpertFailedError
from prismatic.evidence.files import write_text
from prismatic.vla.datasets.rlds import RLDSReader
from prismatic.vla.images import decode_jpeg, encode_jpeg


def settings(tmp_path, **changes) -> CollectSettings:
    base = CollectSettings("libero_object", (0, 3), str(tmp_path), "mini_no_noops", episodes_per_task=2, image_size=16)
    return replace(base, **changes)


def write_scratch(cfg: CollectSettings, task: int, number: int, steps: int = 5, attempts: int = 1) -> None:
    rng = np.random.default_rng([task, number])
    jpegs = [encode_jpeg(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), 95) for _ in range(steps)]
    joined, lengths = np.frombuffer(b"".join(jpegs), np.uint8), np.array([len(j) for j in jpegs])
    header = {"instruction": f"do {task}", "file_path": f"s/t/{number}", "attempts": attempts, "seed": number}
    arrays = {
        "actions": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        "state": rng.uniform(-1, 1, (steps, 8)).astype(np.float32),
        "joint_state": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        **{"image": joined, "image_lengths": lengths, "wrist_image": joined, "wrist_image_lengths": lengths},
        "header": np.array(json.dumps(header | {"standard_state": None, "noise_std": 0.1 * number})),
    }
    write_npz(episode_path(cfg.scratch, task, number), arrays)


@pytest.fixture
def without_simulator(monkeypatch):
    """collect() with the simulator parts replaced; yields the list of shares that would have run."""
    ran = []
    monkeypatch.setattr(collect_demos, "task_count", lambda suite: 10)
    monkeypatch.setattr(collect_demos, "simulator_versions", lambda: {"mujoco": "0"})
    monkeypatch.setattr(collect_demos, "run_processes", ran.append)
    monkeypatch.setattr(collect_demos, "require", lambda render: None)
    monkeypatch.setattr(collect_demos, "load_task", lambda suite, task: SimpleNamespace(init_states=np.zeros((50, 3))))
    return ran


def test_initial_state_choices():
    assert standard_states("sampled") is None
    assert standard_states("standard:3-5") == range(3, 6)
    for text in ("standard", "standard:5-3", "random", "standard:-1-3"):
        with pytest.raises(ValueError, match="sampled"):
            standard_states(text)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"episodes_per_task": 0}, "episodes_per_task"),
        ({"noise_fraction": 1.5}, "noise_fraction"),
        ({"noise_std": -0.1}, "noise_std"),
        ({"dataset_name": "a/b"}, "dataset_name"),
        ({"initial_states": "all"}, "initial_states"),
        ({"initial_states": "standard:\u00b2-3"}, "initial_states"),
        ({"noise_std": float("nan")}, "noise_std"),
        ({"init_noise_mm": float("inf")}, "init_noise_mm"),
        ({"image_size": 0}, "image_size"),
        ({"jpeg_quality": 101}, "jpeg_quality"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_are_named(tmp_path, change, name):
    with pytest.raises(ValueError, match=name):
        settings(tmp_path, **change)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
def test_noisy_episodes_are_spread_evenly(fraction):
    flags = [is_noisy(number, fraction) for number in range(100)]
    assert sum(flags) == round(100 * fraction)
    assert abs(sum(flags[:50]) - 50 * fraction) <= 1


def test_starts_depend_only_on_their_number_and_never_repeat(tmp_path):
    cfg = settings(tmp_path, noise_std=0.15)
    starts = {(t, e, a): episode_start(cfg, t, e, a) for t in range(3) for e in range(20) for a in range(3)}
    assert len({start.seed for start in starts.values()}) == len(starts)
    more = replace(cfg, episodes_per_task=99, task_ids=(1,))
    assert all(episode_start(more, *key) == start for key, start in starts.items())
    assert {start.noise_std for start in starts.values()} == {0.0, 0.15}
    assert episode_start(replace(cfg, seed=1), 0, 0, 0).seed != starts[0, 0, 0].seed


def test_standard_starts_are_taken_in_turn(tmp_path):
    cfg = settings(tmp_path, initial_states="standard:4-6")
    assert [episode_start(cfg, 0, n, 0).standard_state for n in range(5)] == [4, 5, 6, 4, 5]


@pytest.mark.parametrize(("tasks", "workers", "processes"), [((0, 1, 2), 2, 3), ((4,), 2, 2), ((4,), 1, 1)])
def test_shares_cover_every_episode_once(tmp_path, tasks, workers, processes):
    cfg = settings(tmp_path, task_ids=tasks, num_workers=workers, episodes_per_task=7)
    shares = run_shares(cfg)
    covered = [(s.task_id, n) for s in shares for n in range(s.offset, cfg.episodes_per_task, s.stride)]
    assert len(shares) == processes
    assert sorted(covered) == [(task, n) for task in sorted(tasks) for n in range(7)]


class FakeEnv:
    """Remembers what was executed; the goal holds from the action number `needed` on, up to number `lost`."""

    def __init__(self, needed: int, lost: int = 999) -> None:
        self.executed: list[np.ndarray] = []
        self._needed, self._lost = needed, lost

    def step(self, action: np.ndarray) -> bool:
        self.executed.append(np.array(action))
        return self._needed <= len(self.executed) < self._lost


def limits(max_steps: int = 50, after_success: int = 0) -> ExpertLimits:
    return ExpertLimits(max_steps, after_success)


def commands(count: int, fail: bool = False):
    for number in range(count):
        yield Command(np.array([0.1 * (number + 1), 0, 0, 0, 0, 0, -1.0]), "move")
    if fail:
        raise ExpertFailedError("dropped it")


def test_expert_runs_until_success_and_records_before_each_step():
    env, recorded = FakeEnv(needed=3), []
    assert run_expert(env, commands(9), None, lambda e, a: recorded.append((len(e.executed), a)), limits())
    assert [before for before, _ in recorded] == [0, 1, 2]
    np.testing.assert_array_equal([action for _, action in recorded], env.executed)


def test_recording_goes_on_after_success_and_the_goal_must_still_hold():
    env, labels = FakeEnv(needed=3), []
    assert run_expert(env, commands(9), None, lambda e, a: labels.append(a), limits(max_steps=3, after_success=4))
    assert len(labels) == 7
    assert run_expert(FakeEnv(needed=3), commands(5), None, None, limits(after_success=4))  # nothing more to do
    assert not run_expert(FakeEnv(needed=3, lost=6), commands(9), None, None, limits(after_success=4))


def test_noise_changes_what_is_executed_but_not_the_label():
    env, labels = FakeEnv(needed=5), []
    noise = NoiseProcess(0.2, np.random.default_rng(0))
    assert run_expert(env, commands(9), noise, lambda e, a: labels.append(a), limits())
    np.testing.assert_array_equal(labels, [c.action for c in commands(5)])
    assert np.abs(np.array(env.executed) - labels)[:, :6].min() > 0


def test_idle_actions_are_neither_executed_nor_recorded():
    idle, move = np.array([0, 0, 0, 0, 0, 0, -1.0]), np.array([0.2, 0, 0, 0, 0, 0, -1.0])
    env, labels = FakeEnv(needed=99), []
    sequence = [Command(action, "x") for action in (idle, move, idle, -idle, -idle, move)]
    run_expert(env, iter(sequence), None, lambda e, a: labels.append(a), limits())
    np.testing.assert_array_equal(labels, [move, -idle, move])  # a changed gripper is no idle action
    np.testing.assert_array_equal(env.executed, labels)


@pytest.mark.parametrize(("stream", "limit"), [(commands(9), 4), (commands(2), 50), (commands(2, fail=True), 50)])
def test_running_out_of_steps_or_ideas_is_a_failure(stream, limit):
    env = FakeEnv(needed=8)
    assert not run_expert(env, stream, None, None, limits(limit))
    assert len(env.executed) <= limit


def test_scratch_episodes_come_back_unchanged(tmp_path):
    cfg = settings(tmp_path)
    write_scratch(cfg, 3, 1, steps=4)
    path = episode_path(cfg.scratch, 3, 1)
    episode = load_episode(path, 7)
    with np.load(path) as stored:
        np.testing.assert_array_equal(episode.actions, stored["actions"])
        assert b"".join(episode.images["image"]) == stored["image"].tobytes()
    assert (episode.index, episode.instruction, len(episode.images["wrist_image"])) == (7, "do 3", 4)
    assert decode_jpeg(episode.images["image"][2]).shape == (16, 16, 3)
    assert not list(path.parent.glob("*tmp*"))


def test_a_truncated_scratch_file_is_named(tmp_path):
    cfg = settings(tmp_path)
    write_scratch(cfg, 0, 0)
    path = episode_path(cfg.scratch, 0, 0)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match="episode_00000.npz"):
        load_episode(path, 0)


def test_collect_writes_a_readable_data_set_and_a_report(tmp_path, without_simulator, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    cfg = settings(tmp_path)
    for task, number in ((0, 0), (0, 1), (3, 0)):
        write_scratch(cfg, task, number, steps=4 + number, attempts=1 + number)
    write_text(episode_path(cfg.scratch, 3, 1).with_suffix(".failed.json"), '{"attempts": 4}')
    target = collect(cfg)
    reader = RLDSReader(target)
    assert [reader.episode(i).instruction for i in range(reader.num_episodes)] == ["do 0", "do 0", "do 3"]
    assert len(reader.episode(1).actions) == 5
    report = json.loads((target.parent / REPORT_FILE).read_text())
    assert (report["0"]["episodes"], report["0"]["attempts"], report["0"]["first_attempt_successes"]) == (2, 3, 1)
    assert (report["3"]["episodes"], report["3"]["unsolved"], report["3"]["attempts"]) == (1, 1, 5)
    metadata = json.loads((target / "craft_metadata.json").read_text())
    assert metadata["render_mode"] == "lazy" and metadata["versions"] == {"mujoco": "0"}
    assert metadata["kernels"] == "Zen"
    with pytest.raises(FileExistsError):
        collect(cfg)


def test_a_task_without_any_episode_is_an_error(tmp_path, without_simulator):
    cfg = settings(tmp_path)
    write_scratch(cfg, 0, 0)
    with pytest.raises(CollectionError, match="task 3"):
        collect(cfg)
    assert not cfg.target.exists()


def test_other_settings_do_not_continue_a_scratch_folder(tmp_path, without_simulator, monkeypatch):
    cfg = settings(tmp_path, task_ids=(0,))
    write_scratch(cfg, 0, 0)
    collect(cfg)
    changed = replace(cfg, image_size=32, jpeg_quality=80)
    (cfg.target.parent).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="image_size, jpeg_quality"):
        collect(changed)
    with monkeypatch.context() as other, pytest.raises(ValueError, match=r"\(kernels\)"):
        other.setenv("OPENBLAS_CORETYPE", "Nehalem")
        collect(cfg)
    collect(replace(cfg, episodes_per_task=1, num_workers=5))  # these may change


def test_two_runs_do_not_share_a_scratch_folder(tmp_path, without_simulator, held_elsewhere):
    cfg = settings(tmp_path)
    with held_elsewhere(cfg.scratch), pytest.raises(ValueError, match="--output_dir .* writes to it at this moment"):
        collect(cfg)
    assert without_simulator == []


def test_a_worker_stops_when_its_run_was_killed(tmp_path, monkeypatch):
    class FakeTaskEnv:
        def __init__(self, task, *args, **kwargs):
            self.task = task

        def close(self):
            pass

    collected = []
    alive = iter([True, False, False])
    parent = SimpleNamespace(is_alive=lambda: next(alive))
    monkeypatch.setattr(collect_workers.multiprocessing, "parent_process", lambda: parent)
    monkeypatch.setattr(collect_workers, "load_task", lambda suite, task: SimpleNamespace(name="t", task_id=task))
    monkeypatch.setattr(collect_workers, "LiberoEnv", FakeTaskEnv)
    monkeypatch.setattr(collect_workers, "_collect_number", lambda env, cfg, number: collected.append(number))
    collect_workers.collect_share(settings(tmp_path, episodes_per_task=5), collect_workers.Share(0, 0, 1))
    assert collected == [0]


def tell_and_end(cfg, share, tell):
    """In place of `collect_share`; task 3 dies after its line."""
    tell(f"task {share.task_id}: collected")
    if share.task_id == 3:
        os._exit(9)


def test_what_the_processes_tell_is_said_and_one_that_dies_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collect_workers, "collect_share", tell_and_end)
    with pytest.raises(CollectionError, match=r"died: task 3 \(exit code 9\); finished"):
        collect_workers.run_processes(settings(tmp_path, num_workers=2))
    assert sorted(capsys.readouterr().out.splitlines()) == ["task 0: collected", "task 3: collected"]


def test_a_collection_that_was_killed_anywhere_goes_on(tmp_path):
    """Before every call that changes the file system."""
    script, root = Path(__file__).with_name("collect_kills.py"), Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    # pathlib of Python 3.10 keeps the functions of os that it found when it was imported: its calls are no kill points.
    assert int(done.stdout.splitlines()[-1]) > (20 if sys.version_info >= (3, 11) else 10)


def test_finished_episodes_are_ordered_and_restricted_to_the_run(tmp_path):
    cfg = settings(tmp_path)
    for task, number in ((3, 1), (0, 1), (0, 0), (5, 0), (0, 7)):
        write_scratch(cfg, task, number)
    names = [f"{path.parent.name}/{path.stem}" for path in finished_episodes(cfg)]
    assert names == ["task_000/episode_00000", "task_000/episode_00001", "task_003/episode_00001"]
    assert collection_report(cfg)["0"]["noisy_episodes"] == 1


def test_task_ids_outside_the_suite_are_refused(tmp_path, without_simulator):
    with pytest.raises(ValueError, match=r"tasks 0\.\.9"):
        collect(settings(tmp_path, task_ids=(3, 10)))


def test_command_line(tmp_path):
    text = f"--task_suite_name libero_object --task_ids 0,3 --output_dir {tmp_path} --dataset_name d"
    more = "--render_mode published --noise_std 0.15 --initial_states standard:0-29"
    cfg = parse_arguments(f"{text} {more}".split())
    assert cfg.task_ids == (0, 3) and cfg.render_mode.value == "published" and cfg.noise_std == 0.15
    assert (cfg.episodes_per_task, cfg.image_size, cfg.jpeg_quality) == (40, 96, 95)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--task_ids 0,x", "--task_ids: .* found '0,x'"),
        ("--task_ids 0,10", r"--task_ids: libero_object has tasks 0\.\.9"),
        ("--task_ids 0,0", "--task_ids: .* distinct"),
        ("--task_ids=", "--task_ids: found none"),
        ("--initial_states standard:0-50", "--initial_states .* 50 standard states"),
        ("--output_dir /dev/null", "--output_dir /dev/null"),
        ("--dataset_name ../x", "--dataset_name"),
        ("--init_noise_mm nan", "--init_noise_mm is nan"),
        ("--render_mode lasy", "did you mean lazy"),
        ("--num_worker 2", "did you mean --num_workers"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path, without_simulator, capsys, change, said):
    words = ["--task_suite_name", "libero_object", "--task_ids", "0", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        collect_demos.main([*words, "--dataset_name", "d", *change.split()])
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.err.count("\n") == 1 and re.search(said, shown.err), shown.err
    assert without_simulator == [] and list(tmp_path.iterdir()) == []


def test_a_fault_is_one_line_with_another_code(tmp_path, without_simulator, capsys):
    words = ["--task_suite_name", "libero_object", "--task_ids", "0", "--output_dir", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        collect_demos.main([*words, "--dataset_name", "d"])  # nobody collects anything
    assert ended.value.code == 1 and "no episode of task 0" in capsys.readouterr().err


@pytest.mark.simulator
@pytest.mark.slow
def test_collecting_one_episode_end_to_end_and_resuming(tmp_path):
    cfg = settings(tmp_path, task_ids=(3,), episodes_per_task=1, image_size=32, num_workers=1)
    episode = RLDSReader(collect(cfg)).episode(0)
    assert episode.instruction == "pick up the bbq sauce and place it in the basket"
    assert episode.file_path.startswith("libero_object/pick_up_the_bbq_sauce_and_place_it_in_the_basket/")
    assert np.linalg.norm(episode.actions[:, :6], axis=1).min() >= 1e-4
    assert set(np.unique(episode.actions[:, 6])) == {-1.0, 1.0}
    assert decode_jpeg(episode.images["wrist_image"][0]).shape == (32, 32, 3)
    scratch = finished_episodes(cfg)[0]
    stamp = scratch.stat().st_mtime_ns
    collect_workers.collect_share(cfg, run_shares(cfg)[0])  # nothing is missing: returns at once
    assert scratch.stat().st_mtime_ns == stamp
