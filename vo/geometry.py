"""Pure float64 functions on poses, rays and points: no state, no clock, no image.

`p_a = T_a_b @ p_b`. A "ray" here is a pixel after undistortion, on the plane z = 1 of its camera: (N, 2) float64.
Distances in px are distances on that plane times the focal length, so that thresholds keep their meaning.
Poses are perturbed on the right, T exp(xi), xi = (rho, phi): translation first (Sola et al., "A micro Lie theory for
state estimation in robotics", arXiv 1812.01537, section IV).
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import dposv
from scipy.spatial.transform import Rotation

from vo.config import TwoViewConfig
from vo.types import Camera, CameraModel, FloatArray, Rejection, RelativePose

BoolArray = NDArray[np.bool_]

_METHODS = {"usac_magsac": cv2.USAC_MAGSAC, "usac_accurate": cv2.USAC_ACCURATE, "ransac": cv2.RANSAC}


# --- SE(3) ----------------------------------------------------------------------------------------------------------


def skew(v: FloatArray) -> FloatArray:
    """(..., 3) -> (..., 3, 3) with skew(v) @ w = v x w."""
    matrix = np.zeros((*v.shape[:-1], 3, 3))
    matrix[..., 0, 1], matrix[..., 0, 2], matrix[..., 1, 2] = -v[..., 2], v[..., 1], -v[..., 0]
    matrix[..., 1, 0], matrix[..., 2, 0], matrix[..., 2, 1] = v[..., 2], -v[..., 1], v[..., 0]
    return matrix


def make_pose(R: FloatArray, t: FloatArray) -> FloatArray:
    """(4, 4) from a (3, 3) rotation and a (3,) translation."""
    T = np.zeros((4, 4))
    T[:3, :3], T[:3, 3], T[3, 3] = R, t, 1.0
    return T


def invert_pose(T: FloatArray) -> FloatArray:
    """(..., 4, 4) inverse of rigid transforms: T_a_b -> T_b_a."""
    if T.ndim == 2:
        R = T[:3, :3]
        return make_pose(R.T, -(R.T @ T[:3, 3]))
    inverse = np.zeros_like(T)
    R_transposed = np.swapaxes(T[..., :3, :3], -1, -2)
    inverse[..., :3, :3] = R_transposed
    inverse[..., :3, 3] = -(R_transposed @ T[..., :3, 3, None])[..., 0]
    inverse[..., 3, 3] = 1.0
    return inverse


def transform(T_a_b: FloatArray, points_b: FloatArray) -> FloatArray:
    """(N, 3) points in frame a from points in frame b."""
    moved: FloatArray = points_b @ T_a_b[:3, :3].T + T_a_b[:3, 3]
    return moved


def exp_so3(phi: FloatArray) -> FloatArray:
    """(3,) rotation vector, rad -> (3, 3).

    By way of the quaternion, as SciPy does it, to the same bits but in a tenth of the time: a pose takes dozens.
    """
    x, y, z = phi.tolist()
    angle = math.sqrt(x * x + y * y + z * z)
    if angle <= 1e-3:
        squared = angle * angle
        scale = 0.5 - squared / 48 + squared * squared / 3840
    else:
        scale = math.sin(angle / 2) / angle
    x, y, z, w = scale * x, scale * y, scale * z, math.cos(angle / 2)
    xx, yy, zz, ww = x * x, y * y, z * z, w * w
    xy, xz, yz, xw, yw, zw = x * y, x * z, y * z, x * w, y * w, z * w
    return np.array(
        [
            [xx - yy - zz + ww, 2 * (xy - zw), 2 * (xz + yw)],
            [2 * (xy + zw), -xx + yy - zz + ww, 2 * (yz - xw)],
            [2 * (xz - yw), 2 * (yz + xw), -xx - yy + zz + ww],
        ]
    )


def log_so3(R: FloatArray) -> FloatArray:
    """(..., 3, 3) -> (..., 3) rotation vector, rad."""
    vector: FloatArray = Rotation.from_matrix(R).as_rotvec()
    return vector


def rotation_angle(R: FloatArray) -> float:
    """Angle of a (3, 3) rotation, rad."""
    (a, b, c), (d, e, f), (g, h, i) = R.tolist()
    twice_sine = math.sqrt((h - f) ** 2 + (c - g) ** 2 + (d - b) ** 2)
    return math.atan2(twice_sine, a + e + i - 1.0)


def _left_jacobian(phi: FloatArray) -> FloatArray:
    """Left Jacobian of SO(3), by series near zero (Sola et al., equation 145)."""
    K, (first, second) = skew(phi), _jacobian_factors(float(phi @ phi))
    jacobian: FloatArray = np.eye(3) + first * K + second * K @ K
    return jacobian


def _jacobian_factors(angle_squared: float) -> tuple[float, float]:
    if angle_squared < 1e-8:
        return 1 / 2, 1 / 6
    angle = math.sqrt(angle_squared)
    return (1 - math.cos(angle)) / angle_squared, (angle - math.sin(angle)) / (angle_squared * angle)


def exp_se3(xi: FloatArray) -> FloatArray:
    """(6,) twist (rho, phi) -> (4, 4). Number by number, for the same reason as `exp_so3`."""
    rx, ry, rz, x, y, z = xi.tolist()
    first, second = _jacobian_factors(x * x + y * y + z * z)
    cx, cy, cz = y * rz - z * ry, z * rx - x * rz, x * ry - y * rx
    T = np.zeros((4, 4))
    T[:3, :3], T[3, 3] = exp_so3(xi[3:]), 1.0
    T[0, 3] = rx + first * cx + second * (y * cz - z * cy)
    T[1, 3] = ry + first * cy + second * (z * cx - x * cz)
    T[2, 3] = rz + first * cz + second * (x * cy - y * cx)
    return T


def log_se3(T: FloatArray) -> FloatArray:
    """(4, 4) -> (6,) twist (rho, phi)."""
    phi = log_so3(T[:3, :3])
    return np.concatenate([np.linalg.solve(_left_jacobian(phi), T[:3, 3]), phi])


def orthonormalized(T: FloatArray) -> FloatArray:
    """(4, 4) with the rotation projected back to SO(3), against rounding after many products."""
    U, _, Vt = np.linalg.svd(T[:3, :3])
    R = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
    return make_pose(R, T[:3, 3])


def solve_symmetric(H: FloatArray, gradient: FloatArray) -> FloatArray:
    """H^-1 gradient for a symmetric H: by Cholesky, by least squares where it is hardly positive definite."""
    if not len(gradient):
        return np.zeros(gradient.shape)  # all cameras are fixed: only points are refined
    factor, solution, failed_at = dposv(H, gradient)
    # Rounding makes pivots out of nothing where a direction is not seen: steps along it would be anything.
    pivots = factor.diagonal()
    if failed_at or pivots.min() < 1e-7 * pivots.max():
        solution = np.linalg.lstsq(H, gradient, rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)


# --- camera ---------------------------------------------------------------------------------------------------------


def undistort(keypoints: NDArray[np.floating], camera: Camera) -> FloatArray:
    """Rays (N, 2) of pixels (N, 2).

    The inverse of a polynomial distortion is found by iteration: to about 1e-6 px inside the image.
    """
    pixels = np.ascontiguousarray(keypoints, dtype=np.float64)
    if camera.model is CameraModel.PINHOLE or len(pixels) == 0:
        return (pixels - camera.K[:2, 2]) / np.diag(camera.K)[:2]
    K = np.ascontiguousarray(camera.K)
    if camera.model is CameraModel.FISHEYE:
        undistorted = cv2.fisheye.undistortPoints(pixels[:, None], K, np.ascontiguousarray(camera.distortion))
    else:
        criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 40, 1e-10)
        distortion = np.ascontiguousarray(camera.distortion)
        undistorted = cv2.undistortPoints(pixels[:, None], K, distortion, R=np.eye(3), P=np.eye(3), criteria=criteria)
    return np.asarray(undistorted, dtype=np.float64).reshape(-1, 2)


def project(points_camera: FloatArray, camera: Camera) -> FloatArray:
    """Pixels (N, 2) of points (N, 3) in the camera frame, with distortion; NaN behind the camera."""
    pixels = np.full((len(points_camera), 2), np.nan)
    visible = points_camera[:, 2] > 0
    points = np.ascontiguousarray(points_camera[visible])
    if len(points) == 0:
        return pixels
    zero, K = np.zeros(3), np.ascontiguousarray(camera.K)
    if camera.model is CameraModel.FISHEYE:
        projected, _ = cv2.fisheye.projectPoints(points[:, None], zero, zero, K, camera.distortion)
    else:
        projected, _ = cv2.projectPoints(points, zero, zero, K, np.ascontiguousarray(camera.distortion))
    pixels[visible] = np.asarray(projected).reshape(-1, 2)
    return pixels


def homogeneous(rays: FloatArray) -> FloatArray:
    """(N, 2) -> (N, 3) with z = 1."""
    return np.concatenate([rays, np.ones((len(rays), 1))], axis=1)


# --- two views ------------------------------------------------------------------------------------------------------


def essential_matrix(T_camera0_camera1: FloatArray) -> FloatArray:
    """E with ray0^T E ray1 = 0."""
    E: FloatArray = skew(T_camera0_camera1[:3, 3]) @ T_camera0_camera1[:3, :3]
    return E


def sampson_distance(E: FloatArray, rays0: FloatArray, rays1: FloatArray) -> FloatArray:
    """Signed first-order distance (N,) of each match to the epipolar constraint, on the plane z = 1.

    Hartley and Zisserman, Multiple View Geometry, 2nd edition, equation 11.9.
    """
    residual, gradient = _epipolar_residual(E, homogeneous(rays0), homogeneous(rays1))
    distance: FloatArray = residual / gradient
    return distance


def _epipolar_residual(E: FloatArray, x0: FloatArray, x1: FloatArray) -> tuple[FloatArray, FloatArray]:
    """x0^T E x1 and the length of its gradient by the four ray coordinates; x0 and x1 are (N, 3)."""
    lines0, lines1 = x1 @ E.T, x0 @ E
    residual = np.einsum("ni,ni->n", x0, lines0)
    gradient = np.sqrt((lines0[:, :2] ** 2).sum(1) + (lines1[:, :2] ** 2).sum(1))
    return residual, np.maximum(gradient, 1e-12)


def parallax(rays0: FloatArray, rays1: FloatArray, R_camera0_camera1: FloatArray) -> FloatArray:
    """Angle (N,) in rad between the two rays of each match once the rotation is removed."""
    return _angles_between(homogeneous(rays0), homogeneous(rays1) @ R_camera0_camera1.T)


def ray_depths(T_camera0_camera1: FloatArray, rays0: FloatArray, rays1: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Depths (z) along both rays where they come closest, (N,) each, in the unit of the translation.

    Solves depth0 x0 - depth1 R x1 = t in least squares; parallel rays give huge values, not an error.
    """
    x0 = homogeneous(rays0)
    x1 = homogeneous(rays1) @ T_camera0_camera1[:3, :3].T
    return _closest_depths(x0, x1, np.broadcast_to(T_camera0_camera1[:3, 3], x0.shape))


