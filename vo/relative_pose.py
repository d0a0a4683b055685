"""The pose of one camera relative to another, from matched rays alone: RANSAC, cheirality, refinement.

Pure float64 functions like those of `vo.geometry`, whose conventions hold here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from vo.absolute_pose import median
from vo.config import TwoViewConfig
from vo.geometry import (
    BoolArray,
    essential_matrix,
    exp_so3,
    fit_rotation,
    homogeneous,
    make_pose,
    parallax,
    rotation_angle,
    sampson_distance,
    skew,
    solve_symmetric,
)
from vo.kernels import kernels
from vo.types import FloatArray, Rejection, RelativePose

_METHODS = {
    "usac_fast": cv2.USAC_FAST,
    "usac_magsac": cv2.USAC_MAGSAC,
    "usac_accurate": cv2.USAC_ACCURATE,
    "ransac": cv2.RANSAC,
}

# What scores by truncated squares hardly tells a sharp solution from a blunt one in a band as wide as that of inliers,
# which matters where there is little parallax.
_SCORED_WITHIN = {"usac_fast": 0.5}
# Looks at the noise of the inliers, and steps towards the pose, at most. Lengths of steps in standard deviations of the
# pose: after one below the first the noise may be looked at again, one below the second is the last.
_MAX_LOOKS, _MAX_STEPS = 4, 25
_NEAR, _LAST_STEP = 3.0, 0.1
_LIMITS = np.array([_MAX_LOOKS, _MAX_STEPS, _NEAR, _LAST_STEP], np.float64)
# Matches that tell at once that a motion is more than a rotation, and that tell on which side of the cameras the points
# are.
_NUM_IN_HASTE, _NUM_JUDGING = 128, 256
# Derivatives of a rotation by its right perturbation, (3, 3, 3): R skew(e_k).
_TURNS = skew(np.eye(3))


def estimate_relative_pose(
    rays0: FloatArray, rays1: FloatArray, focal_px: float, config: TwoViewConfig
) -> RelativePose | Rejection:
    """Pose of camera 1 in camera 0 from matched rays (M, 2) each: five-point RANSAC, cheirality, refinement.

    Rejects with TOO_FEW_MATCHES, TOO_FEW_INLIERS, LOW_PARALLAX (nothing moved), PURE_ROTATION (the rotation explains
    the matches as well as any translation) or DEGENERATE (no consistent solution). Translation has unit length. The
    same matches give the same pose, on whichever thread: every estimator draws from a generator of its own.
    """
    if len(rays0) < max(config.min_inliers, 6):
        return Rejection.TOO_FEW_MATCHES
    threshold = config.threshold_px / focal_px
    share_turned = 1.0
    if 0.9 * len(rays0) >= config.min_inliers:
        # Where the camera has only turned, or stands, nothing further is worth its time.
        no_translation, share_turned = _explained_by_rotation(rays0, rays1, threshold)
        if no_translation is not None:
            return no_translation
    found = _searched_solution(rays0, rays1, threshold, config)
    if isinstance(found, Rejection):
        return found
    T, inliers = found.T_camera0_camera1, found.inliers
    inliers0, inliers1 = rays0[inliers], rays1[inliers]
    # A rotation that fits too few of all matches may still fit nine of ten inliers, where those are few.
    if share_turned * len(rays0) > 0.8 * len(inliers0) or len(inliers0) < 0.8 * len(rays0):
        no_translation, _ = _explained_by_rotation(inliers0, inliers1, threshold)
        if no_translation is not None:
            return no_translation
    if found.in_front < 0.6:
        return Rejection.DEGENERATE
    return RelativePose(T, inliers, median(parallax(inliers0, inliers1, T[:3, :3])), found.covariance)


@dataclass(frozen=True, slots=True, eq=False)
class _Solution:
    """A refined pose (4, 4) with its covariance (6, 6), inliers (M,), and the share of them before both cameras."""

    T_camera0_camera1: FloatArray
    covariance: FloatArray
    inliers: BoolArray
    in_front: float


def _searched_solution(
    rays0: FloatArray, rays1: FloatArray, threshold: float, config: TwoViewConfig
) -> _Solution | Rejection:
    """By RANSAC, cheirality and refinement; points may turn out to be behind the cameras, which `in_front` tells."""
    E = _ransac_essential(rays0, rays1, threshold, config)
    if E is None:
        return Rejection.DEGENERATE
    matches = _MatchedRays(rays0, rays1)
    inliers = np.abs(matches.seen_with(E).distance) < threshold
    if np.count_nonzero(inliers) < config.min_inliers:
        return Rejection.TOO_FEW_INLIERS
    T, _ = _best_decomposition(E, *matches.some_of(inliers))
    T, covariance, distance = _refine_to_noise(T, matches, threshold)
    inliers = np.abs(distance) < threshold
    if np.count_nonzero(inliers) < config.min_inliers:
        return Rejection.TOO_FEW_INLIERS
    # Where there is little parallax, only the refined matrix tells which side of the cameras the points are on.
    refined, in_front = _best_decomposition(essential_matrix(T), *matches.some_of(inliers))
    if refined[:3, 3] @ T[:3, 3] < 0 or rotation_angle(refined[:3, :3].T @ T[:3, :3]) > 0.1:
        T, covariance, _ = _refine_to_noise(refined, matches, threshold)
    return _Solution(T, covariance, inliers, in_front)


def _some(num: int, num_wanted: int) -> slice:
    """Evenly spread ones of `num`, at least as many as are wanted if there are."""
    return slice(None, None, max(1, num // num_wanted))


def _ransac_essential(
    rays0: FloatArray, rays1: FloatArray, threshold: float, config: TwoViewConfig
) -> FloatArray | None:
    """E with ray0^T E ray1 = 0, or None. Given (1, 0), OpenCV's convention yields that order without an inversion."""
    E, _ = cv2.findEssentialMat(
        np.ascontiguousarray(rays1),
        np.ascontiguousarray(rays0),
        np.eye(3),
        method=_METHODS[config.method],
        prob=config.confidence,
        threshold=threshold * _SCORED_WITHIN.get(config.method, 1.0),
        maxIters=config.max_iterations,
    )
    if E is None or E.shape[0] < 3 or not np.isfinite(E).all():
        return None
    candidates = [np.array(E[i : i + 3], dtype=np.float64) for i in range(0, E.shape[0] - 2, 3)]
    if len(candidates) == 1:
        return candidates[0]
    # Several solutions may come stacked: the one with most inliers is meant.
    return max(candidates, key=lambda c: int((np.abs(sampson_distance(c, rays0, rays1)) < threshold).sum()))


