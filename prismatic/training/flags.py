"""The flags of `finetune.py`, by group: name, default, range and what each does. What they mean together: `config.py`.

Published flags keep their names; None means "as the start model says".
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

from prismatic.command_line import flag
from prismatic.craft.settings import PRESETS, CRaFTConfig, choices_of
from prismatic.model_files import BASE_CHECKPOINT, ROBOT_PLATFORM
from prismatic.training.schedules import LRSchedule
from prismatic.vla.datasets.format_table import PLACE, SKIP_BAD_EPISODES, SPLIT

_SETTINGS = {entry.name: entry for entry in fields(CRaFTConfig)}
MEMORIES = ("batch", "data", "instructions")
"""Names of `--craft_memory`; `retention/memory.py` has each. A flag that one alone reads is `--craft_memory_{name}`."""
_ONLY = "accepted as in published commands; "


def craft_flag(setting: str, text: str, **limits: Any) -> Any:
    """The flag of a setting of the constraint: its default, or None for what the presets decide, with their values."""
    choices = choices_of(setting)
    if setting in PRESETS["original"]:
        values = "; ".join(f"{preset} {_plain(values[setting])}" for preset, values in PRESETS.items())
        return flag(None, f"{text}. None: as the preset says ({values})", choices=choices, **limits)
    return flag(_plain(_SETTINGS[setting].default), text, choices=choices, **limits)


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Enum) else value


@dataclass
class StartFlags:
    """Start model and data."""

    group: ClassVar[str] = "start model and data"

    config_file_path: str = flag(
        "pretrained_models/configs",
        "checkpoint folder, VLM folder (OpenVLA), or a preset: tiny, smollm2-135m, qwen25-0_5b, openvla-7b",
    )
    vlm_path: str = flag(
        "", "native Prismatic VLM (folder or .pt); --config_file_path then gives configuration and tokenizer"
    )
    tokenizer_path: str | None = flag(None, "tokenizer folder for presets that ship none")
    use_minivlm: bool | None = flag(
        None, "True: Qwen body and its prompt; False: llama body and a prompt of its own; None: as the start model says"
    )
    resum_vla_path: str = flag("", "checkpoint folder to resume from; empty: found from run_root_dir and the run id")
    data_root_dir: str = flag("datasets/rlds", "folder of the data sets")
    dataset_name: str = flag("libero_spatial_no_noops", "several: a,b or, with weights, a:0.5,b:2")
    split: str | None = flag(None, SPLIT)
    skip_bad_episodes: bool = flag(False, SKIP_BAD_EPISODES)
    run_root_dir: str = flag("runs", "folder of the runs: metrics in {run_root_dir}/{run id}, checkpoints beside it")
    shuffle_buffer_size: int = flag(100_000, f"{_ONLY}sampling is a true permutation", at_least=1)
    n_shot_episodes: int | None = flag(None, "keep N demonstrations per instruction", at_least=1)
    subset_seed: int | None = flag(None, "of the choice of demonstrations; None: seed", at_least=0)
    data_set_file: str | None = flag(None, "Python file that registers data sets of your own (docs/datasets.md)")
    robot_platform: str | None = flag(None, ROBOT_PLATFORM)
    base_checkpoint: str | None = flag(None, BASE_CHECKPOINT)
    frame_stride: int = flag(1, "use every n-th frame as the start of a sample", at_least=1)


@dataclass
class ModelFlags:
    """Model."""

    group: ClassVar[str] = "model"

    use_l1_regression: bool = flag(True, f"{_ONLY}no other head is implemented")
    use_diffusion: bool = flag(False, f"{_ONLY}not implemented")
    use_film: bool = flag(False, f"{_ONLY}not implemented")
    num_images_in_input: int | None = flag(None, "cameras of a new head; None: as the start model says", at_least=1)
    use_proprio: bool | None = flag(None, "the policy reads the robot's state; None: as the start model says")
    use_pro_version: bool | None = flag(None, "the Pro head, for a new head; None: as the preset says")
    phase: str = flag("Training", f"{_ONLY}this program trains", choices=("Training",))
    legacy_slices: bool | None = flag(
        None,
        "token positions and rotary angles of published heads; None: as the start model says. True on a new head: the "
        "public evaluation code runs the checkpoints as they were trained",
    )


@dataclass
class OptimisationFlags:
    """Optimisation."""

    group: ClassVar[str] = "optimisation"

    batch_size: int = flag(8, "samples per process and micro-batch", at_least=1)
    learning_rate: float = flag(5e-4, "of AdamW", more_than=0, at_most=1)
    lr_warmup_steps: float = flag(0, "linear from 10 %; steps, below 1 a share of max_steps", at_least=0)
    num_steps_before_decay: int = flag(100_000, "of the schedule step", at_least=1)
    lr_schedule: str = flag("step", "see schedules.py", choices=tuple(kind.value for kind in LRSchedule))
    lr_decay_steps: str = flag("", "multistep: '100000,150000'")
    lr_decay_factor: float = flag(0.1, "step and multistep", more_than=0, at_most=1)
    lr_min_ratio: float = flag(0.0, "cosine: last learning rate as a share of the first", at_least=0, less_than=1)
    weight_decay: float = flag(0.01, "of AdamW", at_least=0, at_most=1)
    max_grad_norm: float | None = flag(
        None, "clip the combined gradient to this norm; None: no clipping, as published", more_than=0
    )
    ema_decay: float | None = flag(
        None, "moving average of the trained weights, which is then what checkpoints hold", more_than=0, less_than=1
    )
    grad_accumulation_steps: int = flag(1, "micro-batches per optimizer step", at_least=1)
    max_steps: int = flag(200_000, "optimizer steps of the run", at_least=1)
    seed: int = flag(7, "of new weights, order of samples, augmentation and noise", at_least=0)
    use_val_set: bool = flag(False, "hold out episodes and measure the action error on them")
    val_fraction: float = flag(0.05, "of the episodes of each task", more_than=0, less_than=1)
    val_split: str | None = flag(None, "measure on this split of the data sets instead of held-out episodes")
    val_freq: int = flag(1000, "optimizer steps between two measurements", at_least=1)
    val_batches: int = flag(
        16, "batches per measurement over all processes, always the same; 0: all samples", at_least=0
    )
    image_aug: bool = flag(True, "random crop and colours; evaluation then crops the centre")
    blind_images: bool = flag(
        False, "constant grey in place of every image: a control that learns from state and text alone"
    )
    proprio_dropout: float = flag(
        0.0,
        "share of the samples without robot state: a policy that always knows where its arm is can learn motions by "
        "heart; without it, it has to look",
        at_least=0,
        at_most=1,
    )
    num_data_workers: int = flag(0, "processes that load data; 0: the training process", at_least=0, at_most=256)
    device: str = flag("auto", "auto: cuda when there is one", choices=("auto", "cpu", "cuda"))
    mixed_precision: str = flag("auto", "auto: bf16 on cuda, no on the CPU", choices=("auto", "no", "bf16", "fp16"))
    gradient_checkpointing: bool | str = flag(
        False, "compute activations again in the backward pass: True, or some of towers, llm, head with commas between"
    )
    compile: bool = flag(False, "torch.compile of the policy's forward pass; see compilation.py")
    compile_backend: str = flag("inductor", "or another backend of torch.compile: aot_eager, eager")
    dry_run: bool = flag(False, "check flags and data, predict memory and work, and start no run")


@dataclass
class SavingFlags:
    """Saving."""

    group: ClassVar[str] = "saving"

    save_freq: int = flag(10_000, "optimizer steps between two checkpoints; the last step is always saved", at_least=1)
    save_latest_checkpoint_only: bool = flag(False, "one folder, replaced at each save")
    save_training_state: bool = flag(True, "optimizer, RNG, data position: needed to resume")
    resume: bool | str = flag(False, "True: from the newest checkpoint; auto: from the newest undamaged one, or afresh")
    overwrite: bool = flag(False, "delete what a run of this id left, and begin anew")
    resume_step: int | None = flag(None, "resume from the checkpoint of this step; None: the newest", at_least=0)
    keep_last: int | None = flag(None, "delete all but the N newest checkpoints of the run; None keeps all", at_least=1)
    keep_every: int | None = flag(None, "with --keep_last: checkpoints of steps divisible by this stay", at_least=1)
    async_save: bool = flag(False, "copy the state to CPU memory and write it while training goes on")
    ddp_timeout: float = flag(
        1800.0,
        "seconds until a process gives up on another one; longer than writing a checkpoint",
        more_than=0,
        at_most=1e7,
    )


@dataclass
class TuningFlags:
    """Which weights."""

    group: ClassVar[str] = "which weights"

    use_lora: bool = flag(False, "train adapters in place of the VLM's weights")
    lora_rank: int | None = flag(None, "None: 32", at_least=1, at_most=4096)
    lora_dropout: float | None = flag(None, "None: 0", at_least=0, less_than=1)
    merge_lora_during_training: bool = flag(False, "checkpoints then also hold the merged, verified model")
    lora_emit_unused: bool = flag(False, "zero adapters for layers that are never run, as in published adapter files")
    export_published_layout: bool = flag(False, "write {run_id}--{step}_chkpt--published/ beside each checkpoint")
    use_fz: bool = flag(False, "freeze the whole VLM")
    freeze_vision: bool = flag(False, "freeze the vision towers; CRaFT then runs them once for both passes")


@dataclass
class RetentionFlags:
    """Keeping what the start model could do; see retention/methods.py."""

    group: ClassVar[str] = "keeping what the start could do"

    retention_method: str | None = flag(
        None, "None: as use_craft says", choices=("none", "craft", "l2sp", "feature_penalty", "frozen")
    )
    l2sp_weight: float = flag(0.01, "of L2-SP", more_than=0)
    replay_data: str | None = flag(
        None, f"data-set folders, comma separated, whose samples are mixed into the batches; {PLACE}"
    )
    replay_fraction: float = flag(0.2, "of replayed samples among all", at_least=0.001, at_most=0.999)
    replay_labels: str = flag("data", "start: the start policy's actions (distilled replay)", choices=("data", "start"))
    replay_text: str | None = flag(
        None, "text file: the language model goes on predicting its tokens (co-training); a window per micro-batch"
    )
    replay_text_weight: float = flag(0.1, "of the next-token loss beside the action loss", more_than=0)


@dataclass
class CRaFTFlags:
    """CRaFT. Flags that are None here take the preset's value; `prismatic/craft/settings.py` checks the ranges too."""

    group: ClassVar[str] = "CRaFT"

    use_craft: bool = flag(False, "constrained fine-tuning; False: everything below is not read")
    craft_preset: str = flag(
        "original", "keep: hold the actions; budget, original: the features", choices=tuple(PRESETS)
    )
    craft_signal: str | None = craft_flag("signal", "what is held: features, or what the whole policy does")
    craft_memory: str | None = flag(
        None,
        f"on which inputs: {', '.join(MEMORIES)}; several with commas. None: batch; keep: instructions, and data if "
        "given",
    )
    craft_memory_data: str | None = flag(
        None, f"data-set folders of the memory `data`, comma separated: images, state, instructions; {PLACE}"
    )
    craft_memory_instructions: str | None = flag(
        None, "text file, one a line; None: those the start checkpoint records"
    )
    craft_memory_batch_size: int | None = flag(
        None, "samples per micro-batch; None: the batch's. keep: a quarter of them", at_least=1
    )
    craft_land: bool = flag(False, "after the last step, go back towards the start weights until the budget is met")
    craft_retention_budget: float | None = craft_flag(
        "retention_budget", "eps; of actions the root mean square of normalised actions", more_than=0, infinite=True
    )
    craft_every: int | None = flag(
        None, "constrain every n-th optimizer step; the others are plain steps. None: 1; keep: 2", at_least=1
    )
    craft_retention_weight: float | None = craft_flag("retention_weight", "initial lambda", at_least=0)
    craft_dual: str | None = craft_flag("dual", "rule of lambda")
    craft_dual_lr: float | None = craft_flag("dual_lr", "rate of lambda", at_least=0)
    craft_enable_dual: bool = craft_flag("enable_dual", "False: lambda stays at --craft_fixed_lambda")
    craft_fixed_lambda: float = craft_flag("fixed_lambda", "lambda without a dual", at_least=0)
    craft_share_limit: float = craft_flag(
        "share_limit", "of share: |retention gradient| may be e^limit |action gradient|", more_than=-5, at_most=10
    )
    craft_enable_projection: bool = craft_flag("enable_projection", "False: the gradients are added as they are")
    craft_projection_rule: str | None = craft_flag("projection_rule", "how multiplier and projection make one factor")
    craft_projection_when: str | None = craft_flag("projection_when", "active: only above the budget")
    craft_projection_granularity: str = craft_flag("projection_granularity", "parameters that share a factor")
    craft_projection_eps: float = craft_flag("projection_eps", "delta of the additive guard", at_least=0)
    craft_retention_metric: str | None = craft_flag("retention_metric", "distance of features")
    craft_anchor_type: str = craft_flag("anchor_type", "which features: both, action queries, or vision")
    craft_anchor_layer_idx: int | None = craft_flag(
        "anchor_layer_idx", "layer of C_R; None: the middle, negative from the end", at_least=-1000, at_most=1000
    )
    craft_cr_token_mode: str = craft_flag("cr_token_mode", "or vision_plus_prompt: C_R with the prompt's tokens")
    craft_probe_data: str | None = flag(None, f"held-out data-set folder on which the drift is watched; {PLACE}")
    craft_probe_size: int = flag(64, "samples of it", at_least=1)
    craft_log_freq: int = flag(10, "steps between two lines of metrics; read in plain runs too", at_least=1)


