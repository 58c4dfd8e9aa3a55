"""Initial states of the trials: the benchmark's own, or those of a published metainfo JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from experiments.robot.libero.eval_config import DEFAULT_INITIAL_STATES, EvalConfig, EvalInputError
from prismatic.evidence.checks import FOREIGN, read_object


def read_initial_states(cfg: EvalConfig, task: Any) -> dict[int, np.ndarray | None]:
    """Initial states of the requested trials of one task.

    The index is that of the benchmark's initial state, or of `demo_<index>` in the JSON
    `{task_with_underscores: {demo_<i>: {"success": bool, "initial_state": [...]}}}`.

    Args:
        cfg: uses initial_states_path, initial_state_offset, num_trials_per_task.
        task: task with `language` and `init_states` (n, d).

    Returns:
        {index: (d,) float64, or None for a demonstration that failed (the trial is skipped)} in ascending order.

    Raises:
        EvalInputError: more trials than there are initial states, or a malformed file.
    """
    wanted = range(cfg.initial_state_offset, cfg.initial_state_offset + cfg.num_trials_per_task)
    if cfg.initial_states_path != DEFAULT_INITIAL_STATES:
        return _from_json(cfg.initial_states_path, task.language.replace(" ", "_"), wanted)
    available = len(task.init_states)
    if wanted.stop > available:
        raise EvalInputError(
            f"--num_trials_per_task {cfg.num_trials_per_task} from --initial_state_offset {cfg.initial_state_offset}: "
            f"{cfg.task_suite_name} task {task.task_id} has {available} initial states (0..{available - 1})"
        )
    return {index: np.asarray(task.init_states[index], dtype=np.float64) for index in wanted}


def _from_json(path: str, task_key: str, wanted: range) -> dict[int, np.ndarray | None]:
    try:
        tasks = read_object(Path(path), limits=FOREIGN)
    except (OSError, ValueError) as error:
        raise EvalInputError(f"--initial_states_path {error}") from error
    if task_key not in tasks:
        raise EvalInputError(f"--initial_states_path {path}: expected task {task_key!r}, found: {', '.join(tasks)}")
    return {index: _one_state(tasks[task_key], f"demo_{index}", f"{path}: {task_key}") for index in wanted}


def _one_state(demos: Any, key: str, where: str) -> np.ndarray | None:
    demo = demos.get(key) if isinstance(demos, dict) else None
    if not isinstance(demo, dict) or not {"success", "initial_state"} <= set(demo):
        found = sorted(demo) if isinstance(demo, dict) else _described(demos)
        raise EvalInputError(f"{where}: expected {key} with success and initial_state, found {found}")
    if not isinstance(demo["success"], bool):
        raise EvalInputError(f"{where}: {key}: success: expected true or false, found {demo['success']!r}")
    if not demo["success"]:
        return None
    try:
        state = np.asarray(demo["initial_state"], dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise EvalInputError(f"{where}: {key}: initial_state: expected numbers (d,): {error}") from error
    if state.ndim != 1 or not np.isfinite(state).all():
        raise EvalInputError(f"{where}: {key}: initial_state: expected finite numbers (d,), found shape {state.shape}")
    return state


def _described(demos: Any) -> str:
    return f"{len(demos)} demonstrations without it" if isinstance(demos, dict) else f"a {type(demos).__name__}"