def _closest_depths(
    directions0: FloatArray, directions1: FloatArray, baselines: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Least-squares solution of depth0 directions0 - depth1 directions1 = baselines, row by row."""
    a, c = (directions0**2).sum(1), (directions1**2).sum(1)
    b = (directions0 * directions1).sum(1)
    d, e = (directions0 * baselines).sum(1), (directions1 * baselines).sum(1)
    determinant = np.maximum(a * c - b * b, 1e-18)
    return (c * d - b * e) / determinant, (b * d - a * e) / determinant


def _angles_between(directions0: FloatArray, directions1: FloatArray) -> FloatArray:
    x0, y0, z0 = directions0.T
    x1, y1, z1 = directions1.T
    across = (y0 * z1 - z0 * y1) ** 2 + (z0 * x1 - x0 * z1) ** 2 + (x0 * y1 - y0 * x1) ** 2
    angles: FloatArray = np.arctan2(np.sqrt(across), x0 * x1 + y0 * y1 + z0 * z1)
    return angles


def _best_decomposition(E: FloatArray, rays0: FloatArray, rays1: FloatArray) -> tuple[FloatArray, float]:
    """The (4, 4) pose among the four of E that puts most points before both cameras, and their share."""
    R_a, R_b, t = (np.asarray(part, dtype=np.float64) for part in cv2.decomposeEssentialMat(np.ascontiguousarray(E)))
    best, best_share = np.eye(4), -1.0
    for R in (R_a, R_b):
        for sign in (1.0, -1.0):
            T = make_pose(R, sign * t[:, 0])
            depth0, depth1 = ray_depths(T, rays0, rays1)
            share = float(np.mean((depth0 > 0) & (depth1 > 0)))
            if share > best_share:
                best, best_share = T, share
    return best, best_share


def _tangent_basis(direction: FloatArray) -> FloatArray:
    """(3, 2) orthonormal basis of the plane orthogonal to a unit (3,) vector."""
    U, _, _ = np.linalg.svd(direction[:, None])
    basis: FloatArray = U[:, 1:]
    return basis


def refine_relative_pose(
    T_camera0_camera1: FloatArray, rays0: FloatArray, rays1: FloatArray, scale: float, num_iterations: int = 10
) -> tuple[FloatArray, FloatArray]:
    """Minimises the Sampson distance over rotation and direction of translation, with a Geman-McClure kernel.

    `scale` is the kernel's width on the plane z = 1; the kernel forgets what lies far beyond it. Returns the refined
    (4, 4) pose with unit translation, and the (6, 6) covariance of its right perturbation, zero along the translation,
    which matches cannot see.
    """
    x0, x1 = homogeneous(rays0), homogeneous(rays1)
    T = make_pose(T_camera0_camera1[:3, :3], T_camera0_camera1[:3, 3] / np.linalg.norm(T_camera0_camera1[:3, 3]))
    for _ in range(num_iterations):
        jacobian, residual, basis = _sampson_system(T, x0, x1)
        weights = 1.0 / (1.0 + (residual / scale) ** 2) ** 2
        step = -solve_symmetric((jacobian * weights[:, None]).T @ jacobian, jacobian.T @ (weights * residual))
        t = T[:3, 3] + T[:3, :3] @ basis @ step[:2]
        T = make_pose(T[:3, :3] @ exp_so3(step[2:]), t / np.linalg.norm(t))
        if np.linalg.norm(step) < 1e-7:
            break
    jacobian, residual, basis = _sampson_system(T, x0, x1)
    weights = 1.0 / (1.0 + (residual / scale) ** 2) ** 2
    variance = float(np.sum(weights * residual**2) / max(np.sum(weights) - 5.0, 1.0))
    reduced = np.linalg.pinv((jacobian * weights[:, None]).T @ jacobian, hermitian=True) * variance
    expand = np.zeros((6, 5))
    expand[:3, :2], expand[3:, 2:] = basis, np.eye(3)
    return T, expand @ reduced @ expand.T


def _refine_to_noise(
    T: FloatArray, rays0: FloatArray, rays1: FloatArray, threshold: float
) -> tuple[FloatArray, FloatArray]:
    """Refinement with a kernel that shrinks to the noise of the inliers.

    Outliers fill the inlier band evenly, good matches crowd near zero: a kernel as wide as the band would let the
    outliers in it pull, one of about two standard deviations lets the good matches decide.
    """
    covariance = np.zeros((6, 6))
    gate = threshold
    for _ in range(4):
        distance = np.abs(sampson_distance(essential_matrix(T), rays0, rays1))
        if (distance < gate).sum() < 6:
            break
        sigma = max(1.4826 * float(np.median(distance[distance < gate])), 1e-3 * threshold)
        near = distance < 6 * sigma
        T, covariance = refine_relative_pose(T, rays0[near], rays1[near], 2.5 * sigma)
        gate = 3 * sigma
    return T, covariance


def _sampson_system(T: FloatArray, x0: FloatArray, x1: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Jacobian (N, 5) and residual (N,) of the Sampson distance, and the (3, 2) basis of translation steps.

    Steps: two along the basis, in the frame of camera 1, then three of the right rotation.
    """
    R, t = T[:3, :3], T[:3, 3]
    E, basis = essential_matrix(T), _tangent_basis(R.T @ t)
    E_steps = np.concatenate([skew((R @ basis).T) @ R, E @ skew(np.eye(3))])
    residual, gradient = _epipolar_residual(E, x0, x1)
    lines0, lines1 = (x1 @ E.T)[:, :2], (x0 @ E)[:, :2]
    lines0_steps, lines1_steps = x1 @ np.swapaxes(E_steps, 1, 2), x0 @ E_steps
    residual_steps = np.einsum("ni,kni->nk", x0, lines0_steps)
    squared_steps = np.einsum("ni,kni->nk", lines0, lines0_steps[..., :2])
    squared_steps += np.einsum("ni,kni->nk", lines1, lines1_steps[..., :2])
    jacobian = residual_steps / gradient[:, None] - squared_steps * (residual / gradient**3)[:, None]
    return jacobian, residual / gradient, basis


def estimate_relative_pose(
    rays0: FloatArray, rays1: FloatArray, focal_px: float, config: TwoViewConfig
) -> RelativePose | Rejection:
    """Pose of camera 1 in camera 0 from matched rays (M, 2) each: five-point RANSAC, cheirality, refinement.

    Rejects with TOO_FEW_MATCHES, TOO_FEW_INLIERS, LOW_PARALLAX (nothing moved), PURE_ROTATION (the rotation explains
    the matches as well as any translation) or DEGENERATE (no consistent solution). Translation has unit length.
    """
    if len(rays0) < max(config.min_inliers, 6):
        return Rejection.TOO_FEW_MATCHES
    threshold = config.threshold_px / focal_px
    E = _ransac_essential(rays0, rays1, threshold, config)
    if E is None:
        return Rejection.DEGENERATE
    inliers = np.abs(sampson_distance(E, rays0, rays1)) < threshold
    if inliers.sum() < config.min_inliers:
        return Rejection.TOO_FEW_INLIERS
    T, in_front = _best_decomposition(E, rays0[inliers], rays1[inliers])
    T, covariance = _refine_to_noise(T, rays0, rays1, threshold)
    inliers = np.abs(sampson_distance(essential_matrix(T), rays0, rays1)) < threshold
    if inliers.sum() < config.min_inliers:
        return Rejection.TOO_FEW_INLIERS
    no_translation = _explained_by_rotation(rays0, rays1, inliers, threshold)
    if no_translation is not None:
        return no_translation
    if in_front < 0.6:
        return Rejection.DEGENERATE
    angle = float(np.median(parallax(rays0[inliers], rays1[inliers], T[:3, :3])))
    return RelativePose(T, inliers, angle, covariance)


def estimate_first_pose(
    rays0: FloatArray, rays1: FloatArray, focal_px: float, config: TwoViewConfig
) -> RelativePose | Rejection:
    """As `estimate_relative_pose`, and safe where all points lie on one plane: two motions may explain those alike.

    Where a homography fits nearly all that the essential matrix fits, its motions (Faugeras and Lustman 1988, as OpenCV
    solves them) compete with that of the essential matrix; DEGENERATE where two that differ fit equally well.
    """
    essential = estimate_relative_pose(rays0, rays1, focal_px, config)
    if isinstance(essential, Rejection) and essential is not Rejection.DEGENERATE:
        return essential
    threshold = config.threshold_px / focal_px
    num_needed = config.min_inliers
    if isinstance(essential, RelativePose):
        num_needed = max(num_needed, int(0.85 * essential.inliers.sum()))
    planar = [_finished(T, rays0, rays1, threshold) for T in _planar_motions(rays0, rays1, threshold, num_needed)]
    if not planar:
        return essential
    found = [*planar, essential] if isinstance(essential, RelativePose) else planar
    fits = [int(pose.inliers.sum()) for pose in found]
    best = found[int(np.argmax(fits))]
    if best.inliers.sum() < config.min_inliers:
        return Rejection.DEGENERATE
    rivals = [pose for pose, fit in zip(found, fits, strict=True) if fit > 0.97 * max(fits)]
    if any(_differ(best.T_camera0_camera1, rival.T_camera0_camera1) for rival in rivals):
        return Rejection.DEGENERATE
    return best


def _planar_motions(rays0: FloatArray, rays1: FloatArray, threshold: float, num_needed: int) -> list[FloatArray]:
    """The motions (4, 4) that a plane seen by `num_needed` matches allows, with the points before both cameras."""
    # OpenCV's estimator is made for pixels: among rays a few wrong matches lead it astray.
    H, _ = cv2.findHomography(rays0 / threshold, rays1 / threshold, cv2.USAC_MAGSAC, 1.5, maxIters=1000)
    if H is None or not np.isfinite(H).all():
        return []
    unit = np.diag([threshold, threshold, 1.0])
    H = unit @ np.asarray(H, dtype=np.float64) @ np.diag([1 / threshold, 1 / threshold, 1.0])
    moved = homogeneous(rays0) @ H.T
    error = np.linalg.norm(moved[:, :2] / moved[:, 2:] - rays1, axis=1)
    fits = error < 1.5 * threshold
    if fits.sum() < num_needed:
        return []
    _, rotations, translations, _ = cv2.decomposeHomographyMat(H, np.eye(3))
    motions = []
    for R, t in zip(rotations, translations, strict=True):
        length = float(np.linalg.norm(t))
        if length < 1e-6:
            continue
        T = invert_pose(make_pose(np.asarray(R, np.float64), np.asarray(t, np.float64).ravel() / length))
        depth0, depth1 = ray_depths(T, rays0[fits], rays1[fits])
        if np.mean((depth0 > 0) & (depth1 > 0)) > 0.9:
            motions.append(T)
    return motions


def _finished(T: FloatArray, rays0: FloatArray, rays1: FloatArray, threshold: float) -> RelativePose:
    """A motion refined on all matches, with its inliers, parallax and covariance."""
    T, covariance = _refine_to_noise(T, rays0, rays1, threshold)
    inliers = np.abs(sampson_distance(essential_matrix(T), rays0, rays1)) < threshold
    angles = parallax(rays0[inliers], rays1[inliers], T[:3, :3])
    return RelativePose(T, inliers, float(np.median(angles)) if len(angles) else 0.0, covariance)


def _differ(T0: FloatArray, T1: FloatArray) -> bool:
    """Whether two motions with unit translation are not the same: a degree of rotation, or ten of direction, apart."""
    turned = rotation_angle(T0[:3, :3].T @ T1[:3, :3])
    return bool(turned > np.deg2rad(1.0) or float(T0[:3, 3] @ T1[:3, 3]) < np.cos(np.deg2rad(10.0)))


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
        threshold=threshold,
        maxIters=config.max_iterations,
    )
    if E is None or E.shape[0] < 3 or not np.isfinite(E).all():
        return None
    # Several solutions may come stacked: the one with most inliers is meant.
    candidates = [np.array(E[i : i + 3], dtype=np.float64) for i in range(0, E.shape[0] - 2, 3)]
    return max(candidates, key=lambda c: int((np.abs(sampson_distance(c, rays0, rays1)) < threshold).sum()))


