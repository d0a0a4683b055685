"""The map while it grows: keyframes and landmarks, the thread that refines them, and the unit they are in.

Holds no clock and knows no camera status: the odometry says when a frame has passed and which of its views are to
follow. What a refinement or a change of unit does to the map is done here, and nowhere else.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from frontends.base import Features
from vo.bundle_problem import WindowSolution
from vo.config import OdometryConfig
from vo.geometry import (
    parallax,
    reproject,
    rotation_angle,
    undistort,
)
from vo.scale_source import ScaleSource
from vo.self_calibration import FocalEstimate, FocalSearch
from vo.tracks import TrackTable
from vo.types import Camera, CameraModel, Frame, MapUpdate
from vo.window import LensJob, View, Window, WindowChange, WindowJob

IntArray = NDArray[np.int64]

# Dead tracks are cleared away once in so many frames: looking for them takes longer than a frame makes.
_PRUNE_EVERY = 5
# A focal length that turns out to be another one by more than this bends a path visibly.
_BENDING_RATIO = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class _Refinement:
    """A window under way, and the number of the step that began it."""

    job: WindowJob
    solution: Future[WindowSolution]
    begun_at: int


class LiveMap:
    """Tracks, window and scale source of an odometry. The window is refined on a thread of its own; `close` ends it.

    camera            of the frames, as well as is known: self-calibration puts a better one in its place.
    waits_for_window  takes a refinement in `window_lag_frames` after its keyframe, and waits for it if need be, so that
                      the same frames give the same poses; otherwise as soon as it is there, and no pose ever waits.
    `held` views, which several methods take, are kept by the caller without being keyframes: they follow the map.
    """

    def __init__(self, config: OdometryConfig, camera: Camera, scale: ScaleSource, waits_for_window: bool) -> None:
        self._config = config
        self.camera = camera
        self.tracks = TrackTable()
        self.window = Window(config, camera.focal_px)
        self.segment_id = 0
        self._num_steps = 0
        self._scale = scale
        # Decided and not applied yet: the map's unit changes only while no refinement of it is under way.
        self._pending_factor = 1.0
        self._has_unit = False
        self._search = FocalSearch(config.self_calibration, camera)
        self._num_keyframes = 0
        self._waits_for_window = waits_for_window
        self._window_is_stale = False
        self._refinement: _Refinement | None = None
        self._given_up = np.zeros(0, np.int64)  # landmarks of which consumers have not been told yet
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="window")

    def close(self) -> None:
        """Ends the window's thread; safe to call twice."""
        self._worker.shutdown(wait=True, cancel_futures=True)

    def finish(self, frame_index: int, timestamp_ns: int) -> MapUpdate | None:
        """Refines what the last keyframes left to refine; None if there is nothing. No step may follow."""
        self._waits_for_window, self._window_is_stale = True, True
        update = None
        for is_first in (True, False):
            self._num_steps += self._config.window_lag_frames
            update = self.take_in_refinement(frame_index, timestamp_ns, ()) or update
            self.begin_refinement(is_last=is_first)
        self._num_steps += self._config.window_lag_frames
        return self.take_in_refinement(frame_index, timestamp_ns, ()) or update

    @property
    def scale_name(self) -> str:
        """The unit that lengths are in now."""
        return self._scale.name if self._has_unit else "relative"

    @property
    def focal_estimate(self) -> FocalEstimate | None:
        """What self-calibration has found; None where nobody asked for it."""
        return self._search.estimate if self._config.self_calibration.enabled else None

    def advance(self) -> None:
        """One more frame has come."""
        self._num_steps += 1

    def view_of(self, frame: Frame, features: Features) -> View:
        """A frame as the map sees it: undistorted as well as is known by now, and without tracks yet."""
        keypoints = features.valid_keypoints()
        untracked = np.full(len(keypoints), -1, np.int64)
        nominal, kappa = undistort(keypoints, self.camera), self.window.radial.mean
        colors = _colors_at(frame.image, keypoints)
        return View(frame.index, frame.timestamp_ns, features, keypoints, colors, nominal, kappa, untracked, np.eye(4))

    def observe(self, view: View, held: tuple[View, ...]) -> None:
        """Enters the frame into the track table; what has no track yet begins one."""
        view.track_ids = self.tracks.observe(view.frame_index, view.track_ids, view.keypoints, view.colors).copy()
        if self._num_steps % _PRUNE_EVERY == 0:
            others = [other.track_ids for other in held]
            self.tracks.prune(np.concatenate([self.window.seen_ids(self.tracks), *others, view.track_ids]))

    def add_keyframe(self, view: View, frame: Frame | None) -> None:
        """Makes `view` of `frame` the newest keyframe, which leaves the window to be refined."""
        if frame is not None:
            view.inverse_depths = self._scale.inverse_depths(frame, view.keypoints)
        self.window.add(view, self.tracks)
        self._num_keyframes += 1
        self._window_is_stale = True

    def needs_keyframe(self, view: View, num_inliers: int) -> bool:
        """Whether there is something new to triangulate from here, or the last keyframe is going out of sight.

        Keyframes closer together than that only shorten the window's reach, and with it the hold on the scale.
        """
        newest = self.window.keyframes[-1]
        rows0, rows1 = self.tracks.shared_rows(newest.track_ids, view.track_ids)
        if len(rows0) < self._config.min_matches or num_inliers < 2 * self._config.min_inliers:
            return True
        R_newest_view = newest.T_world_camera[:3, :3].T @ view.T_world_camera[:3, :3]
        moved = parallax(newest.rays[rows0], view.rays[rows1], R_newest_view)
        parallax_px = float(np.median(moved)) * self.camera.focal_px
        num_before = np.count_nonzero(self.tracks.has_landmark(self.tracks.rows_of(newest.track_ids)))
        is_fading = num_inliers < self._config.keyframe_landmark_ratio * num_before
        return bool(
            parallax_px > self._config.keyframe_parallax_px
            or (is_fading and parallax_px > self._config.keyframe_parallax_px / 4)
            or rotation_angle(R_newest_view) > np.deg2rad(self._config.keyframe_rotation_deg)
        )

    def give_up_landmarks(self, track_ids: IntArray) -> None:
        """Takes points away that cannot be right; their tracks may be given better ones."""
        self.tracks.drop_landmarks(track_ids)
        self._given_up = np.union1d(self._given_up, track_ids)

    def begin_anew(self) -> None:
        """A new segment without a link to the map so far."""
        self.segment_id += 1
        self.window.clear()
        self._scale.reset()
        self._has_unit, self._pending_factor = False, 1.0
        self._window_is_stale = False
        self._refinement = None
        self._given_up = np.zeros(0, np.int64)
        self._num_keyframes = 0

    # --- the window, beside the frames ------------------------------------------------------------------------------

    def begin_refinement(self, *, is_last: bool = False) -> None:
        """Hands the window to its thread, unless that is still busy: then the next step tries again."""
        if not self._window_is_stale or self._refinement is not None:
            return
        self._window_is_stale = False
        depth_sigma = self._scale.inverse_depth_sigma if self._has_unit else 0.0
        if self._search.is_due(self._num_keyframes, is_last=is_last):
            self._search.begin(self._num_keyframes)
            is_radial = self.camera.model is not CameraModel.FISHEYE
            job: WindowJob | None = self.window.lens_job(self.tracks, self._search.starts, is_radial, depth_sigma)
        else:
            job = self.window.job(self.tracks, depth_sigma)
        if job is not None:
            self._refinement = _Refinement(job, self._worker.submit(job.solve), self._num_steps)

    def take_in_refinement(self, frame_index: int, timestamp_ns: int, held: tuple[View, ...]) -> MapUpdate | None:
        """Moves keyframes, landmarks and the views in hand to where the refinement puts them, once it is due."""
        refinement = self._refinement
        if refinement is None:
            return None
        lag = self._num_steps - refinement.begun_at
        if lag < self._config.window_lag_frames if self._waits_for_window else not refinement.solution.done():
            return None
        self._refinement = None
        if isinstance(refinement.job, LensJob):
            return self._take_in_lens(refinement.job, refinement.solution.result(), (frame_index, timestamp_ns), held)
        change = self.window.apply(refinement.job, refinement.solution.result(), self.tracks)
        for view in self._without_keyframes(held, refinement.job.views):
            view.T_world_camera = change.correction @ view.T_world_camera
            view.kappa = self.window.radial.mean
        return self._map_update(frame_index, timestamp_ns, change)

    def _take_in_lens(
        self, job: LensJob, solution: WindowSolution, now: tuple[int, int], held: tuple[View, ...]
    ) -> MapUpdate | None:
        """Puts the camera that was found in the place of the old one, and the keyframes where it has them.

        Poses that were published before are bent by comparison: where that shows, a new segment says so, which begins
        with all keyframes in their new places.
        """
        self._window_is_stale = True
        camera = self._search.take_in(self.camera, solution)
        if camera is None:
            return None
        if abs(solution.focal.log_ratio) > _BENDING_RATIO:
            self.segment_id += 1
        self.camera = camera
        change = self.window.apply(job, solution, self.tracks)
        self.window.change_camera(camera, job.views[0].frame_index)
        for view in self._without_keyframes(held, job.views):
            view.T_world_camera = change.correction @ view.T_world_camera
        for view in held:
            view.undistort(camera)
        self._scale.forget_path()
        return self._map_update(*now, replace(change, views=(job.views[0], *change.views)))

    def _without_keyframes(self, held: tuple[View, ...], others: tuple[View, ...] = ()) -> list[View]:
        placed = {id(view) for view in (*others, *self.window.keyframes, *self.window.older)}
        return [view for key, view in {id(view): view for view in held}.items() if key not in placed]

    def _map_update(self, frame_index: int, timestamp_ns: int, change: WindowChange) -> MapUpdate:
        points, _ = self.tracks.landmarks(change.landmark_ids)
        given_up = self._given_up[~self.tracks.landmarks(self._given_up)[1]]
        self._given_up = np.zeros(0, np.int64)
        return MapUpdate(
            frame_index=frame_index,
            timestamp_ns=timestamp_ns,
            segment_id=self.segment_id,
            scale_source=self.scale_name,
            keyframe_indices=np.array([view.frame_index for view in change.views], np.int64),
            keyframe_timestamps_ns=np.array([view.timestamp_ns for view in change.views], np.int64),
            T_world_keyframes=np.stack([view.T_world_camera for view in change.views]),
            landmark_ids=change.landmark_ids.copy(),
            landmarks=points,
            landmark_colors=self.tracks.colors(change.landmark_ids),
            removed_landmark_ids=np.union1d(change.removed_ids, given_up),
        )

    # --- the unit of the map ----------------------------------------------------------------------------------------

    def passed(self, view: View) -> None:
        """Notes a pose on the way, for scale sources that measure along the path."""
        self._scale.passed(view.T_world_camera)

    def read_scale(self, view: View, frame: Frame | None) -> None:
        """Asks the scale source at a keyframe by how much the map is too small."""
        if frame is None:
            return
        points, known = self.tracks.landmarks(view.track_ids)
        _, depth = reproject(view.T_world_camera, points[known])
        self._scale.passed(view.T_world_camera)
        self._pending_factor *= self._scale.factor(
            frame, view.T_world_camera, view.keypoints[known], depth, self._pending_factor
        )

    def change_unit(self, camera: View, held: tuple[View, ...]) -> float:
        """Rescales the map about the camera, so that no pose jumps; the first time about the origin.

        What was posed before the first reading is in another unit, and said to be by its `scale_source`. Returns the
        factor on all lengths; 1 while a refinement is under way.
        """
        factor = self._pending_factor
        if factor == 1.0 or self._refinement is not None:
            return 1.0
        center = camera.T_world_camera[:3, 3].copy() if self._has_unit else np.zeros(3)
        self._has_unit, self._pending_factor = self._scale.is_metric, 1.0
        self.window.rescale(center, factor)
        self.tracks.scale_landmarks(center, factor)
        for view in self._without_keyframes(held):
            T = view.T_world_camera.copy()
            T[:3, 3] = center + factor * (T[:3, 3] - center)
            view.T_world_camera = T
        self._scale.rescaled(center, factor)
        return factor


def _colors_at(image: NDArray[np.uint8], keypoints: NDArray[np.float32]) -> NDArray[np.uint8]:
    """RGB (N, 3) of the pixels nearest to the keypoints (N, 2)."""
    height, width = image.shape[:2]
    columns = np.clip(np.rint(keypoints[:, 0]), 0, width - 1).astype(np.int64)
    rows = np.clip(np.rint(keypoints[:, 1]), 0, height - 1).astype(np.int64)
    values = image[rows, columns]
    return np.repeat(values[:, None], 3, axis=1) if values.ndim == 1 else values
