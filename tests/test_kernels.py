"""The compiled geometry against the same formulas in NumPy; how it is built, found and left out."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from two_view_scene import FOCAL_PX, scene, with_outliers

import vo.kernels
from vo.absolute_pose import Landmarks, _descended, refine_absolute_pose
from vo.bundle import optimize_window
from vo.bundle_equations import CompiledSums, NumpySums
from vo.bundle_problem import FocalPrior, RadialPrior, WindowProblem, WindowState
from vo.doctor import State, _check_kernels
from vo.geometry import essential_matrix, exp_se3, exp_so3, make_pose, reproject
from vo.kernels import Kernels, kernels
from vo.relative_pose import (
    _descended_to_noise,
    _essential_steps,
    _MatchedRays,
    _num_in_front,
    _tangent_basis,
    _with_unit_translation,
    estimate_relative_pose,
)

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import build_kernels

needs_kernels = pytest.mark.skipif(kernels() is None, reason=f"no compiled geometry: {vo.kernels.status()}")
USERS = ("vo.relative_pose", "vo.absolute_pose", "vo.bundle_equations")


@pytest.fixture
def compiled() -> Kernels:
    found = kernels()
    assert found is not None
    return found


def numpy_alone(patch: pytest.MonkeyPatch) -> None:
    for user in USERS:
        patch.setattr(f"{user}.kernels", lambda: None)


# --- bundle adjustment ----------------------------------------------------------------------------------------------


def window_problem(
    seed: int, *, num_fixed: int = 1, has_depths: bool = False, lens: tuple[bool, bool] = (False, False)
) -> tuple[WindowProblem, WindowState]:
    """A problem away from its minimum, with outliers, a point that nobody sees and one behind a camera."""
    rng = np.random.default_rng(seed)
    num_poses, num_points = 5, 40
    poses = np.stack([exp_se3(rng.normal(0, [0.3, 0.1, 0.2, 0.03, 0.03, 0.03])) for _ in range(num_poses)])
    points = rng.uniform([-3, -2, 3], [3, 2, 9], (num_points, 3))
    points[-1, 2] = -2.0
    sees = rng.random((num_poses, num_points)) < 0.6
    sees[:, -2], sees[1, -1] = False, True
    pose_index, point_index = np.nonzero(sees)
    rays = np.stack([reproject(poses[i], points[j][None])[0][0] for i, j in zip(pose_index, point_index, strict=True)])
    rays += rng.normal(0, 1.0 / FOCAL_PX, rays.shape) + 0.1 * (rng.random((len(rays), 1)) < 0.1)
    rays[0] += 10.0  # farther off than what any error counts for
    depths = None
    if has_depths:
        depth = np.array(
            [reproject(poses[i], points[j][None])[1][0] for i, j in zip(pose_index, point_index, strict=True)]
        )
        depths = np.where(rng.random(len(rays)) < 0.3, np.nan, 1.0 / depth + rng.normal(0, 0.01, len(rays)))
    problem = WindowProblem(
        poses,
        num_fixed,
        points,
        pose_index.astype(np.int64),
        point_index.astype(np.int64),
        rays,
        FOCAL_PX,
        RadialPrior(0.01, 50.0, 0.2),
        lens[0],
        FocalPrior(0.02, 30.0, 0.3),
        lens[1],
        depths,
        40.0,
    )
    state = WindowState(
        np.stack([T if row < num_fixed else T @ exp_se3(rng.normal(0, 0.02, 6)) for row, T in enumerate(poses)]),
        points + rng.normal(0, 0.05, points.shape),
        0.015 if lens[0] else 0.01,
        0.03 if lens[1] else 0.02,
    )
    return problem, state


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-9) -> None:
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(initial=1e-300))


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_fixed=st.integers(1, 5),
    has_depths=st.booleans(),
    lens=st.tuples(st.booleans(), st.booleans()),
    damping=st.sampled_from([0.0, 1e-9, 1e-4, 1.0, 1e4]),
)
def test_the_compiled_window_is_that_of_numpy(seed, num_fixed, has_depths, lens, damping):
    problem, state = window_problem(seed, num_fixed=num_fixed, has_depths=has_depths, lens=lens)
    ours, theirs = CompiledSums(problem, 1.3, kernels()), NumpySums(problem, 1.3)
    assert ours.cost(state) == pytest.approx(theirs.cost(state), rel=1e-12)
    errors, expected = ours.errors_px(state), theirs.errors_px(state)
    assert np.isinf(expected).any() and (np.isinf(errors) == np.isinf(expected)).all()
    assert_close(errors[np.isfinite(expected)], expected[np.isfinite(expected)], 1e-10)
    found, reference = ours.linearize(state), theirs.linearize(state)
    assert_close(found.cameras, reference.cameras)
    (system, gradient), (true_system, true_gradient) = found.reduced(damping), reference.reduced(damping)
    # A point that two cameras see from nearly one place is known as badly as its inverse is large.
    assert_close(system, true_system, 1e-6)
    assert_close(gradient, true_gradient, 1e-6)
    np.testing.assert_array_equal(system, system.T)
    step = np.random.default_rng(seed).normal(0, 0.01, len(gradient))
    assert_close(found.point_steps(step), reference.point_steps(step), 1e-6)


@needs_kernels
@pytest.mark.parametrize("has_depths", [False, True])
@pytest.mark.parametrize("lens", [(False, False), (True, True)])
def test_a_window_ends_where_numpy_ends(has_depths, lens, monkeypatch):
    problem, state = window_problem(3, num_fixed=2, has_depths=has_depths, lens=lens)
    problem = replace(problem, T_world_camera=state.T, points=state.points)
    ours = optimize_window(problem, 1.3, 12)
    numpy_alone(monkeypatch)
    theirs = optimize_window(problem, 1.3, 12)
    assert ours.num_iterations == theirs.num_iterations and ours.final_cost < 0.8 * ours.initial_cost
    assert ours.final_cost == pytest.approx(theirs.final_cost, rel=1e-9)
    np.testing.assert_allclose(ours.T_world_camera, theirs.T_world_camera, atol=1e-7)
    assert ours.radial.mean == pytest.approx(theirs.radial.mean, abs=1e-7)
    assert ours.radial.information == pytest.approx(theirs.radial.information, rel=1e-5)
    assert ours.focal.information == pytest.approx(theirs.focal.information, rel=1e-5)


# --- two views ------------------------------------------------------------------------------------------------------


def matched(seed: int, num: int, noise_px: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    T, _, rays0, rays1 = scene(seed, num, noise_px=noise_px)
    rng = np.random.default_rng(seed)
    return with_outliers(rays1, 0.2)[0], rays0, _with_unit_translation(T @ exp_se3(rng.normal(0, 0.01, 6)))


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(6, 300), noise_px=st.floats(0.05, 2.0))
def test_compiled_matches_are_those_of_numpy(seed, num, noise_px):
    rays1, rays0, T = matched(seed, num, noise_px)
    ours = _MatchedRays(rays0, rays1)
    with pytest.MonkeyPatch.context() as patch:
        numpy_alone(patch)
        theirs = _MatchedRays(rays0, rays1)
    E = essential_matrix(T)
    seen, expected = ours.seen_with(E), theirs.seen_with(E)
    assert_close(seen.distance, expected.distance)
    assert_close(seen.inverse_gradient, expected.inverse_gradient)
    assert_close(seen.lines, expected.lines)
    scale = 2.0 / FOCAL_PX
    for cutoff in (np.inf, 2.4 * scale):
        found, reference = ours.system(T, seen, scale, cutoff), theirs.system(T, expected, scale, cutoff)
        assert_close(found.H, reference.H)
        assert_close(found.gradient, reference.gradient, 1e-8)
        np.testing.assert_allclose(found.sums, reference.sums, rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(found.basis, _tangent_basis(T[:3, 3] @ T[:3, :3]))


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(40, 300), noise_px=st.floats(0.05, 1.0))
def test_compiled_refinement_ends_where_that_of_numpy_ends(seed, num, noise_px):
    rays1, rays0, T = matched(seed, num, noise_px)
    ours = _MatchedRays(rays0, rays1)
    found, sigma = ours.refined_to_noise(T, 2.0 / FOCAL_PX)
    with pytest.MonkeyPatch.context() as patch:
        numpy_alone(patch)
        expected, true_sigma = _descended_to_noise(T, _MatchedRays(rays0, rays1), 2.0 / FOCAL_PX)
    assert sigma == pytest.approx(true_sigma, rel=1e-6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@needs_kernels
def test_a_refinement_without_a_definite_system_is_left_to_numpy(compiled):
    """Eight copies of one match say next to nothing: least squares takes the shortest step."""
    rays = np.tile([[0.1, 0.2]], (8, 1))
    matches = _MatchedRays(rays, rays)
    T = make_pose(np.eye(3), np.array([1.0, 0.0, 0.0]))
    limits = np.array([4.0, 25.0, 3.0, 0.1])
    assert compiled.matches_refine(T, matches.x0, matches.x1, 0.01, limits) is None
    refined, _ = matches.refined_to_noise(T, 0.01)
    assert np.isfinite(refined).all()


@needs_kernels
def test_hardly_any_match_inside_gives_no_noise(compiled):
    rays1, rays0, T = matched(0, 60, 0.3)
    matches = _MatchedRays(rays0, rays1)
    refined, sigma = compiled.matches_refine(T, matches.x0, matches.x1, 1e-9, np.array([4.0, 25.0, 3.0, 0.1]))
    assert sigma == 0.0
    np.testing.assert_array_equal(refined, T)


@needs_kernels
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num=st.integers(1, 200))
def test_points_in_front_are_counted_alike(seed, num):
    rng = np.random.default_rng(seed)
    x0, x1 = (np.concatenate([rng.normal(0, 0.5, (2, num)), np.ones((1, num))]) for _ in range(2))
    rotations, t = np.stack([exp_so3(rng.normal(0, 1, 3)) for _ in range(2)]), rng.normal(0, 1, 3)
    counts = _num_in_front(rotations, t, x0, x1)
    with pytest.MonkeyPatch.context() as patch:
        numpy_alone(patch)
        np.testing.assert_array_equal(counts, _num_in_front(rotations, t, x0, x1))


@needs_kernels
def test_two_views_have_the_same_pose_both_ways(monkeypatch):
    _, _, rays0, rays1 = scene(5, 300, noise_px=0.5)
    rays1, _ = with_outliers(rays1, 0.3)
    from vo.config import TwoViewConfig

    ours = estimate_relative_pose(rays0, rays1, FOCAL_PX, TwoViewConfig())
    numpy_alone(monkeypatch)
    theirs = estimate_relative_pose(rays0, rays1, FOCAL_PX, TwoViewConfig())
    np.testing.assert_allclose(ours.T_camera0_camera1, theirs.T_camera0_camera1, atol=1e-7)
    np.testing.assert_allclose(ours.covariance, theirs.covariance, rtol=1e-4, atol=1e-12)


# --- landmarks ------------------------------------------------------------------------------------------------------


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num=st.integers(6, 300), num_iterations=st.integers(0, 15))
def test_the_compiled_pose_is_that_of_numpy(seed, num, num_iterations):
    rng = np.random.default_rng(seed)
    T = exp_se3(rng.normal(0, 0.3, 6))
    points = rng.uniform([-4, -3, 2], [4, 3, 12], (num, 3))
    points[0, 2] = -3.0
    rays = reproject(T, points)[0] + rng.normal(0, 0.5 / FOCAL_PX, (num, 2)) + 0.2 * (rng.random((num, 1)) < 0.15)
    start = T @ exp_se3(rng.normal(0, 0.02, 6))
    landmarks = Landmarks(points, rays, FOCAL_PX)
    found = landmarks.refined(start, 1.5, num_iterations)
    expected = _descended(start, landmarks, 1.5, num_iterations)
    # How far a search has come along a valley may differ by what rounding makes of its last steps.
    cost, reference = (landmarks.seen_from(pose).cauchy_cost(1.5) for pose in (found, expected))
    assert cost == pytest.approx(reference, rel=1e-6)
    if num >= 30:
        np.testing.assert_allclose(found, expected, atol=1e-5)


@needs_kernels
def test_landmarks_that_fix_no_pose_are_left_to_numpy(compiled):
    points, rays = np.tile([[0.0, 0.0, 5.0]], (10, 1)), np.zeros((10, 2))
    landmarks = Landmarks(points, rays, FOCAL_PX)
    assert compiled.landmarks_refine(np.eye(4), landmarks._points, landmarks._rays, FOCAL_PX, 1.0, 5) is None
    assert np.isfinite(refine_absolute_pose(np.eye(4), points, rays, FOCAL_PX, 2.0).T_world_camera).all()


# --- the library ----------------------------------------------------------------------------------------------------


@pytest.fixture
def looked_up_anew():
    vo.kernels._loaded.cache_clear()
    yield
    vo.kernels._loaded.cache_clear()


def test_it_can_be_left_out(monkeypatch, looked_up_anew):
    monkeypatch.setenv("LIGHTVO_KERNELS", "off")
    assert kernels() is None
    assert vo.kernels.status() == "numpy: LIGHTVO_KERNELS is off"


def test_without_it_numpy_does_the_same(monkeypatch, tmp_path, looked_up_anew):
    monkeypatch.setattr(vo.kernels, "LIBRARY", tmp_path / "none.so")
    assert kernels() is None
    assert vo.kernels.status() == "numpy: installed without a C compiler"


def test_the_doctor_says_which_it_is(monkeypatch, looked_up_anew):
    monkeypatch.setenv("LIGHTVO_KERNELS", "off")
    check = _check_kernels()
    assert (check.name, check.state, check.is_required) == ("geometry", State.MISSING, False)
    assert "compiler" in check.remedy
    monkeypatch.delenv("LIGHTVO_KERNELS")
    vo.kernels._loaded.cache_clear()
    if kernels() is not None:
        assert _check_kernels().detail == "compiled"


def test_a_damaged_library_is_left_out(monkeypatch, tmp_path, caplog, looked_up_anew):
    monkeypatch.setattr(vo.kernels, "LIBRARY", tmp_path / "damaged.so")
    (tmp_path / "damaged.so").write_bytes(b"no library")
    assert kernels() is None and kernels() is None
    assert vo.kernels.status().startswith("numpy: damaged.so cannot be loaded: ")
    assert len(caplog.records) == 1, "said once"


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_a_library_of_another_source_is_left_out(monkeypatch, tmp_path, caplog, looked_up_anew):
    source, library = tmp_path / "kernels.c", tmp_path / "other.so"
    source.write_bytes(build_kernels.SOURCE.read_bytes() + b"/* changed */\n")
    monkeypatch.setattr(build_kernels, "SOURCE", source)
    assert build_kernels.compile_kernels(library) is None
    monkeypatch.setattr(vo.kernels, "LIBRARY", library)
    assert kernels() is None
    assert vo.kernels.status() == "numpy: other.so is of another version of the source; install again"
    monkeypatch.setattr(vo.kernels, "_SOURCE", source)
    vo.kernels._loaded.cache_clear()
    assert kernels() is not None and vo.kernels.status() == "compiled"


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler"])
def test_without_a_compiler_nothing_old_stays(compiler, tmp_path, monkeypatch):
    library = tmp_path / "library.so"
    library.write_bytes(b"of before")
    monkeypatch.setenv("CC", compiler)
    problem = build_kernels.compile_kernels(library)
    assert problem is not None and compiler in problem and "\n" not in problem
    assert list(tmp_path.iterdir()) == []


def test_what_would_be_read_beyond_an_array_is_refused():
    """NumPy would raise an IndexError or broadcast; compiled loops would read what lies there."""
    problem, _ = window_problem(0)
    with pytest.raises(ValueError, match=r"point_index: expected 0\.\.39, got 0\.\.40"):
        replace(problem, point_index=np.where(np.arange(len(problem.rays)) == 3, 40, problem.point_index))
    with pytest.raises(ValueError, match=r"pose_index: expected 0\.\.4, got -1"):
        replace(problem, pose_index=problem.pose_index - 1)
    with pytest.raises(ValueError, match="expected as many of both"):
        _MatchedRays(np.zeros((4, 2)), np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"got \(4, 3\), \(3, 2\)"):
        Landmarks(np.zeros((4, 3)), np.zeros((3, 2)), 1.0)


def test_landmarks_of_single_precision_are_widened():
    landmarks = Landmarks(np.ones((4, 3), np.float32), np.zeros((4, 2), np.float32), 1.0)
    assert landmarks._points.dtype == landmarks._rays.dtype == np.float64


def test_arrays_that_do_not_lie_in_a_row_are_refused():
    with pytest.raises(ValueError, match="expected a contiguous one"):
        vo.kernels._at(np.zeros((4, 4))[:, :2])
    read_only = np.zeros(3)
    read_only.setflags(write=False)
    assert vo.kernels._at(read_only) == read_only.ctypes.data


def test_steps_of_the_essential_matrix_are_its_derivatives():
    T = exp_se3(np.array([0.5, -0.2, 0.8, 0.1, -0.2, 0.3]))
    T = _with_unit_translation(T)
    basis = _tangent_basis(T[:3, 3] @ T[:3, :3])
    steps = _essential_steps(T[:3, :3], essential_matrix(T), basis)
    for k in range(5):
        xi = np.concatenate([basis[k], np.zeros(3)]) if k < 2 else np.concatenate([np.zeros(3), np.eye(3)[k - 2]])
        change = (essential_matrix(T @ exp_se3(1e-6 * xi)) - essential_matrix(T @ exp_se3(-1e-6 * xi))) / 2e-6
        np.testing.assert_allclose(steps[k].reshape(3, 3), change, atol=1e-8)