def _best_decomposition(E: FloatArray, x0: FloatArray, x1: FloatArray) -> tuple[FloatArray, float]:
    """The pose among the four of E that puts most points before both cameras, and their share; x0, x1: rows x, y, 1."""
    R_a, R_b, t = (np.asarray(part, dtype=np.float64) for part in cv2.decomposeEssentialMat(np.ascontiguousarray(E)))
    rotations, t = np.stack([R_a, R_b]), t[:, 0]
    counts = _num_in_front(rotations, t, x0, x1).ravel()
    best = int(np.argmax(counts))
    return make_pose(rotations[best // 2], -t if best % 2 else t), float(counts[best]) / x0.shape[1]


def _num_in_front(rotations: FloatArray, t: FloatArray, x0: FloatArray, x1: FloatArray) -> NDArray[np.int64]:
    """(K, 2) points before both cameras with each rotation (K, 3, 3), with t and with -t; x0, x1: rows x, y, 1.

    The depths that solve depth0 x0 - depth1 R x1 = t in least squares have the signs of two cofactors.
    """
    compiled = kernels()
    if compiled is not None:
        return compiled.matches_in_front(rotations, t, x0, x1)
    turned = rotations @ x1  # (K, 3, N)
    a, b, c = (x0 * x0).sum(0), (turned * x0).sum(1), (x1 * x1).sum(0)
    d, e = t @ x0, t @ turned
    sign0, sign1 = c * d - b * e, b * d - a * e
    before, behind = (sign0 > 0) & (sign1 > 0), (sign0 < 0) & (sign1 < 0)
    counts: NDArray[np.int64] = np.count_nonzero(np.stack([before, behind], axis=1), axis=2)
    return counts


def _explained_by_rotation(rays0: FloatArray, rays1: FloatArray, threshold: float) -> tuple[Rejection | None, float]:
    """LOW_PARALLAX or PURE_ROTATION if a rotation alone fits nine of ten matches (M, 2) as well as any translation.

    And the share of matches that it fits. A rotation leaves a two-dimensional residual, so its gate is wider
    by sqrt(2) than the line distance's. One that is fitted to some of the matches in haste, and does not fit even half
    of them, tells that there is none.
    """
    some = _some(len(rays0), _NUM_IN_HASTE)
    R, share = _fit_of_rotation(rays0[some], rays1[some], threshold, 3)
    if share < 0.5:
        return None, share
    R, share = _fit_of_rotation(rays0, rays1, threshold, 4, R)
    if share < 0.9:
        return None, share
    return (Rejection.LOW_PARALLAX if rotation_angle(R) < threshold else Rejection.PURE_ROTATION), share


def _fit_of_rotation(
    rays0: FloatArray, rays1: FloatArray, threshold: float, num_iterations: int, start: FloatArray | None = None
) -> tuple[FloatArray, float]:
    """The rotation, and the share of the matches that it explains."""
    R = fit_rotation(rays0, rays1, threshold, num_iterations, start)
    return R, np.count_nonzero(parallax(rays0, rays1, R) < 1.5 * threshold) / len(rays0)


# --- refinement -----------------------------------------------------------------------------------------------------


def refine_relative_pose(
    T_camera0_camera1: FloatArray, rays0: FloatArray, rays1: FloatArray, scale: float, num_iterations: int = 10
) -> tuple[FloatArray, FloatArray]:
    """Minimises the Sampson distance over rotation and direction of translation, with a Geman-McClure kernel.

    `scale` is the kernel's width on the plane z = 1; the kernel forgets what lies far beyond it. Returns the refined
    (4, 4) pose with unit translation, and the (6, 6) covariance of its right perturbation, zero along the translation,
    which matches cannot see.
    """
    matches, T = _MatchedRays(rays0, rays1), _with_unit_translation(T_camera0_camera1)
    for _ in range(num_iterations):
        system = matches.system(T, matches.seen_with(essential_matrix(T)), scale)
        step = system.step()
        T = system.moved(T, step)
        if np.linalg.norm(step) < 1e-7:
            break
    return T, matches.system(T, matches.seen_with(essential_matrix(T)), scale).covariance()


def _refine_to_noise(
    T: FloatArray, matches: _MatchedRays, threshold: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Refinement with a kernel that shrinks to the noise of the inliers: the pose, its covariance, and distances (M,).

    Outliers fill the inlier band evenly, good matches crowd near zero: a kernel as wide as the band would let the
    outliers in it pull, one of about two standard deviations lets the good matches decide. The kernel shrinks once the
    pose is near what the present one makes of it; when it is settled, so is the pose, up to what its noise would hide.
    """
    T, sigma = matches.refined_to_noise(_with_unit_translation(T), threshold)
    seen = matches.seen_with(essential_matrix(T))
    if sigma == 0.0:
        return T, np.zeros((6, 6)), seen.distance
    system = matches.system(T, seen, 2.5 * sigma, 6 * sigma)
    return T, system.covariance() * system.inefficiency(), seen.distance


def _descended_to_noise(T: FloatArray, matches: _MatchedRays, threshold: float) -> tuple[FloatArray, float]:
    """The pose, and the noise that its kernel ended at; 0 where hardly any match lies within the threshold."""
    gate, sigma, num_looks, is_near, is_settled = threshold, 0.0, 0, True, False
    for _ in range(_MAX_STEPS):
        seen = matches.seen_with(essential_matrix(T))
        if is_near and num_looks < _MAX_LOOKS:
            distance = np.abs(seen.distance)
            inside = distance[distance < gate]
            if len(inside) < 6:
                break
            before, sigma = sigma, max(1.4826 * median(inside), 1e-3 * threshold)
            gate, num_looks = 3 * sigma, num_looks + 1
            is_settled = num_looks == _MAX_LOOKS or abs(sigma - before) < 0.02 * sigma
        system = matches.system(T, seen, 2.5 * sigma, 6 * sigma)
        step = system.step()
        T = system.moved(T, step)
        length = math.sqrt(abs(float(step @ system.gradient))) / sigma
        is_near = length < _NEAR
        if is_settled and length < _LAST_STEP:
            break
    return T, sigma


def _with_unit_translation(T: FloatArray) -> FloatArray:
    return make_pose(T[:3, :3], T[:3, 3] / math.sqrt(float(T[:3, 3] @ T[:3, 3])))


@dataclass(frozen=True, slots=True, eq=False)
class _SeenMatches:
    """Matches under an essential matrix E: signed Sampson distances (M,), one over the length of the gradient (M,), and
    the epipolar lines' normals (4, M): two rows in image 0, two in image 1. `rows`: all, for compiled functions.
    """

    E: FloatArray
    distance: FloatArray
    inverse_gradient: FloatArray
    lines: FloatArray
    rows: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class _RobustSystem:
    """Weighted normal equations of the distances by five steps: two across the translation, three of the rotation.

    basis     (2, 3) unit vectors across the translation, in the frame of camera 1.
    H, gradient   (5, 5), (5,).
    sums      of the weights, of the kernel's own second derivatives, of squared distances times weights and times
              squared weights.
    """

    basis: FloatArray
    H: FloatArray
    gradient: FloatArray
    sums: tuple[float, float, float, float]

    def step(self) -> FloatArray:
        """(5,) towards the minimum.

        Reweighting alone goes too short a way, for the weights it holds fixed fall as it comes nearer: by as much as
        they exceed the second derivatives of the kernel (Huber and Ronchetti, Robust Statistics, 2nd edition, section
        7.8). Twice as far never leads away from a minimum.
        """
        weights, curvatures, _, _ = self.sums
        return -min(weights / curvatures if curvatures > 0 else 2.0, 2.0) * solve_symmetric(self.H, self.gradient)

    def moved(self, T: FloatArray, step: FloatArray) -> FloatArray:
        """T after a step; the translation keeps its unit length."""
        R = T[:3, :3]
        t = T[:3, 3] + R @ (step[:2] @ self.basis)
        return make_pose(R @ exp_so3(step[2:]), t / math.sqrt(float(t @ t)))

    def covariance(self) -> FloatArray:
        """(6, 6) of the right perturbation, from the scatter of what the weights leave."""
        weights, _, squares, _ = self.sums
        reduced = solve_symmetric(self.H, np.eye(5)) * (squares / max(weights - 5.0, 1.0))
        expand = np.zeros((6, 5))
        expand[:3, :2], expand[3:, 2:] = self.basis.T, np.eye(3)
        return expand @ reduced @ expand.T

    def inefficiency(self) -> float:
        """Variance of what the kernel finds over what `covariance` says: it gives away part of what normal noise tells.

        Huber and Ronchetti, section 7.6: the mean square of the influence over the square of its mean slope.
        """
        weights, curvatures, squares, influences = self.sums
        return weights**2 * influences / (squares * curvatures**2) if squares * curvatures > 0 else 1.0


class _MatchedRays:
    """Rays of M matches, laid out for arithmetic on whole rows, which is compiled where that is to be had.

    x0^T E x1 is linear in E with the nine products of coordinates as coefficients, and so are the epipolar lines: one
    small matrix product gives them all, and another the derivatives by five steps of E.
    """

    def __init__(self, rays0: FloatArray, rays1: FloatArray) -> None:
        if rays0.shape != rays1.shape:
            raise ValueError(f"rays0, rays1: expected as many of both, got {rays0.shape}, {rays1.shape}")
        self.x0, self.x1 = (np.ascontiguousarray(homogeneous(rays).T, dtype=np.float64) for rays in (rays0, rays1))
        self._compiled = kernels()
        if self._compiled is None:
            self._products = (self.x0[:, None] * self.x1).reshape(9, -1)
            self._slopes = np.zeros((3, 3, len(rays0)))  # room for `_half_slopes`; the last one stays zero

    def some_of(self, chosen: BoolArray) -> tuple[FloatArray, FloatArray]:
        """(3, N) each: enough of the chosen matches (M,) to judge them by."""
        rows = np.flatnonzero(chosen)
        rows = rows[_some(len(rows), _NUM_JUDGING)]
        return self.x0[:, rows], self.x1[:, rows]

    def refined_to_noise(self, T: FloatArray, threshold: float) -> tuple[FloatArray, float]:
        """`_descended_to_noise`, compiled or not."""
        found = None
        if self._compiled is not None:
            found = self._compiled.matches_refine(T, self.x0, self.x1, threshold, _LIMITS)
        return _descended_to_noise(T, self, threshold) if found is None else found

    def seen_with(self, E: FloatArray) -> _SeenMatches:
        if self._compiled is not None:
            seen = self._compiled.matches_seen(E, self.x0, self.x1)
            return _SeenMatches(E, seen[0], seen[1], seen[2:], seen)
        coefficients = np.zeros((5, 9))
        coefficients[0] = E.ravel()
        coefficients[1:3, 6:] = E[:2]  # (E x1), two rows; the last products are x1 itself
        coefficients[3:, 2::3] = E.T[:2]  # (E^T x0)
        residual_and_lines = coefficients @ self._products
        lines = residual_and_lines[1:]
        inverse_gradient = 1.0 / np.sqrt(np.maximum((lines * lines).sum(0), 1e-24))
        return _SeenMatches(E, residual_and_lines[0] * inverse_gradient, inverse_gradient, lines, residual_and_lines)

    def system(self, T: FloatArray, seen: _SeenMatches, scale: float, cutoff: float = math.inf) -> _RobustSystem:
        """At a pose, for a Geman-McClure kernel of width `scale` that ends at `cutoff`."""
        basis = _tangent_basis(T[:3, 3] @ T[:3, :3])
        steps = _essential_steps(T[:3, :3], seen.E, basis)
        if self._compiled is not None:
            system = self._compiled.matches_system(self.x0, self.x1, steps, seen.rows, scale, cutoff)
            H, gradient, (weights, curvatures, squares, influences) = system[:25], system[25:30], system[30:].tolist()
            return _RobustSystem(basis, H.reshape(5, 5), gradient, (weights, curvatures, squares, influences))
        distance = seen.distance
        root = 1.0 / (1.0 + (distance * (1.0 / scale)) ** 2)  # of the weight
        if cutoff < math.inf:
            root *= np.abs(distance) < cutoff
        weights, weighted = root * root, root * distance
        # Derivatives of distance = residual / gradient by the steps, times the root.
        jacobian = steps @ self._products
        jacobian -= (steps @ self._half_slopes(seen.lines)) * (distance * seen.inverse_gradient)
        jacobian *= root * seen.inverse_gradient
        total, influence = float(weights.sum()), weights * distance
        curvatures = 4.0 * float(weights @ root) - 3.0 * total
        sums = total, curvatures, float(weighted @ weighted), float(influence @ influence)
        return _RobustSystem(basis, jacobian @ jacobian.T, jacobian @ weighted, sums)

    def _half_slopes(self, lines: FloatArray) -> FloatArray:
        """(9, M) half the derivatives of the squared gradients by the entries of E."""
        slopes = self._slopes
        np.multiply(lines[:2, None], self.x1[:2], out=slopes[:2, :2])
        slopes[:2, :2] += lines[2:] * self.x0[:2, None]
        slopes[:2, 2], slopes[2, :2] = lines[:2], lines[2:]
        return slopes.reshape(9, -1)


def _essential_steps(R: FloatArray, E: FloatArray, basis: FloatArray) -> FloatArray:
    """(5, 9) derivatives of E = skew(t) R by steps along the basis (2, 3) and by the right perturbation of R."""
    steps = np.empty((5, 3, 3))
    np.matmul(R, skew(basis), out=steps[:2])
    np.matmul(E, _TURNS, out=steps[2:])
    return steps.reshape(5, 9)


def _tangent_basis(direction: FloatArray) -> FloatArray:
    """(2, 3) orthonormal vectors across a unit (3,) vector.

    Duff et al., "Building an orthonormal basis, revisited", Journal of Computer Graphics Techniques 6 (1), 2017.
    """
    x, y, z = direction.tolist()
    sign = math.copysign(1.0, z)
    a = -1.0 / (sign + z)
    b = x * y * a
    return np.array([[1.0 + sign * x * x * a, sign * b, -sign * x], [b, sign + y * y * a, -y]])


def refined_pose(T: FloatArray, rays0: FloatArray, rays1: FloatArray, threshold: float) -> RelativePose:
    """The pose (4, 4) of camera 1 in camera 0 refined on all matches (M, 2), with its inliers, parallax and covariance.

    The translation of the result has unit length. Whether matches agree is not judged: `inliers` are within `threshold`
    of their epipolar lines, on the plane z = 1.
    """
    T, covariance, distance = _refine_to_noise(T, _MatchedRays(rays0, rays1), threshold)
    inliers = np.abs(distance) < threshold
    angles = parallax(rays0[inliers], rays1[inliers], T[:3, :3])
    return RelativePose(T, inliers, float(np.median(angles)) if len(angles) else 0.0, covariance)
