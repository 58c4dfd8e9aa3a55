"""Flags of the LIBERO evaluation and their validation.

The published flags keep their names. A flag whose value the checkpoint decides (`center_crop`, `use_proprio`, ...)
defaults to None, "as the checkpoint says"; given explicitly it must agree with the checkpoint (`policy_facts.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from experiments.robot.libero.controls import Control
from experiments.robot.libero.simulator import RenderMode, ResetMode
from experiments.robot.libero.suites import LanguageSource, resolve_language_source, split_suite
from experiments.robot.libero.video import SaveVideos

DEFAULT_INITIAL_STATES = "DEFAULT"


class EvalInputError(ValueError):
    """A flag, path, task or checkpoint the evaluation cannot work with; the message names it."""


@dataclass
class EvalConfig:
    """Command line of `run_libero_eval.py`."""

    # --- Model (published flags) ---
    # Names the log file only.
    model_family: str = "openvla"
    # Checkpoint directory. Not needed for `--control replay`.
    pretrained_checkpoint: str = ""
    # The only action head there is; False is an error.
    use_l1_regression: bool = True
    # Accepted because published commands spell them out; the unsupported values are errors.
    use_film: bool = False
    use_minivlm: bool = True
    num_diffusion_steps: int = 50
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    # None: as the checkpoint says. An explicit value that differs from the checkpoint is an error.
    num_images_in_input: int | None = None
    use_proprio: bool | None = None
    center_crop: bool | None = None
    use_pro_version: bool | None = None
    # Actions executed of each predicted chunk before the policy is asked again.
    num_open_loop_steps: int = 8
    # Key of the normalisation statistics. Empty: the suite's name, or `<suite>_no_noops`.
    unnorm_key: str = ""
    phase: str = "Inference"

    # --- LIBERO (published flags) ---
    task_suite_name: str = "libero_spatial"
    # Idle control steps before the first query, so that dropped objects come to rest.
    num_steps_wait: int = 10
    num_trials_per_task: int = 50
    # DEFAULT: the benchmark's own; or a JSON {task_with_underscores: {demo_i: {success, initial_state}}}.
    initial_states_path: str = DEFAULT_INITIAL_STATES
    # Pixels, square, of the rendered cameras. None: as in the checkpoint's training data where recorded, else 256.
    env_img_res: int | None = None

    # --- Output (published flags) ---
    run_id_note: str | None = None
    local_log_dir: str = "./experiments/logs"
    use_wandb: bool = False
    wandb_entity: str = "your-wandb-entity"
    wandb_project: str = "your-wandb-project"
    # Seeds python, numpy and torch before every episode; the environment itself is always seeded with 0.
    seed: int = 7
    # Folder name below `rollout_dir`.
    save_version: str = "vla-adapter"

    # --- Which episodes ---
    # Comma-separated task numbers, e.g. "0,3"; empty: all tasks of the suite.
    task_ids: str = ""
    # Index of the first initial state: trials use offset .. offset + num_trials_per_task - 1.
    initial_state_offset: int = 0
    # Where instructions come from: filename or bddl. None: bddl for the `_lan` and `_task` suites, else filename.
    language_source: LanguageSource | None = None
    # Radius (mm) of the disc from which each movable object's extra displacement is drawn; 0: none.
    init_noise_mm: float = 0.0

    # --- How they run ---
    # 0: one episode after the other in this process, as published. More: this many simulator processes, which share
    # the policy of this process; every episode ends the same.
    num_workers: int = 0
    # True: observations that wait for the policy at the same time share one forward pass. Faster on a GPU, but actions
    # then depend in their last bits on what else was waiting. False: one by one.
    batch_inference: bool = False
    # "2/3": only the second third of the episodes (episode numbers 2, 5, 8, ...); `merge_shards` joins the results.
    shard: str | None = None
    # A worker that reports nothing for this long is ended and its episode tried once more.
    worker_timeout_s: float = 3600.0
    # Give up after this many errors in a row: a broken renderer would otherwise grind through all episodes.
    max_consecutive_errors: int = 10
    # None: as in the checkpoint's training data where recorded, else `published`.
    render_mode: RenderMode | None = None
    # `hard` rebuilds the simulation model before every episode, as published; `soft` returns to the state a hard reset
    # leaves: the same episodes bit for bit, without the seconds of rebuilding.
    reset_mode: ResetMode = ResetMode.SOFT
    # None: cuda when there is one, else cpu.
    device: str | None = None

    # --- Videos ---
    save_videos: SaveVideos = SaveVideos.ALL
    # Videos per task; None: no limit (`first`: 1).
    max_videos: int | None = None
    # Control steps per video frame. None: one per query, which needs no further image; each other frame costs one.
    video_frame_interval: int | None = None
    rollout_dir: str = "./rollouts"

    # --- Controls ---
    # none, replay, blind (grey_images) or frozen (frozen_image).
    control: Control = Control.NONE
    # RLDS data set directory (.../<name>/1.0.0) for `--control replay`.
    replay_dataset: str | None = None
    # Episode index; None: for each task the first episode with its instruction.
    replay_episode: int | None = None
    # Comma-separated results folders of control runs on the same episodes: their rates go into results.json.
    control_results: str = ""

    # --- Results ---
    # Folder of episodes.jsonl and results.json; None: `<local_log_dir>/<run id>`.
    results_dir: str | None = None
    # True: continue an existing results_dir, skipping the episodes it holds.
    resume: bool = False

    def validate(self) -> None:
        """Check everything that needs neither simulator nor checkpoint.

        Raises:
            EvalInputError: naming the flag, what was found and what was expected.
        """
        _check_supported(self)
        _check_counts(self)
        _check_paths(self)
        self.shard_part()

    def task_id_list(self, num_tasks: int) -> list[int]:
        """Selected task numbers in ascending order, without repetition.

        Args:
            num_tasks: number of tasks of the suite.

        Raises:
            EvalInputError: a task id that is no number, or outside 0 .. num_tasks-1, or given twice.
        """
        if not self.task_ids.strip():
            return list(range(num_tasks))
        words = [word.strip() for word in self.task_ids.strip("[]() ").split(",")]
        if not all(word.isdigit() for word in words):
            raise EvalInputError(f"--task_ids: expected comma-separated task numbers, found {self.task_ids!r}")
        ids = sorted(int(word) for word in words)
        if ids[-1] >= num_tasks or len(set(ids)) != len(ids):
            raise EvalInputError(
                f"--task_ids: expected distinct tasks of {self.task_suite_name} (0..{num_tasks - 1}), "
                f"found {self.task_ids!r}"
            )
        return ids

    def resolved_language_source(self) -> LanguageSource:
        """The flag, or what the suite needs."""
        return resolve_language_source(self.task_suite_name, self.language_source)

    def shard_part(self) -> tuple[int, int]:
        """(part, parts) of `--shard`, part counted from 1; (1, 1) without.

        Raises:
            EvalInputError: not of the form "2/3", or a part that does not exist.
        """
        if self.shard is None:
            return 1, 1
        words = self.shard.split("/")
        if len(words) == 2 and all(word.strip().isdigit() for word in words):
            part, parts = int(words[0]), int(words[1])
            if 1 <= part <= parts:
                return part, parts
        raise EvalInputError(f"--shard: expected part/parts such as 1/3 (the first is 1), found {self.shard!r}")

    def statistics_key(self) -> str:
        """Name of the normalisation statistics to ask the checkpoint for.

        A perturbed suite (`libero_goal_swap`) uses the statistics of the suite it is derived from.
        """
        if self.unnorm_key:
            return self.unnorm_key
        return split_suite(self.task_suite_name)[0] or self.task_suite_name


def _check_supported(cfg: EvalConfig) -> None:
    fixed = {
        "use_l1_regression": (True, "the L1 regression head is the only action head"),
        "use_film": (False, "FiLM is not implemented"),
        "use_minivlm": (True, "only the Qwen prompt of the small VLM is implemented"),
        "load_in_8bit": (False, "quantised loading is not implemented"),
        "load_in_4bit": (False, "quantised loading is not implemented"),
        "phase": ("Inference", "other phases add training noise to the action head"),
    }
    for name, (expected, reason) in fixed.items():
        found = getattr(cfg, name)
        if found != expected:
            raise EvalInputError(f"--{name} {found}: expected {expected} ({reason})")


def _check_counts(cfg: EvalConfig) -> None:
    minimum = {
        "num_open_loop_steps": 1,
        "num_steps_wait": 0,
        "num_trials_per_task": 1,
        "env_img_res": 16,
        "initial_state_offset": 0,
        "num_workers": 0,
        "max_consecutive_errors": 1,
        "max_videos": 0,
        "video_frame_interval": 1,
        "replay_episode": 0,
        "worker_timeout_s": 1,
        "init_noise_mm": 0,
    }
    for name, low in minimum.items():
        value = getattr(cfg, name)
        if value is not None and value < low:
            raise EvalInputError(f"--{name}: expected at least {low}, found {value}")


def _check_paths(cfg: EvalConfig) -> None:
    if cfg.resume and not cfg.results_dir:
        raise EvalInputError("--resume True: expected --results_dir, the folder to continue; found none")
    if (cfg.control is Control.REPLAY) != (cfg.replay_dataset is not None):
        raise EvalInputError(
            f"--control {cfg.control.value} with --replay_dataset {cfg.replay_dataset}: "
            "replay needs a data set, the other controls use none"
        )
    if cfg.control is not Control.REPLAY and not cfg.pretrained_checkpoint:
        raise EvalInputError("--pretrained_checkpoint: expected a checkpoint directory, found nothing")
    if "image_aug" in cfg.pretrained_checkpoint and cfg.center_crop is False:
        raise EvalInputError(
            f"--center_crop False: {cfg.pretrained_checkpoint} was trained with image augmentation (random crops of "
            "90 % area), which needs the centre crop at evaluation"
        )
    if cfg.initial_states_path != DEFAULT_INITIAL_STATES and not os.path.isfile(cfg.initial_states_path):
        raise EvalInputError(f"--initial_states_path: no such file: {cfg.initial_states_path}")
