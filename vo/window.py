"""The map: keyframes with what they see. The newest are refined together, older ones hold them in place.

Nothing here runs by itself: `job` freezes what is to be refined, `WindowJob.solve` is pure and may run anywhere, and
`apply` takes the result in, however far the camera has gone on meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from frontends.base import Features, Matches
from frontends.nearest import comparable, largest_products
from vo.absolute_pose import estimate_absolute_pose
from vo.bundle import optimize_window
from vo.bundle_problem import FocalPrior, RadialPrior, WindowProblem, WindowSolution, corrected_rays
from vo.config import OdometryConfig
from vo.geometry import (
    invert_pose,
    reproject,
    reproject_each,
    rotation_angle,
    transform,
    triangulate,
    undistort,
)
from vo.self_calibration import solve_lens
from vo.tracks import TrackTable, is_among
from vo.types import Camera, FloatArray, Rejection

IntArray = NDArray[np.int64]

# Keyframes are thinned out where the map holds too many, but never among this many older ones next to the window.
_NEVER_THINNED = 16
# In px^2, the residuals' variance: turns the standard deviation of a prior into the information bundle.py expects.
_RESIDUAL_VARIANCE = 0.1
_NUM_VOTES = 256


@dataclass(slots=True, eq=False)
class View:
    """A posed frame: what was seen where, and from where.

    keypoints (N, 2) px; colors (N, 3) RGB there; nominal_rays (N, 2) the same, undistorted by the calibration;
    kappa the distortion that this leaves over; track_ids (N,), -1 once an observation proved wrong;
    inverse_depths (N,) 1/m measured there, NaN where there is none, None where there is no measurement at all.
    """

    frame_index: int
    timestamp_ns: int
    features: Features
    keypoints: NDArray[np.float32]
    colors: NDArray[np.uint8]
    nominal_rays: FloatArray
    kappa: float
    track_ids: IntArray
    T_world_camera: FloatArray
    inverse_depths: FloatArray | None = None
    _rays: tuple[float, FloatArray] | None = field(default=None, init=False, repr=False)

    @property
    def rays(self) -> FloatArray:
        """(N, 2) without the leftover distortion either.

        Made when they are asked for: every refinement learns about the distortion of a hundred keyframes, most of which
        are not looked at again before the next one.
        """
        if self._rays is None or self._rays[0] != self.kappa:
            self._rays = self.kappa, corrected_rays(self.nominal_rays, self.kappa)
        return self._rays[1]

    def undistort(self, camera: Camera) -> None:
        """Takes another calibration for the one it was made with; nothing is known of what that one leaves over."""
        self.nominal_rays, self.kappa, self._rays = undistort(self.keypoints, camera), 0.0, None


@dataclass(frozen=True, slots=True, eq=False)
class WindowJob:
    """A frozen window: the problem, whose views, landmarks and features (O,) it is made of, and how hard to try."""

    problem: WindowProblem
    views: tuple[View, ...]
    point_ids: IntArray
    rows: IntArray
    kernel_px: float
    max_iterations: int

    def solve(self) -> WindowSolution:
        return optimize_window(self.problem, self.kernel_px, self.max_iterations)


@dataclass(frozen=True, slots=True, eq=False)
class LensJob(WindowJob):
    """The window with its lens, begun at several focal lengths over the present one."""

    starts: tuple[float, ...]

    def solve(self) -> WindowSolution:
        return solve_lens(self.problem, self.kernel_px, self.starts)


@dataclass(frozen=True, slots=True, eq=False)
class WindowChange:
    """What a refinement changed: views that moved, landmarks (L,) that moved, and those (D,) that were given up.

    correction (4, 4) moves everything that came after the newest view of the job.
    """

    views: tuple[View, ...]
    landmark_ids: IntArray
    removed_ids: IntArray
    correction: FloatArray


class Window:
    """Owns the keyframes: the newest `window_size` are free to move, up to `map_keyframes` older ones stay put."""

    def __init__(self, config: OdometryConfig, focal_px: float) -> None:
        self._config = config
        self._focal_px = focal_px
        self.keyframes: list[View] = []
        self.older: list[View] = []
        self.radial = self._unknown_radial()

    def _unknown_radial(self) -> RadialPrior:
        sigma = self._config.radial_sigma
        return RadialPrior(0.0, _RESIDUAL_VARIANCE / sigma**2 if sigma > 0 else 0.0, 3.0 * sigma)

    def add(self, view: View, tracks: TrackTable) -> None:
        """Makes `view` the newest keyframe and triangulates the tracks it completes."""
        self.keyframes.append(view)
        while len(self.keyframes) > self._config.window_size:
            self.older.append(self.keyframes.pop(0))
        self._thin_out()
        self._triangulate(view, tracks)

    def clear(self) -> None:
        self.keyframes.clear()
        self.older.clear()

    def seen_ids(self, tracks: TrackTable) -> IntArray:
        """Ids of the tracks to keep: all that the window sees, and the landmarks of older keyframes."""
        ids = np.concatenate([np.zeros(0, np.int64), *(view.track_ids for view in self.keyframes)])
        older = np.concatenate([np.zeros(0, np.int64), *(view.track_ids for view in self.older)])
        return np.concatenate([ids, older[tracks.has_landmark(tracks.rows_of(older))]])

    def likely_views(self, view: View) -> list[View]:
        """Keyframes in which a lost camera may find itself: the newest ones, then those that look most like its image.

        Each of the image's strongest descriptors votes for the keyframe with the nearest one; no vocabulary is
        needed for the few keyframes a window keeps.
        """
        count = self._config.recovery_keyframes
        newest = self.keyframes[: -count - 1 : -1]
        others = [keyframe for keyframe in (*self.older, *self.keyframes) if all(keyframe is not v for v in newest)]
        if not others or view.features.num_valid == 0:
            return newest
        queries = comparable(view.features)[:_NUM_VOTES]
        # One table from the start: small results between large intermediate ones would keep their memory from the next.
        nearest = torch.empty(len(others), len(queries), device=queries.device)
        for row, other in enumerate(others):
            nearest[row] = largest_products(queries, comparable(other.features))
        votes = torch.bincount(nearest.argmax(dim=0), minlength=len(others)).tolist()
        ranked = sorted(range(len(others)), key=lambda i: -votes[i])[:count]
        return [*newest, *(others[i] for i in ranked if votes[i] > 0)]

    def older_view_of(self, view: View, tracks: TrackTable) -> View | None:
        """The older keyframe, out of the newest ones' sight, whose landmarks `view` should see most of."""
        forward = view.T_world_camera[:3, 2]
        candidates = [
            keyframe
            for keyframe in self.older[: -self._config.window_fixed]
            if keyframe.T_world_camera[:3, 2] @ forward >= 0.7
        ]
        if not candidates:
            return None
        # All at once, for a map has a hundred keyframes.
        index = np.repeat(np.arange(len(candidates)), [len(keyframe.track_ids) for keyframe in candidates])
        rows = tracks.rows_of(np.concatenate([keyframe.track_ids for keyframe in candidates]))
        known = tracks.has_landmark(rows)
        index, rows = index[known], rows[known]
        is_seen = np.zeros(len(tracks) + 1, np.bool_)
        is_seen[tracks.rows_of(view.track_ids)] = True
        already = np.bincount(index[is_seen[rows]], minlength=len(candidates))
        T_world_keyframes = np.stack([keyframe.T_world_camera for keyframe in candidates])
        in_sight = _in_sight(view, tracks.points(rows), T_world_keyframes, index)
        counts = np.bincount(index[in_sight], minlength=len(candidates))
        gains = np.where(already < counts // 2, counts - already, 0)
        best = int(np.argmax(gains))
        return candidates[best] if gains[best] > self._config.revisit_landmarks else None

    def revisit(self, view: View, tracks: TrackTable, match: Callable[[Features, Features], Matches]) -> None:
        """Ties a new keyframe to an older one whose landmarks come into sight again, so that drift stays small.

        A landmark that was triangulated anew meanwhile becomes one with the old one; the window then moves to fit.
        """
        keyframe = self.older_view_of(view, tracks)
        if keyframe is None:
            return
        matches = match(keyframe.features, view.features)
        rows0, rows1 = matches.indices[:, 0], matches.indices[:, 1]
        points, known = tracks.landmarks(keyframe.track_ids[rows0])
        rows0, rows1, points = rows0[known], rows1[known], points[known]
        min_inliers = 2 * self._config.min_inliers
        focal_px, threshold_px = self._focal_px, self._config.pose_threshold_px
        pose = estimate_absolute_pose(points, view.rays[rows1], focal_px, threshold_px, min_inliers)
        if isinstance(pose, Rejection) or pose.inliers.sum() < 0.5 * len(points):
            return
        rows0, rows1 = rows0[pose.inliers], rows1[pose.inliers]
        self._unite(keyframe.track_ids[rows0], view, rows1, tracks)

    def _unite(self, old_ids: IntArray, view: View, rows: IntArray, tracks: TrackTable) -> None:
        """Gives features (N,) of `view`, and all that belongs to their tracks, the tracks they turned out to be."""
        fresh = ~is_among(old_ids, view.track_ids)
        old_ids, rows = old_ids[fresh], rows[fresh]
        new_ids = view.track_ids[rows]
        view.track_ids[rows] = old_ids
        order = np.argsort(new_ids)
        new_ids, old_ids = new_ids[order], old_ids[order]
        started = new_ids >= 0
        new_ids, old_ids = new_ids[started], old_ids[started]
        if len(new_ids) == 0:
            return
        for other in (*self.keyframes, *self.older):
            at = np.minimum(np.searchsorted(new_ids, other.track_ids), len(new_ids) - 1)
            renamed = (new_ids[at] == other.track_ids) & ~is_among(old_ids[at], other.track_ids)
            other.track_ids[renamed] = old_ids[at[renamed]]
        _, had_landmark = tracks.landmarks(new_ids)
        tracks.drop_landmarks(new_ids[had_landmark])

    def _thin_out(self) -> None:
        """Gives up the older keyframe that differs least from the one before it, where there are too many."""
        while len(self.older) > self._config.map_keyframes:
            candidates = self.older[: max(len(self.older) - _NEVER_THINNED, 2)]
            differences = [
                rotation_angle(a.T_world_camera[:3, :3].T @ b.T_world_camera[:3, :3])
                + float(np.linalg.norm(a.T_world_camera[:3, 3] - b.T_world_camera[:3, 3]))
                for a, b in pairwise(candidates)
            ]
            del self.older[int(np.argmin(differences)) + 1]

    def _triangulate(self, view: View, tracks: TrackTable) -> None:
        """New landmarks of `view`'s tracks, each from the oldest keyframe nearby that sees it."""
        table_rows = tracks.rows_of(view.track_ids)
        rows = np.flatnonzero(~tracks.has_landmark(table_rows) & (table_rows >= 0))
        place = np.full(len(tracks) + 1, -1, np.int64)
        place[table_rows[rows]] = np.arange(len(rows))
        anchor_T = np.zeros((len(rows), 4, 4))
        anchor_rays = np.zeros((len(rows), 2))
        anchored = np.zeros(len(rows), np.bool_)
        for keyframe in reversed(self.keyframes[:-1]):
            places = place[tracks.rows_of(keyframe.track_ids)]
            of_keyframe = np.flatnonzero(places >= 0)
            of_rows = places[of_keyframe]
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

    # --- refinement -------------------------------------------------------------------------------------------------

    def job(self, tracks: TrackTable, inverse_depth_sigma: float = 0.0) -> WindowJob | None:
        """The window as it stands, frozen for refinement; None if there is too little to refine.

        inverse_depth_sigma  standard deviation of the views' inverse depths, which are then in the unit of the map;
                             0 leaves them out.
        """
        if len(self.keyframes) + len(self.older) < 2:
            return None
        fixed = self._holding_views(tracks)
        num_fixed = max(len(fixed), min(2, len(self.keyframes) - 1))
        frozen = self._frozen((*fixed, *self.keyframes), num_fixed, tracks, inverse_depth_sigma)
        if frozen is None:
            return None
        problem, point_ids, rows = frozen
        refines_radial = self._config.radial_sigma > 0 and len(fixed) > 0
        problem = replace(problem, radial=self.radial, refines_radial=refines_radial)
        views = (*fixed, *self.keyframes)
        return WindowJob(problem, views, point_ids, rows, self._config.window_kernel_px, self._config.window_iterations)

    def lens_job(
        self, tracks: TrackTable, starts: tuple[float, ...], is_radial: bool, inverse_depth_sigma: float = 0.0
    ) -> LensJob | None:
        """The newest keyframes, their lens among the unknowns; None if they share too little.

        starts     focal lengths to begin at, over the present one.
        is_radial  whether the lens may have a radial distortion of its kind.
        """
        config = self._config.self_calibration
        views = (*self.older, *self.keyframes)[-config.max_keyframes :]
        frozen = self._frozen(views, 1, tracks, inverse_depth_sigma)
        if frozen is None:
            return None
        problem, point_ids, rows = frozen
        sigma = config.radial_sigma if is_radial else 0.0
        problem = replace(
            problem,
            radial=RadialPrior(0.0, _RESIDUAL_VARIANCE / sigma**2 if sigma > 0 else 0.0),
            refines_radial=sigma > 0,
            focal=FocalPrior(0.0, _RESIDUAL_VARIANCE / config.focal_sigma**2),
            refines_focal=True,
        )
        return LensJob(problem, views, point_ids, rows, self._config.window_kernel_px, 0, starts)

    def _frozen(
        self, views: tuple[View, ...], num_fixed: int, tracks: TrackTable, inverse_depth_sigma: float
    ) -> tuple[WindowProblem, IntArray, IntArray] | None:
        """The problem of these views, the ids of its points and the features (O,) that see them."""
        point_ids, point_index, pose_index, rows = _observations(views, num_fixed, tracks)
        if len(rows) < 6 * len(views):
            return None
        points, _ = tracks.landmarks(point_ids)
        of_views = _by_pose(pose_index, len(views))
        rays = np.concatenate([view.nominal_rays[rows[mine]] for view, mine in zip(views, of_views, strict=True)])
        poses = np.stack([view.T_world_camera for view in views])
        problem = WindowProblem(poses, num_fixed, points, pose_index, point_index, rays, self._focal_px)
        if inverse_depth_sigma > 0:
            depths = [_inverse_depths(view, rows[mine]) for view, mine in zip(views, of_views, strict=True)]
            gain_px = np.sqrt(_RESIDUAL_VARIANCE) / inverse_depth_sigma
            problem = replace(problem, inverse_depths=np.concatenate(depths), depth_gain_px=gain_px)
        return problem, point_ids, rows

    def _holding_views(self, tracks: TrackTable) -> tuple[View, ...]:
        """The older keyframes that share most landmarks with the window, oldest first."""
        if not self.older:
            return ()
        in_window = np.zeros(len(tracks) + 1, np.bool_)
        rows = tracks.rows_of(np.concatenate([view.track_ids for view in self.keyframes]))
        in_window[rows[tracks.has_landmark(rows)]] = True
        is_shared = in_window[tracks.rows_of(np.concatenate([view.track_ids for view in self.older]))]
        starts = np.cumsum([0, *(len(view.track_ids) for view in self.older)])
        shared = [int(np.count_nonzero(is_shared[a:b])) for a, b in pairwise(starts)]
        best = sorted(range(len(shared)), key=lambda i: shared[i])[-self._config.window_fixed :]
        return tuple(self.older[i] for i in sorted(best) if shared[i] >= self._config.min_inliers)

    def apply(self, job: WindowJob, solution: WindowSolution, tracks: TrackTable) -> WindowChange:
        """Takes a refinement in: poses, points and distortion, then cuts what does not fit.

        Keyframes and landmarks that came after the job was frozen follow its newest view rigidly.
        """
        newest = job.views[-1]
        for view, T_world_camera in zip(job.views, solution.T_world_camera, strict=True):
            view.T_world_camera = T_world_camera
        correction = newest.T_world_camera @ invert_pose(job.problem.T_world_camera[-1])
        later = tuple(view for view in self.keyframes if view.frame_index > newest.frame_index)
        followers = self._follow(later, job, correction, tracks)
        alive = tracks.alive(job.point_ids)
        alive[alive] = tracks.landmarks(job.point_ids[alive])[1]
        tracks.set_landmarks(job.point_ids[alive], solution.points[alive])
        removed = self._remove_outliers(job, solution, tracks)
        if not isinstance(job, LensJob):
            self._learn_radial(solution.radial, job.problem)
        moved = np.union1d(job.point_ids[alive], followers)
        moved = moved[tracks.alive(moved)]
        free = job.views[job.problem.num_fixed :]
        return WindowChange((*free, *later), moved[tracks.landmarks(moved)[1]], removed, correction)

    def _follow(self, later: tuple[View, ...], job: WindowJob, correction: FloatArray, tracks: TrackTable) -> IntArray:
        """Moves views and landmarks of the time since the job by the correction; returns the landmarks' ids."""
        if not later:
            return np.zeros(0, np.int64)
        before = np.concatenate([view.track_ids for view in (*job.views, *self.older)])
        ids = np.setdiff1d(np.concatenate([view.track_ids for view in later]), before)
        ids = np.setdiff1d(ids, job.point_ids)
        ids = ids[tracks.landmarks(ids)[1]]
        tracks.set_landmarks(ids, transform(correction, tracks.landmarks(ids)[0]))
        for view in later:
            view.T_world_camera = correction @ view.T_world_camera
        return ids

    def _remove_outliers(self, job: WindowJob, solution: WindowSolution, tracks: TrackTable) -> IntArray:
        """Cuts observations that stayed far off; a landmark left with fewer than two loses its point."""
        wrong = solution.errors_px > self._config.pose_threshold_px
        problem = job.problem
        observed_ids = job.point_ids[problem.point_index]
        for view, mine in zip(job.views, _by_pose(problem.pose_index, len(job.views)), strict=True):
            rows, ids = job.rows[mine][wrong[mine]], observed_ids[mine][wrong[mine]]
            view.track_ids[rows[view.track_ids[rows] == ids]] = -1
        remaining = np.bincount(problem.point_index[~wrong], minlength=len(job.point_ids))
        lost = job.point_ids[remaining < 2]
        lost = lost[tracks.alive(lost)]
        lost = lost[tracks.landmarks(lost)[1]]
        tracks.drop_landmarks(lost)
        return lost

    def _learn_radial(self, learned: RadialPrior, problem: WindowProblem) -> None:
        """Remembers the distortion. An observation stays in the window for many refinements: each counts its share."""
        if not problem.refines_radial:
            return
        gained = max(learned.information - problem.radial.information, 0.0) / self._config.window_size
        self.radial = RadialPrior(learned.mean, problem.radial.information + gained, learned.limit)
        for view in (*self.keyframes, *self.older):
            view.kappa = self.radial.mean

    def change_camera(self, camera: Camera, first_frame: int) -> None:
        """Takes a better calibration in; keyframes before `first_frame` were made with the old one and are given up."""
        self._focal_px = camera.focal_px
        self.radial = self._unknown_radial()
        self.older = [view for view in self.older if view.frame_index >= first_frame]
        for view in (*self.older, *self.keyframes):
            view.undistort(camera)

    def rescale(self, center: FloatArray, factor: float) -> None:
        """Changes the unit of the keyframes' positions about a point (3,) of the world."""
        for view in (*self.keyframes, *self.older):
            T = view.T_world_camera.copy()
            T[:3, 3] = center + factor * (T[:3, 3] - center)
            view.T_world_camera = T


def _inverse_depths(view: View, rows: IntArray) -> FloatArray:
    return np.full(len(rows), np.nan) if view.inverse_depths is None else view.inverse_depths[rows]


def _in_sight(view: View, points: FloatArray, T_world_keyframes: FloatArray, index: IntArray) -> NDArray[np.bool_]:
    """Which points (N, 3) should be within `view`'s image, at a size that still looks the same as in their keyframe.

    T_world_keyframes (K, 4, 4); index (N,) says which is whose.
    """
    rays, depth = reproject(view.T_world_camera, points)
    low, high = view.rays.min(axis=0), view.rays.max(axis=0)
    inside = ((rays > low) & (rays < high)).all(axis=1) & (depth > 0)
    axes, centres = T_world_keyframes[:, :3, 2], T_world_keyframes[:, :3, 3]
    depth_there = np.einsum("ni,ni->n", points, axes[index]) - np.einsum("ki,ki->k", centres, axes)[index]
    ratio = depth / np.maximum(depth_there, 1e-9)
    found: NDArray[np.bool_] = inside & (ratio > 0.5) & (ratio < 2.0)
    return found


def _by_pose(pose_index: IntArray, num_poses: int) -> list[slice]:
    """Where the observations of each pose lie, which come pose after pose."""
    bounds = np.searchsorted(pose_index, np.arange(num_poses + 1)).tolist()
    return [slice(first, last) for first, last in pairwise(bounds)]


def _observations(
    views: tuple[View, ...], num_fixed: int, tracks: TrackTable
) -> tuple[IntArray, IntArray, IntArray, IntArray]:
    """Landmarks seen twice or more, and once by a free view: their track ids (L,), which of them is seen (O,), view
    numbers (O,) and feature rows (O,), view by view.
    """
    table_rows = tracks.rows_of(np.concatenate([view.track_ids for view in views]))
    lengths = [len(view.track_ids) for view in views]
    pose_index = np.repeat(np.arange(len(views)), lengths)
    rows = np.concatenate([np.arange(length) for length in lengths])
    seen = np.flatnonzero(tracks.has_landmark(table_rows))
    table_rows, pose_index, rows = table_rows[seen], pose_index[seen], rows[seen]
    counts = np.bincount(table_rows, minlength=len(tracks))
    by_free = np.bincount(table_rows[pose_index >= num_fixed], minlength=len(tracks))
    useful = (counts >= 2) & (by_free >= 1)
    keep = np.flatnonzero(useful[table_rows])
    point_index = (np.cumsum(useful) - 1)[table_rows[keep]]
    return tracks.ids(np.flatnonzero(useful)), point_index, pose_index[keep], rows[keep]
