"""The state of one simulation, kept and put back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np


class SimulationSnapshot:
    """Everything that decides how one simulation goes on: MuJoCo's integration state, which includes what its solver
    starts from, and those arrays of the model that simulation code writes to."""

    def __init__(self, sim: Any) -> None:
        import mujoco

        self._model, self._data = sim.model._model, sim.data._data
        self._spec = mujoco.mjtState.mjSTATE_INTEGRATION
        self._state = np.empty(mujoco.mj_stateSize(self._model, self._spec))
        mujoco.mj_getState(self._model, self._data, self._state, self._spec)
        self._arrays = {name: array.copy() for name, array in _small_arrays(self._model)}

    def restore(self) -> None:
        """Put the simulation back; computed quantities follow with the next forward pass."""
        import mujoco

        for name, array in _small_arrays(self._model):
            if not np.array_equal(array, self._arrays[name]):
                array[...] = self._arrays[name]
        mujoco.mj_setState(self._model, self._data, self._state, self._spec)


def _small_arrays(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of the model that simulation code changes: places, sizes, colours of bodies, geoms and sites."""
    for name in dir(model):
        if name.startswith(("body_", "geom_", "site_", "jnt_", "actuator_", "light_", "cam_")):
            value = getattr(model, name)
            if isinstance(value, np.ndarray):
                yield name, value
