"""Data of your own: say once what its files hold, look at it, and see what a policy would learn from.

    python examples/make_own_data.py DATA/my_arm     # or put a data set there that you recorded, and change this file
    python examples/own_data.py DATA/my_arm
    craft-finetune --config_file_path tiny --data_set_file examples/own_data.py \\
        --data_root_dir DATA --dataset_name my_arm

The second prints the report of the data set, the folder with pictures of its frames, and one sample. The robot has five
joints and a gripper, recorded as LeRobot records such arms: positions and targets in degrees, at 30 Hz.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np

from prismatic.command_line import OneLineParser, bad_input_in_one_line
from prismatic.vla.action_spec import ActionSpec, NormalizationType
from prismatic.vla.datasets.registry import DataSetConfig, register_data_set
from prismatic.vla.datasets.source import SourceKeys


def standardize(actions, state):
    """Stored targets and positions, (T, 6) -> learned: the joints' way to the target (rad), gripper 1 = open; state."""
    way = np.radians(actions[:, :5] - state[:, :5])
    joints = np.radians(state[:, :5])
    return np.hstack([way, actions[:, 5:] / 100]), np.hstack([joints, state[:, 5:] / 100])


CONFIG = DataSetConfig(
    standardize,
    keys=(
        SourceKeys(
            "lerobot", ("observation.images.front", "observation.images.wrist"), ("observation.state",), "action"
        ),
    ),
    action_mask=(True,) * 5 + (False,),  # the gripper is not normalised
    action_spec=ActionSpec(chunk_len=16, action_dim=6, proprio_dim=6, normalization=NormalizationType.BOUNDS_Q99),
    control_hz=30.0,
)
register_data_set("my_arm", CONFIG)


def main(folder):
    """Print the report of the data set, and its first sample."""
    from prismatic.vla.datasets.dataset import DatasetSettings, VLADataset
    from prismatic.vla.datasets.inspect import format_report, inspect

    report, pictures = inspect(folder, tempfile.mkdtemp())
    print(format_report(report) + f"frames         {pictures}\n")
    samples = VLADataset(folder.parent, folder.name, DatasetSettings(CONFIG.action_spec, image_aug=False))
    sample = samples[0, 0]  # the first of epoch 0
    print(f"{len(samples)} samples. The first: {sample['instruction']!r}, images {sample['images'].shape} of cameras")
    print(
        f"{samples.cameras['my_arm']}, state {sample['proprio'].shape}, actions {sample['actions'].shape}, normalised;"
    )
    print("its first action is", np.round(samples.normalizer.unnormalize_action(sample["actions"])[0], 3))


if __name__ == "__main__":
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a LeRobot data set with the name my_arm")
    with bad_input_in_one_line(sys.argv[0]):
        main(parser.parse_args().folder.absolute())
