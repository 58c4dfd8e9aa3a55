"""The simulator against recorded demonstrations: orientation, order of the cameras, and replay."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from experiments.robot.doctor.demonstrations import (
    CAMERAS,
    DataSet,
    DemonstrationPolicy,
    RecordedStart,
    recorded_starts,
    thumbnail,
)
from experiments.robot.doctor.findings import Check, Status, judge
from experiments.robot.libero import simulator
from experiments.robot.libero.controls import PolicyActor
from experiments.robot.libero.episode import EpisodeLimits, run_episode
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.tasks import load_task, task_count
from prismatic.vla.datasets.dataset_part import left_out_lines
from prismatic.vla.datasets.inspect_checks import check_for_training
from prismatic.vla.datasets.registry import LiberoStandardization
from prismatic.vla.datasets.source import DataSetError

MAX_EPISODES = 5
"""Recorded first frames that the simulator's is compared with."""
MARGIN = 1.3
"""The runner-up must differ this many times as much as the best match for the answer to be clear."""
OPEN_LOOP_STEPS = 8
REPLAYS = 2

_TURNS = ("upright", "turned left", "rotated by 180 degrees", "turned right")


def data_checks(data: DataSet) -> list[Check]:
    """Gripper and conventions in the data, and the simulator's images against the recorded ones."""
    return [
        Check(
            "gripper of the data",
            "the fingers close after the raw action that closes (+1 in LIBERO) and open after the other",
            "nothing is ever grasped: 0 %",
            lambda: _recorded_gripper(data),
        ),
        Check(
            "conventions of the data",
            "values, images and control rate as the data set is registered",
            "training refuses contradictions; the rest is learned as it is",
            lambda: _conventions(data),
        ),
        Check(
            "images against data",
            "both cameras look most alike upright and in the given order",
            "a policy that has never seen such images: near 0 % (a vertical flip or a missing rotation is silent)",
            lambda: _orientation(data),
        ),
    ]


def replay_check(data: DataSet) -> Check:
    """Two demonstrations through the evaluator's action path."""
    return Check(
        "replay",
        f"{REPLAYS} of {REPLAYS} scripted demonstrations succeed, from observation to un-normalised action",
        "no policy can do better than a demonstration that fails",
        lambda: _replay(data),
    )


def _recorded_gripper(data: DataSet) -> tuple[Status, str]:
    convention = data.config.standardize
    if not isinstance(convention, LiberoStandardization):
        return Status.SKIP, f"{data.name} is registered with other conventions than LIBERO's"
    sign = np.sign(convention.closes - convention.opens)
    middle, quarter = (convention.closes + convention.opens) / 2, abs(convention.closes - convention.opens) / 4
    closing, opening = [], []
    for index in np.flatnonzero(data.source.lengths)[:MAX_EPISODES].tolist():
        state, actions = data.source.state(index), data.source.actions(index)
        width = np.diff(state[:, 6] - state[:, 7])
        command = sign * (actions[:-1, 6] - middle)
        closing += width[command > quarter].tolist()
        opening += width[command < -quarter].tolist()
    if not closing or not opening:
        return Status.WARN, "the data hold no closing or no opening command"
    text = (
        f"mean change per step {1000 * np.mean(closing):+.2f} mm after {convention.closes:+g}, "
        f"{1000 * np.mean(opening):+.2f} after {convention.opens:+g}"
    )
    return judge(np.mean(closing) < np.mean(opening), text)


def _conventions(data: DataSet) -> tuple[Status, str]:
    try:
        lines = check_for_training(data.source, data.config, data.name)
    except DataSetError as error:
        return Status.FAIL, str(error)
    lines = [*left_out_lines(data.left_out, len(data)), *data.source.warnings, *lines]
    return (Status.WARN, "; ".join(lines)) if lines else (Status.OK, "nothing stands out")


def _first_frames(data: DataSet) -> tuple[Any, dict[str, list[np.ndarray]]]:
    """Task with the most usual first instruction, and thumbnails of its first recorded frames per camera."""
    assert data.suite is not None  # checked by the caller
    tasks = [load_task(data.suite, number) for number in range(task_count(data.suite))]
    by_language = {task.language.lower(): task for task in tasks}
    task = None
    frames: dict[str, list[np.ndarray]] = {camera: [] for camera in CAMERAS}
    for index in np.flatnonzero(data.source.lengths).tolist():
        found = by_language.get(data.source.instructions[index].strip().lower())
        task = task or found
        if found is None or found is not task:
            continue
        for number, camera in enumerate(CAMERAS):
            frames[camera].append(thumbnail(data.picture(number, index, 0)))
        if len(frames[CAMERAS[0]]) == MAX_EPISODES:
            break
    return task, frames


