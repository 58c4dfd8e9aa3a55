"""The episode protocol, in the toy world."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fake_libero_world import FakeBackend, FakeEnv, FakePolicy, FakeTask

from experiments.robot.libero.controls import WAIT_ACTION, PolicyActor, ReplayActor
from experiments.robot.libero.episode import EpisodeLimits, run_episode
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from experiments.robot.libero.initial_states import read_initial_states


def fresh_env(**kwargs) -> FakeEnv:
    env = FakeEnv(FakeTask(0, "x", np.zeros((1, 2))), SimpleNamespace(render=True), **kwargs)
    env.reset(np.zeros(2), 0)
    return env


def actor(speed: float, steps: int = 8) -> PolicyActor:
    made = PolicyActor(FakePolicy(speed), steps)
    made.reset("x")
    return made


def test_waiting_steps_come_first_and_their_done_is_ignored():
    env = fresh_env(wait_done=True)
    rollout = run_episode(env, actor(0.001), EpisodeLimits(10, 5))
    np.testing.assert_array_equal(env.actions[:10], np.tile(WAIT_ACTION, (10, 1)))
    assert not rollout.success and len(env.actions) == 15 and rollout.steps == 5


def test_success_is_the_first_done():
    env = fresh_env()
    rollout = run_episode(env, actor(0.05), EpisodeLimits(10, 220))
    expected = next(n for n in range(1, 30) if np.cumsum(np.full(n, 0.05))[-1] >= 1.0)
    assert rollout.success and rollout.steps == expected and len(env.actions) == 10 + expected


@pytest.mark.parametrize(("chunk", "queries"), [(8, 3), (5, 4), (1, 20)])
def test_the_policy_is_asked_only_when_the_queue_is_empty(chunk, queries):
    env = fresh_env()
    rollout = run_episode(env, actor(0.001, chunk), EpisodeLimits(10, 20))
    assert len(rollout.query_s) == queries == env.observations and rollout.frames == []


def test_frames_at_the_interval_cost_no_second_observation():
    env = fresh_env()
    rollout = run_episode(env, actor(0.001), EpisodeLimits(10, 20, frame_interval=1))
    assert env.observations == 20 == len(rollout.frames) and len(rollout.query_s) == 3
    env = fresh_env()
    rollout = run_episode(env, actor(0.001), EpisodeLimits(10, 20, frame_interval=8))
    assert env.observations == 3 == len(rollout.frames)


def test_replay_without_video_never_observes():
    env = fresh_env()
    replay = ReplayActor(np.tile([0.05, 0, 0, 0, 0, 0, 1.0], (30, 1)), 8)
    assert run_episode(env, replay, EpisodeLimits(10, 40)).success and env.observations == 0


def test_initial_states_are_taken_by_index():
    task = FakeBackend().load_task("toy", 1)
    states = read_initial_states(EvalConfig(num_trials_per_task=2, initial_state_offset=3), task)
    assert list(states) == [3, 4]
    np.testing.assert_array_equal(states[3], task.init_states[3])
    with pytest.raises(EvalInputError, match="6 initial states"):
        read_initial_states(EvalConfig(num_trials_per_task=4, initial_state_offset=3), task)
