"""Settings of evaluations in the toy world."""

from __future__ import annotations

import pytest

from experiments.robot.libero.eval_config import EvalConfig
from experiments.robot.libero.modes import RenderMode
from experiments.robot.libero.video import SaveVideos


@pytest.fixture
def cfg(tmp_path) -> EvalConfig:
    checkpoint = tmp_path / "run--5_chkpt"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    return EvalConfig(
        pretrained_checkpoint=str(checkpoint),
        task_suite_name="toy_suite",
        num_trials_per_task=3,
        local_log_dir=str(tmp_path / "logs"),
        results_dir=str(tmp_path / "results"),
        rollout_dir=str(tmp_path / "rollouts"),
        save_videos=SaveVideos.NONE,
        render_mode=RenderMode.LAZY,
    )
