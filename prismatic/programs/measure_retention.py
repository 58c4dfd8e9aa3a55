"""Measure what training did to the representation: drift, CKA, linear probes and action errors, as one JSON file.

python vla-scripts/measure_retention.py --checkpoint runs/x--500_chkpt --start pretrained_models/tiny-libero-object \
    --data_root_dir datasets/rlds --dataset_name libero_object_scripted_no_noops --output out.json

The data set is usually one the start model was trained on, whose statistics it has. What the numbers mean is in
`prismatic/training/representation.py`. Both policies are in memory.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from prismatic.command_line import bad_input_in_one_line, flag, parse
from prismatic.model_files import BASE_CHECKPOINT, ROBOT_PLATFORM
from prismatic.output_folder import check_file, held
from prismatic.training.checkpoints import load_checkpoint
from prismatic.training.representation import MeasureSettings, measure_retention, write_report
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.format_table import SKIP_BAD_EPISODES, SPLIT
from prismatic.vla.datasets.registry import load_data_set_file


@dataclass
class MeasureConfig:
    """Flags."""

    checkpoint: str = ""
    start: str = ""
    data_root_dir: str = "datasets/rlds"
    dataset_name: str = ""
    split: str | None = flag(None, SPLIT)
    skip_bad_episodes: bool = flag(False, SKIP_BAD_EPISODES)
    data_set_file: str | None = flag(None, "Python file that registers data sets of your own (docs/datasets.md)")
    robot_platform: str | None = flag(None, ROBOT_PLATFORM)
    base_checkpoint: str | None = flag(None, BASE_CHECKPOINT)
    output: str = ""
    max_samples: int = flag(512, "evenly spread over the episodes; 0: all", at_least=0)
    batch_size: int = flag(16, at_least=1)
    seed: int = flag(7, "which episodes the probes are tested on", at_least=0)
    unnorm_key: str | None = flag(None, "entry of the start's statistics, when it has none of the data set's name")
    device: str = flag("auto", "auto: cuda when there is one", choices=("auto", "cpu", "cuda"))


def measure(cfg: MeasureConfig) -> None:
    """Check, measure, write; errors name the flag or the file that does not fit."""
    for name in ("checkpoint", "start", "dataset_name", "output"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is missing")
    check_file(cfg.output, "--output")
    _require_new(cfg)
    with held(Path(cfg.output), "--output"):
        _require_new(cfg)  # of another process that was quicker
        _measure(cfg)


def _require_new(cfg: MeasureConfig) -> None:
    if Path(cfg.output).exists():
        raise FileExistsError(f"--output {cfg.output} exists already")


def _measure(cfg: MeasureConfig) -> None:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    settings = MeasureSettings(
        cfg.max_samples, cfg.batch_size, cfg.seed, device, cfg.unnorm_key, cfg.split, cfg.skip_bad_episodes
    )
    if cfg.data_set_file is not None:
        load_data_set_file(cfg.data_set_file)
    trained = load_checkpoint(cfg.checkpoint, base=cfg.base_checkpoint, robot=cfg.robot_platform)
    # A published start does not say which robot it is for; what was trained from it does.
    start = load_checkpoint(cfg.start, robot=ActionSpec.from_dict(trained.manifest["action_spec"]))
    report = measure_retention(start, trained, cfg.data_root_dir, cfg.dataset_name, settings)
    write_report({"flags": asdict(cfg)} | report, cfg.output)
    drift, errors = report["drift"]["original"]["rel_mse"]["total"], report["action_l1"]
    print(f"{cfg.output}: relative drift {drift:.4g}, " + ", ".join(f"L1 {k} {v:.4g}" for k, v in errors.items()))


def main() -> None:
    """Parse and measure."""
    with bad_input_in_one_line("measure_retention.py"):
        measure(parse(MeasureConfig, description=__doc__))


if __name__ == "__main__":
    main()
