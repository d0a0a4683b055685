"""What links of a chain hand on: depths, lengths, covariances; against transformed points and numeric derivatives."""

from __future__ import annotations

import numpy as np
import pytest
from two_view_scene import FOCAL_PX, scene

from vo.depth_chain import ChainCovariance, Depths, carried, measured, scale_of
from vo.geometry import exp_se3, homogeneous, invert_pose, log_se3, make_pose, transform, translation_votes

NOISE = 0.5 / FOCAL_PX


def known_scene(num_points: int = 300):
    """T with its length, rays of both frames and true depths of both."""
    T, points, rays0, rays1 = scene(num_points=num_points)
    return T, rays0, rays1, points[:, 2], transform(invert_pose(T), points)[:, 2]


def known_depths(inverse, information):
    return Depths(inverse, information, np.zeros(len(inverse)))


def unit(T):
    return make_pose(T[:3, :3], T[:3, 3] / np.linalg.norm(T[:3, 3]))


def test_depths_go_along_with_the_motion() -> None:
    T, rays0, _, depth0, depth1 = known_scene()
    rows0 = np.random.default_rng(0).permutation(400)[:300]
    rows1 = np.random.default_rng(1).permutation(350)[:300]
    depths = Depths.unknown(400)
    depths.inverse[rows0], depths.information[rows0] = 1 / depth0, 100.0
    moved = carried(depths, rows0, rows1, rays0, T, 350)
    np.testing.assert_allclose(moved.inverse[rows1], 1 / depth1, rtol=1e-9)
    assert np.count_nonzero(moved.information) == 300
    # Information by the numeric derivative of the inverse depth.
    nudged = Depths(depths.inverse * (1 + 1e-6), depths.information, depths.from_here)
    slope = (carried(nudged, rows0, rows1, rays0, T, 350).inverse[rows1] - 1 / depth1) / (1e-6 / depth0)
    np.testing.assert_allclose(moved.information[rows1], 100.0 / slope**2, rtol=1e-4)


def test_what_falls_behind_the_camera_is_unknown() -> None:
    depths = known_depths(np.array([1.0, 0.1, 0.0]), np.array([10.0, 10.0, 0.0]))
    rows = np.arange(3)
    moved = carried(depths, rows, rows, np.zeros((3, 2)), make_pose(np.eye(3), np.array([0.0, 0.0, 2.0])), 3)
    np.testing.assert_allclose(moved.inverse, [0.0, 1 / 8, 0.0])
    assert moved.information[0] == 0 and moved.information[1] > 0 and moved.information[2] == 0


def test_the_length_is_that_of_the_depths() -> None:
    T, rays0, rays1, depth0, _ = known_scene()
    true = np.linalg.norm(T[:3, 3])
    rows = np.arange(300)
    depths = known_depths(1 / depth0, np.full(300, 1e4))
    scale = scale_of(depths, rows, unit(T), rays0, rays1, NOISE)
    assert scale is not None and scale.num_votes == 300
    assert scale.length == pytest.approx(true, rel=1e-9) and scale.sigma < 1e-6
    depths.inverse[:90] *= 1.5  # a third is wrong, all in the same sense
    scale = scale_of(depths, rows, unit(T), rays0, rays1, NOISE)
    assert scale is not None and scale.length == pytest.approx(true, rel=0.05)
    depths.information[:90] = 0.0
    scale = scale_of(depths, rows, unit(T), rays0, rays1, NOISE)
    assert scale is not None and scale.num_votes == 210 and scale.length == pytest.approx(true, rel=1e-9)


def test_no_depth_gives_no_length() -> None:
    T, rays0, rays1, depth0, _ = known_scene()
    rows = np.arange(300)
    assert scale_of(Depths.unknown(300), rows, unit(T), rays0, rays1, NOISE) is None
    backwards = unit(T)
    backwards[:3, 3] *= -1
    assert scale_of(known_depths(1 / depth0, np.ones(300)), rows, backwards, rays0, rays1, NOISE) is None
    on_axis = make_pose(np.eye(3), np.array([0.0, 0.0, 1.0]))
    one = known_depths(np.ones(1), np.ones(1))
    assert scale_of(one, np.zeros(1, np.int64), on_axis, np.zeros((1, 2)), np.zeros((1, 2)), NOISE) is None


def test_the_error_of_a_length_is_as_large_as_it_says() -> None:
    T, rays0, rays1, depth0, _ = known_scene()
    true, found = np.linalg.norm(T[:3, 3]), []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        inverse = 1 / depth0 + rng.normal(0, 0.01, 300)
        noisy = rays1 + rng.normal(0, NOISE, rays1.shape)
        scale = scale_of(known_depths(inverse, np.full(300, 1e4)), np.arange(300), unit(T), rays0, noisy, NOISE)
        assert scale is not None
        found.append((scale.length / true - 1, scale.sigma))
    errors, sigmas = np.array(found).T
    assert 0.7 < np.mean(sigmas) / np.std(errors) < 1.5
    assert abs(np.mean(errors)) < 0.5 * np.std(errors)


