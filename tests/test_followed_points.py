"""Points followed through a matcher of images: how they move, what survives a change of anchors, and a real run."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from frontends.base import Extractor, Features, Matcher, Matches, PairMatcher
from frontends.followed_points import (
    Followed,
    FollowedConfig,
    FollowedFeatures,
    FollowingConfig,
    PointFollower,
    moved_points,
)
from frontends.nearest import Nearest
from vo.config import OdometryConfig, TwoViewConfig
from vo.evaluation import compare
from vo.odometry import Odometry
from vo.sources import open_source
from vo.trajectory import Trajectory, read_trajectory

Points = NDArray[np.float32]
WIDTH, HEIGHT = 320, 240


def paired(points0: Points, points1: Points, size: tuple[int, int], scores: Points | None = None) -> tuple:
    """What a matcher of images returns of corresponding points."""
    count = len(points0)
    scores = np.ones(count, np.float32) if scores is None else scores
    features = [
        Features(torch.from_numpy(np.float32(p)), torch.from_numpy(scores), torch.zeros(count, 0), count, size, "fake")
        for p in (points0, points1)
    ]
    return *features, Matches(np.repeat(np.arange(count)[:, None], 2, axis=1), scores)


def grid(size: tuple[int, int] = (WIDTH, HEIGHT)) -> Points:
    columns, rows = np.meshgrid(np.arange(16, size[0] - 16, 8), np.arange(16, size[1] - 16, 8))
    return np.stack((columns.ravel(), rows.ravel()), axis=1).astype(np.float32)


@dataclass
class PlaneMatcher:
    """Sees a plane from a moving camera: the first pixel of an image is its number, and homographies are known.

    Like LoFTR it begins on a grid of image 0, so that no point found in one image is the start of a match in the next.
    """

    homographies: list[NDArray[np.float64]]
    blind: set[tuple[int, int]] = field(default_factory=set)
    noise_px: float = 0.0
    calls: list[tuple[int, int]] = field(default_factory=list)
    kind: str = "fake"

    def image(self, number: int) -> NDArray[np.uint8]:
        return np.full((HEIGHT, WIDTH), number, np.uint8)

    def moved(self, points: Points, number0: int, number1: int) -> Points:
        H = self.homographies[number1] @ np.linalg.inv(self.homographies[number0])
        return cv2.perspectiveTransform(points[:, None].astype(np.float64), H)[:, 0].astype(np.float32)

    def match_images(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> tuple[Features, Features, Matches]:
        numbers = int(image0[0, 0]), int(image1[0, 0])
        self.calls.append(numbers)
        starts = grid()[: 0 if numbers in self.blind else None]
        if len(starts) == 0:
            return paired(starts, starts, (WIDTH, HEIGHT))
        ends = self.moved(starts, *numbers)
        ends += np.random.default_rng(numbers).normal(0, self.noise_px, ends.shape).astype(np.float32)
        inside = ((ends >= 0) & (ends <= [WIDTH - 1, HEIGHT - 1])).all(axis=1)
        return paired(starts[inside], ends[inside], (WIDTH, HEIGHT))

    def seeds(self, image: NDArray[np.uint8]) -> Points:
        return grid()


def drifting(count: int, step: float = 7.3) -> list[NDArray[np.float64]]:
    """A camera that moves sideways over the plane, turns and comes nearer."""
    found = [np.eye(3)]
    for _ in range(count - 1):
        move = np.array([[1.004, 0.003, -step], [-0.003, 1.004, 0.4], [1e-6, 2e-6, 1.0]])
        found.append(move @ found[-1])
    return found


# ---------------------------------------------------------------- how points move


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_any_plane_of_motion_is_followed_exactly(seed: int) -> None:
    generator = np.random.default_rng(seed)
    A, b = np.eye(2) + generator.normal(0, 0.05, (2, 2)), generator.normal(0, 20, 2)
    starts = (grid() + generator.uniform(-3, 3, grid().shape)).astype(np.float32)
    points = generator.uniform(40, 200, (60, 2)).astype(np.float32)
    moved, nearest = moved_points(points, starts, (starts @ A.T + b).astype(np.float32), FollowingConfig(snap_px=0))
    assert np.isfinite(moved).all()
    np.testing.assert_allclose(moved, points @ A.T + b, atol=0.01)
    distances = np.linalg.norm(points[:, None] - starts, axis=2)
    np.testing.assert_allclose(distances[np.arange(60), nearest], distances.min(axis=1), atol=1e-4)


def test_a_match_at_the_point_carries_it_unchanged() -> None:
    starts = grid()
    ends = starts + np.float32([5.0, -3.0])
    ends[100] += [0.8, 0.9]  # differs from its neighbours, and is believed
    points = starts[[100, 101]] + np.float32([[0.3, 0.4], [0.6, 0.0]])
    moved, nearest = moved_points(points, starts, ends.astype(np.float32), FollowingConfig(snap_px=1.0))
    np.testing.assert_allclose(moved, points + np.float32([[5.8, -2.1], [5.0, -3.0]]), atol=1e-4)
    assert nearest.tolist() == [100, 101]
    moved, _ = moved_points(points, starts, ends.astype(np.float32), FollowingConfig(snap_px=0.45))
    assert abs(moved[0, 0] - points[0, 0] - 5.8) > 0.1


def test_wrong_matches_among_the_neighbours_do_not_pull() -> None:
    starts, generator = grid(), np.random.default_rng(0)
    ends = (starts + np.float32([4.0, 2.0])).astype(np.float32)
    wrong = generator.choice(len(starts), len(starts) // 10, replace=False)
    ends[wrong] += generator.uniform(15, 40, (len(wrong), 2)).astype(np.float32)
    points = generator.uniform(60, 180, (300, 2)).astype(np.float32)
    moved, _ = moved_points(points, starts, ends, FollowingConfig(snap_px=0.0, reach_px=14.0))
    found = np.isfinite(moved).all(axis=1)
    assert found.mean() > 0.7
    assert np.quantile(np.linalg.norm(moved[found] - points[found] - [4.0, 2.0], axis=1), 0.95) < 0.3


def test_points_without_enough_agreeing_matches_have_no_place() -> None:
    starts = grid()
    config = FollowingConfig()
    far = np.float32([[2.0, 2.0], [100.0, 100.0]])
    few = starts[np.linalg.norm(starts - [100, 100], axis=1) < 9][:3]
    assert len(few) == 3
    moved, _ = moved_points(far + 2.1, few, few + np.float32(1), config)
    assert np.isnan(moved).all()
    ends = (starts + np.random.default_rng(0).uniform(-20, 20, starts.shape)).astype(np.float32)
    moved, _ = moved_points(starts + np.float32(4), starts, ends, config)
    assert np.isnan(moved).mean() > 0.95
    nothing = np.zeros((0, 2), np.float32)
    assert np.isnan(moved_points(far, nothing, nothing, config)[0]).all()
    assert moved_points(nothing, starts, starts, config)[0].shape == (0, 2)


def test_a_single_match_snaps_even_alone() -> None:
    start, end = np.float32([[50.0, 60.0]]), np.float32([[55.0, 61.0]])
    moved, _ = moved_points(start, start, end, FollowingConfig())
    np.testing.assert_allclose(moved, end)


# ---------------------------------------------------------------- over many images


def test_points_keep_their_number_and_their_place_over_many_anchors() -> None:
    matcher = PlaneMatcher(drifting(40, step=15.0), noise_px=0.2)
    follower = PointFollower(matcher, FollowingConfig(max_keypoints=800))
    assert isinstance(matcher, PairMatcher) and isinstance(follower, Extractor) and isinstance(Followed(), Matcher)
    born: dict[int, tuple[int, Points]] = {}
    errors, ages, previous = [], [], None
    for number in range(40):
        features = follower.extract(matcher.image(number))
        assert isinstance(features, FollowedFeatures)
        assert features.keypoints.shape == (800, 2) and features.kind == "fake" and features.num_valid > 300
        assert len(np.unique(features.point_ids)) == features.num_valid
        points = features.valid_keypoints()
        assert (points >= 0).all() and (points <= [WIDTH - 1, HEIGHT - 1]).all()
        for point_id, point in zip(features.point_ids.tolist(), points, strict=True):
            first, origin = born.setdefault(point_id, (number, point))
            errors.append(np.linalg.norm(matcher.moved(origin[None], first, number)[0] - point))
            ages.append(number - first)
        if previous is not None:
            matches = Followed().match(previous, features)
            assert len(matches) > 250
            ids = previous.point_ids[matches.indices[:, 0]]
            assert np.array_equal(ids, features.point_ids[matches.indices[:, 1]])
        previous = features
    anchors = {source for source, _ in matcher.calls}
    assert 4 < len(anchors) < 20
    # Each change of anchors adds the error of one match; they do not add up from image to image.
    assert np.quantile(ages, 0.9) > 12 and np.median(errors) < 0.3 and np.quantile(errors, 0.95) < 0.8


def test_snapping_alone_loses_nearly_everything_where_anchors_change() -> None:
    """Why the motion around a point counts too: a grid of 8 px has a node within 1 px of one point in twenty."""
    lives = {}
    for reach_px in (0.0, 12.0):
        matcher = PlaneMatcher(drifting(30))
        follower = PointFollower(matcher, FollowingConfig(max_keypoints=800, reach_px=reach_px))
        counts: dict[int, int] = {}
        for number in range(30):
            for point_id in follower.extract(matcher.image(number)).point_ids.tolist():  # type: ignore[attr-defined]
                counts[point_id] = counts.get(point_id, 0) + 1
        lives[reach_px] = np.mean(list(counts.values()))
    assert lives[12.0] > 1.8 * lives[0.0]


def test_new_points_keep_their_distance_and_fill_the_capacity() -> None:
    matcher = PlaneMatcher(drifting(12, step=30.0))
    follower = PointFollower(matcher, FollowingConfig(max_keypoints=300, spacing_px=6.0))
    for number in range(12):
        features = follower.extract(matcher.image(number))
        points = features.valid_keypoints()
        distances = np.linalg.norm(points[:, None] - points, axis=2) + 1e3 * np.eye(len(points))
        # Followed points may come nearer to each other while the camera moves back; new ones never begin so near.
        assert np.quantile(distances.min(axis=1), 0.02) > 5.0
        assert features.num_valid <= 300
    assert follower.extract(matcher.image(0)).keypoints.shape == (300, 2)


def test_an_anchor_out_of_sight_hands_over_to_the_image_before() -> None:
    matcher = PlaneMatcher(drifting(5), blind={(0, 3)})
    follower = PointFollower(matcher, FollowingConfig())
    features = [follower.extract(matcher.image(number)) for number in range(5)]
    assert (0, 3) in matcher.calls and (2, 3) in matcher.calls and (3, 4) in matcher.calls
    assert all(len(Followed().match(a, b)) > 300 for a, b in pairwise(features))


def test_images_without_any_match_begin_again() -> None:
    blind = {(a, b) for a in range(3) for b in range(3, 6)}
    matcher = PlaneMatcher(drifting(6), blind=blind)
    follower = PointFollower(matcher, FollowingConfig())
    features = [follower.extract(matcher.image(number)) for number in range(6)]
    assert len(Followed().match(features[2], features[3])) == 0
    assert not set(features[2].point_ids) & set(features[3].point_ids)  # type: ignore[attr-defined]
    assert len(Followed().match(features[3], features[5])) > 300


# ---------------------------------------------------------------- matches


def test_images_with_nothing_in_common_are_matched_anew() -> None:
    matcher = PlaneMatcher(drifting(3))
    first, second = (PointFollower(matcher, FollowingConfig()) for _ in range(2))
    features0, features1 = first.extract(matcher.image(0)), second.extract(matcher.image(2))
    assert isinstance(features1, FollowedFeatures)
    object.__setattr__(features1, "point_ids", features1.point_ids + 100_000)
    matcher.calls.clear()
    matches = Followed(FollowedConfig(snap_px=3.0)).match(features0, features1)
    assert matcher.calls == [(0, 2)]
    points0, points1 = (f.valid_keypoints()[matches.indices[:, side]] for side, f in enumerate((features0, features1)))
    errors = np.linalg.norm(matcher.moved(points0, 0, 2) - points1, axis=1)
    assert len(matches) > 20 and errors.max() < 3.1
    assert all(len(np.unique(matches.indices[:, side])) == len(matches) for side in (0, 1))


def test_scores_are_the_lower_of_both_and_rows_are_in_order() -> None:
    matcher = PlaneMatcher(drifting(3))
    follower = PointFollower(matcher, FollowingConfig())
    features0, features1 = (follower.extract(matcher.image(number)) for number in (0, 1))
    matches = Followed().match(features0, features1)
    assert np.array_equal(matches.indices[:, 0], np.sort(matches.indices[:, 0]))
    rows0, rows1 = matches.indices.T
    expected = np.minimum(features0.scores.numpy()[rows0], features1.scores.numpy()[rows1])
    np.testing.assert_array_equal(matches.scores, expected)
    assert (matches.num_kept0, matches.num_kept1) == (features0.num_valid, features1.num_valid)


def test_other_features_are_refused() -> None:
    matcher = PlaneMatcher(drifting(2))
    features = PointFollower(matcher, FollowingConfig()).extract(matcher.image(0))
    other = Features(torch.zeros(4, 2), torch.zeros(4), torch.zeros(4, 8), 4, (9, 9), "orb")
    with pytest.raises(ValueError, match="expected followed points, got fake and orb"):
        Followed().match(features, other)
    with pytest.raises(ValueError, match="cannot be compared"):
        Nearest().match(features, other)


# ---------------------------------------------------------------- a real run


class FlowMatcher:
    """A matcher of real images that needs no weights: OpenCV's dense flow, read on LoFTR's grid, checked both ways."""

    kind = "flow"

    def __init__(self) -> None:
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)

    def match_images(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> tuple[Features, Features, Matches]:
        gray0, gray1 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) for image in (image0, image1))
        size = (gray0.shape[1], gray0.shape[0])
        there, back = self._flow.calc(gray0, gray1, None), self._flow.calc(gray1, gray0, None)
        starts = self.seeds(image0)
        columns, rows = starts.astype(int).T
        ends = starts + there[rows, columns]
        inside = ((ends >= 0) & (ends <= np.array(size) - 1)).all(axis=1)
        starts, ends = starts[inside], ends[inside]
        columns, rows = np.rint(ends).astype(int).T
        agrees = np.linalg.norm(ends + back[rows, columns] - starts, axis=1) < 0.7
        return paired(starts[agrees], ends[agrees], size)

    def seeds(self, image: NDArray[np.uint8]) -> Points:
        gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        points = grid((gray.shape[1], gray.shape[0]))
        columns, rows = points.astype(int).T
        texture = cv2.cornerMinEigenVal(gray, 8)[rows, columns]
        order = np.argsort(-texture, kind="stable")
        return points[order[texture[order] > 1e-4]]


@pytest.mark.slow
def test_the_bundled_clip_through_a_matcher_of_images() -> None:
    source = open_source("demo")
    follower = PointFollower(FlowMatcher(), FollowingConfig(max_keypoints=1024))
    odometry = Odometry(source.camera, OdometryConfig(), TwoViewConfig(), Followed().match)
    poses, times_ns, indices = [], [], []
    for frame in source.frames():
        if frame.index == 60:
            break
        step = odometry.step(frame, follower.extract(frame.image))
        if step.pose.T_world_camera is not None:
            poses.append(step.pose.T_world_camera)
            times_ns.append(frame.timestamp_ns)
            indices.append(frame.index)
    source.close()
    assert source.ground_truth is not None and len(poses) == 60
    trajectory = Trajectory(np.array(times_ns), np.array(poses), "demo", np.array(indices))
    evaluation = compare(trajectory, read_trajectory(source.ground_truth), "sim3").evaluation
    assert evaluation.ate_rmse_m < 0.05 and evaluation.rpe_rot_deg < 0.2
