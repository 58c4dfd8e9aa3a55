"""Where the scripted expert grasps an object."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np

from experiments.robot.libero.expert_settings import ExpertSettings
from experiments.robot.libero.scene_geometry import SceneGeometry

FINGER_OPENING = 0.078  # clear width between opened fingers, m


class GraspKind(str, Enum):
    """TOP: fingers on both sides of the object.  RIM: fingers on both sides of the wall of an open container."""

    TOP = "top"
    RIM = "rim"


@dataclass(frozen=True)
class Grasp:
    """Where to grasp: finger-tip position (3,) in metres, wrist yaw relative to the start, kind, top of the object."""

    position: np.ndarray
    yaw: float
    kind: GraspKind
    top: float


class GraspPlanner:
    """Chooses one grasp per object, always in the same order of preference."""

    def __init__(self, geometry: SceneGeometry, settings: ExpertSettings) -> None:
        self._geometry = geometry
        self._settings = settings

    def plan(self, body: str, finger_axis: np.ndarray) -> Grasp:
        """Grasp for `body`; finger_axis (2,) is the horizontal direction in which the fingers close at yaw 0."""
        points = self._geometry.vertices(body)
        base = float(np.arctan2(finger_axis[1], finger_axis[0]))
        yaw, width = self._narrowest(points, base)
        if width < FINGER_OPENING - 0.006:
            return self._top(points, base, yaw)
        return self._rim(body, points, base)

    @staticmethod
    def _narrowest(points: np.ndarray, base: float) -> tuple[float, float]:
        """Yaw with the smallest width across the fingers; turning the wrist costs 2 cm per radian, which keeps round
        objects at yaw 0."""
        yaws = np.linspace(-np.pi / 2, np.pi / 2, 37)
        directions = np.stack([np.cos(base + yaws), np.sin(base + yaws)])
        spans = np.ptp(points[:, :2] @ directions, axis=0)
        blocked = np.where(spans < FINGER_OPENING - 0.006, 0.0, 1.0)
        best = int(np.argmin(spans + 0.02 * np.abs(yaws) + blocked))
        return float(yaws[best]), float(spans[best])

    @staticmethod
    def _top(points: np.ndarray, base: float, yaw: float) -> Grasp:
        low, high = points[:, 2].min(), points[:, 2].max()
        across = np.array([np.cos(base + yaw), np.sin(base + yaw)])
        along = np.array([-across[1], across[0]])
        middle = sum((np.ptp(q) / 2 + q.min()) * d for d in (across, along) for q in [points[:, :2] @ d])
        height = max(low + 0.012, high - min(0.035, 0.6 * (high - low)))
        return Grasp(np.array([*middle, height]), yaw, GraspKind.TOP, float(high))

    def _rim(self, body: str, points: np.ndarray, base: float) -> Grasp:
        others = self._geometry.others(body)
        candidates: list[tuple[float, int, Grasp]] = []
        for turn in (0.0, 0.35, -0.35, 0.7, -0.7, 1.05, -1.05, 1.4, -1.4):
            for side in (0.0, np.pi):
                grasp = self._rim_candidate(points, base + turn + side, turn)
                penetration = self._penetration(grasp, base + turn + side, others)
                if penetration <= 0.0:
                    return grasp
                candidates.append((penetration, len(candidates), grasp))
        return min(candidates, key=lambda item: item[:2])[2]

    def _rim_candidate(self, points: np.ndarray, angle: float, yaw: float) -> Grasp:
        """Grasp of the wall in direction `angle` seen from the object's middle."""
        low, high = points[:, 2].min(), points[:, 2].max()
        rim = points[points[:, 2] > high - 0.15 * (high - low)]
        middle = (points[:, :2].min(0) + points[:, :2].max(0)) / 2
        outward = np.array([np.cos(angle), np.sin(angle)])
        radius = ((rim[:, :2] - middle) @ outward).max()
        spot = middle + outward * (radius - 0.005)
        near = points[np.linalg.norm(points[:, :2] - spot, axis=1) < 0.015]
        rim_height = near[:, 2].max() if len(near) else high
        height = max(rim_height - self._settings.rim_depth, low + 0.01)
        return Grasp(np.array([*spot, height]), yaw, GraspKind.RIM, float(high))

    def _penetration(self, grasp: Grasp, angle: float, others: np.ndarray) -> float:
        """How deep (m) the opened hand would sink into other objects; 0 or less when the grasp is free."""
        if not len(others):
            return 0.0
        outward = np.array([np.cos(angle), np.sin(angle)])
        offset = others[:, :2] - grasp.position[:2]
        across, along = np.abs(offset @ outward), np.abs(offset @ np.array([-outward[1], outward[0]]))
        fingers = others[(across < 0.055) & (along < 0.018), 2]
        palm = others[(across < 0.115) & (along < 0.04), 2]
        deep = [0.0]
        if len(fingers):
            deep.append(fingers.max() - grasp.position[2] + self._settings.rim_margin)
        if len(palm):
            deep.append(palm.max() - grasp.position[2] - 0.035)
        return max(deep)
