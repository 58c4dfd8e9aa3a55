"""Where policy, demonstrations and simulator of an evaluation come from."""

from __future__ import annotations

import sys
from typing import Any

from experiments.robot.libero.controls import Control
from experiments.robot.libero.episode import EnvSettings
from experiments.robot.libero.eval_config import EvalConfig, EvalInputError
from prismatic.model_files import CheckpointError
from prismatic.training.folder_kinds import check_is_checkpoint


class LiberoBackend:
    """The real policy, data sets and simulator. Imports happen where they are needed."""

    def check_machine(self, cfg: EvalConfig) -> None:
        """The device of the policy, and the renderer unless nobody looks."""
        from experiments.robot.libero.simulator import require

        if cfg.control is not Control.REPLAY:
            usable_device(cfg.device)
        require(render=cfg.renders())

    def check_policy(self, cfg: EvalConfig) -> None:
        """What can be seen of the checkpoint without loading it, or of the demonstrations. Raises EvalInputError."""
        if cfg.control is Control.REPLAY:
            assert cfg.replay_dataset is not None  # `--control replay` needs it
            for line in self.open_demonstrations(cfg.replay_dataset).warnings:
                print(f"warning: --replay_dataset: {line}", file=sys.stderr)
            return
        try:
            check_is_checkpoint(cfg.pretrained_checkpoint)
        except CheckpointError as error:
            raise EvalInputError(f"--pretrained_checkpoint: {error}") from error

    def load_policy(self, cfg: EvalConfig) -> Any:
        """`VLAPolicy` from the checkpoint directory, on `cfg.device` or the best device there is.

        Raises EvalInputError for a checkpoint that cannot be used.
        """
        from experiments.robot.policy import VLAPolicy
        from prismatic.vla.datasets.registry import load_data_set_file

        device = usable_device(cfg.device)
        if cfg.data_set_file is not None:
            load_data_set_file(cfg.data_set_file)
        options = {"num_images": cfg.num_images_in_input, "base": cfg.base_checkpoint, "robot": cfg.robot_platform}
        try:
            return VLAPolicy.from_checkpoint(cfg.pretrained_checkpoint, device, cfg.statistics_key(), **options)
        except KeyError as error:
            raise EvalInputError(f"--unnorm_key: checkpoint {cfg.pretrained_checkpoint}: {error.args[0]}") from error
        except (ValueError, OSError) as error:
            raise EvalInputError(f"--pretrained_checkpoint: {error}") from error

    def open_demonstrations(self, path: str) -> Any:
        """`Recordings` of one data set."""
        from experiments.robot.libero.recordings import Recordings

        try:
            return Recordings(path)
        except (OSError, ValueError, KeyError) as error:
            text = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise EvalInputError(f"--replay_dataset {path}: {text}") from error

    def task_count(self, suite: str) -> int:
        """Number of tasks of the suite."""
        from experiments.robot.libero.tasks import task_count

        return task_count(suite)

    def load_task(self, suite: str, task_id: int) -> Any:
        """`LiberoTask`."""
        from experiments.robot.libero.tasks import load_task

        return load_task(suite, task_id)

    def max_steps(self, suite: str) -> int:
        """Step limit of the suite, or of the suite it is derived from."""
        from experiments.robot.libero.tasks import max_episode_steps

        return max_episode_steps(suite)

    def make_env(self, task: Any, settings: EnvSettings) -> Any:
        """`LiberoEnv`."""
        from experiments.robot.libero.simulator import LiberoEnv

        return LiberoEnv(task, settings.image_size, settings.render_mode, settings.render, settings.reset_mode)

    def versions(self) -> dict[str, str]:
        """Simulator packages, torch, transformers, python and the GL backend."""
        from importlib.metadata import PackageNotFoundError, version

        from experiments.robot.libero.simulator import simulator_versions

        found = dict(simulator_versions())
        for name in ("torch", "transformers"):
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "not installed"
        return found | {"python": ".".join(map(str, sys.version_info[:3]))}


def usable_device(wanted: str | None) -> str:
    """The device of `--device`; None: cuda when there is one, else cpu.

    Raises:
        EvalInputError: torch knows no such device, or this machine has none.
    """
    from craft_vla import policy

    try:
        return str(policy.usable_device(wanted))
    except ValueError as error:
        raise EvalInputError(f"--{error}") from error
