"""The pose of a frame from the landmarks of its tracks: from the last motion, from two views, from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from frontends.base import Features, Matches
from vo.absolute_pose import AbsolutePose, closest_pose, estimate_absolute_pose, median, refine_absolute_pose
from vo.config import OdometryConfig, TwoViewConfig
from vo.geometry import (
    essential_matrix,
    fit_rotation,
    invert_pose,
    make_pose,
    parallax,
    reproject,
    sampson_distance,
    transform,
    translation_scale,
    translation_votes,
)
from vo.relative_pose import estimate_relative_pose, refined_pose
from vo.tracks import TrackTable, is_among
from vo.types import FloatArray, Rejection, RelativePose
from vo.window import View

IntArray = NDArray[np.int64]
MatchFunction = Callable[[Features, Features], Matches]

# Lengths of a translation that landmarks name agree within this share.
_VOTE_BAND = 0.15
# Share of all matches with a keyframe that must agree with a camera which few landmarks place.
_MIN_CONFIRMING = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Motion:
    """How the camera moved since the previous frame, up to scale: matches (M, 2) that agree, and the relative pose.

    T_previous_current has unit translation, or none where `rejection` says why.
    """

    pairs: IntArray
    T_previous_current: FloatArray
    rejection: Rejection | None


@dataclass(frozen=True, slots=True, eq=False)
class Posed:
    """A frame's pose with the features (N,) that turned out not to belong to their track."""

    pose: AbsolutePose
    num_inliers: int
    wrong_rows: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """Where a lost camera is.

    pose           its inliers are the landmarks that agree.
    matches        with the keyframe it was found by.
    track_ids      (N,) tracks that its features go on with, -1 where they begin one.
    misplaced_ids  tracks whose landmark cannot be where it is.
    """

    pose: AbsolutePose
    matches: Matches
    track_ids: IntArray
    misplaced_ids: IntArray

    @property
    def num_inliers(self) -> int:
        return int(self.pose.inliers.sum())


