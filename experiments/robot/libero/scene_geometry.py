"""Shapes of a scene's objects where they are now."""

from __future__ import annotations

import numpy as np

from experiments.robot.libero.simulator import LiberoEnv


class SceneGeometry:
    """Vertices of the scene's bodies in world coordinates (visual meshes, boxes where a body has no mesh)."""

    def __init__(self, env: LiberoEnv) -> None:
        self._env = env
        self._local: dict[str, list[tuple[int, np.ndarray]]] = {}
        model = env.sim.model._model
        children: dict[int, list[int]] = {}
        for body in range(1, model.nbody):
            children.setdefault(int(model.body_parentid[body]), []).append(body)
        self._children = children
        domain = env.domain
        self.bodies = {
            name: item.root_body
            for name, item in {**domain.objects_dict, **domain.fixtures_dict}.items()
            if self._parts(item.root_body)
        }

    def vertices(self, body: str) -> np.ndarray:
        """(n, 3) float64 world positions; raises KeyError when the body has no shape."""
        parts = self._parts(body)
        if not parts:
            raise KeyError(f"body {body!r} has no mesh and no box geometry")
        data = self._env.sim.data
        return np.concatenate([v @ data.geom_xmat[g].reshape(3, 3).T + data.geom_xpos[g] for g, v in parts])

    def others(self, body: str) -> np.ndarray:
        """(n, 3) vertices of all objects and fixtures except `body`."""
        found = [self.vertices(other) for other in self.bodies.values() if other != body]
        return np.concatenate(found) if found else np.zeros((0, 3))

    def centre(self, body: str) -> np.ndarray:
        """(3,) middle of the bounding box."""
        points = self.vertices(body)
        return (points.min(0) + points.max(0)) / 2

    def _parts(self, body: str) -> list[tuple[int, np.ndarray]]:
        if body not in self._local:
            geoms = self._geoms(self._env.sim.model.body_name2id(body))
            parts = [(g, v) for g in geoms if (v := self._mesh(g)) is not None]
            self._local[body] = parts or [(g, v) for g in geoms if (v := self._box(g)) is not None]
        return self._local[body]

    def _geoms(self, root: int) -> list[int]:
        model = self._env.sim.model._model
        stack = [root]
        geoms: list[int] = []
        while stack:
            body = stack.pop()
            start = int(model.body_geomadr[body])
            geoms += range(start, start + int(model.body_geomnum[body])) if start >= 0 else []
            stack += self._children.get(body, [])
        return sorted(geoms)

    def _mesh(self, geom: int) -> np.ndarray | None:
        model = self._env.sim.model._model
        mesh = int(model.geom_dataid[geom])
        if model.geom_type[geom] != 7 or mesh < 0:  # 7: mjGEOM_MESH
            return None
        start, count = int(model.mesh_vertadr[mesh]), int(model.mesh_vertnum[mesh])
        points = np.array(model.mesh_vert[start : start + count], dtype=np.float64)
        return points[:: max(1, count // 1500)]

    def _box(self, geom: int) -> np.ndarray | None:
        model = self._env.sim.model._model
        if model.geom_type[geom] != 6:  # 6: mjGEOM_BOX
            return None
        signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], dtype=np.float64)
        return signs * model.geom_size[geom]
