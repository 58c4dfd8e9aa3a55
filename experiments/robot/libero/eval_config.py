"""Flags of the LIBERO evaluation and their validation.

The published flags keep their names. A flag whose value the checkpoint decides (`center_crop`, `use_proprio`, ...)
defaults to None, "as the checkpoint says"; given explicitly it must agree with the checkpoint (`policy_facts.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from experiments.robot.libero.controls import Control
from experiments.robot.libero.modes import RenderMode, ResetMode
from experiments.robot.libero.suite_names import LanguageSource, resolve_language_source, split_suite
from experiments.robot.libero.video import SaveVideos
from prismatic.command_line import (
    ForeignFlag,
    UsageError,
    check_switches,
    check_values,
    flag,
    flag_like,
    given_flags,
    parse,
    require_package,
)
from prismatic.model_files import BASE_CHECKPOINT, ROBOT_PLATFORM
from prismatic.output_folder import check_folder
from prismatic.training.flags import TrackingFlags
from prismatic.training.writers import require_services
from prismatic.vla.datasets.format_table import PLACE

DEFAULT_INITIAL_STATES = "DEFAULT"


EvalInputError = UsageError
"""A flag, path, task or checkpoint the evaluation cannot work with; the message names it."""


@dataclass
class EvalConfig:
    """Command line of `run_libero_eval.py`."""

    # --- Model (published flags)
    model_family: str = flag("openvla", "Names the log file only.", is_name=True)
    pretrained_checkpoint: str = flag(
        "", "Checkpoint directory. `--control replay` only takes from it how images are made, and does without."
    )
    use_l1_regression: bool = flag(True, "The only action head there is; False is an error.")
    use_film: bool = flag(
        False, "Accepted because published commands spell them out; the unsupported values are errors."
    )
    use_minivlm: bool | None = flag(None, "True: Qwen body; False: llama body. None: as the checkpoint says.")
    num_diffusion_steps: int = flag(50, at_least=0)
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    num_images_in_input: int | None = flag(
        None,
        "None: as the checkpoint says. An explicit value that differs from the checkpoint is an error.",
        at_least=1,
    )
    use_proprio: bool | None = None
    center_crop: bool | None = None
    use_pro_version: bool | None = None
    num_open_loop_steps: int = flag(
        8, "Actions executed of each predicted chunk before the policy is asked again.", at_least=1
    )
    unnorm_key: str = flag("", "Key of the normalisation statistics. Empty: the suite's name, or `<suite>_no_noops`.")
    phase: str = "Inference"
    data_set_file: str | None = flag(None, "Python file that registers data sets of your own (docs/datasets.md)")
    robot_platform: str | None = flag(None, ROBOT_PLATFORM)
    base_checkpoint: str | None = flag(None, BASE_CHECKPOINT)

    # --- LIBERO (published flags)
    task_suite_name: str = "libero_spatial"
    num_steps_wait: int = flag(
        10, "Idle control steps before the first query, so that dropped objects come to rest.", at_least=0
    )
    num_trials_per_task: int = flag(50, at_least=1)
    initial_states_path: str = flag(
        DEFAULT_INITIAL_STATES,
        "DEFAULT: the benchmark's own; or a JSON {task_with_underscores: {demo_i: {success, initial_state}}}.",
    )
    env_img_res: int | None = flag(
        None,
        "Pixels, square, of the rendered cameras. None: as in the checkpoint's training data where recorded, else 256.",
        at_least=16,
        at_most=4096,
    )

    # --- Output (published flags)
    run_id_note: str | None = flag(None, is_name=True)
    local_log_dir: str = "./experiments/logs"
    use_wandb: bool = flag_like(TrackingFlags, "use_wandb", False)
    use_tensorboard: bool = flag_like(TrackingFlags, "use_tensorboard", False)
    use_trackio: bool = flag_like(TrackingFlags, "use_trackio", False)
    wandb_entity: str | None = flag_like(TrackingFlags, "wandb_entity", None)
    wandb_project: str = flag_like(TrackingFlags, "wandb_project", "craft-vla")
    seed: int = flag(
        7,
        "Seeds python, numpy and torch before every episode; the environment itself is always seeded with 0.",
        at_least=0,
    )
    save_version: str = flag("vla-adapter", "Folder name below `rollout_dir`.", is_name=True)

    # --- Which episodes
    task_ids: str = flag("", "Comma-separated task numbers, e.g. '0,3'; empty: all tasks of the suite.")
    initial_state_offset: int = flag(
        0, "Index of the first initial state: trials use offset .. offset + num_trials_per_task - 1.", at_least=0
    )
    language_source: LanguageSource | None = flag(
        None,
        "Where instructions come from: filename or bddl. None: bddl for the `_lan` and `_task` suites, else filename.",
    )
    init_noise_mm: float = flag(
        0.0,
        "Radius (mm) of the disc from which each movable object's extra displacement is drawn; 0: none.",
        at_least=0,
        at_most=1000,
    )

    # --- How they run
    num_workers: int = flag(
        0,
        "simulator processes that share this process's policy; 0: one episode after the other in this process, as "
        "published. Every episode ends the same",
        at_least=0,
        at_most=1024,
    )
    batch_inference: bool = flag(
        False,
        "observations that wait for the policy at the same time share one forward pass: faster on a GPU, but actions "
        "then depend in their last bits on what else was waiting",
    )
    shard: str | None = flag(
        None,
        "'2/3': only the second third of the episodes (numbers 2, 5, 8, ...); `merge_shards` joins the results",
    )
    worker_timeout_s: float = flag(
        3600.0,
        "A worker that reports nothing for this long is ended and its episode tried once more.",
        at_least=1,
        at_most=1e7,
    )
    max_consecutive_errors: int = flag(
        10,
        "Give up after this many errors in a row: a broken renderer would otherwise grind through all episodes.",
        at_least=1,
    )
    render_mode: RenderMode | None = flag(
        None, "None: as in the checkpoint's training data where recorded, else `published`."
    )
    reset_mode: ResetMode = flag(
        ResetMode.SOFT,
        "hard rebuilds the simulation model before every episode, as published; soft returns to the state a hard reset "
        "leaves: the same episodes bit for bit, without the seconds of rebuilding",
    )
    device: str | None = flag(None, "None: cuda when there is one, else cpu.")

    # --- Videos
    save_videos: SaveVideos = SaveVideos.ALL
    max_videos: int | None = flag(None, "Videos per task; None: no limit (`first`: 1).", at_least=0)
    video_frame_interval: int | None = flag(
        None,
        "Control steps per video frame. None: one per query, which needs no further image; each other frame costs one.",
        at_least=1,
    )
    rollout_dir: str = "./rollouts"

    # --- Controls
    control: Control = flag(Control.NONE, "none, replay, blind (grey_images) or frozen (frozen_image).")
    replay_dataset: str | None = flag(None, f"Data-set folder for `--control replay`; {PLACE}.")
    replay_episode: int | None = flag(
        None, "Episode index; None: for each task the first episode with its instruction.", at_least=0
    )
    control_results: str = flag(
        "", "Comma-separated results folders of control runs on the same episodes: their rates go into results.json."
    )

    # --- Results
    results_dir: str | None = flag(None, "Folder of episodes.jsonl and results.json; None: `<local_log_dir>/<run id>`.")
    resume: bool = flag(False, "True: continue an existing results_dir, skipping the episodes it holds.")

    def validate(self) -> None:
        """Check everything that needs neither simulator nor checkpoint.

        Raises:
            EvalInputError: naming the flag, what was found and what was expected.
        """
        _check_supported(self)
        check_values(self)
        self.check_switches({f.name for f in fields(self) if getattr(self, f.name) != f.default})
        require_services(self)
        if self.save_videos is not SaveVideos.NONE:
            require_package(f"--save_videos {self.save_videos.value}", "imageio_ffmpeg", "libero")
        _check_paths(self)
        _check_device(self.device)
        self.shard_part()
        task_numbers(self.task_ids)

    def check_switches(self, given: Iterable[str]) -> None:
        """EvalInputError for the first of these flags that nothing reads without another flag."""
        has_videos = self.save_videos is not SaveVideos.NONE, "--save_videos all, first or failures"
        switches = {
            "batch_inference": (self.num_workers > 1, "--num_workers 2 or more"),
            "max_videos": has_videos,
            "replay_": (self.control is Control.REPLAY, "--control replay"),
            # Not what names a place (`rollout_dir`, `wandb_project`): drivers and published commands always give it.
            "video_frame_interval": has_videos,
            "worker_timeout_s": (self.num_workers > 0, "--num_workers N"),
        }
        check_switches(self, given, switches)

    def renders(self) -> bool:
        """Whether anybody looks at an image."""
        return self.control is not Control.REPLAY or self.save_videos is not SaveVideos.NONE

    def task_id_list(self, num_tasks: int) -> list[int]:
        """Selected task numbers in ascending order, without repetition.

        Args:
            num_tasks: number of tasks of the suite.

        Raises:
            EvalInputError: a task id that is no number, or outside 0 .. num_tasks-1, or given twice.
        """
        ids = task_numbers(self.task_ids)
        if ids is None:
            return list(range(num_tasks))
        if ids[-1] >= num_tasks:
            raise EvalInputError(
                f"--task_ids: expected tasks of {self.task_suite_name} (0..{num_tasks - 1}), found {self.task_ids!r}"
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
        if len(words) == 2 and all(map(_is_number, words)):
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


def task_numbers(text: str) -> list[int] | None:
    """`0,3` or `[0, 3]` -> [0, 3], ascending; None for blank text.

    Raises:
        EvalInputError: a word that is no number, or one given twice.
    """
    if not text.strip():
        return None
    words = [word.strip() for word in text.strip("[]() ").split(",")]
    if not all(map(_is_number, words)):
        raise EvalInputError(f"--task_ids: expected comma-separated task numbers, found {text!r}")
    ids = sorted(int(word) for word in words)
    if len(set(ids)) != len(ids):
        raise EvalInputError(f"--task_ids: expected distinct task numbers, found {text!r}")
    return ids


def _is_number(word: str) -> bool:
    """Digits 0-9, of a length that a count can have."""
    return bool(re.fullmatch(r"[0-9]{1,9}", word.strip()))


def _check_device(device: str | None) -> None:
    if device is not None and not re.fullmatch(r"[a-z]+(:[0-9]{1,3})?", device):
        raise EvalInputError(f"--device is {device!r}, expected cpu, cuda or cuda:N")


def _check_supported(cfg: EvalConfig) -> None:
    fixed = {
        "use_l1_regression": (True, "the L1 regression head is the only action head"),
        "use_film": (False, "FiLM is not implemented"),
        "load_in_8bit": (False, "quantised loading is not implemented"),
        "load_in_4bit": (False, "quantised loading is not implemented"),
        "phase": ("Inference", "other phases add training noise to the action head"),
    }
    for name, (expected, reason) in fixed.items():
        found = getattr(cfg, name)
        if found != expected:
            raise EvalInputError(f"--{name} {found}: expected {expected} ({reason})")


def _check_paths(cfg: EvalConfig) -> None:
    if cfg.resume and not cfg.results_dir:
        raise EvalInputError("--resume True: expected --results_dir, the folder to continue; found none")
    if cfg.control is Control.REPLAY and cfg.replay_dataset is None:
        raise EvalInputError("--control replay: expected --replay_dataset, the demonstrations to replay; found none")
    if cfg.control is not Control.REPLAY and not cfg.pretrained_checkpoint:
        raise EvalInputError("--pretrained_checkpoint: expected a checkpoint directory, found nothing")
    if "image_aug" in cfg.pretrained_checkpoint and cfg.center_crop is False:
        raise EvalInputError(
            f"--center_crop False: {cfg.pretrained_checkpoint} was trained with image augmentation (random crops of "
            "90 % area), which needs the centre crop at evaluation"
        )
    if cfg.initial_states_path != DEFAULT_INITIAL_STATES and not os.path.isfile(cfg.initial_states_path):
        raise EvalInputError(f"--initial_states_path: no such file: {cfg.initial_states_path}")
    check_folder(cfg.local_log_dir, "--local_log_dir")
    if cfg.results_dir is not None:
        check_folder(cfg.results_dir, "--results_dir")
    if cfg.save_videos is not SaveVideos.NONE:
        check_folder(cfg.rollout_dir, "--rollout_dir")


_DIFFUSION = ForeignFlag("diffusion heads are not implemented", harmless=None)
_ADAPTERS = ForeignFlag("the checkpoint knows its adapters", harmless=None)
_BASE = ForeignFlag("use --pretrained_checkpoint FOLDER")
FOREIGN = {
    "use_diffusion": ForeignFlag("diffusion heads are not implemented", harmless=("false",)),
    "num_diffusion_steps_train": _DIFFUSION,
    "num_diffusion_steps_inference": _DIFFUSION,
    "use_lora": _ADAPTERS,
    "lora_rank": _ADAPTERS,
    "lora_dropout": _ADAPTERS,
    "vla_path": _BASE,
    "config_file_path": _BASE,
    "vlm_path": _BASE,
}
"""Flags of published evaluation commands that this program does not have (docs/migrating.md)."""


def parse_flags(args: Sequence[str] | None = None) -> EvalConfig:
    """The flags of `run_libero_eval.py`, from `args` or the command line.

    Raises UsageError for those that cannot be used, and for a flag without its switch, also at its default value.
    """
    cfg = parse(EvalConfig, args, FOREIGN, "Evaluate a checkpoint on a LIBERO suite.")
    cfg.check_switches(given_flags(args))
    return cfg