class Poser:
    """Poses views against the landmarks of a track table, which it reads and never changes."""

    def __init__(
        self, focal_px: float, config: OdometryConfig, two_view: TwoViewConfig, match: MatchFunction, tracks: TrackTable
    ) -> None:
        self._focal_px = focal_px
        self._config = config
        self._two_view = two_view
        self._match = match
        self._tracks = tracks

    def relative_motion(self, view: View, previous: View, matches: Matches) -> Motion:
        """Two-view geometry between the previous frame and this one; sorts out the matches that cannot be right."""
        rows0, rows1 = matches.indices[:, 0], matches.indices[:, 1]
        rays0, rays1 = previous.rays[rows0], view.rays[rows1]
        relative = estimate_relative_pose(rays0, rays1, self._focal_px, self._two_view)
        if isinstance(relative, RelativePose):
            return Motion(matches.indices[relative.inliers], relative.T_camera0_camera1, None)
        threshold = self._two_view.threshold_px / self._focal_px
        R = fit_rotation(rays0, rays1, threshold)
        keep = np.ones(len(rays0), np.bool_)
        if relative in (Rejection.LOW_PARALLAX, Rejection.PURE_ROTATION):
            keep = parallax(rays0, rays1, R) < 3 * threshold
        return Motion(matches.indices[keep], make_pose(R, np.zeros(3)), relative)

    def by_prior(self, view: View, previous: View, matches: Matches, last_motion: FloatArray) -> Posed | None:
        """Refines constant velocity or standing still; None unless a clear majority of the landmarks agrees.

        The pose then judges the matches without a landmark, which saves the essential matrix in most frames.
        """
        points, has_landmark = self._tracks.landmarks(view.track_ids)
        rows = np.flatnonzero(has_landmark)
        if len(rows) < 2 * self._config.min_inliers:
            return None
        points, rays = points[rows], view.rays[rows]
        guesses = [previous.T_world_camera @ last_motion, previous.T_world_camera]
        guess = closest_pose(guesses, points, rays)
        pose = self._refined(guess, points, rays)
        num_inliers = int(pose.inliers.sum())
        if num_inliers < max(2 * self._config.min_inliers, self._config.prior_inlier_ratio * len(rows)):
            return None
        bare = ~has_landmark[matches.indices[:, 1]]
        rows0, rows1 = matches.indices[bare, 0], matches.indices[bare, 1]
        T_previous_current = invert_pose(previous.T_world_camera) @ pose.T_world_camera
        agrees = self._agrees(T_previous_current, previous.rays[rows0], view.rays[rows1])
        return Posed(pose, num_inliers, np.concatenate([rows[~pose.inliers], rows1[~agrees]]))

    def _agrees(self, T_camera0_camera1: FloatArray, rays0: FloatArray, rays1: FloatArray) -> NDArray[np.bool_]:
        """Whether matches (M,) fit a relative pose: near the epipolar line, or where the rotation alone takes them."""
        threshold = 2 * self._two_view.threshold_px / self._focal_px
        agrees = parallax(rays0, rays1, T_camera0_camera1[:3, :3]) < threshold
        if np.linalg.norm(T_camera0_camera1[:3, 3]) > 0:
            agrees |= np.abs(sampson_distance(essential_matrix(T_camera0_camera1), rays0, rays1)) < threshold
        return agrees

    def by_motion(self, view: View, previous: View, motion: Motion, last_motion: FloatArray) -> Posed | Rejection:
        """Refines the best of several guesses; without a good one, poses from scratch."""
        points, has_landmark = self._tracks.landmarks(view.track_ids)
        rows = np.flatnonzero(has_landmark)
        points, rays, focal_px = points[rows], view.rays[rows], self._focal_px
        threshold_px, min_inliers = self._config.pose_threshold_px, self._config.min_inliers
        if len(rows) < min_inliers:
            return Rejection.TOO_FEW_MATCHES
        guesses = self._guesses(previous, motion, last_motion, points, rays)
        guess = closest_pose(guesses, points, rays)
        pose: AbsolutePose | Rejection = self._refined(guess, points, rays)
        if not self._is_good(pose):
            pose = estimate_absolute_pose(points, rays, focal_px, threshold_px, min_inliers)
        if isinstance(pose, Rejection):
            return pose
        if not self._is_good(pose):
            return Rejection.TOO_FEW_INLIERS
        return Posed(pose, int(pose.inliers.sum()), rows[~pose.inliers])

    def _guesses(
        self, previous: View, motion: Motion, last_motion: FloatArray, points: FloatArray, rays: FloatArray
    ) -> list[FloatArray]:
        """Constant velocity, the essential matrix with the landmarks' scale, and the rotation alone."""
        T_world_previous = previous.T_world_camera
        T = motion.T_previous_current
        guesses = [T_world_previous @ last_motion, T_world_previous @ make_pose(T[:3, :3], np.zeros(3))]
        if motion.rejection is None:
            scale = translation_scale(T, transform(invert_pose(T_world_previous), points), rays)
            if scale is not None:
                guesses.append(T_world_previous @ make_pose(T[:3, :3], T[:3, 3] * scale))
        return guesses

    def _refined(self, guess: FloatArray, points: FloatArray, rays: FloatArray) -> AbsolutePose:
        return refine_absolute_pose(guess, points, rays, self._focal_px, self._config.pose_threshold_px)

    def _is_good(self, pose: AbsolutePose | Rejection) -> bool:
        if isinstance(pose, Rejection):
            return False
        num_inliers = int(pose.inliers.sum())
        enough = max(self._config.min_inliers, self._config.min_inlier_ratio * len(pose.inliers))
        return num_inliers >= enough

    def find(self, view: View, keyframes: Iterable[View]) -> Found | None:
        """Looks for a lost camera among keyframes, likely ones first; `view` takes the tracks over of the right one.

        Many landmarks that agree say where it is. A few do where the matches as a whole bear them out: landmarks that
        were far away have depths by which the camera, come nearer, cannot find itself.
        """
        doubtful = []
        for keyframe in keyframes:
            found = self._found_in(keyframe, view)
            if found is not None and found.num_inliers >= 2 * self._config.min_inliers:
                view.track_ids = found.track_ids
                return found
            if found is not None:
                doubtful.append((found, keyframe))
        confirmed = [self._confirmed(found, keyframe, view) for found, keyframe in doubtful]
        best = max(
            (found for found in confirmed if found is not None), key=lambda found: found.num_inliers, default=None
        )
        if best is not None:
            view.track_ids = best.track_ids
            return best
        view.track_ids[:] = -1
        return None

    def _found_in(self, keyframe: View, view: View) -> Found | None:
        """The camera against the landmarks that a keyframe has seen."""
        matches = self._match(keyframe.features, view.features)
        track_ids = np.full(len(view.track_ids), -1, np.int64)
        track_ids[matches.indices[:, 1]] = keyframe.track_ids[matches.indices[:, 0]]
        # Of what an older keyframe saw, only landmarks live on.
        track_ids[~self._tracks.alive(track_ids)] = -1
        points, has_landmark = self._tracks.landmarks(track_ids)
        rows = np.flatnonzero(has_landmark)
        threshold_px, min_inliers = self._config.pose_threshold_px, self._config.min_inliers
        pose = estimate_absolute_pose(points[rows], view.rays[rows], self._focal_px, threshold_px, min_inliers)
        if isinstance(pose, Rejection):
            return None
        track_ids[rows[~pose.inliers]] = -1
        return Found(pose, matches, track_ids, np.zeros(0, np.int64))

    def _confirmed(self, found: Found, keyframe: View, view: View) -> Found | None:
        """Where all matches with a keyframe put the camera, from where a few landmarks do; None if they do not agree.

        Rotation and direction are those of the matches; the length of the translation is the one that most landmarks
        name, for those are wrong in their depth above all. Landmarks that the camera does not see where they should be
        are `misplaced`, and can be placed better from here.
        """
        rows0, rows1 = found.matches.indices.T
        T_keyframe_view = invert_pose(keyframe.T_world_camera) @ found.pose.T_world_camera
        if not T_keyframe_view[:3, 3].any():
            return None
        threshold = self._two_view.threshold_px / self._focal_px
        relative = refined_pose(T_keyframe_view, keyframe.rays[rows0], view.rays[rows1], threshold)
        rows0, rows1 = rows0[relative.inliers], rows1[relative.inliers]
        if len(rows0) < max(2 * self._config.min_inliers, _MIN_CONFIRMING * len(found.matches)):
            return None
        ids = keyframe.track_ids[rows0]
        points, has_landmark = self._tracks.landmarks(ids)
        points, rays = points[has_landmark], view.rays[rows1[has_landmark]]
        T = relative.T_camera0_camera1
        votes, _ = translation_votes(T, transform(invert_pose(keyframe.T_world_camera), points), rays)
        length, agrees = _most_named(votes, _VOTE_BAND)
        num_agree = int(np.count_nonzero(agrees))
        if num_agree < max(self._config.min_inliers, len(votes) / 2):
            return None
        T_world_camera = keyframe.T_world_camera @ make_pose(T[:3, :3], T[:3, 3] * length)
        projected, depth = reproject(T_world_camera, points)
        off_px = np.linalg.norm(projected - rays, axis=1) * self._focal_px
        is_misplaced = (depth <= 0) | (off_px > self._config.pose_threshold_px)
        track_ids = np.full(len(view.track_ids), -1, np.int64)
        track_ids[rows1] = ids
        track_ids[~self._tracks.alive(track_ids)] = -1
        sigma = 1.4826 * median(np.abs(votes[agrees] - length)) / num_agree**0.5
        covariance = _sized_covariance(relative.covariance, T, length, sigma)
        pose = AbsolutePose(T_world_camera, covariance, agrees, found.pose.sigma_px)
        return Found(pose, found.matches, track_ids, ids[has_landmark][is_misplaced])

    def reconnect(self, view: View, others: Sequence[View], posed: Posed) -> Posed:
        """Finds tracks again that the previous frame missed, by matching to keyframes, and refines the pose with them.

        A detector does not find every point in every frame; without this a track dies of one miss.
        """
        num_found = sum(self._rejoin(view, keyframe) for keyframe in others)
        if num_found == 0:
            return posed
        points, has_landmark = self._tracks.landmarks(view.track_ids)
        rows = np.flatnonzero(has_landmark)
        pose = self._refined(view.T_world_camera, points[rows], view.rays[rows])
        if not self._is_good(pose):
            return posed
        view.T_world_camera = pose.T_world_camera
        view.track_ids[rows[~pose.inliers]] = -1
        return Posed(pose, int(pose.inliers.sum()), rows[~pose.inliers])

    def _rejoin(self, view: View, keyframe: View) -> int:
        """Extends tracks of the keyframe that `view` has lost, where geometry and landmark agree; returns how many."""
        matches = self._match(keyframe.features, view.features)
        rows0, rows1 = matches.indices[:, 0], matches.indices[:, 1]
        ids = keyframe.track_ids[rows0]
        is_open = (view.track_ids[rows1] < 0) & self._tracks.alive(ids) & ~is_among(ids, view.track_ids)
        rows0, rows1, ids = rows0[is_open], rows1[is_open], ids[is_open]
        if len(ids) == 0:
            return 0
        focal_px = self._focal_px
        E = essential_matrix(invert_pose(keyframe.T_world_camera) @ view.T_world_camera)
        off_line_px = np.abs(sampson_distance(E, keyframe.rays[rows0], view.rays[rows1])) * focal_px
        points, has_landmark = self._tracks.landmarks(ids)
        projected, depth = reproject(view.T_world_camera, points)
        off_point_px = np.linalg.norm(projected - view.rays[rows1], axis=1) * focal_px
        agrees = np.where(
            has_landmark,
            (off_point_px < self._config.pose_threshold_px) & (depth > 0),
            off_line_px < 1.5 * self._two_view.threshold_px,
        )
        view.track_ids[rows1[agrees]] = ids[agrees]
        return int(agrees.sum())


def _most_named(votes: FloatArray, band: float) -> tuple[float, NDArray[np.bool_]]:
    """The median of the votes (N,) around the one that most others come close to, by a share of it; and those (N,)."""
    ordered = np.sort(votes[votes > 0])
    if len(ordered) == 0:
        return 0.0, np.zeros(len(votes), np.bool_)
    first = np.searchsorted(ordered, ordered * (1 - band))
    end = np.searchsorted(ordered, ordered * (1 + band), side="right")
    best = int(np.argmax(end - first))
    length = median(ordered[first[best] : end[best]])
    return length, np.abs(votes - length) < band * length


def _sized_covariance(covariance: FloatArray, T_0_1: FloatArray, length: float, sigma: float) -> FloatArray:
    """Covariance (6, 6) of a pose with unit translation once that has a length with a standard deviation."""
    units = np.array([length, length, length, 1.0, 1.0, 1.0])
    along = np.append(T_0_1[:3, 3] @ T_0_1[:3, :3], np.zeros(3))
    return covariance * np.outer(units, units) + sigma**2 * np.outer(along, along)
