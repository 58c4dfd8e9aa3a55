"""The command of the README, as users start it: one process and two, one micro-batch and four, LoRA and full tuning."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prismatic.training.checkpoints import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "one process": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def run(folder: Path, launcher: str, *flags: str) -> subprocess.CompletedProcess:
    command = [
        *LAUNCHERS[launcher], "vla-scripts/finetune.py",
        "--config_file_path", "pretrained_models/tiny-libero-object",
        "--data_root_dir", "tests/golden/rlds_mini", "--dataset_name", "libero_mini_no_noops",
        "--run_root_dir", str(folder), "--run_id_override", "run", "--batch_size", "1", "--max_steps", "2",
        "--save_freq", "2", "--learning_rate", "5e-4", "--use_proprio", "True", "--num_images_in_input", "2",
        "--device", "cpu", *flags,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)


@pytest.mark.slow
@pytest.mark.parametrize(  # every two of the three settings meet
    ("launcher", "accumulation", "lora"),
    [
        ("one process", "1", "True"),
        ("one process", "4", "False"),
        ("torchrun", "1", "False"),
        ("torchrun", "4", "True"),
    ],
)
def test_a_craft_run_from_the_command_line(tmp_path, launcher, accumulation, lora):
    done = run(
        tmp_path, launcher, "--use_craft", "True", "--craft_retention_budget", "0.1", "--craft_dual_lr", "0.01",
        "--craft_enable_projection", "True", "--craft_log_freq", "1", "--use_lora", lora,
        *(["--lora_rank", "4"] if lora == "True" else []), "--grad_accumulation_steps", accumulation,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["CRaFT/Retention Loss"] > 0 and lines[1]["CRaFT/Lambda"] == pytest.approx(0.999)
    assert lines[1]["samples_seen"] == 2 * int(accumulation) * (2 if launcher == "torchrun" else 1)
    assert done.stdout.count("CRaFT: saved") == 1  # the banner of the main process
    loaded = load_checkpoint(tmp_path / "run--2_chkpt")
    assert loaded.manifest["craft"]["dual"]["lambda"] < 0.999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--craft_retention_budget", "0"], "--craft_retention_budget is 0.0, expected more than 0"),
        (["--craft_projection_rule", "sometimes"], "--craft_projection_rule is 'sometimes', expected one of add, max"),
        (["--craft_anchor", "disable_adapter"], "the model has no adapters; use --use_lora True"),
    ],
)
def test_bad_settings_end_with_a_sentence(tmp_path, flags, message):
    done = run(tmp_path, "one process", "--use_craft", "True", *flags)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_all_processes_find_is_said_once(tmp_path):
    done = run(tmp_path, "torchrun", "--max_steps", "0")
    assert done.returncode != 0
    assert done.stderr.count("finetune.py: error: --max_steps is 0, expected at least 1") == 1


def test_fsdp_is_refused_with_the_alternative():
    from types import SimpleNamespace

    from accelerate.utils import DistributedType

    from prismatic.training.retention.methods import check_parallelism

    for version in (1, 2):
        state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
        accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
        with pytest.raises(ValueError, match=f"FSDP{version}.*Use DDP"):
            check_parallelism(accelerator)
