"""The state machine: one call per frame, features in, a pose and tracks out. No thread and no clock.

INITIALIZING  tracks grow from the first keyframe until there is parallax; only the rotation is reported.
TRACKING      matches extend tracks, landmarks give the pose and carry the scale; keyframes refine both in a window.
LOST          no pose is reported; recent keyframes are searched, and after a while a new segment begins.
RELOCALIZED   the first frame found again in the same map.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from frontends.base import Features, Matches
from vo.config import OdometryConfig, RelativeScaleConfig, TwoViewConfig
from vo.first_pose import estimate_first_pose
from vo.geometry import fit_rotation, invert_pose, make_pose, ray_depths
from vo.live_map import LiveMap
from vo.odometry_step import UNKNOWN_TRANSLATION, OdometryStep, counts, step_without_pose
from vo.posing import Found, MatchFunction, Motion, Posed, Poser
from vo.scale_source import ScaleSource
from vo.self_calibration import FocalEstimate
from vo.stillness import RepeatedImages, is_still
from vo.tracks import TrackTable, is_among
from vo.types import (
    Camera,
    FloatArray,
    Frame,
    MapUpdate,
    PoseEstimate,
    Rejection,
    RelativePose,
    TrackingStatus,
)
from vo.window import View

IntArray = NDArray[np.int64]


class Odometry:
    """Visual odometry of one camera. The window is refined on a thread of its own; `close` ends it.

    match             called with the features of two frames, older first; decides nothing but correspondence.
    waits_for_window  takes a refinement in `window_lag_frames` after its keyframe, and waits for it if need be, so that
                      the same frames give the same poses; otherwise as soon as it is there, and no pose ever waits.
    scale             what gives the map its unit; that of the first landmarks without one.
    """

    def __init__(
        self,
        camera: Camera,
        config: OdometryConfig,
        two_view: TwoViewConfig,
        match: MatchFunction,
        *,
        waits_for_window: bool = True,
        scale: ScaleSource | None = None,
    ) -> None:
        self._camera = camera
        self._config = config
        self._two_view = two_view
        self._match = match
        self._map = LiveMap(config, camera, scale or ScaleSource(RelativeScaleConfig()), waits_for_window)
        self._poser = Poser(camera.focal_px, config, two_view, match, self._map.tracks)
        self._status = TrackingStatus.INITIALIZING
        self._previous: View | None = None
        self._still_reference: View | None = None
        self._last_motion = np.eye(4)
        self._num_lost = 0
        self._frame: Frame | None = None
        self._repeated = RepeatedImages()

    def close(self) -> None:
        """Ends the window's thread; safe to call twice."""
        self._map.close()

    def finish(self) -> MapUpdate | None:
        """Refines what the last keyframes left to refine; None if there is nothing. No step may follow."""
        if self._previous is None:
            return None
        return self._map.finish(self._previous.frame_index, self._previous.timestamp_ns)

    @property
    def radial_distortion(self) -> float:
        """The radial distortion found beyond the calibration: a ray of length r is the ray times 1 - kappa r^2."""
        return self._map.window.radial.mean

    @property
    def camera(self) -> Camera:
        """The camera in use: the one given, or what self-calibration has put in its place."""
        return self._map.camera

    @property
    def focal_estimate(self) -> FocalEstimate | None:
        """What self-calibration has found; None where nobody asked for it."""
        return self._map.focal_estimate

    @property
    def tracks(self) -> TrackTable:
        return self._map.tracks

    @property
    def keyframes(self) -> tuple[View, ...]:
        """The window's keyframes, oldest first."""
        return tuple(self._map.window.keyframes)

    def step(self, frame: Frame, features: Features) -> OdometryStep:
        """Poses the next frame. Expected failures come back as status and rejection, never as an exception."""
        self._map.advance()
        if self._repeated.is_hanging(frame.image):
            return self._unposed_frame(frame, Rejection.REPEATED_IMAGE)
        if frame.health is not None and frame.health.is_blind:
            return self._unposed_frame(frame, Rejection.DEGENERATE)
        if frame.follows_gap and self._status is not TrackingStatus.INITIALIZING:
            # Where the camera was meanwhile nobody knows: it is lost until it is found.
            self._status, self._last_motion = TrackingStatus.LOST, np.eye(4)
        map_update = self._map.take_in_refinement(frame.index, frame.timestamp_ns, self._held())
        self._frame = self._as_seen(frame)
        self._repeated.note(frame.image)
        self._change_unit()
        step = self._step(self._map.view_of(frame, features))
        self._map.begin_refinement()
        return replace(step, map_update=map_update)

    def _as_seen(self, frame: Frame) -> Frame:
        """The frame with the camera that the map has by now."""
        if self._map.camera is not self._camera:
            self._camera = self._map.camera
            self._poser = Poser(self._camera.focal_px, self._config, self._two_view, self._match, self._map.tracks)
        return frame if self.focal_estimate is None else replace(frame, camera=self._camera)

    def _change_unit(self) -> None:
        if self._previous is not None:
            factor = self._map.change_unit(self._previous, self._held())
            self._last_motion = make_pose(self._last_motion[:3, :3], self._last_motion[:3, 3] * factor)

    def _step(self, view: View) -> OdometryStep:
        keypoints, features = view.keypoints, view.features
        if self._previous is None:
            return self._begin(view)
        if len(keypoints) < self._config.min_matches:
            return self._lose(view, None, Rejection.TOO_FEW_MATCHES)
        matches = self._match(self._previous.features, features)
        if len(matches) < self._config.min_matches:
            return self._recover(view, matches, Rejection.TOO_FEW_MATCHES)
        if self._status is TrackingStatus.INITIALIZING:
            motion = self._poser.relative_motion(view, self._previous, matches)
            self._extend(view, self._previous, motion.pairs)
            return self._initialize(view, matches, motion)
        return self._follow(view, self._previous, matches)

    # --- the first map ----------------------------------------------------------------------------------------------

    def _begin(self, view: View) -> OdometryStep:
        """Takes the first frame with enough keypoints as the world's frame."""
        if len(view.keypoints) < self._config.min_matches:
            return self._unposed(view, None, Rejection.TOO_FEW_MATCHES)
        self._observe(view)
        self._map.window.add(view, self._map.tracks)
        self._previous = self._still_reference = view
        self._status = TrackingStatus.INITIALIZING
        self._num_lost = 0
        return self._posed_step(view, None, is_keyframe=True, covariance=np.zeros((6, 6)))

    def _initialize(self, view: View, matches: Matches, motion: Motion) -> OdometryStep:
        """Starts the map once the first keyframe and this frame see enough tracks under enough parallax."""
        origin = self._map.window.keyframes[0]
        rows0, rows1 = self._map.tracks.shared_rows(origin.track_ids, view.track_ids)
        if len(rows0) < len(motion.pairs) / 2:
            self._rematch(origin, view)
            rows0, rows1 = self._map.tracks.shared_rows(origin.track_ids, view.track_ids)
        relative = estimate_first_pose(origin.rays[rows0], view.rays[rows1], self._camera.focal_px, self._two_view)
        # Where the first keyframe is going out of sight a short baseline is better than none.
        is_leaving = len(rows0) < len(origin.keypoints) / 6
        enough_deg = self._config.init_parallax_deg * (0.7 if is_leaving else 1.0)
        if isinstance(relative, RelativePose) and relative.parallax_rad > np.deg2rad(enough_deg):
            step = self._try_first_map(view, matches, relative, rows0, rows1)
            if step is not None:
                return step
        return self._await_parallax(view, matches, motion, relative, rows0, rows1)

    def _rematch(self, origin: View, view: View) -> None:
        """Finds tracks of the first keyframe again that were lost on the way, by matching to it."""
        pairs = self._match(origin.features, view.features).indices
        ids = origin.track_ids[pairs[:, 0]]
        is_open = (ids >= 0) & ~is_among(ids, view.track_ids)
        view.track_ids[pairs[is_open, 1]] = ids[is_open]

    def _try_first_map(
        self, view: View, matches: Matches, relative: RelativePose, rows0: IntArray, rows1: IntArray
    ) -> OdometryStep | None:
        """The first landmarks, in units of the inliers' median depth; None if there are too few."""
        origin = self._map.window.keyframes[0]
        T, inliers = relative.T_camera0_camera1, relative.inliers
        depths, _ = ray_depths(T, origin.rays[rows0[inliers]], view.rays[rows1[inliers]])
        depths = depths[depths > 0]
        if len(depths) < self._config.init_landmarks:
            return None
        unit = float(np.median(depths))
        view.track_ids[rows1[~inliers]] = -1
        view.T_world_camera = origin.T_world_camera @ make_pose(T[:3, :3], T[:3, 3] / unit)
        self._observe(view)
        self._map.add_keyframe(view, self._frame)
        if self._map.tracks.num_landmarks < self._config.init_landmarks:
            self._map.tracks.drop_landmarks(view.track_ids[self._map.tracks.landmarks(view.track_ids)[1]])
            self._map.window.keyframes.pop()
            self._previous = view
            return self._posed_step(view, matches, rejection=Rejection.LOW_PARALLAX)
        self._status = TrackingStatus.TRACKING
        self._accept(view, is_moving=True)
        self._map.read_scale(view, self._frame)
        self._change_unit()
        baseline = float(np.linalg.norm((invert_pose(origin.T_world_camera) @ view.T_world_camera)[:3, 3]))
        covariance = relative.covariance.copy()
        covariance[:3] *= baseline
        covariance[:, :3] *= baseline
        num_inliers = int(inliers.sum())
        return self._posed_step(view, matches, num_inliers=num_inliers, is_keyframe=True, covariance=covariance)

    def _await_parallax(
        self,
        view: View,
        matches: Matches,
        motion: Motion,
        relative: RelativePose | Rejection,
        rows0: IntArray,
        rows1: IntArray,
    ) -> OdometryStep:
        """Reports the rotation and holds the translation; starts over where the first keyframe is out of sight."""
        origin = self._map.window.keyframes[0]
        is_stationary = self._is_still(view)
        rejection = Rejection.LOW_PARALLAX if isinstance(relative, RelativePose) else relative
        if is_stationary:
            R = np.eye(3)
        elif isinstance(relative, RelativePose):
            R = relative.T_camera0_camera1[:3, :3]
        elif len(rows0) >= self._two_view.min_inliers:
            R = fit_rotation(origin.rays[rows0], view.rays[rows1], self._two_view.threshold_px / self._camera.focal_px)
        else:
            T_origin_previous = invert_pose(origin.T_world_camera) @ self._previous_pose()
            R = (T_origin_previous @ motion.T_previous_current)[:3, :3]
        view.T_world_camera = origin.T_world_camera @ make_pose(R, np.zeros(3))
        self._observe(view)
        restart = len(rows0) < max(self._two_view.min_inliers, len(origin.keypoints) // 10)
        if restart:
            self._map.window.clear()
            self._map.window.add(view, self._map.tracks)
        self._accept(view, is_moving=not is_stationary)
        return self._posed_step(
            view,
            matches,
            num_inliers=len(motion.pairs),
            is_keyframe=restart,
            rejection=rejection,
            is_stationary=is_stationary,
            covariance=UNKNOWN_TRANSLATION.copy(),
        )

    # --- tracking ---------------------------------------------------------------------------------------------------

    def _extend(self, view: View, previous: View, pairs: IntArray) -> None:
        """Lets the features of `view` go on with the tracks of the features (M, 2) they are paired with."""
        view.track_ids[:] = -1
        view.track_ids[pairs[:, 1]] = previous.track_ids[pairs[:, 0]]

    def _follow(self, view: View, previous: View, matches: Matches) -> OdometryStep:
        """Poses a frame against the landmarks its tracks carry: from the last motion, else from two-view geometry."""
        self._extend(view, previous, matches.indices)
        posed: Posed | Rejection | None = self._poser.by_prior(view, previous, matches, self._last_motion)
        if posed is None and self._status is TrackingStatus.LOST:
            # Two views that hardly overlap take longest to say so; the search below begins at the newest keyframes.
            return self._recover(view, matches, Rejection.TOO_FEW_INLIERS)
        if posed is None:
            motion = self._poser.relative_motion(view, previous, matches)
            self._extend(view, previous, motion.pairs)
            posed = self._poser.by_motion(view, previous, motion, self._last_motion)
        if isinstance(posed, Rejection):
            return self._recover(view, matches, posed)
        if posed.num_inliers < 2 * self._config.min_inliers:
            # So few would not do to find a lost camera; if the keyframes know better, they are right.
            tracked = view.track_ids.copy()
            found = self._poser.find(view, self._map.window.likely_views(view))
            if found is not None and found.num_inliers > posed.num_inliers:
                return self._relocalize(view, found)
            view.track_ids = tracked
        view.T_world_camera = posed.pose.T_world_camera
        view.track_ids[posed.wrong_rows] = -1
        is_stationary = self._is_still(view)
        if not is_stationary:
            others = [keyframe for keyframe in self._map.window.keyframes if keyframe is not previous]
            count = self._config.reconnect_keyframes
            posed = self._poser.reconnect(view, others[::-1][:count], posed)
        if is_stationary and self._still_reference is not None:
            view.T_world_camera = self._still_reference.T_world_camera
        self._observe(view)
        is_keyframe = not is_stationary and self._map.needs_keyframe(view, posed.num_inliers)
        if is_keyframe:
            self._map.window.revisit(view, self._map.tracks, self._match)
            self._map.add_keyframe(view, self._frame)
            self._map.read_scale(view, self._frame)
        self._accept(view, is_moving=not is_stationary)
        self._status = self._found_status()
        return self._posed_step(
            view,
            matches,
            num_inliers=posed.num_inliers,
            is_keyframe=is_keyframe,
            is_stationary=is_stationary,
            covariance=posed.pose.covariance,
        )

    def _is_still(self, view: View) -> bool:
        """Whether the image has not moved since the last frame that did, so that slow creeping still adds up."""
        if self._still_reference is None:
            return False
        rows0, rows1 = self._map.tracks.shared_rows(self._still_reference.track_ids, view.track_ids)
        if len(rows0) < self._config.min_matches:
            return False
        before, now = self._still_reference.keypoints[rows0], view.keypoints[rows1]
        return is_still(before, now, self._camera, self._config.stationary_px)

    # --- loss and recovery ------------------------------------------------------------------------------------------

    def _recover(self, view: View, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        """Looks for the camera in the map of recent keyframes."""
        if self._status is TrackingStatus.INITIALIZING:
            return self._restart(view, matches, rejection)
        found = self._poser.find(view, self._map.window.likely_views(view))
        return self._lose(view, matches, rejection) if found is None else self._relocalize(view, found)

    def _relocalize(self, view: View, found: Found) -> OdometryStep:
        view.T_world_camera = found.pose.T_world_camera
        self._map.give_up_landmarks(found.misplaced_ids)
        self._observe(view)
        self._accept(view, is_moving=True)
        self._last_motion = np.eye(4)
        self._map.add_keyframe(view, self._frame)
        self._status = self._found_status()
        return self._posed_step(
            view, found.matches, num_inliers=found.num_inliers, is_keyframe=True, covariance=found.pose.covariance
        )

    def _found_status(self) -> TrackingStatus:
        return TrackingStatus.RELOCALIZED if self._status is TrackingStatus.LOST else TrackingStatus.TRACKING

    def _lose(self, view: View, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        self._num_lost += 1
        if self._num_lost > self._config.max_lost_frames and len(view.keypoints) >= self._config.min_matches:
            return self._restart(view, matches, rejection)
        if self._status is TrackingStatus.INITIALIZING:
            return self._unposed(view, matches, rejection)
        self._status = TrackingStatus.LOST
        return self._unposed(view, matches, rejection)

    def _restart(self, view: View, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        """A new segment without a link to the map so far."""
        self._map.begin_anew()
        self._last_motion = np.eye(4)
        view.T_world_camera = np.eye(4)
        view.track_ids[:] = -1
        step = self._begin(view)
        return replace(step, pose=replace(step.pose, rejection=rejection), matches=matches)

    # --- shared -----------------------------------------------------------------------------------------------------

    def _previous_pose(self) -> FloatArray:
        return np.eye(4) if self._previous is None else self._previous.T_world_camera

    def _held(self) -> tuple[View, ...]:
        """The views that are kept between frames."""
        return tuple(view for view in (self._previous, self._still_reference) if view is not None)

    def _observe(self, view: View) -> None:
        self._map.observe(view, self._held())

    def _accept(self, view: View, is_moving: bool) -> None:
        """Makes the frame the one to match the next against."""
        self._last_motion = invert_pose(self._previous_pose()) @ view.T_world_camera
        self._map.passed(view)
        self._previous = view
        self._num_lost = 0
        if is_moving:
            self._still_reference = view

    def _posed_step(
        self,
        view: View,
        matches: Matches | None,
        num_inliers: int = 0,
        is_keyframe: bool = False,
        is_stationary: bool = False,
        rejection: Rejection | None = None,
        covariance: FloatArray | None = None,
    ) -> OdometryStep:
        num_matches, stop_layer = counts(matches)
        pose = PoseEstimate(
            frame_index=view.frame_index,
            timestamp_ns=view.timestamp_ns,
            T_world_camera=view.T_world_camera.copy(),
            status=self._status,
            covariance=covariance,
            rejection=rejection,
            num_matches=num_matches,
            stop_layer=stop_layer,
            num_inliers=num_inliers,
            is_keyframe=is_keyframe,
            is_stationary=is_stationary,
            segment_id=self._map.segment_id,
            scale_source=self._map.scale_name,
        )
        return OdometryStep(pose, self._map.tracks.frame_tracks(view.frame_index, view.timestamp_ns), matches)

    def _unposed(self, view: View, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        return self._without_pose(view.frame_index, view.timestamp_ns, rejection, matches)

    def _unposed_frame(self, frame: Frame, rejection: Rejection) -> OdometryStep:
        """A frame that was not even looked at; the next one goes on from what was seen before."""
        if self._status is not TrackingStatus.INITIALIZING:
            self._status = TrackingStatus.LOST
        return self._without_pose(frame.index, frame.timestamp_ns, rejection, None)

    def _without_pose(
        self, frame_index: int, timestamp_ns: int, rejection: Rejection, matches: Matches | None
    ) -> OdometryStep:
        return step_without_pose(
            frame_index,
            timestamp_ns,
            rejection,
            matches,
            segment_id=self._map.segment_id,
            scale_source=self._map.scale_name,
        )
