"""Recorded demonstrations as the replay control needs them: what each did, in the simulator's convention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.robot.libero.controls import to_simulator_actions
from prismatic.vla.datasets.format_table import folder_and_split
from prismatic.vla.datasets.inspect import open_folder
from prismatic.vla.datasets.inspect_checks import check_for_training
from prismatic.vla.datasets.registry import get_data_set_config, standardize_libero


@dataclass(frozen=True)
class Recording:
    """One demonstration: its instruction and its actions (T, 7), the gripper -1 open and +1 close."""

    instruction: str
    actions: np.ndarray


class Recordings:
    """The demonstrations of a data set in any format that training reads, of its primary camera at least.

    Stored actions are turned into the simulator's as those of a policy trained on them would be; LIBERO's are executed
    as they are. A data set of an unknown name counts as LIBERO's. warnings: what stands out in it, a line each.

    Args:
        place: the folder, `FOLDER:SPLIT` for another split, or one version of an RLDS data set.

    Raises DataSetError for values that contradict the conventions, and what `open_folder` raises.
    """

    def __init__(self, place: str) -> None:
        folder, split = folder_and_split(place)
        # One demonstration is needed: others may be broken.
        name, self._source, self._config = open_folder(folder, split, skip_bad=True, num_images=1)
        try:
            get_data_set_config(name)
        except KeyError:
            self._config = get_data_set_config("libero_")
        self.warnings = [*self._source.warnings, *check_for_training(self._source, self._config, name)]

    @property
    def metadata(self) -> dict[str, Any] | None:
        """How the data were collected, None when there is no record."""
        return self._source.metadata

    @property
    def num_episodes(self) -> int:
        """Demonstrations, also those that cannot be read."""
        return len(self._source)

    def episode(self, index: int) -> Recording:
        """Demonstration `index`, without actions when it cannot be read."""
        instruction, actions = self._source.instructions[index], self._source.actions(index)
        if len(actions) and self._config.standardize != standardize_libero:
            actions = to_simulator_actions(self._config.standardize(actions, self._source.state(index))[0])
        return Recording(instruction, actions)
