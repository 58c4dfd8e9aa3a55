"""What one collection of demonstrations is asked for."""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.robot.libero.expert_settings import describe_expert
from experiments.robot.libero.kernels import fixed_kernels
from experiments.robot.libero.modes import RenderMode, ResetMode
from prismatic.command_line import UsageError, check_values, flag

VERSION = "1.0.0"


@dataclass(frozen=True)
class CollectSettings:
    """One collection run.  Everything that decides the content of an episode is part of the scratch fingerprint."""

    task_suite_name: str
    task_ids: tuple[int, ...]
    output_dir: str
    dataset_name: str
    episodes_per_task: int = flag(40, at_least=1)
    image_size: int = flag(96, "pixels, square", at_least=16, at_most=4096)
    jpeg_quality: int = flag(95, at_least=1, at_most=100)
    num_workers: int = flag(2, "simulator processes", at_least=1, at_most=1024)
    seed: int = flag(0, at_least=0)
    noise_std: float = flag(0.0, "of the executed arm action; the recorded one stays clean", at_least=0, at_most=10)
    noise_fraction: float = flag(0.5, "share of episodes with noise (if noise_std > 0)", at_least=0, at_most=1)
    initial_states: str = flag("sampled", "'sampled' or 'standard:FIRST-LAST'")
    # LIBERO's own starts differ by so little that a policy succeeds by heart; from displaced ones it has to look.
    init_noise_mm: float = flag(
        0.0, "radius of the disc in which every object is displaced from its start", at_least=0, at_most=1000
    )
    render_mode: RenderMode = RenderMode.LAZY
    # Soft resets are faster but leave fixtures where they were built: a sampled object that belongs on one would fall.
    reset_mode: ResetMode = ResetMode.HARD
    max_attempts: int = flag(4, "per episode", at_least=1)
    # LIBERO's own demonstrations end after the goal has held for 10 steps. Without them hardly any window shows what
    # to do once the gripper has opened, and a policy trained on those carries the object and never lets go.
    steps_after_success: int = flag(10, "recorded after the goal is reached; it must still hold", at_least=0)

    def __post_init__(self) -> None:
        check_values(self)
        if not re.fullmatch(r"[A-Za-z0-9_]{1,200}", self.dataset_name):
            raise UsageError(f"--dataset_name: letters, digits and underscores only, found {self.dataset_name!r}")
        standard_states(self.initial_states)

    @property
    def scratch(self) -> Path:
        """Directory of finished episodes."""
        return Path(self.output_dir) / ".scratch" / self.dataset_name

    @property
    def target(self) -> Path:
        """Version directory of the finished data set."""
        return Path(self.output_dir) / self.dataset_name / VERSION

    def fingerprint(self) -> dict[str, Any]:
        """What two runs must share to continue each other (not the number of episodes, tasks or workers)."""
        modes = {"render_mode": self.render_mode.value, "reset_mode": self.reset_mode.value}
        kernels = (fixed_kernels() | os.environ).get("OPENBLAS_CORETYPE", "")
        content = asdict(self) | modes | {"expert": describe_expert(), "kernels": kernels}
        for name in ("task_ids", "output_dir", "dataset_name", "episodes_per_task", "num_workers"):
            del content[name]
        return content


def standard_states(text: str) -> range | None:
    """`sampled` -> None, `standard:0-29` -> range(0, 30).  Raises UsageError for anything else."""
    if text == "sampled":
        return None
    match = re.fullmatch(r"standard:([0-9]{1,9})-([0-9]{1,9})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UsageError(f"--initial_states: expected 'sampled' or 'standard:FIRST-LAST', found {text!r}")
    return range(int(match[1]), int(match[2]) + 1)
