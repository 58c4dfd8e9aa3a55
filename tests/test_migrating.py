"""Commands of VLA-Adapter, OpenVLA-OFT and OpenVLA, pasted: accepted, or answered with the flag to use."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from experiments.robot.libero import eval_config
from experiments.robot.libero.eval_config import EvalConfig
from prismatic.command_line import UsageError
from prismatic.training import command_line
from prismatic.training.config import FinetuneConfig, TuningMode

PAGE = (Path(__file__).parents[1] / "docs" / "migrating.md").read_text(encoding="utf-8")

VLA_ADAPTER_TRAINING = """
    --vlm_path pretrained_models/prism-qwen25-extra-dinosiglip-224px-0_5b --config_file_path pretrained_models/configs
    --data_root_dir data/libero --dataset_name libero_spatial_no_noops --run_root_dir outputs --use_film False
    --num_images_in_input 2 --use_proprio True --use_lora True --use_fz False --use_minivlm True --image_aug True
    --num_steps_before_decay 400000 --max_steps 400005 --save_freq 5000 --save_latest_checkpoint_only False
    --merge_lora_during_training True --batch_size 1 --grad_accumulation_steps 8 --learning_rate 2e-4 --lora_rank 64
    --use_pro_version True --wandb_entity YOUR_WANDB_ENTITY --wandb_project libero_spatial_no_noops
    --run_id_note VLA-Adapter--libero_spatial_no_noops--20250901
"""
OPENVLA_OFT_TRAINING = """
    --vla_path openvla/openvla-7b --data_root_dir data/rlds --dataset_name libero_spatial_no_noops --run_root_dir runs
    --use_l1_regression True --use_diffusion False --use_film False --num_images_in_input 2 --use_proprio True
    --batch_size 8 --learning_rate 5e-4 --num_steps_before_decay 100000 --max_steps 150005 --save_freq 10000
    --save_latest_checkpoint_only False --image_aug True --lora_rank 32 --wandb_entity me --wandb_project mine
    --run_id_note parallel_dec--8_acts_chunk--continuous_acts--L1_regression--3rd_person_img--wrist_img--proprio_state
"""
OPENVLA_TRAINING = """
    --vla_path openvla/openvla-7b --data_root_dir data/rlds --dataset_name bridge_orig --run_root_dir runs
    --adapter_tmp_dir tmp --lora_rank 32 --batch_size 16 --grad_accumulation_steps 1 --learning_rate 5e-4
    --image_aug True --wandb_project mine --wandb_entity me --save_steps 5000
"""
VLA_ADAPTER_EVALUATION = """
    --use_proprio True --num_images_in_input 2 --use_film False --pretrained_checkpoint outputs/LIBERO-Spatial-Pro
    --task_suite_name libero_spatial --use_pro_version True
"""
OPENVLA_OFT_EVALUATION = """
    --pretrained_checkpoint moojink/openvla-7b-oft-finetuned-libero-spatial --task_suite_name libero_spatial
    --use_l1_regression True --use_diffusion False --num_diffusion_steps_train 50 --num_diffusion_steps_inference 50
    --lora_rank 32 --use_film False --num_images_in_input 2 --use_proprio True --center_crop True
"""
OPENVLA_EVALUATION = """
    --model_family openvla --pretrained_checkpoint openvla/openvla-7b-finetuned-libero-spatial
    --task_suite_name libero_spatial --center_crop True --run_id_note note --use_wandb False --wandb_project mine
    --wandb_entity me
"""
# Whatever else their configurations hold, with its default.
OTHER_TRAINING = """
    --shuffle_buffer_size 100000 --num_diffusion_steps 50 --num_diffusion_steps_train 50 --diffusion_sample_freq 50
    --phase1_path None --lr_warmup_steps 0.1 --use_val_set False --val_freq 10000 --val_time_limit 180 --resume False
    --lora_dropout 0.0 --wandb_log_freq 10 --phase Training --use_quantization False
