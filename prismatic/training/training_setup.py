"""The objects of a run, which `setup.py` makes; apart from it, since much of what it needs takes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prismatic.extern.hf.processing_prismatic import PrismaticProcessor
from prismatic.models.vla_policy import VLAPolicyModel
from prismatic.training.base_model import BaseModel
from prismatic.training.instruction_record import with_trained_on
from prismatic.vla.action_spec import ActionSpec
from prismatic.vla.datasets.dataset import VLADataset
from prismatic.vla.datasets.replay import ReplayMixture
from prismatic.vla.images import ImageSpec


@dataclass
class TrainingSetup:
    """Everything a run holds fixed. `start_instructions`: those the start model was trained on, by data set."""

    model: VLAPolicyModel
    processor: PrismaticProcessor
    dataset: VLADataset | ReplayMixture
    action_spec: ActionSpec
    image_spec: ImageSpec
    dataset_metadata: dict[str, Any]
    statistics: dict[str, Any]
    base: BaseModel | None
    origin: str
    run_dir: Path
    val_dataset: VLADataset | None = None
    start_instructions: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Camera images per sample."""
        return self.model.num_images

    @property
    def instructions(self) -> dict[str, list[str]]:
        """What the policy of this run is trained on, the start's training included: {data set name: sentences}."""
        return with_trained_on(self.start_instructions, self.dataset.manifest())