@dataclass
class ExperimentalFlags:
    """Settings that no preset, table or recipe changes: for experiments with the method itself."""

    group: ClassVar[str] = "CRaFT, experimental: no preset or table changes them"

    craft_anchor: str | None = craft_flag("anchor", "how theta_0 is kept")
    craft_dual_error: str | None = craft_flag("dual_error", "the violation that the dual integrates")
    craft_dual_ki: float = craft_flag("dual_ki", "integral gain of pi", at_least=0)
    craft_dual_kp: float = craft_flag("dual_kp", "proportional gain of pi", at_least=0)
    craft_dual_nu: float = craft_flag("dual_nu", "averaging factor of pi and of the gate", at_least=0, less_than=1)
    craft_lambda_max: float | None = craft_flag("lambda_max", "largest lambda", more_than=0, infinite=True)
    craft_projection_gamma: float = craft_flag("projection_gamma", "the gate opens above gamma eps", more_than=0)
    craft_projection_guard: str | None = craft_flag("projection_guard", "of the division by |r|^2")
    craft_projection_metric: str = craft_flag("projection_metric", "inner product of a conflict")
    craft_barrier_phi: float = craft_flag("barrier_phi", "rate of the rule barrier", more_than=0)
    craft_feature_source: str = craft_flag("feature_source", "bridge: all that the action head reads")
    craft_w_raw: float = craft_flag("w_raw", "weight of C_R in L_ret", at_least=0)
    craft_w_aq: float = craft_flag("w_aq", "weight of C_AQ in L_ret", at_least=0)
    craft_use_mean_pooling: bool = craft_flag("use_mean_pooling", "False: the maximum over tokens")


@dataclass
class TrackingFlags:
    """Tracking."""

    group: ClassVar[str] = "tracking"

    use_wandb: bool = flag(
        False, "report to Weights & Biases as well; WANDB_MODE=offline in the environment: no network"
    )
    use_tensorboard: bool = flag(False, "event files in tensorboard/ of the run's folder")
    use_trackio: bool = flag(False, "report to trackio on this machine as well; TRACKIO_DIR says where")
    wandb_entity: str | None = flag(None, "account")
    wandb_project: str = flag("craft-vla", "project, also of trackio")
    wandb_log_freq: int = flag(10, "the same as --craft_log_freq for plain runs, published", at_least=1)
    run_id_note: str | None = flag(None, "added to the run id", is_name=True)
    run_id_override: str | None = flag(None, "the run id; None: made of the main settings", is_name=True)
