"""Handing out episodes, and simulator processes that share one policy, in the toy world."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_libero_world import FakeBackend, FakePolicy, RaiseAt, comparable, lines_of, text_log

from experiments.robot.libero import scheduler
from experiments.robot.libero.episode import Job
from experiments.robot.libero.eval_config import EvalInputError
from experiments.robot.libero.eval_log import EpisodeStatus, PlannedEpisode
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.scheduler import EpisodeQueue
from experiments.robot.libero.video import SaveVideos

ROOT = Path(__file__).parents[2]


def jobs(*lengths: int, limit: int | None = None) -> list[Job]:
    return [Job(t, tuple(PlannedEpisode(i, i + 1) for i in range(n)), limit) for t, n in enumerate(lengths)]


@pytest.mark.parametrize("tasks", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [1, 2, 3, 5, 40])
def test_every_episode_is_handed_out_once_and_no_worker_idles(tasks, workers):
    queue = EpisodeQueue(jobs(*[5] * tasks))
    held: dict[int, int | None] = dict.fromkeys(range(workers))
    given = []
    while len(queue):
        for worker in range(workers):
            others = [task for other, task in held.items() if other != worker and task is not None]
            left = len(queue)
            assignment = queue.take(held[worker], others)
            assert (assignment is None) == (left == 0)
            if assignment is not None:
                held[worker] = assignment.task_id
                given.append((assignment.task_id, assignment.planned.init_idx))
    assert sorted(given) == [(task, index) for task in range(tasks) for index in range(5)]
    if workers == 1:
        assert given == sorted(given), "alone, task by task"


def test_a_worker_stays_with_its_task_and_helps_when_that_is_done():
    queue = EpisodeQueue(jobs(3, 1, 6))
    assert queue.take(None, []).task_id == 0
    assert queue.take(None, [0]).task_id == 1
    assert queue.take(0, [1]).task_id == 0
    assert queue.take(1, [0]).task_id == 2, "a task nobody holds comes before helping"
    assert queue.take(None, [0, 2]).task_id == 2, "the task with most episodes per worker"
    assert queue.take(None, [0, 2, 2, 2, 2, 2]).task_id == 0


def test_an_episode_put_back_is_the_next_of_its_task():
    queue = EpisodeQueue(jobs(3, limit=1), SaveVideos.ALL)
    first = queue.take(None)
    assert first.record_video and not queue.take(0).record_video
    queue.put_back(first)
    assert queue.take(0) == first


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_give_the_records_and_the_log_of_the_sequential_run(cfg, tmp_path, workers):
    mishap = RaiseAt([-0.05])
    evaluate(cfg, FakeBackend(mishap=mishap, limit=21))
    folders = {"results_dir": str(tmp_path / "many"), "local_log_dir": str(tmp_path / "logs_many")}
    many = replace(cfg, num_workers=workers, **folders)
    backend = FakeBackend(mishap=mishap, limit=21)
    results = evaluate(many, backend)
    assert comparable(many) == comparable(cfg) and text_log(many) == text_log(cfg)
    assert len(backend.policies) == 1 and not backend.envs, "one policy, here; environments elsewhere"
    assert results["policy_wait_share"] > 0
    for record in lines_of(many):
        assert len(record["query_latency_s"]) == record["n_queries"]


class BatchPolicy(FakePolicy):
    """Counts what it is asked together."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def predict(self, image, wrist_image, state, instruction):
        self.sizes.append(1)
        return super().predict(image, wrist_image, state, instruction)

    def predict_batch(self, requests):
        chunks = [self.predict(*request) for request in requests]
        self.sizes[-len(requests) :] = [len(requests)]
        return chunks


class BatchBackend(FakeBackend):
    def load_policy(self, cfg):
        self.policies.append(BatchPolicy())
        return self.policies[-1]


def wait_for_all(connections, timeout):
    """In place of `wait`: every worker has something to say before any of them is heard."""
    return [connection for connection in connections if connection.poll(None)]


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_waiting_queries_share_a_batch_only_when_asked_for(cfg, tmp_path, batched, monkeypatch):
    monkeypatch.setattr(scheduler, "wait", wait_for_all)
    evaluate(cfg, FakeBackend())
    many = replace(cfg, num_workers=3, batch_inference=batched, results_dir=str(tmp_path / "b"), run_id_note="b")
    backend = BatchBackend()
    evaluate(many, backend)
    assert (max(backend.policies[0].sizes) > 1) == batched
    left = {key: {**record, "fingerprint": ""} for key, record in comparable(many).items()}
    assert left == {key: {**record, "fingerprint": ""} for key, record in comparable(cfg).items()}
    assert (lines_of(many)[0]["fingerprint"] == lines_of(cfg)[0]["fingerprint"]) is not batched


