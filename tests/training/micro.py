"""A model with few weights in place of the `tiny` preset: steps of milliseconds, for tests of many runs."""

from pathlib import Path

import pytest

from prismatic.models.presets import PRESETS, Preset, get_preset

DATA = Path(__file__).resolve().parents[1] / "golden" / "rlds_mini"
SHIPPED = Path(__file__).resolve().parents[2] / "datasets" / "rlds"

# What no two runs share: times and memory.
MEASURED = {
    "samples_per_second",
    "Time/Samples Per Second",
    "Time/Data Wait Share",
    "Memory/Peak GiB",
    "CRaFT/Anchor Seconds",
}


def _config() -> dict:
    config = _TINY.config()
    tower = {"image_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_hidden_dim": 48}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return config | {
        "image_sizes": [32, 32],
        "vision_towers": [t | tower for t in config["vision_towers"]],
        "text_config": config["text_config"] | sizes | {"num_key_value_heads": 1},
    }


_TINY = get_preset("tiny")
MICRO = Preset(_config, _TINY.head, image_size=32)


def install() -> None:
    """Let `--config_file_path tiny` build the small model in this process."""
    PRESETS["tiny"] = MICRO


def flags(folder: Path | str, name: str = "run") -> dict:
    """Flags of a run in which all kinds of state matter: augmentation, accumulation and a moving multiplier."""
    return {
        "config_file_path": "tiny",
        "data_root_dir": str(DATA),
        "dataset_name": "libero_mini_no_noops",
        "run_root_dir": str(folder),
        "run_id_override": name,
        "batch_size": 1,
        "grad_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "lr_schedule": "cosine",
        "use_craft": True,
        "craft_preset": "budget",
        "craft_retention_budget": 1e-4,
        "craft_every": 2,
        "craft_log_freq": 1,
        "device": "cpu",
    }


def start_checkpoint(folder: Path) -> Path:
    """A checkpoint of the small model after one step on another suite than `DATA`: it has something to keep."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    from prismatic.training.config import FinetuneConfig
    from prismatic.training.loop import Trainer
    from prismatic.training.setup import build_setup

    cfg = FinetuneConfig(
        config_file_path="tiny", data_root_dir=str(SHIPPED), dataset_name="libero_object_scripted_no_noops",
        run_root_dir=str(folder), run_id_override="start", batch_size=2, max_steps=1, device="cpu",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", MICRO)
        AcceleratorState._reset_state(reset_partial_state=True)
        Trainer(cfg, build_setup(cfg), Accelerator(cpu=True)).fit()
    return folder / "start--1_chkpt"
