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
from scipy.linalg.lapack import dgesdd, dposv
from scipy.spatial.transform import Rotation

from vo.types import Camera, CameraModel, FloatArray

BoolArray = NDArray[np.bool_]


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
    x0, x1 = homogeneous(rays0), homogeneous(rays1)
    lines0, lines1 = x1 @ E.T, x0 @ E
    residual = np.einsum("ni,ni->n", x0, lines0)
    gradient = np.sqrt((lines0[:, :2] ** 2).sum(1) + (lines1[:, :2] ** 2).sum(1))
    distance: FloatArray = residual / np.maximum(gradient, 1e-12)
    return distance


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


def fit_rotation(
    rays0: FloatArray, rays1: FloatArray, scale: float, num_iterations: int = 8, start: FloatArray | None = None
) -> FloatArray:
    """R_camera0_camera1 (3, 3) that aligns the bearings: Kabsch, reweighted with a Cauchy kernel of width `scale`.

    start   (3, 3) gives the first weights; without it they are equal.
    """
    x0, x1 = _bearings(rays0), _bearings(rays1)
    R = start
    for _ in range(num_iterations):
        weighted = x0
        if R is not None:
            off = x0 - R @ x1
            weighted = x0 / (1.0 + (off * off).sum(0) / scale**2)
        R = _closest_rotation(weighted @ x1.T)
    return np.eye(3) if R is None else R


def _closest_rotation(M: FloatArray) -> FloatArray:
    """The rotation R (3, 3) of the largest trace of R^T M; LAPACK at once, for NumPy takes longer to ask it."""
    U, _, Vt, _ = dgesdd(M)
    R: FloatArray = U @ Vt
    (a, b, c), (d, e, f), (g, h, i) = R.tolist()
    if a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g) < 0:
        R -= 2.0 * np.outer(U[:, 2], Vt[2])  # no reflection
    return R


def _bearings(rays: FloatArray) -> FloatArray:
    """(3, N) unit vectors along rays (N, 2)."""
    x = np.ones((3, len(rays)))
    x[:2] = rays.T
    x /= np.sqrt((x * x).sum(0))
    return x


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
    votes, leverage = translation_votes(T_camera0_camera1, points_camera0, rays1)
    weights = np.sqrt(leverage) / np.maximum(points_camera0[:, 2], 1e-9)
    usable = (leverage > 1e-12) & (points_camera0[:, 2] > 0)
    if not usable.any():
        return None
    votes = votes[usable]
    order = np.argsort(votes, kind="stable")
    cumulative = np.cumsum(weights[usable][order])
    return float(votes[order][np.searchsorted(cumulative, cumulative[-1] / 2)])


def translation_votes(
    T_camera0_camera1: FloatArray, points_camera0: FloatArray, rays1: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Lengths (N,) of the translation of a pose that put landmarks (N, 3) of camera 0 closest to their rays (N, 2).

    And the squared distance (N,) by which a unit of length moves each across its ray: a vote with next to none of that
    means nothing.
    """
    R, t = T_camera0_camera1[:3, :3], T_camera0_camera1[:3, 3]
    u, v = rays1.T
    px, py, pz = R.T @ points_camera0.T
    tx, ty, tz = (t @ R).tolist()
    fixed = v * pz - py, px - u * pz, u * py - v * px
    moving = v * tz - ty, tx - u * tz, u * ty - v * tx
    leverage = moving[0] ** 2 + moving[1] ** 2 + moving[2] ** 2
    votes = fixed[0] * moving[0] + fixed[1] * moving[1] + fixed[2] * moving[2]
    return votes / np.maximum(leverage, 1e-300), leverage
