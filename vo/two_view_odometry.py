"""Odometry without a map: a chain of relative poses, each of two views, for whoever wants tracks and motions only.

Every frame is posed against the one before it, or against the last one from which something has moved; the lengths of
translations are carried on by the depths of the tracks that both have seen. There is no window, no landmark outlives
its track, and nothing is revised: errors add up along the chain, and its covariances with them.

INITIALIZING  the first frame of a segment, until there is parallax to it; only the rotation is reported.
TRACKING      the frame is linked to the chain. Where nothing but a rotation shows, its rejection says so, and the
              position is held.
LOST          no pose; the next frames are matched to the last good one, and after a while a new segment begins.
RELOCALIZED   the first frame linked to the chain again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from frontends.base import Features, Matches
from vo.config import OdometryConfig, TwoViewConfig
from vo.depth_chain import ChainCovariance, Depths, carried, measured, scale_of
from vo.first_pose import estimate_first_pose
from vo.geometry import make_pose
from vo.odometry_step import UNKNOWN_TRANSLATION, OdometryStep, counts, step_without_pose
from vo.pair_poses import PairMotion, PairPoser, PairsAhead, SeenFrame
from vo.posing import MatchFunction
from vo.self_calibration import FocalEstimate
from vo.stillness import RepeatedImages
from vo.types import (
    Camera,
    FloatArray,
    Frame,
    FrameTracks,
    MapUpdate,
    PoseEstimate,
    Rejection,
    RelativePose,
    TrackingStatus,
)
from vo.window import View

IntArray = NDArray[np.int64]

# Noise of a ray, of the distance at which a match is an outlier: what weighs depths against each other.
_NOISE = 0.5
# A translation is taken once its direction is known as well as this, 1 sigma; where its first frame is going out of
# sight a poor one is better than none.
_MAX_DIRECTION_RAD, _LEAVING_DIRECTION_RAD = 0.1, 0.4


@dataclass(slots=True, eq=False)
class _Link:
    """A frame of the chain.

    track_ids, lengths   (N,) of its features.
    anchor_rows          (N,) features of the anchor that the tracks go back to, -1 where they do not.
    depths               of its features, where it is an anchor.
    """

    frame_index: int
    timestamp_ns: int
    seen: SeenFrame
    track_ids: IntArray
    lengths: NDArray[np.int32]
    anchor_rows: IntArray
    depths: Depths
    T_world_camera: FloatArray
    covariance: ChainCovariance


class TwoViewOdometry:
    """Visual odometry of one camera by two views at a time; see `vo.odometry.Odometry`, whose place it takes.

    match   called with the features of two frames, older first; decides nothing but correspondence.
    The anchor is the last frame whose translation is known: the frame before, unless only rotations came since.
    """

    def __init__(self, camera: Camera, config: OdometryConfig, two_view: TwoViewConfig, match: MatchFunction) -> None:
        self.camera = camera
        self._config = config
        self._two_view = two_view
        self._match = match
        self._poser = PairPoser(camera, config, two_view)
        self._ahead = PairsAhead(self._poser, camera, config.poses_in_flight)
        self._repeated = RepeatedImages()
        self._status = TrackingStatus.INITIALIZING
        self._previous: _Link | None = None
        self._anchor: _Link | None = None
        self._next_track_id = 0
        self._segment_id = 0
        self._num_lost = 0

    @property
    def radial_distortion(self) -> float:
        """None is looked for."""
        return 0.0

    @property
    def focal_estimate(self) -> FocalEstimate | None:
        """None: there is no map to find it from."""
        return None

    @property
    def keyframes(self) -> tuple[View, ...]:
        """None: no frame is matched to any but the one before."""
        return ()

    def begin_pair(self, features0: Features, features1: Features, matches: Matches) -> None:
        """Lets a worker pose neighbouring frames before `step` comes to them; called by one thread, in their order."""
        self._ahead.begin(features0, features1, matches)

    def finish(self) -> MapUpdate | None:
        """Nothing is left to refine."""
        return None

    def close(self) -> None:
        """Ends the workers; safe to call twice."""
        self._ahead.close()

    def step(self, frame: Frame, features: Features) -> OdometryStep:
        """Poses the next frame. Expected failures come back as status and rejection, never as an exception."""
        unseen = self._unseen(frame)
        previous = None if unseen is not None or self._previous is None else self._previous.seen.features
        seen, motion = self._ahead.take(previous, features)
        if unseen is not None:
            # The next frame goes on from what was seen before.
            self._lose_sight()
            return self._without_pose(frame.index, frame.timestamp_ns, unseen, None)
        if frame.follows_gap:
            # Where the camera was meanwhile nobody knows: it is lost until it is found.
            self._lose_sight()
        self._repeated.note(frame.image)
        num_features = len(seen.keypoints)
        unlinked = np.full(num_features, -1, np.int64)
        link = _Link(
            frame.index,
            frame.timestamp_ns,
            seen,
            unlinked,
            np.zeros(num_features, np.int32),
            unlinked.copy(),
            Depths.unknown(num_features),
            np.eye(4),
            ChainCovariance(),
        )
        return self._step(link, motion)

    def _unseen(self, frame: Frame) -> Rejection | None:
        """Why a frame is not even looked at."""
        if self._repeated.is_hanging(frame.image):
            return Rejection.REPEATED_IMAGE
        return Rejection.DEGENERATE if frame.health is not None and frame.health.is_blind else None

    def _lose_sight(self) -> None:
        if self._status is not TrackingStatus.INITIALIZING:
            self._status = TrackingStatus.LOST

    def _step(self, link: _Link, motion: PairMotion | None) -> OdometryStep:
        previous = self._previous
        if previous is None:
            return self._begin(link)
        if len(link.seen.keypoints) < self._config.min_matches:
            return self._lose(link, None, Rejection.TOO_FEW_MATCHES)
        matches = self._match(previous.seen.features, link.seen.features)
        if len(matches) < self._config.min_matches:
            return self._fail(link, matches, Rejection.TOO_FEW_MATCHES)
        if motion is None:
            motion = self._poser.motion(previous.seen, link.seen, matches.indices)
        if not motion.has_rotation:
            return self._fail(link, matches, motion.rejection)
        self._extend(link, previous, motion.rows)
        base, motion = self._based(link, previous, motion)
        is_leaving = len(motion.rows) < len(base.track_ids) / 3
        if motion.direction_sigma_rad > (_LEAVING_DIRECTION_RAD if is_leaving else _MAX_DIRECTION_RAD):
            motion = motion.without_translation() if motion.pose is not None else motion
        if motion.pose is None:
            return self._hold(link, matches, base, motion, motion.rejection)
        if self._status is TrackingStatus.INITIALIZING:
            return self._begin_chain(link, matches, base, motion)
        return self._go_on(link, matches, base, motion)

    # --- the chain --------------------------------------------------------------------------------------------------

    def _begin(self, link: _Link) -> OdometryStep:
        """Takes the first frame with enough keypoints as the world's frame."""
        if len(link.seen.keypoints) < self._config.min_matches:
            return self._unposed(link, None, Rejection.TOO_FEW_MATCHES)
        self._anchor, self._status = link, TrackingStatus.INITIALIZING
        return self._posed(link, None, is_keyframe=True)

    def _extend(self, link: _Link, previous: _Link, rows: IntArray) -> None:
        """Lets the features of a frame go on with the tracks of the features (M, 2) of the one before."""
        rows0, rows1 = rows[:, 0], rows[:, 1]
        link.track_ids[rows1] = previous.track_ids[rows0]
        link.lengths[rows1] = previous.lengths[rows0]
        link.anchor_rows[rows1] = rows0 if previous is self._anchor else previous.anchor_rows[rows0]

    def _based(self, link: _Link, previous: _Link, motion: PairMotion) -> tuple[_Link, PairMotion]:
        """The frame from which the motion is measured, and the motion: from the anchor, while that is in sight.

        What is too little to be seen from one frame to the next adds up until it is not.
        """
        anchor = self._anchor
        if anchor is None or anchor is previous:
            return previous, motion
        rows1 = np.flatnonzero(link.anchor_rows >= 0)
        if len(rows1) >= max(self._config.min_matches, self._two_view.min_inliers):
            since = self._poser.motion(anchor.seen, link.seen, np.stack([link.anchor_rows[rows1], rows1], axis=1))
            if since.has_rotation:
                return anchor, since
        # How far the camera has come since nobody can say any more; too little to be seen, that is.
        self._carry_depths(anchor, previous)
        self._anchor = previous
        link.anchor_rows[:] = -1
        link.anchor_rows[motion.rows[:, 1]] = motion.rows[:, 0]
        return previous, motion

    def _carry_depths(self, anchor: _Link, link: _Link) -> None:
        """Gives a frame that was held the depths of the anchor, from which it has only turned."""
        rows1 = np.flatnonzero(link.anchor_rows >= 0)
        rows0 = link.anchor_rows[rows1]
        R = anchor.T_world_camera[:3, :3].T @ link.T_world_camera[:3, :3]
        turned = make_pose(R, np.zeros(3))
        link.depths = carried(anchor.depths, rows0, rows1, anchor.seen.rays[rows0], turned, len(link.track_ids))

    def _begin_chain(self, link: _Link, matches: Matches, base: _Link, motion: PairMotion) -> OdometryStep:
        """The first translation sets the unit: the median depth of what both frames see."""
        rows0, rows1 = motion.rows[:, 0], motion.rows[:, 1]
        inverse1 = motion.inverse1[motion.inverse1 > 0]
        # Where the first frame is going out of sight a short baseline is better than none.
        is_leaving = len(rows0) < len(base.track_ids) / 3
        enough_rad = np.deg2rad(self._config.init_parallax_deg * (0.7 if is_leaving else 1.0))
        if motion.pose is None or motion.pose.parallax_rad < enough_rad or len(inverse1) < self._config.init_landmarks:
            return self._hold(link, matches, base, motion, Rejection.LOW_PARALLAX)
        # Of a plane the essential matrix sees two motions, and does not tell.
        rays0, rays1 = base.seen.rays[rows0], link.seen.rays[rows1]
        first = estimate_first_pose(rays0, rays1, self.camera.focal_px, self._two_view)
        if not isinstance(first, RelativePose):
            return self._hold(link, matches, base, motion, first)
        if first.T_camera0_camera1[:3, 3] @ motion.T_0_1[:3, 3] < np.cos(np.deg2rad(10.0)):
            return self._hold(link, matches, base, motion, Rejection.DEGENERATE)
        return self._move(link, matches, base, motion, float(np.median(inverse1)), 0.0)

    def _go_on(self, link: _Link, matches: Matches, base: _Link, motion: PairMotion) -> OdometryStep:
        """A link whose length the depths before it give; without them a new segment, for a length is not made up."""
        rows0, rows1 = motion.rows[:, 0], motion.rows[:, 1]
        rays0, rays1 = base.seen.rays[rows0], link.seen.rays[rows1]
        scale = scale_of(base.depths, rows0, motion.T_0_1, rays0, rays1, self._noise)
        if scale is None or scale.num_votes < self._config.min_inliers:
            return self._restart(link, matches, Rejection.TOO_FEW_INLIERS)
        return self._move(link, matches, base, motion, scale.length, scale.sigma)

    def _move(
        self, link: _Link, matches: Matches, base: _Link, motion: PairMotion, length: float, sigma: float
    ) -> OdometryStep:
        """Adds a link of a known length, and makes the frame the anchor."""
        if motion.pose is None:
            raise ValueError("motion: has no translation to go along")
        rows0, rows1 = motion.rows[:, 0], motion.rows[:, 1]
        T = make_pose(motion.T_0_1[:3, :3], motion.T_0_1[:3, 3] * length)
        link.T_world_camera = base.T_world_camera @ T
        units = np.array([length, length, length, 1.0, 1.0, 1.0])
        link.covariance = base.covariance.linked(T, motion.pose.covariance * np.outer(units, units), sigma)
        before = carried(base.depths, rows0, rows1, base.seen.rays[rows0], T, len(link.track_ids))
        information = motion.leverage1 * (length / self._noise) ** 2
        link.depths = measured(before, rows1, motion.inverse1 / length, information)
        if base is not self._previous:
            # Tracks that do not agree with the motion since the anchor have gone astray on the way.
            astray = link.anchor_rows >= 0
            astray[rows1] = False
            link.track_ids[astray] = -1
        self._anchor = link
        self._status = self._found_status()
        return self._posed(link, matches, num_inliers=len(rows0))

    def _hold(
        self, link: _Link, matches: Matches, base: _Link, motion: PairMotion, rejection: Rejection | None
    ) -> OdometryStep:
        """A frame of which the rotation alone is known, or that stands still: the position is that of the base."""
        is_initializing = self._status is TrackingStatus.INITIALIZING
        if motion.is_still:
            link.T_world_camera, link.covariance = base.T_world_camera, base.covariance
            rejection = Rejection.LOW_PARALLAX if is_initializing else None
        else:
            turned = make_pose(motion.T_0_1[:3, :3], np.zeros(3))
            link.T_world_camera = base.T_world_camera @ turned
            link.covariance = base.covariance.linked(turned, self._covariance_of_rotation(base, len(motion.rows)))
        if not is_initializing:
            self._status = self._found_status()
        covariance = UNKNOWN_TRANSLATION.copy() if is_initializing else None
        return self._posed(
            link,
            matches,
            num_inliers=len(motion.rows),
            rejection=rejection,
            is_stationary=motion.is_still,
            covariance=covariance,
        )

    def _covariance_of_rotation(self, base: _Link, num_matches: int) -> FloatArray:
        """(6, 6): a translation that a rotation hides moves what is seen by no more than a match may be off."""
        threshold = self._two_view.threshold_px / self.camera.focal_px
        known = base.depths.inverse[base.depths.information > 0]
        depth = 1.0 / float(np.median(known)) if len(known) and np.median(known) > 0 else 1.0
        turn = threshold**2 / max(num_matches, 1)
        return np.diag([(depth * threshold) ** 2] * 3 + [turn] * 3)

    @property
    def _noise(self) -> float:
        return _NOISE * self._two_view.threshold_px / self.camera.focal_px

    # --- loss -------------------------------------------------------------------------------------------------------

    def _fail(self, link: _Link, matches: Matches, rejection: Rejection | None) -> OdometryStep:
        if rejection is None:
            raise ValueError("rejection: a frame that failed has one")
        if self._status is TrackingStatus.INITIALIZING:
            return self._restart(link, matches, rejection)
        return self._lose(link, matches, rejection)

    def _lose(self, link: _Link, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        self._num_lost += 1
        if self._num_lost > self._config.max_lost_frames and len(link.seen.keypoints) >= self._config.min_matches:
            return self._restart(link, matches, rejection)
        self._lose_sight()
        return self._unposed(link, matches, rejection)

    def _restart(self, link: _Link, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        """A new segment without a link to the chain so far."""
        self._segment_id += 1
        link.track_ids[:], link.anchor_rows[:], link.lengths[:] = -1, -1, 0
        step = self._begin(link)
        return replace(step, pose=replace(step.pose, rejection=rejection), matches=matches)

    def _found_status(self) -> TrackingStatus:
        return TrackingStatus.RELOCALIZED if self._status is TrackingStatus.LOST else TrackingStatus.TRACKING

    # --- what is reported -------------------------------------------------------------------------------------------

    def _posed(
        self,
        link: _Link,
        matches: Matches | None,
        *,
        num_inliers: int = 0,
        is_keyframe: bool = False,
        is_stationary: bool = False,
        rejection: Rejection | None = None,
        covariance: FloatArray | None = None,
    ) -> OdometryStep:
        """Names the tracks that begin, and makes the frame the one to match the next against."""
        born = np.flatnonzero(link.track_ids < 0)
        link.track_ids[born] = np.arange(self._next_track_id, self._next_track_id + len(born))
        link.lengths[born] = 0
        link.lengths += 1
        self._next_track_id += len(born)
        self._previous, self._num_lost = link, 0
        num_matches, stop_layer = counts(matches)
        pose = PoseEstimate(
            frame_index=link.frame_index,
            timestamp_ns=link.timestamp_ns,
            T_world_camera=link.T_world_camera.copy(),
            status=self._status,
            covariance=link.covariance.of_pose if covariance is None else covariance,
            rejection=rejection,
            num_matches=num_matches,
            stop_layer=stop_layer,
            num_inliers=num_inliers,
            is_keyframe=is_keyframe,
            is_stationary=is_stationary,
            segment_id=self._segment_id,
        )
        return OdometryStep(pose, self._tracks(link), matches)

    def _tracks(self, link: _Link) -> FrameTracks:
        without = np.zeros(len(link.track_ids), np.bool_)
        return FrameTracks(
            link.frame_index, link.timestamp_ns, link.track_ids, link.seen.keypoints, link.lengths, without
        )

    def _unposed(self, link: _Link, matches: Matches | None, rejection: Rejection) -> OdometryStep:
        return self._without_pose(link.frame_index, link.timestamp_ns, rejection, matches)

    def _without_pose(
        self, frame_index: int, timestamp_ns: int, rejection: Rejection, matches: Matches | None
    ) -> OdometryStep:
        return step_without_pose(frame_index, timestamp_ns, rejection, matches, segment_id=self._segment_id)