def _orientation(data: DataSet) -> tuple[Status, str]:
    if data.suite is None:
        return Status.SKIP, f"{data.name}: the suite is not known (--suite)"
    if len(data.source.keys.cameras) < len(CAMERAS):
        return Status.SKIP, f"{data.name} has the cameras {data.source.keys.cameras}, LIBERO two"
    task, frames = _first_frames(data)
    if task is None:
        return Status.SKIP, f"{data.name}: no instruction of {data.suite}"
    env = simulator.LiberoEnv(task, 96, RenderMode.LAZY, reset_mode=ResetMode.SOFT)
    try:
        env.reset(task.init_states[0], seed=0)
        env.settle()
        seen = env.observe()
    finally:
        env.close()
    views = {"image": thumbnail(seen.image), "wrist_image": thumbnail(seen.wrist_image)}
    found = [best_match(views, frames[camera]) for camera in CAMERAS]
    texts = [
        f"{camera} <- {view}, {how} ({ratio:.1f} times)"
        for camera, (view, how, ratio) in zip(CAMERAS, found, strict=True)
    ]
    right = all((view, how) == (camera, "upright") for camera, (view, how, _) in zip(CAMERAS, found, strict=True))
    if right and min(ratio for _, _, ratio in found) < MARGIN:
        return Status.WARN, f"{', '.join(texts)}: not clear"
    return judge(right, ", ".join(texts))


def best_match(views: dict[str, np.ndarray], frames: list[np.ndarray]) -> tuple[str, str, float]:
    """Which simulated view, turned or mirrored how, looks most like the recorded frames.

    Args:
        views: camera -> (S, S, 3) of the simulator.
        frames: (S, S, 3) each, recorded.

    Returns:
        (camera, orientation in words, difference of the runner-up divided by that of the match).
    """
    scores = []
    for (camera, view), turns, mirrored in itertools.product(views.items(), range(4), (False, True)):
        changed = np.rot90(view[:, ::-1] if mirrored else view, turns)
        difference = float(np.mean([np.abs(changed - frame).mean() for frame in frames]))
        scores.append((difference, camera, _words(turns, mirrored)))
    (best, camera, how), (second, _, _) = sorted(scores)[:2]
    return camera, how, second / max(best, 1e-9)


def _words(turns: int, mirrored: bool) -> str:
    if not mirrored:
        return _TURNS[turns]
    return {0: "mirrored left-right", 2: "mirrored top-bottom"}.get(turns, f"mirrored and {_TURNS[turns]}")


def _replay(data: DataSet) -> tuple[Status, str]:
    starts = recorded_starts(data)[:REPLAYS]
    if len(starts) < REPLAYS:
        return Status.SKIP, f"{data.name} does not record the starts of {REPLAYS} episodes without noise"
    outcomes = []
    for start in starts:
        env = replay_env(data, start)
        try:
            outcomes.append(replay_episode(env, data, start))
        finally:
            env.close()
    texts = [f"episode {start.episode}: {text}" for start, (_, text) in zip(starts, outcomes, strict=True)]
    return judge(all(success for success, _ in outcomes), "; ".join(texts))


def replay_env(data: DataSet, start: RecordedStart) -> simulator.LiberoEnv:
    """The environment a demonstration was recorded in."""
    task = load_task(data.metadata["task_suite_name"], start.task_id)
    mode = RenderMode(data.metadata["render_mode"])
    reset_mode = ResetMode(data.metadata.get("reset_mode", ResetMode.HARD.value))
    return simulator.LiberoEnv(task, data.metadata["image_size"], mode, reset_mode=reset_mode)


def replay_episode(env: simulator.LiberoEnv, data: DataSet, start: RecordedStart) -> tuple[bool, str]:
    """Run one demonstration as the evaluator runs a policy.

    Returns:
        (success, what happened in words).
    """
    assert data.reader is not None  # only RLDS records starts
    episode = data.reader.episode(start.episode)
    policy = DemonstrationPolicy(episode)
    number = start.start.standard_state
    env.reset(None if number is None else env.task.init_states[number], seed=start.start.seed)
    actor = PolicyActor(policy, OPEN_LOOP_STEPS)
    actor.reset(env.task.language)
    rollout = run_episode(env, actor, EpisodeLimits(simulator.SETTLE_STEPS, len(episode) + OPEN_LOOP_STEPS))
    if rollout.success:
        return True, f"success after {rollout.steps} steps"
    return False, policy.problem or f"no success in {rollout.steps} steps"
