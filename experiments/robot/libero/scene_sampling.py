"""Images of the moment at which robosuite samples its observables, rendered only when somebody looks.

robosuite renders its camera observables in every control step, some 2-4 ms of simulated time before its end, and the
policy looks at one step in eight. Here the same clock runs at the same sub-steps, but what it takes is the scene (the
list of shapes, their places, lights and the camera, as MuJoCo hands it to the renderer) instead of its image. The image
of a stored scene is the image robosuite would have made, bit for bit, and a scene costs a hundredth of it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

_PROPRIOCEPTION = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
_MAX_GEOMS = 1000  # as robosuite's own scene


class SceneSampler:
    """Replaces the observables of a robosuite environment by one that stores scenes and proprioception.

    Args:
        domain: robosuite environment, built with an offscreen renderer and without camera observables.
        cameras: camera names.
        size: pixels of the square images.
    """

    def __init__(self, domain: Any, cameras: Sequence[str], size: int) -> None:
        self._domain, self._cameras, self._size = domain, tuple(cameras), size
        self._sim: Any = None
        self._sensors: list[Any] = []
        self._scenes: list[Any] = []
        self._views: list[Any] = []
        self._images: list[np.ndarray] | None = None
        self.proprioception: dict[str, np.ndarray] = {}
        """Sampled robot0_eef_pos (3,), robot0_eef_quat (4,) x, y, z, w and robot0_gripper_qpos (2,)."""
        domain._setup_observables = self._setup  # a hard reset calls it again
        domain._observables = self._setup()

    def images(self) -> list[np.ndarray]:
        """The cameras' images (size, size, 3) uint8 of the last sample, as robosuite reports them (upside down).

        Made at the first call after a sample, and kept until the next sample.
        """
        if self._images is None:
            self._images = [self._render(scene) for scene in self._scenes]
        return [image.copy() for image in self._images]

    def _setup(self) -> OrderedDict:
        from robosuite.utils.observables import Observable

        robot = self._domain.robots[0].setup_observables()  # a hard reset makes new robots
        self._sensors = [robot[name]._sensor for name in _PROPRIOCEPTION]

        def sample(_cache: dict) -> np.ndarray:
            return self._sample()

        sample.__modality__ = "policy_view"  # type: ignore[attr-defined]  # robosuite reads it from the function
        # robosuite's own class keeps the time, with its rounding: it decides the sub-step.
        view = Observable(name="policy_view", sensor=sample, sampling_rate=self._domain.control_freq)
        return OrderedDict(policy_view=view)

    def _sample(self) -> np.ndarray:
        import mujoco

        sim = self._domain.sim
        if self._sim is not sim:
            self._prepare(sim)
        context = sim._render_context_offscreen
        model, data = sim.model._model, sim.data._data
        for view, scene in zip(self._views, self._scenes, strict=True):
            mujoco.mjv_updateScene(model, data, context.vopt, context.pert, view, mujoco.mjtCatBit.mjCAT_ALL, scene)
        self._images = None
        values = [np.array(sensor({})) for sensor in self._sensors]
        self.proprioception = dict(zip(_PROPRIOCEPTION, values, strict=True))
        return np.concatenate(values)

    def _prepare(self, sim: Any) -> None:
        import mujoco

        self._sim, self._scenes, self._views = sim, [], []
        for name in self._cameras:
            view = mujoco.MjvCamera()
            view.type = mujoco.mjtCamera.mjCAMERA_FIXED
            view.fixedcamid = sim.model.camera_name2id(name)
            self._views.append(view)
            self._scenes.append(mujoco.MjvScene(sim.model._model, maxgeom=_MAX_GEOMS))

    def _render(self, scene: Any) -> np.ndarray:
        import mujoco

        context, size = self._sim._render_context_offscreen, self._size
        context.gl_ctx.make_current()
        if size > context.con.offWidth or size > context.con.offHeight:
            offscreen = self._sim.model.vis.global_
            context.update_offscreen_size(max(size, offscreen.offwidth), max(size, offscreen.offheight))
        mujoco.mjr_render(viewport=mujoco.MjrRect(0, 0, size, size), scn=scene, con=context.con)
        return context.read_pixels(size, size)