def _explained_by_rotation(
    rays0: FloatArray, rays1: FloatArray, inliers: BoolArray, threshold: float
) -> Rejection | None:
    """LOW_PARALLAX or PURE_ROTATION if a rotation alone fits nearly all that the essential matrix fits.

    A rotation leaves a two-dimensional residual, so its gate is wider by sqrt(2) than the line distance's.
    """
    R = fit_rotation(rays0[inliers], rays1[inliers], threshold)
    angles = parallax(rays0[inliers], rays1[inliers], R)
    if np.mean(angles < 1.5 * threshold) < 0.9:
        return None
    still = rotation_angle(R) < threshold
    return Rejection.LOW_PARALLAX if still else Rejection.PURE_ROTATION


def fit_rotation(rays0: FloatArray, rays1: FloatArray, scale: float, num_iterations: int = 8) -> FloatArray:
    """R_camera0_camera1 (3, 3) that aligns the bearings: Kabsch, reweighted with a Cauchy kernel of width `scale`."""
    x0, x1 = homogeneous(rays0), homogeneous(rays1)
    x0 /= np.linalg.norm(x0, axis=1, keepdims=True)
    x1 /= np.linalg.norm(x1, axis=1, keepdims=True)
    weights = np.ones(len(x0))
    R = np.eye(3)
    for _ in range(num_iterations):
        U, _, Vt = np.linalg.svd((x0 * weights[:, None]).T @ x1)
        R = U @ np.diag([1.0, 1.0, np.linalg.det(U @ Vt)]) @ Vt
        weights = 1.0 / (1.0 + (np.linalg.norm(x0 - x1 @ R.T, axis=1) / scale) ** 2)
    return R


