"""Observations of old data, which a memory or the drift monitor looks at: no actions are read."""

from __future__ import annotations

from prismatic.training.config import FinetuneConfig
from prismatic.training.data_sets import open_old_data
from prismatic.training.training_setup import TrainingSetup
from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset


def observations(
    flag: str, folder: str, setup: TrainingSetup, cfg: FinetuneConfig, image_aug: bool | None = None
) -> VLADataset:
    """Images, state and instructions of the data set at `FOLDER` or `FOLDER:SPLIT`, as the run sees them.

    `image_aug` None augments as in training. Raises what `open_old_data` does.
    """
    training: DatasetSettings = setup.dataset.settings
    settings = DatasetSettings(
        setup.action_spec,
        setup.image_spec,
        setup.num_images,
        image_aug=training.image_aug if image_aug is None else image_aug,
        blind_images=training.blind_images,  # a blind run sees no image, here neither
        seed=cfg.seed,
        observations_only=True,
        skip_bad_episodes=cfg.skip_bad_episodes,
        known_statistics=setup.statistics,
    )
    return open_old_data(flag, folder, settings)
