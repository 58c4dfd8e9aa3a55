"""Which geoms a camera cannot show. Drawing them changes no pixel, and drawing is what an image costs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

HIDDEN_GROUP = 0
"""The geom group that the LAZY renderer leaves out: collision shapes."""


def outside_view(model: Any, data: Any, camera: int) -> np.ndarray:
    """(ngeom,) bool: the geom's bounding sphere lies outside the pyramid of a camera with square images.

    model, data: of `mujoco`, with poses computed. Near and far planes are not used. A plane has no sphere and is never
    outside. The spheres are taken a little larger than they are.
    """
    radius = 1.01 * model.geom_rbound + 1e-3
    from_camera = (data.geom_xpos - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)  # it looks along -z
    half = np.deg2rad(model.cam_fovy[camera]) / 2
    sideways = np.abs(from_camera[:, :2]).max(axis=1)
    beyond_edge = sideways * np.cos(half) + from_camera[:, 2] * np.sin(half) > radius
    return (model.geom_rbound > 0) & (beyond_edge | (from_camera[:, 2] > radius))


@contextmanager
def hidden(model: Any, geoms: np.ndarray) -> Iterator[None]:
    """Within the context, geoms (ngeom,) bool are in the group that is not drawn."""
    groups = model.geom_group.copy()
    model.geom_group[geoms] = HIDDEN_GROUP
    try:
        yield
    finally:
        model.geom_group[:] = groups
