"""Flags: validation, learning-rate schedule, run id, translation to the algorithm's settings."""

import sys

import pytest

from prismatic import command_line
from prismatic.command_line import UsageError
from prismatic.training.command_line import parse_flags
from prismatic.training.config import FinetuneConfig, TuningMode


def test_published_and_craft_defaults():
    cfg = FinetuneConfig()
    assert (cfg.batch_size, cfg.learning_rate, cfg.max_steps, cfg.save_freq) == (8, 5e-4, 200_000, 10_000)
    craft = cfg.craft_config()
    assert (craft.retention_weight, craft.retention_budget, craft.dual_lr) == (1.0, 0.1, 0.01)
    assert (craft.projection_eps, craft.enable_projection, craft.fixed_lambda) == (1e-8, True, 0.1)
    assert not cfg.use_craft


def test_command_line_of_the_user_parses(monkeypatch):
    command = (
        "--config_file_path x --data_root_dir d --dataset_name libero_spatial_no_noops --run_root_dir r "
        "--use_minivlm True --num_images_in_input 2 --use_proprio True --use_lora True --lora_rank 64 --batch_size 4 "
        "--grad_accumulation_steps 4 --learning_rate 2e-4 --max_steps 200005 --save_freq 5000 --use_pro_version True "
        "--image_aug True --run_id_override my_run --wandb_project p --use_craft True --craft_retention_budget 0.05 "
        "--craft_anchor_type aq_only --craft_anchor_layer_idx -2 --craft_log_freq 5 --n_shot_episodes 5"
    )
    monkeypatch.setattr(sys, "argv", ["finetune.py", *command.split()])
    cfg = parse_flags()
    assert cfg.use_craft is True
    assert cfg.run_id == "my_run"
    assert cfg.craft_config().anchor_layer_idx == -2
    assert cfg.craft_config().anchor_type.value == "aq_only"
    assert cfg.n_shot_episodes == 5


def test_every_run_has_a_log_and_one_flag_says_how_often():
    assert FinetuneConfig().log_freq == FinetuneConfig(use_craft=True).log_freq == 10
    for options in ({}, {"use_craft": True}, {"retention_method": "l2sp"}):
        assert FinetuneConfig(craft_log_freq=3, wandb_log_freq=7, **options).log_freq == 3
    assert FinetuneConfig(wandb_log_freq=7).log_freq == 7
    assert FinetuneConfig(wandb_log_freq=7, use_craft=True).log_freq == 10


def test_decay_takes_effect_with_and_without_warm_up():
    for warmup in (0, 10, 0.1):
        cfg = FinetuneConfig(learning_rate=1.0, lr_warmup_steps=warmup, num_steps_before_decay=50, max_steps=100)
        assert cfg.learning_rate_at(49) == 1.0
        assert cfg.learning_rate_at(50) == pytest.approx(0.1)
    assert cfg.learning_rate_at(0) == pytest.approx(0.1 + 0.9 / 10)
    assert cfg.learning_rate_at(4) == pytest.approx(0.1 + 0.9 * 5 / 10)


def test_cosine_falls_to_zero_and_constant_stays():
    cosine = FinetuneConfig(learning_rate=1.0, lr_schedule="cosine", max_steps=100, lr_warmup_steps=10)
    values = [cosine.learning_rate_at(step) for step in range(100)]
    assert values[10] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.5)
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] < 1e-3
    constant = FinetuneConfig(learning_rate=1.0, lr_schedule="constant")
    assert constant.learning_rate_at(10_000) == 1.0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"use_diffusion": True}, "use_diffusion"),
        ({"use_l1_regression": False}, "use_l1_regression"),
        ({"use_film": True}, "use_film"),
        ({"phase": "Inference"}, "phase"),
        ({"use_lora": True, "use_fz": True}, "exclude"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"lr_schedule": "linear"}, "linear"),
        ({"craft_anchor_type": "everything"}, "everything"),
        ({"craft_cr_token_mode": "all"}, "cr_token_mode"),
        ({"craft_dual_lr": -1.0}, "dual_lr"),
    ],
)
def test_bad_flags_are_named(flags, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**flags)


def test_run_id_tells_the_runs_apart():
    base = {"config_file_path": "a/b/", "dataset_name": "d"}
    variants = [
        {},
        {"use_craft": True},
        {"use_lora": True},
        {"use_fz": True},
        {"n_shot_episodes": 5},
        {"batch_size": 2},
    ]
    ids = {FinetuneConfig(**base, **v).run_id for v in variants}
    assert len(ids) == len(variants)
    assert all(i.startswith("b+d+") for i in ids)
    assert FinetuneConfig(use_fz=True).tuning_mode is TuningMode.FROZEN


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"resume": "always"}, "--resume is 'always', expected True, False or auto"),
        ({"keep_last": 0}, "--keep_last is 0, expected at least 1"),
        ({"keep_every": 5}, "--keep_every 5 needs --keep_last"),
        ({"keep_last": 2, "save_latest_checkpoint_only": True}, "--keep_last excludes --save_latest_checkpoint_only"),
        ({"async_save": True, "export_published_layout": True}, "--async_save True excludes"),
        ({"ddp_timeout": 0}, "--ddp_timeout is 0, expected more than 0"),
    ],
)
def test_saving_flags_that_contradict_each_other(flags, message):
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**flags)


@pytest.mark.parametrize(
    ("flags", "switch"),
    [
        ({"resum_vla_path": "runs/x--5_chkpt"}, "--resume True; without it the run starts at step 0"),
        ({"resume_step": 0}, "--resume True"),
        ({"val_batches": 5}, "--use_val_set True"),
        ({"subset_seed": 1}, "--n_shot_episodes N or --use_val_set True"),
        ({"compile_backend": "eager"}, "--compile True"),
        ({"lr_min_ratio": 0.5}, "--lr_schedule cosine"),
        ({"lr_schedule": "cosine", "num_steps_before_decay": 5}, "--lr_schedule step"),
        ({"lr_schedule": "cosine", "lr_decay_factor": 0.5}, "--lr_schedule step or multistep"),
    ],
)
def test_flags_that_nothing_reads_without_another_are_refused(flags, switch):
    with pytest.raises(ValueError, match=f"--{list(flags)[-1]} .* has no effect: it needs {switch}"):
        FinetuneConfig(**flags)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("True", True), ("False", False)])
def test_resume_on_the_command_line(text, value):
    found = parse_flags(["--resume", text]).resume
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_a_flag_needs_is_asked_for_with_the_flags(monkeypatch, package):
    """Before a model is loaded or a file of an earlier run is touched."""
    monkeypatch.setattr(command_line, "is_installed", lambda name: name != package)
    way_out = rf"--use_{package} True needs {package}.*pip install 'craft-vla\[{package}\]'"
    with pytest.raises(UsageError, match=way_out):
        parse_flags([f"--use_{package}", "True"])
    parse_flags([f"--use_{package}", "False"])