def link_of(T, rays0, rays1):
    """Inverse depths in frame 1 and their information, as a pair of frames gives them."""
    inverse, leverage = translation_votes(invert_pose(T), homogeneous(rays1), rays0)
    return inverse, leverage / NOISE**2


def test_measurements_are_weighed_by_their_baseline() -> None:
    T, rays0, rays1, _, depth1 = known_scene()
    rows = np.arange(300)
    inverse, information = link_of(T, rays0, rays1)
    np.testing.assert_allclose(inverse, 1 / depth1)
    once = measured(Depths.unknown(300), rows, inverse, information)
    np.testing.assert_allclose(once.inverse, inverse)
    # Again, a little off, from a baseline of twice the length: the mean of both by their information.
    again = measured(once, rows, inverse + 5e-6, 4 * information)
    np.testing.assert_allclose(again.information, 5 * information)
    np.testing.assert_allclose(again.inverse, inverse + 4e-6)
    np.testing.assert_allclose(again.from_here, np.sqrt(4 * information) / (5 * information))


def test_information_is_that_of_rays_with_noise_and_nothing_is_too_near() -> None:
    """Depths that two noisy views give scatter as their information says, about the true ones."""
    T, rays0, rays1, _, depth1 = known_scene()
    inverses = []
    for seed in range(300):
        noise = np.random.default_rng(seed).normal(0, NOISE / np.sqrt(2), (2, *rays0.shape))
        inverses.append(link_of(T, rays0 + noise[0], rays1 + noise[1])[0])
    sigma, information = np.std(inverses, axis=0), link_of(T, rays0, rays1)[1]
    assert np.median(sigma * np.sqrt(information)) == pytest.approx(1.0, rel=0.25)
    assert abs(np.median((np.mean(inverses, axis=0) - 1 / depth1) / sigma)) < 0.05


def test_a_depth_that_contradicts_the_past_takes_its_place() -> None:
    T, rays0, rays1, _, depth1 = known_scene()
    rows = np.arange(300)
    inverse, information = link_of(T, rays0, rays1)
    past = measured(Depths.unknown(300), rows, inverse, information)
    wrong = inverse.copy()
    wrong[0], wrong[1] = 3.0 * inverse[0] + 100 / np.sqrt(information[0]), -1.0
    now = measured(past, rows, wrong, information)
    assert now.inverse[0] == pytest.approx(wrong[0]) and now.information[0] == past.information[0]
    assert now.inverse[1] == past.inverse[1] and now.information[1] == past.information[1], "behind the camera: nothing"
    assert past.inverse[0] == pytest.approx(1 / depth1[0]), "the past stays as it was"


def test_a_covariance_is_carried_by_the_derivatives_of_the_chain() -> None:
    rng = np.random.default_rng(0)
    T0, T_0_1 = exp_se3(rng.normal(0, 0.5, 6)), exp_se3(rng.normal(0, 0.5, 6))
    half = rng.normal(size=(7, 7))
    before, link, scale_sigma = half @ half.T, np.diag([1.0, 2, 3, 4, 5, 6]) * 0.1, 0.3
    after = ChainCovariance(before).linked(T_0_1, link, scale_sigma)

    def moved(error0, log_scale, error_of_link):
        scaled = make_pose(T_0_1[:3, :3], T_0_1[:3, 3] * np.exp(log_scale))
        T1 = T0 @ exp_se3(error0) @ scaled @ exp_se3(error_of_link)
        return np.append(log_se3(invert_pose(T0 @ T_0_1) @ T1), log_scale)

    def derivative(function, size):
        return np.stack([(function(s) - function(-s)) / 2e-6 for s in 1e-6 * np.eye(size)], axis=1)

    of_state = derivative(lambda s: moved(s[:6], s[6], np.zeros(6)), 7)
    of_link = derivative(lambda s: moved(np.zeros(6), 0.0, s), 6)
    of_scale = derivative(lambda s: moved(np.zeros(6), s[0], np.zeros(6)), 1)
    expected = of_state @ before @ of_state.T + of_link @ link @ of_link.T + scale_sigma**2 * of_scale @ of_scale.T
    np.testing.assert_allclose(after._matrix, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(after.of_pose, expected[:6, :6], rtol=1e-4, atol=1e-6)
    assert not ChainCovariance().of_pose.any()
