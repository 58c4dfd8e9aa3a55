"""Command line of `vla-scripts/finetune.py`: one dataclass, checked once, translated once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from prismatic.command_line import check_switches, check_values
from prismatic.craft.settings import PRESET_FIELDS, CRaFTConfig, plain_values
from prismatic.training.flag_checks import check_choice, check_unread
from prismatic.training.flags import (
    MEMORIES,
    CRaFTFlags,
    ExperimentalFlags,
    ModelFlags,
    OptimisationFlags,
    RetentionFlags,
    SavingFlags,
    StartFlags,
    TrackingFlags,
    TuningFlags,
)
from prismatic.training.schedules import LRSchedule, ScheduleSettings, parse_boundaries

# Flags of the published script that this code base does not implement: a value other than the default is an error,
# not a silent no-op.
_UNSUPPORTED = {
    "use_l1_regression": (True, "only the L1-regression head is implemented"),
    "use_diffusion": (False, "diffusion action heads are not implemented"),
    "use_film": (False, "FiLM conditioning is not implemented"),
    "phase": ("Training", "this program trains"),
}


CHECKPOINTED = ("towers", "llm", "head")
AIM = 1.1
"""A run that lands steers to this multiple of its budget."""
# What a preset says beyond the settings of the constraint. memory_share: of the batch.
_PRESET_TRAINING: dict[str, dict[str, Any]] = {"keep": {"memory": "instructions", "every": 2, "memory_share": 0.25}}


# Flags that do not change what a run learns.
_NOT_LEARNED = frozenset(
    [
        "run_root_dir",
        "run_id_note",
        "run_id_override",
        "overwrite",
        "resume",
        "resum_vla_path",
        "resume_step",
        "save_freq",
        "keep_last",
        "keep_every",
        "save_latest_checkpoint_only",
        "save_training_state",
        "async_save",
        "export_published_layout",
        "merge_lora_during_training",
        "use_wandb",
        "use_tensorboard",
        "use_trackio",
        "wandb_entity",
        "wandb_project",
        "wandb_log_freq",
        "craft_log_freq",
        "craft_probe_data",
        "craft_probe_size",
        "device",
        "ddp_timeout",
        "dry_run",
        "num_data_workers",
        "shuffle_buffer_size",
    ]
)


class TuningMode(str, Enum):
    """Which weights are trained. The head, the proprio projector and the action queries always are."""

    LORA = "lora"
    FULL = "full"
    FROZEN = "frozen"


class RetentionMethod(str, Enum):
    """What holds the model near its start (`retention/methods.py`)."""

    NONE = "none"
    CRAFT = "craft"
    L2SP = "l2sp"
    FEATURE_PENALTY = "feature_penalty"
    FROZEN = "frozen"

    @property
    def measures_drift(self) -> bool:
        """True for the methods that read the `craft_*` flags."""
        return self in (RetentionMethod.CRAFT, RetentionMethod.FEATURE_PENALTY)


@dataclass
class FinetuneConfig(
    TrackingFlags,
    ExperimentalFlags,
    CRaFTFlags,
    RetentionFlags,
    TuningFlags,
    SavingFlags,
    OptimisationFlags,
    ModelFlags,
    StartFlags,
):
    """Flags of `finetune.py`, group by group (`flags.py`), checked together and resolved once."""

    def __post_init__(self) -> None:
        """Raise ValueError for flags that contradict each other, are out of range or not implemented."""
        check_values(self)
        for name, (supported, reason) in _UNSUPPORTED.items():
            if getattr(self, name) != supported:
                raise ValueError(f"--{name} {getattr(self, name)}: {reason}")
        self._resolve_retention_method()
        self.check_switches({f.name for f in fields(self) if getattr(self, f.name) != f.default})
        if self.use_lora and self.tuning_mode is not TuningMode.LORA:
            raise ValueError("--use_lora True excludes --use_fz True and --retention_method frozen")
        self.schedule_settings  # noqa: B018 - validates
        self._check_data_flags()
        self._resolve_lora_flags()
        self._check_replay_flags()
        self._resolve_craft_flags()
        self._check_saving_flags()
        for part in self.checkpointed_parts:
            check_choice("gradient_checkpointing", part, CHECKPOINTED)

    def check_switches(self, given: Iterable[str]) -> None:
        """ValueError for the first of these flags that nothing reads without another flag."""
        measures, l2sp = self.retention.measures_drift, self.retention is RetentionMethod.L2SP
        decays = self.lr_schedule in (LRSchedule.STEP.value, LRSchedule.MULTISTEP.value)
        subset = self.n_shot_episodes is not None or self.use_val_set
        switches = {  # flags by name or prefix: (their switch is on, the switch)
            "compile_backend": (self.compile, "--compile True"),
            "craft_": (measures, "--use_craft True (or --retention_method feature_penalty)"),
            "craft_probe_size": (self.craft_probe_data is not None, "--craft_probe_data FOLDER"),
            "l2sp_weight": (l2sp, "--retention_method l2sp"),
            "lr_decay_factor": (decays, "--lr_schedule step or multistep"),
            "lr_min_ratio": (self.lr_schedule == LRSchedule.COSINE.value, "--lr_schedule cosine"),
            "lora_": (self.use_lora, "--use_lora True; without it all weights are trained"),
            "num_steps_before_decay": (self.lr_schedule == LRSchedule.STEP.value, "--lr_schedule step"),
            "merge_lora_during_training": (self.use_lora, "--use_lora True"),
            "replay_fraction": (self.replay_data is not None, "--replay_data FOLDER"),
            "resum_vla_path": (bool(self.resume), "--resume True; without it the run starts at step 0"),
            "resume_step": (bool(self.resume), "--resume True; without it the run starts at step 0"),
            "subset_seed": (subset, "--n_shot_episodes N or --use_val_set True"),
            # Not `val_freq`: published commands give it beside --use_val_set False.
            "val_fraction": (self.use_val_set, "--use_val_set True"),
            "val_batches": (self.use_val_set, "--use_val_set True"),
            "val_split": (self.use_val_set, "--use_val_set True"),
            "replay_labels": (self.replay_data is not None, "--replay_data FOLDER"),
            "replay_text_weight": (self.replay_text is not None, "--replay_text FILE"),
        }
        check_switches(self, set(given) - {"craft_log_freq"}, switches)  # every run has a log

    def _check_saving_flags(self) -> None:
        if not isinstance(self.resume, bool) and self.resume != "auto":
            raise ValueError(f"--resume is {self.resume!r}, expected True, False or auto")
        if self.overwrite and self.resume:
            raise ValueError("--overwrite True excludes --resume: a run is continued or replaced")
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError(f"--keep_every {self.keep_every} needs --keep_last: without it every checkpoint is kept")
        if self.keep_last is not None and self.save_latest_checkpoint_only:
            raise ValueError("--keep_last excludes --save_latest_checkpoint_only True, which keeps one folder")
        if self.async_save and (self.merge_lora_during_training or self.export_published_layout):
            # Both run a model, which would draw from the generators of the run at an unpredictable time.
            raise ValueError(
                "--async_save True excludes --merge_lora_during_training True and --export_published_layout True: "
                "merge and export afterwards with merge_lora_weights_and_save.py"
            )

    def _check_data_flags(self) -> None:
        if self.val_split is not None and self.val_split == (self.split or "train"):
            raise ValueError(f"--val_split {self.val_split} is the split that is trained on, expected another one")

    def _resolve_lora_flags(self) -> None:
        if not self.use_lora:
            return
        self.lora_rank = 32 if self.lora_rank is None else self.lora_rank
        self.lora_dropout = 0.0 if self.lora_dropout is None else self.lora_dropout

    def _check_replay_flags(self) -> None:
        if self.replay_labels == "start" and self.retention is not RetentionMethod.NONE:
            raise ValueError(
                f"--replay_labels start excludes --retention_method {self.retention_method}: both need the start "
                "weights; use --replay_labels data"
            )
        if self.replay_text is None:
            return
        if self.retention is not RetentionMethod.NONE or self.replay_labels == "start":
            other = "--replay_labels start" if self.replay_labels == "start" else f"method {self.retention_method}"
            raise ValueError(f"--replay_text {self.replay_text} is a method of its own and excludes {other}")
        if self.tuning_mode is TuningMode.FROZEN:
            raise ValueError(f"--replay_text {self.replay_text} has no effect: --use_fz True trains no language model")

    def _resolve_craft_flags(self) -> None:
        """Give the flags that were left to the preset their values, and check that they fit each other."""
        if not self.retention.measures_drift:
            return
        config = self.craft_config()
        check_unread(self, config)
        for name in PRESET_FIELDS:
            value = getattr(config, name)
            setattr(self, f"craft_{name}", value.value if isinstance(value, Enum) else value)
        defaults = _PRESET_TRAINING.get(self.craft_preset, {})
        if self.craft_memory is None:
            self.craft_memory = defaults.get("memory", "batch")
            if "memory" in defaults and self.craft_memory_data is not None:
                self.craft_memory += ",data"
        if self.craft_every is None:
            self.craft_every = defaults.get("every", 1)
        if self.craft_memory_batch_size is None and "memory_share" in defaults:
            self.craft_memory_batch_size = max(1, round(self.batch_size * defaults["memory_share"]))
        self._check_craft_flags(config)

    def _check_craft_flags(self, config: CRaFTConfig) -> None:
        self._check_memories()
        if self.craft_land and self.ema_decay is not None:
            raise ValueError("--craft_land True excludes --ema_decay: both decide what the last checkpoint holds")
        if self.craft_land and math.isinf(config.retention_budget):
            raise ValueError("--craft_land True needs a finite --craft_retention_budget to land at")

    def _check_memories(self) -> None:
        for name in self.memories:
            check_choice("craft_memory", name, MEMORIES)
        if len(set(self.memories)) != len(self.memories):
            raise ValueError(f"--craft_memory {self.craft_memory} names a memory twice")
        for name in MEMORIES:
            value, used = getattr(self, f"craft_memory_{name}", None), name in self.memories
            if value is not None and not used:
                raise ValueError(
                    f"--craft_memory_{name} {value} needs --craft_memory {name}, found {self.craft_memory}"
                )
        if "data" in self.memories and self.craft_memory_data is None:
            raise ValueError(f"--craft_memory {self.craft_memory} needs --craft_memory_data FOLDER")
        size = self.craft_memory_batch_size
        if size is not None and size > self.batch_size and "batch" in self.memories:
            raise ValueError(
                f"--craft_memory_batch_size is {size}, but the memory batch has no more than --batch_size "
                f"{self.batch_size} samples"
            )

    @property
    def memories(self) -> list[str]:
        """Names of the memories, in the order given."""
        return [name.strip() for name in ("batch" if self.craft_memory is None else self.craft_memory).split(",")]

    def _resolve_retention_method(self) -> None:
        if self.retention_method is None:
            self.retention_method = "craft" if self.use_craft else "none"
        if self.use_craft and self.retention_method != "craft":
            raise ValueError(f"--use_craft True contradicts --retention_method {self.retention_method}")
        self.use_craft = self.retention_method == "craft"

    @property
    def retention(self) -> RetentionMethod:
        """The retention method as an enum."""
        return RetentionMethod(self.retention_method)

    @property
    def tuning_mode(self) -> TuningMode:
        """The published booleans as one choice."""
        if self.use_fz or self.retention is RetentionMethod.FROZEN:
            return TuningMode.FROZEN
        return TuningMode.LORA if self.use_lora else TuningMode.FULL

    @property
    def schedule(self) -> LRSchedule:
        """The learning-rate schedule; ValueError for an unknown name."""
        return LRSchedule(self.lr_schedule)

    @property
    def run_id(self) -> str:
        """Folder name of the run: the override, or one made of the main settings."""
        if self.run_id_override is not None:
            return self.run_id_override
        start = self.config_file_path.rstrip("/").split("/")[-1]
        effective = self.batch_size * self.grad_accumulation_steps
        run_id = (
            f"{start}+{self.dataset_name.translate(str.maketrans(',:/', '+x_'))}+b{effective}+lr-{self.learning_rate}"
        )
        if self.use_lora:
            run_id += f"+lora-r{self.lora_rank}+dropout-{self.lora_dropout}"
        run_id += "+frozen" * (self.tuning_mode is TuningMode.FROZEN) + "--image_aug" * self.image_aug
        if self.retention is not RetentionMethod.NONE:
            run_id += f"--{self.retention_method}"
        if self.retention.measures_drift:
            run_id += f"-{self.craft_preset}-eps{self.craft_retention_budget:g}"
        if self.replay_data is not None:
            run_id += f"--replay-{self.replay_fraction:g}"
        if self.replay_text is not None:
            run_id += f"--text-{self.replay_text_weight:g}"
        run_id += f"--{self.max_steps}steps--seed{self.seed}--{self._digest()}"
        return run_id if self.run_id_note is None else f"{run_id}--{self.run_id_note}"

    def _digest(self) -> str:
        """Eight digits of everything that decides what is learned: other settings, another run."""
        learned = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_LEARNED}
        return hashlib.sha256(json.dumps(plain_values(learned), sort_keys=True).encode()).hexdigest()[:8]

    def craft_config(self) -> CRaFTConfig:
        """The `craft_*` flags as the algorithm's settings; `feature_penalty` has neither projection nor dual."""
        flags = {f.name: getattr(self, f"craft_{f.name}") for f in fields(CRaFTConfig) if f.name != "aim"}
        flags["aim"] = AIM if self.craft_land else 1.0
        if self.retention is RetentionMethod.FEATURE_PENALTY:
            flags |= {"enable_projection": False, "enable_dual": False}
        given = {k: v for k, v in flags.items() if v is not None or k not in PRESET_FIELDS}
        try:
            return CRaFTConfig.from_preset(self.craft_preset, **given)
        except ValueError as error:  # the settings are flags here
            raise ValueError(str(error).replace("CRaFT ", "--craft_", 1)) from None

    @property
    def schedule_settings(self) -> ScheduleSettings:
        """The `lr_*` flags as a function of the step; ValueError for values that are out of range or unused."""
        kind = self.schedule
        if bool(self.lr_decay_steps) != (kind is LRSchedule.MULTISTEP):
            raise ValueError(
                f"--lr_schedule {kind.value} with --lr_decay_steps {self.lr_decay_steps!r}: multistep needs steps, the "
                "other schedules have none"
            )
        boundaries: tuple[int, ...] = ()
        if kind is LRSchedule.MULTISTEP:
            boundaries = parse_boundaries(self.lr_decay_steps)
        elif kind is LRSchedule.STEP:
            boundaries = (self.num_steps_before_decay,)
        return ScheduleSettings(
            kind, self.max_steps, self.lr_warmup_steps, boundaries, self.lr_decay_factor, self.lr_min_ratio
        )

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of optimizer step `step` (0-based): linear warm-up from 10 %, then the schedule."""
        return self.learning_rate * self.schedule_settings.factor_at(step)

    @property
    def checkpointed_parts(self) -> list[str]:
        """Parts whose activations are computed again in the backward pass."""
        given = self.gradient_checkpointing
        return (
            (list(CHECKPOINTED) if given else []) if isinstance(given, bool) else [p.strip() for p in given.split(",")]
        )

    @property
    def log_freq(self) -> int:
        """Optimizer steps between two lines of metrics."""
        if self.retention.measures_drift or self.craft_log_freq != FinetuneConfig.craft_log_freq:
            return self.craft_log_freq
        return self.wandb_log_freq

    def precision(self, on_cuda: bool) -> str:
        """Mixed precision: `auto` is bf16 on CUDA and none on the CPU, where bf16 is several times slower."""
        if self.mixed_precision != "auto":
            return self.mixed_precision
        return "bf16" if on_cuda else "no"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain_values(asdict(self))