"""
OTHER_EVALUATION = """
    --use_minivlm True --num_diffusion_steps 50 --num_open_loop_steps 8 --unnorm_key libero_spatial
    --load_in_8bit False --load_in_4bit False --num_steps_wait 10 --num_trials_per_task 50 --initial_states_path DEFAULT
    --env_img_res 256 --local_log_dir ./experiments/logs --seed 7 --save_version vla-adapter --phase Inference
"""


def names(*commands: str) -> set[str]:
    return set(re.findall(r"--(\w+)(?= )", " ".join(commands)))


def train(text: str) -> FinetuneConfig:
    return command_line.parse_flags(shlex.split(text))


@pytest.mark.parametrize("more", ["", OTHER_TRAINING])
def test_vla_adapters_training_command_is_accepted(more):
    cfg = train(VLA_ADAPTER_TRAINING + more)
    assert cfg.tuning_mode is TuningMode.LORA and cfg.lora_rank == 64 and cfg.merge_lora_during_training
    assert (cfg.max_steps, cfg.grad_accumulation_steps, cfg.num_images_in_input) == (400005, 8, 2)


@pytest.mark.parametrize("command", [OPENVLA_OFT_TRAINING, OPENVLA_TRAINING])
def test_openvlas_training_commands_are_led_to_one_that_is_accepted(command):
    """Each answer names the flag to use; following them ends."""
    with pytest.raises(UsageError, match="--vla_path.* use --config_file_path"):
        train(command)
    command = command.replace("--vla_path openvla/openvla-7b", "--config_file_path start")
    if "--save_steps" in command:
        with pytest.raises(UsageError, match="--save_steps.* use --save_freq"):
            train(command)
        command = command.replace("--save_steps", "--save_freq")
    with pytest.raises(ValueError, match="--lora_rank.* needs --use_lora True"):
        train(command)
    assert train(command + " --use_lora True").lora_rank == 32


@pytest.mark.parametrize("command", [VLA_ADAPTER_EVALUATION, OPENVLA_OFT_EVALUATION, OPENVLA_EVALUATION])
def test_evaluation_commands_are_accepted(command, capsys):
    for more in ("", OTHER_EVALUATION):
        cfg = eval_config.parse_flags(shlex.split(command + more + " --save_videos none"))
        cfg.validate()
        assert cfg.task_suite_name == "libero_spatial"
    notes = capsys.readouterr().err.splitlines()
    assert all(line.startswith("note: --") and "changes nothing here" in line for line in notes)
    assert bool(notes) == ("lora_rank" in command)


@pytest.mark.parametrize("words", [["--use_diffusion", "True"], ["--vla_path", "x"], ["--vlm_path", "x"]])
def test_what_would_change_an_evaluation_is_refused(words):
    with pytest.raises(UsageError, match=f"{words[0]} {words[1]} is a flag of another code base: "):
        eval_config.parse_flags(words)


@pytest.mark.parametrize(
    ("section", "config", "foreign", "commands"),
    [
        (
            "Training",
            FinetuneConfig,
            command_line.FOREIGN,
            (VLA_ADAPTER_TRAINING, OPENVLA_OFT_TRAINING, OPENVLA_TRAINING, OTHER_TRAINING),
        ),
        (
            "Evaluation",
            EvalConfig,
            eval_config.FOREIGN,
            (VLA_ADAPTER_EVALUATION, OPENVLA_OFT_EVALUATION, OPENVLA_EVALUATION, OTHER_EVALUATION),
        ),
    ],
)
def test_the_page_lists_all_of_theirs_and_nothing_else(section, config, foreign, commands):
    rows = re.findall(r"^\| `(.*?) \|", PAGE.partition(f"## {section}\n")[2].partition("\n## ")[0], re.M)
    listed = set(re.findall(r"\w+", " ".join(rows))) - {"OpenVLA", "OFT"}
    here = {entry.name for entry in fields(config)}
    assert listed <= here | set(foreign), "listed, but unknown to the program"
    assert names(*commands) <= listed and set(foreign) <= listed
    assert not here & set(foreign)
