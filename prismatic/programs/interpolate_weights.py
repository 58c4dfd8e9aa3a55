"""Write the policy between a trained checkpoint and the model it started from: theta_0 + scale (theta - theta_0).

python vla-scripts/interpolate_weights.py --checkpoint runs/...--20000_chkpt --adapter_scale 0.5 --output runs/half

After training and for free: a smaller scale keeps more of what the start model knew (WiSE-FT, arXiv 2109.01903; RETAIN,
arXiv 2512.08333). `--parts llm` moves the language model alone, as RETAIN's variant for one modality does: vision
towers and their projector, action queries, head and proprio projector stay as trained. `--parts head --adapter_scale 0`
is the trained VLM read by the start model's head: is what that head relied on still there? The output is an ordinary
checkpoint folder with merged weights, to evaluate or to start from. Runs on the CPU with the two models in memory.
"""

from dataclasses import dataclass
from pathlib import Path

from prismatic.command_line import bad_input_in_one_line, flag, parse
from prismatic.model_files import ROBOT_PLATFORM
from prismatic.output_folder import check_folder, held
from prismatic.progress import Progress
from prismatic.training.interpolation import check_scale, interpolate_checkpoint, save_policy
from prismatic.vla.datasets.registry import load_data_set_file


@dataclass
class InterpolateConfig:
    """Flags."""

    checkpoint: str = ""
    base: str = flag("", "the start model's folder; empty: the one recorded in the checkpoint, if it is still there")
    adapter_scale: float = flag(0.5, "0: start model, 1: trained model, above 1: beyond it", at_least=0)
    parts: str = flag(
        "all",
        "what moves. vlm: head and proprio projector stay as trained; llm: all but the language model does; head: the "
        "VLM does",
        choices=("vlm", "llm", "head", "all"),
    )
    data_set_file: str | None = flag(None, "Python file that registers data sets of your own (docs/datasets.md)")
    robot_platform: str | None = flag(None, ROBOT_PLATFORM)
    output: str = ""


def interpolate(cfg: InterpolateConfig) -> None:
    """Check, interpolate, write; ValueError or FileExistsError name the flag or the file that does not fit."""
    for name in ("checkpoint", "output"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name} is missing: name the folder")
    check_scale(cfg.adapter_scale)
    check_folder(cfg.output, "--output")
    with held(Path(cfg.output), "--output"):
        _interpolate(cfg)


def _interpolate(cfg: InterpolateConfig) -> None:
    if Path(cfg.output).exists():
        raise FileExistsError(f"--output {cfg.output} exists already")
    if cfg.data_set_file is not None:
        load_data_set_file(cfg.data_set_file)
    with Progress(2, "interpolating", "steps", note="reads both policies") as progress:
        base, robot = cfg.base or None, cfg.robot_platform
        policy = interpolate_checkpoint(cfg.checkpoint, cfg.adapter_scale, base, cfg.parts, robot)
        progress.advance(note="writes the policy")
        folder = save_policy(policy, cfg.output)
        progress.advance()
    record = policy.manifest["interpolation"]
    print(f"{folder}: {record['base']} + {cfg.adapter_scale} ({cfg.checkpoint} - {record['base']}), {cfg.parts}")


def main() -> None:
    """Parse and interpolate."""
    with bad_input_in_one_line("interpolate_weights.py"):
        interpolate(parse(InterpolateConfig, description=__doc__))


if __name__ == "__main__":
    main()