# --- landmarks ------------------------------------------------------------------------------------------------------


def triangulate(
    T_world_camera0: FloatArray, T_world_camera1: FloatArray, rays0: FloatArray, rays1: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Points (N, 3) in the world midway between the closest points of two rays, and the angle (N,) rad between them.

    The poses may be (4, 4) or (N, 4, 4), one for each ray. Parallel rays give far points, not an error; a point behind
    a camera is for the caller to find by reprojecting it.
    """
    directions0 = np.einsum("...ij,...j->...i", T_world_camera0[..., :3, :3], homogeneous(rays0))
    directions1 = np.einsum("...ij,...j->...i", T_world_camera1[..., :3, :3], homogeneous(rays1))
    centres0 = np.broadcast_to(T_world_camera0[..., :3, 3], directions0.shape)
    centres1 = np.broadcast_to(T_world_camera1[..., :3, 3], directions1.shape)
    depth0, depth1 = _closest_depths(directions0, directions1, centres1 - centres0)
    points0 = centres0 + directions0 * depth0[:, None]
    points1 = centres1 + directions1 * depth1[:, None]
    return (points0 + points1) / 2, _angles_between(directions0, directions1)


def reproject(T_world_camera: FloatArray, points_world: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Rays (N, 2) and depths (N,) of world points (N, 3); rays are meaningless where the depth is not positive."""
    points = (points_world - T_world_camera[:3, 3]) @ T_world_camera[:3, :3]
    depth = points[:, 2]
    rays: FloatArray = points[:, :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[:, None]
    return rays, depth


def reproject_each(T_world_camera: FloatArray, points_world: FloatArray) -> tuple[FloatArray, FloatArray]:
    """As `reproject`, with a pose (N, 4, 4) for each point."""
    offsets = points_world - T_world_camera[:, :3, 3]
    points = np.einsum("nji,nj->ni", T_world_camera[:, :3, :3], offsets)
    depth = points[:, 2]
    rays: FloatArray = points[:, :2] / np.where(np.abs(depth) < 1e-9, 1e-9, depth)[:, None]
    return rays, depth


def translation_scale(T_camera0_camera1: FloatArray, points_camera0: FloatArray, rays1: FloatArray) -> float | None:
    """Length of the translation of a pose known up to scale, from landmarks (N, 3) in camera 0 seen again in camera 1.

    Each landmark votes with the length that puts it closest to its ray, weighted by how far a unit of translation moves
    it in the image; the weighted median is returned, None if no landmark moves at all.
    """
    x1 = homogeneous(rays1)
    R, t = T_camera0_camera1[:3, :3], T_camera0_camera1[:3, 3]
    fixed = np.cross(x1, points_camera0 @ R)
    moving = np.cross(x1, np.broadcast_to(t @ R, x1.shape))
    leverage = (moving**2).sum(1)
    weights = np.sqrt(leverage) / np.maximum(points_camera0[:, 2], 1e-9)
    usable = (leverage > 1e-12) & (points_camera0[:, 2] > 0)
    if not usable.any():
        return None
    votes = (fixed[usable] * moving[usable]).sum(1) / leverage[usable]
    order = np.argsort(votes, kind="stable")
    cumulative = np.cumsum(weights[usable][order])
    return float(votes[order][np.searchsorted(cumulative, cumulative[-1] / 2)])
