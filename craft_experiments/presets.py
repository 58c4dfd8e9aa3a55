"""Scales of the experiments, as data: suites, steps, episodes, seeds, and the flags that go with them."""

from __future__ import annotations

from craft_experiments.preset import Bench, NewTask, Pace, Preset
from craft_experiments.preset_archive import TINY_ARCHIVE

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
KEEP = {"craft_preset": "keep", "craft_retention_budget": 0.03}
_PRIMARY = ("plain", "keep_none", "keep_data_5", "replay_5", "distilled_5")
_RIVALS = ("frozen", "l2sp_0.01", "penalty_1", "interpolate_0.5", "interpolate_llm_0.5")
_SECONDARY = ("keep_data_1", "replay_1", "distilled_1", "craft", *_RIVALS)
_RECOVERED = ("plain", "keep_data_5")

QWEN = Preset(
    name="qwen25-0_5b",
    suites=SUITES,
    task_ids=dict.fromkeys(SUITES, ""),
    start="pretrained_models/configs",
    data_root_dir="data/libero",
    dataset_suffix="_no_noops",
    max_steps=20_000,
    save_freq=5_000,
    batch_size=8,
    learning_rate=5e-4,
    num_trials=50,
    pro_trials=50,
    start_trials=50,
    craft={
        "craft_retention_weight": 1.0,
        "craft_retention_budget": 0.1,
        "craft_dual_lr": 0.01,
        "craft_enable_projection": True,
    },
    perturbed={"suite_suffix": "_swap"},
    budgets=(0.01, 0.05, 0.2),
    penalties=(0.1, 1.0, 10.0),
    shots=(5, 10, 20, 50),
    demos_per_task=50,
    seeds=(0,),
    train={"use_lora": True, "lora_rank": 32},
    evaluate={"center_crop": True, "num_workers": 1, "save_videos": "failures"},
    num_gpus=1,
    bench=Bench(
        # What the published policy of libero_object has not seen; all demonstrations are scripted, at its image size.
        new_tasks=(NewTask("near", "libero_spatial", "0"), NewTask("far", "libero_goal", "8")),
        primary=_PRIMARY,
        secondary=_SECONDARY,
        recovered=_RECOVERED,
        changes={
            "keep": KEEP,  # the start of the tables has a new head and no skill
            "start": "pretrained_models/LIBERO-Object-Pro",
            "start_suite": "libero_object",
            "start_task_ids": "0,3,5,7",
            "start_dataset": "libero_object_no_noops",
            "max_steps": 5_000,
            "save_freq": 2_500,
            "seeds": (0, 1, 2, 3, 4),
            "num_trials": 40,
            "pro_trials": 20,
            "start_trials": 40,
            "demos_per_task": 50,
            "data_root_dir": "data/keep",
            "perturbed": {},
            "collect": {
                "initial_states": "standard:40-49",
                "noise_std": 0.15,
                "noise_fraction": 0.5,
                "image_size": 256,
            },
        },
    ),
)

TINY = Preset(
    name="tiny",
    suites=SUITES[:3],  # on libero_10 nothing succeeded, playback neither (results/archive)
    task_ids={"libero_spatial": "0,1", "libero_object": "2", "libero_goal": "1,8", "libero_10": "0"},
    start="pretrained_models/tiny-libero-object-four",
    start_suite="libero_object",
    start_task_ids="0,3,5,7",
    start_dataset="libero_object_start_no_noops",
    start_perturbed={"init_noise_mm": 50},
    data_root_dir="data",
    dataset_suffix="_displaced_no_noops",
    max_steps=600,
    save_freq=300,
    batch_size=16,
    learning_rate=3.5e-4,
    num_trials=4,
    pro_trials=2,
    start_trials=2,
    # The original rates and budget are inert at this scale (results/budget); drift is therefore stated relatively.
    craft={"craft_preset": "budget", "craft_retention_budget": 0.01},
    perturbed={"init_noise_mm": 35},
    budgets=(0.01, 0.03),
    penalties=(1.0,),
    shots=(5, 20),
    demos_per_task=20,
    seeds=(0, 1),
    metric_flags={"craft_retention_metric": "rel_mse"},
    train={
        "lr_schedule": "cosine",
        "lr_warmup_steps": 0.05,
        "max_grad_norm": 1.0,
        "image_aug": False,
        "proprio_dropout": 0.5,  # else the policy reads the robot state and does not look (results/pilot_target)
        "craft_log_freq": 10,
    },
    evaluate={"num_workers": 0, "save_videos": "none", "render_mode": "lazy"},
    collect={
        "initial_states": "standard:20-49",
        "init_noise_mm": 40,
        "reset_mode": "soft",
        "noise_std": 0.15,
        "noise_fraction": 0.5,
        "image_size": 96,
        "jpeg_quality": 75,
        "max_attempts": 12,  # with the default of 4 two starts of twenty had none that succeeded
        "seed": 0,
    },
    start_collect={"init_noise_mm": 50},
    heldout_collect={"episodes_per_task": 6, "noise_std": 0.0, "seed": 1000},
    keep=KEEP,
    # 0.45 s for a step of 16 samples; 0.022 s a control step, of which an episode takes three quarters of its limit.
    pace=Pace(program=13, sample=0.45 / 16, control_step=0.022 * 0.75, demonstration=8),
    bench=Bench(
        new_tasks=(NewTask("near", "libero_object", "2"), NewTask("far", "libero_spatial", "0")),
        primary=_PRIMARY,
        secondary=_SECONDARY,
        recovered=_RECOVERED,
        changes={
            "max_steps": 800,
            "save_freq": 400,
            "learning_rate": 5e-4,  # by pilots (docs/experiments.md): at 3.5e-4 plain learns B in 13 of 40 episodes
            "seeds": (0, 1, 2, 3, 4),
            "num_trials": 40,
            "pro_trials": 20,
            "start_trials": 40,
        },
    ),
)

PRESETS = {preset.name: preset for preset in (TINY, QWEN, TINY_ARCHIVE)}