class AngryPolicy(FakePolicy):
    def predict(self, image, wrist_image, state, instruction):
        if instruction.startswith("open") and state[0] < -0.04:
            raise ValueError("no\nway")
        return super().predict(image, wrist_image, state, instruction)


class AngryBackend(FakeBackend):
    def load_policy(self, cfg):
        return AngryPolicy()


@pytest.mark.slow
def test_an_exception_of_the_policy_belongs_to_the_episode_that_asked(cfg, tmp_path):
    evaluate(cfg, AngryBackend())
    many = replace(cfg, num_workers=2, results_dir=str(tmp_path / "b"), run_id_note="b")
    results = evaluate(many, AngryBackend())
    assert comparable(many) == comparable(cfg)
    errors = [record for record in lines_of(many) if record["status"] == EpisodeStatus.ERROR.value]
    assert {record["error"] for record in errors} == {"ValueError: no way"} and not results["valid"]


class RememberingBackend(FakeBackend):
    def load_policy(self, cfg):
        policy = FakePolicy()
        policy.reset = lambda: None
        return policy


def test_a_policy_with_memory_is_not_shared(cfg):
    with pytest.raises(EvalInputError, match="--num_workers 2.*--num_workers 0"):
        evaluate(replace(cfg, num_workers=2), RememberingBackend())


RUN = """
import sys, threading
from fake_libero_world import FakeBackend, FakePolicy
from experiments.robot.libero.eval_config import EvalConfig
from experiments.robot.libero.evaluation import evaluate
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.video import SaveVideos

class Slow(FakePolicy):
    def predict(self, *request):
        if len(self.seen) == 24:  # at least four of the 18 episodes are recorded, and the others never are
            threading.Event().wait()
        return super().predict(*request)

class SlowBackend(FakeBackend):
    def load_policy(self, cfg):
        return Slow()

if __name__ == "__main__":
    checkpoint, results, logs, workers = sys.argv[1:]
    evaluate(EvalConfig(pretrained_checkpoint=checkpoint, task_suite_name="toy_suite", num_trials_per_task=6,
        local_log_dir=logs, results_dir=results, save_videos=SaveVideos.NONE, render_mode=RenderMode.LAZY,
        num_workers=int(workers)), SlowBackend())
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_where_it_was_and_leaves_no_process(cfg, tmp_path, workers):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "libero")])}
    arguments = [cfg.pretrained_checkpoint, cfg.results_dir, str(tmp_path / "first"), str(workers)]
    process = subprocess.Popen([sys.executable, str(script), *arguments], env=environment, stdout=subprocess.DEVNULL)
    path = Path(cfg.results_dir) / "episodes.jsonl"
    while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= 4):
        time.sleep(0.01)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(children) >= workers
    before = path.read_text()
    assert before.count("\n") < 18, "the run was over before it was killed"
    whole = replace(cfg, num_trials_per_task=6)
    results = evaluate(replace(whole, resume=True, num_workers=workers), FakeBackend())
    assert results["valid"] and path.read_text().startswith(before[: before.rfind("\n") + 1])
    assert results["episodes_run"] == 18 - before.count("\n"), "only episodes in flight are run again"
    alone = replace(whole, results_dir=str(tmp_path / "alone"), run_id_note="alone")
    evaluate(alone, FakeBackend())
    assert comparable(whole) == comparable(alone)
    while any(Path(f"/proc/{child}").exists() for child in children):
        time.sleep(0.05)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_records_say_what_ran_where(cfg):
    evaluate(replace(cfg, task_suite_name="libero_goal_swap", unnorm_key="x"), FakeBackend())
    record = json.loads((Path(cfg.results_dir) / "episodes.jsonl").read_text().splitlines()[0])
    assert record["perturbation"] == "swap" and len(record["checkpoint_hash"]) == 16
    assert record["checkpoint"].endswith("@" + record["checkpoint_hash"])
    assert 0 <= record["policy_wait_share"] <= 1 and np.isfinite(record["query_latency_s"]).all()
