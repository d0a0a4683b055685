"""The window: the last keyframes, what they see, and the refinement of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frontends.base import Features
from vo.bundle import WindowProblem, WindowSolution, optimize_window
from vo.config import OdometryConfig
from vo.geometry import reproject_each, triangulate
from vo.tracks import TrackTable
from vo.types import FloatArray

IntArray = NDArray[np.int64]


@dataclass(slots=True, eq=False)
class View:
    """A posed frame: what was seen where, and from where.

    keypoints (N, 2) px; rays (N, 2) the same, undistorted; track_ids (N,), -1 once an observation proved wrong.
    """

    frame_index: int
    timestamp_ns: int
    features: Features
    keypoints: NDArray[np.float32]
    rays: FloatArray
    track_ids: IntArray
    T_world_camera: FloatArray


def shared_rows(ids0: IntArray, ids1: IntArray) -> tuple[IntArray, IntArray]:
    """Rows of two id arrays that name the same track; ids below zero name none."""
    _, rows0, rows1 = np.intersect1d(ids0, ids1, return_indices=True)
    valid = ids0[rows0] >= 0
    return rows0[valid], rows1[valid]


class Window:
    """Keeps up to `window_size` keyframes, oldest first, and changes their poses and landmarks only in `refine`."""

    def __init__(self, config: OdometryConfig, focal_px: float) -> None:
        self._config = config
        self._focal_px = focal_px
        self.keyframes: list[View] = []

    def add(self, view: View, tracks: TrackTable) -> None:
        """Makes `view` the newest keyframe and triangulates the tracks it completes."""
        self.keyframes.append(view)
        del self.keyframes[: -self._config.window_size]
        self._triangulate(view, tracks)

    def clear(self) -> None:
        self.keyframes.clear()

    def seen_ids(self) -> IntArray:
        """Ids of all tracks that a keyframe sees; may repeat and hold -1."""
        return np.concatenate([np.zeros(0, np.int64), *(view.track_ids for view in self.keyframes)])

    def _triangulate(self, view: View, tracks: TrackTable) -> None:
        """New landmarks of `view`'s tracks, each from the oldest keyframe that sees it."""
        _, has_landmark = tracks.landmarks(view.track_ids)
        rows = np.flatnonzero(~has_landmark & (view.track_ids >= 0))
        anchor_T = np.zeros((len(rows), 4, 4))
        anchor_rays = np.zeros((len(rows), 2))
        anchored = np.zeros(len(rows), np.bool_)
        for keyframe in reversed(self.keyframes[:-1]):
            of_rows, of_keyframe = shared_rows(view.track_ids[rows], keyframe.track_ids)
            anchor_T[of_rows], anchor_rays[of_rows] = keyframe.T_world_camera, keyframe.rays[of_keyframe]
            anchored[of_rows] = True
        rows, anchor_T, anchor_rays = rows[anchored], anchor_T[anchored], anchor_rays[anchored]
        points, good = self._checked_points(view, anchor_T, anchor_rays, view.rays[rows])
        tracks.set_landmarks(view.track_ids[rows[good]], points[good])

    def _checked_points(
        self, view: View, anchor_T: FloatArray, anchor_rays: FloatArray, rays: FloatArray
    ) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Points (N, 3) and whether parallax, depth and reprojection error allow to use them."""
        view_T = np.broadcast_to(view.T_world_camera, anchor_T.shape)
        points, angles = triangulate(anchor_T, view_T, anchor_rays, rays)
        good = angles > np.deg2rad(self._config.triangulation_parallax_deg)
        for T, seen in ((anchor_T, anchor_rays), (view_T, rays)):
            projected, depth = reproject_each(T, points)
            error_px = np.linalg.norm(projected - seen, axis=1) * self._focal_px
            good &= (depth > 0) & (error_px < self._config.triangulation_error_px)
        return points, good

    def refine(self, tracks: TrackTable) -> WindowSolution | None:
        """Bundle adjustment of the window, then removal of what does not fit; None if there is too little to refine."""
        num_fixed = min(self._config.window_fixed, len(self.keyframes) - 1)
        if num_fixed < 1:
            return None
        ids, pose_index, rows = self._observations(tracks)
        if len(ids) < 6 * len(self.keyframes):
            return None
        point_ids, point_index = np.unique(ids, return_inverse=True)
        points, _ = tracks.landmarks(point_ids)
        rays = np.concatenate([view.rays[rows[pose_index == i]] for i, view in enumerate(self.keyframes)])
        poses = np.stack([view.T_world_camera for view in self.keyframes])
        problem = WindowProblem(poses, num_fixed, points, pose_index, point_index, rays, self._focal_px)
        solution = optimize_window(problem, self._config.window_kernel_px, self._config.window_iterations)
        self._apply(solution, tracks, point_ids)
        self._remove_outliers(solution, problem, tracks, point_ids, rows)
        return solution

    def _observations(self, tracks: TrackTable) -> tuple[IntArray, IntArray, IntArray]:
        """Track ids, keyframe numbers and feature rows (O,) of landmarks seen by two keyframes or more."""
        ids, pose_index, rows = [], [], []
        for i, view in enumerate(self.keyframes):
            _, has_landmark = tracks.landmarks(view.track_ids)
            seen = np.flatnonzero(has_landmark)
            ids.append(view.track_ids[seen])
            pose_index.append(np.full(len(seen), i, np.int64))
            rows.append(seen)
        all_ids = np.concatenate(ids)
        _, inverse, counts = np.unique(all_ids, return_inverse=True, return_counts=True)
        often = counts[inverse] >= 2
        return all_ids[often], np.concatenate(pose_index)[often], np.concatenate(rows)[often]

    def _apply(self, solution: WindowSolution, tracks: TrackTable, point_ids: IntArray) -> None:
        for view, T_world_camera in zip(self.keyframes, solution.T_world_camera, strict=True):
            view.T_world_camera = T_world_camera
        tracks.set_landmarks(point_ids, solution.points)

    def _remove_outliers(
        self, solution: WindowSolution, problem: WindowProblem, tracks: TrackTable, point_ids: IntArray, rows: IntArray
    ) -> None:
        """Cuts observations that stayed far off; a landmark left with fewer than two loses its point."""
        wrong = solution.errors_px > self._config.pose_threshold_px
        for i, view in enumerate(self.keyframes):
            view.track_ids[rows[wrong & (problem.pose_index == i)]] = -1
        remaining = np.bincount(problem.point_index[~wrong], minlength=len(point_ids))
        tracks.drop_landmarks(point_ids[remaining < 2])
