"""The preset of the tables in results/archive, frozen: their pages are made with it again. Nothing here changes."""

from craft_experiments.preset import Preset

_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")

TINY_ARCHIVE = Preset(
    name="tiny-archive",
    suites=_SUITES,
    task_ids={"libero_spatial": "0,1", "libero_object": "2,5", "libero_goal": "1,8", "libero_10": "0"},
    start="pretrained_models/tiny-libero-displaced",
    start_suite="libero_object",
    start_task_ids="0,3,7",
    start_dataset="libero_object_start_no_noops",
    other_start_datasets={"libero_spatial": "libero_spatial_start_no_noops"},
    start_perturbed={"init_noise_mm": 50},
    data_root_dir="data",
    dataset_suffix="_displaced_no_noops",
    max_steps=800,
    save_freq=400,
    batch_size=8,
    learning_rate=5e-4,
    num_trials=4,
    pro_trials=2,
    start_trials=2,
    # The original rates and budget are inert at this scale (results/budget); drift is therefore stated relatively.
    craft={"craft_preset": "budget", "craft_retention_budget": 0.01},
    perturbed={"init_noise_mm": 35},
    budgets=(0.003, 0.01, 0.03),
    penalties=(1.0, 10.0),
    shots=(1, 5, 10, 20),
    demos_per_task=20,
    seeds=(0, 1, 2),
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
        "seed": 0,
    },
    start_collect={"init_noise_mm": 50},
    heldout_collect={"episodes_per_task": 6, "noise_std": 0.0, "seed": 1000},
)
