"""The bundled clip: does the renderer do what geometry says, and do clip, times, camera and ground truth agree."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from vo.sources.cameras import read_camera
from vo.types import Camera

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "datasets" / "sample"
sys.path.insert(0, str(ROOT / "tools"))

import make_sample  # noqa: E402
from sample_geometry import Blocker, Cylinder, Lamp, Rectangle, Sphere, Surface, lit  # noqa: E402
from sample_path import camera_poses  # noqa: E402
from sample_render import Scene, View, build_scene, depth_map, render, trace  # noqa: E402

FloatArray = NDArray[np.float64]
IDENTITY = np.eye(4)


@pytest.fixture(scope="module")
def room() -> Scene:
    cv2.setNumThreads(1)
    return make_sample.sample_scene(make_sample.SEED)


@pytest.fixture(scope="module")
def clip() -> list[NDArray[np.uint8]]:
    """Every frame of the committed clip, RGB."""
    capture = cv2.VideoCapture(str(SAMPLE / "clip.mp4"))
    frames = []
    while True:
        ok, image = capture.read()
        if not ok:
            return frames
        frames.append(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))


@pytest.fixture(scope="module")
def ground_truth() -> tuple[FloatArray, FloatArray]:
    """Times (N,) s and T_world_camera (N, 4, 4) as another program would read them from groundtruth.txt."""
    rows = np.loadtxt(SAMPLE / "groundtruth.txt")
    poses = np.tile(np.eye(4), (len(rows), 1, 1))
    poses[:, :3, :3] = Rotation.from_quat(rows[:, 4:]).as_matrix()
    poses[:, :3, 3] = rows[:, 1:4]
    return rows[:, 0], poses


def coordinate_texture(rows: int, columns: int) -> NDArray[np.float32]:
    """A texture whose red is u and whose green is v: what is seen says where it was looked up."""
    v, u = np.mgrid[0:rows, 0:columns].astype(np.float32)
    return np.stack(((u + 0.5) / columns, (v + 0.5) / rows, np.ones_like(u)), axis=-1)


def unprojected(camera: Camera, pose: FloatArray, depth: NDArray[np.float32]) -> FloatArray:
    """(H, W, 3) m in the world, from the pinhole model alone."""
    x, y = np.meshgrid(np.arange(camera.width), np.arange(camera.height))
    rays = np.stack(
        ((x - camera.K[0, 2]) / camera.K[0, 0], (y - camera.K[1, 2]) / camera.K[1, 1], np.ones(x.shape)), axis=-1
    )
    return (rays * depth[..., None]) @ pose[:3, :3].T + pose[:3, 3]


def small_camera() -> Camera:
    return Camera(80, 60, np.array([[70.0, 0.0, 41.3], [0.0, 70.0, 28.6], [0.0, 0.0, 1.0]]))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31 - 1))
def test_rectangle_seen_at_an_angle_shows_the_texture_of_the_point_on_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pose = IDENTITY.copy()
    pose[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    pose[:3, 3] = rng.normal(size=3)
    middle = pose[:3, :3] @ [rng.uniform(-0.4, 0.4), rng.uniform(-0.3, 0.3), rng.uniform(1.5, 4.0)] + pose[:3, 3]
    axes = pose[:3, :3] @ Rotation.from_rotvec(rng.normal(0.0, 0.6, 3)).as_matrix()
    edge_u, edge_v = axes[:, 0] * rng.uniform(0.5, 3.0), axes[:, 1] * rng.uniform(0.5, 3.0)
    rectangle = Rectangle(middle - (edge_u + edge_v) / 2.0, edge_u, edge_v, coordinate_texture(200, 200))
    scene, camera = build_scene([rectangle]), small_camera()
    depth = depth_map(scene, camera, pose)
    offset = unprojected(camera, pose, depth) - rectangle.origin
    seen = depth > 0.0
    if rectangle.normal @ (pose[:3, 3] - rectangle.origin) <= 0.0:
        assert not seen.any()
        return
    u, v = offset @ edge_u / (edge_u @ edge_u), offset @ edge_v / (edge_v @ edge_v)
    assert seen.any()
    assert np.abs(offset @ rectangle.normal)[seen].max() < 1e-4
    assert ((u > -1e-4) & (u < 1.0 + 1e-4) & (v > -1e-4) & (v < 1.0 + 1e-4))[seen].all()
    image = render(scene, View(camera, pose[None], np.zeros((1, 2))))
    inside = seen & (np.minimum(u, v) > 0.1) & (np.maximum(u, v) < 0.9)
    assert np.abs(image[..., 0] - u)[inside].max(initial=0.0) < 2e-3
    assert np.abs(image[..., 1] - v)[inside].max(initial=0.0) < 2e-3


def test_edges_lie_where_the_pixel_convention_puts_them() -> None:
    # From x = 20.25 to 50.75 px: pixel 20 spans 19.5 to 20.5 and is a quarter covered, pixel 51 likewise.
    camera = Camera(80, 60, np.array([[70.0, 0.0, 40.0], [0.0, 70.0, 30.0], [0.0, 0.0, 1.0]]))
    left, right, top, bottom = (20.25 - 40) / 35, (50.75 - 40) / 35, (10.5 - 30) / 35, (40.5 - 30) / 35
    edge_u, edge_v = np.array([right - left, 0.0, 0.0]), np.array([0.0, bottom - top, 0.0])
    surface = Rectangle(np.array([left, top, 2.0]), edge_u, edge_v, np.ones((50, 50, 3), np.float32))
    grid = (np.arange(16) + 0.5) / 16 - 0.5
    jitter = np.stack(np.meshgrid(grid, grid), axis=-1).reshape(-1, 2)
    image = render(build_scene([surface]), View(camera, np.tile(IDENTITY, (256, 1, 1)), jitter))[..., 0]
    np.testing.assert_allclose(image[25, 19:23], [0.0, 0.25, 1.0, 1.0], atol=0.01)
    np.testing.assert_allclose(image[25, 49:53], [1.0, 1.0, 0.25, 0.0], atol=0.01)
    np.testing.assert_allclose(image[9:13, 30], [0.0, 0.0, 1.0, 1.0], atol=0.01)
    np.testing.assert_allclose(image[39:42, 30], [1.0, 1.0, 0.0], atol=0.01)


def test_sphere_and_cylinder_have_the_shape_and_texture_of_their_formula() -> None:
    camera, pose = small_camera(), IDENTITY.copy()
    # Camera z along world y, camera y along world -z: upright.
    pose[:3, :3] = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])
    ball = Sphere(np.array([-0.4, 2.0, 0.1]), 0.3, coordinate_texture(160, 320))
    can = Cylinder(np.array([0.5, 2.2, -0.4]), 0.25, 0.6, coordinate_texture(160, 320))
    scene = build_scene([ball, can])
    view = View(camera, pose[None], np.zeros((1, 2)))
    surface, points = trace(scene, view).surface[0], unprojected(camera, pose, depth_map(scene, camera, pose))
    image = render(scene, view)
    on_ball, on_can = surface == 0, surface == 1
    assert on_ball.sum() > 200 and on_can.sum() > 150
    radial = points - ball.centre
    np.testing.assert_allclose(np.linalg.norm(radial, axis=-1)[on_ball], ball.radius, atol=1e-5)
    colatitude = np.arccos(np.clip(radial[..., 2] / ball.radius, -1.0, 1.0)) / np.pi
    assert np.abs(image[..., 1] - colatitude)[on_ball & (colatitude > 0.1) & (colatitude < 0.9)].max() < 5e-3
    np.testing.assert_allclose(np.linalg.norm((points - can.base)[on_can][:, :2], axis=1), can.radius, atol=1e-5)
    height = (points - can.base)[..., 2] / can.height
    assert height[on_can].min() > -1e-4 and height[on_can].max() < 1.0 + 1e-4
    assert np.abs(image[..., 1] - (1.0 - height))[on_can & (height > 0.1) & (height < 0.9)].max() < 5e-3
    assert (points[..., 1][on_ball] < ball.centre[1]).all(), "the near side is the one seen"


def facing(x: float, z: float, size: float, value: float) -> Rectangle:
    texture = np.full((40, 40, 3), value, np.float32)
    return Rectangle(np.array([x, -size / 2, z]), np.array([size, 0, 0.0]), np.array([0, size, 0.0]), texture)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_surface_hides_the_farther(order: tuple[int, int]) -> None:
    surfaces = (facing(-1.0, 2.0, 2.0, 0.25), facing(-0.2, 1.5, 0.4, 0.75))
    depth = depth_map(build_scene([surfaces[i] for i in order]), small_camera(), IDENTITY)
    assert depth[28, 41] == pytest.approx(1.5, abs=1e-5)
    assert depth[28, 70] == pytest.approx(2.0, abs=1e-5)


def test_blur_is_the_mean_over_the_exposure() -> None:
    scene, camera = build_scene([facing(-3.0, 2.0, 6.0, 0.0), facing(0.0, 1.9, 0.5, 1.0)]), small_camera()
    poses = np.tile(IDENTITY, (8, 1, 1))
    poses[:, 0, 3] = np.linspace(-0.1, 0.1, 8)
    jitter = np.zeros((8, 2))
    singles = [render(scene, View(camera, poses[k : k + 1], jitter[:1])) for k in range(8)]
    blurred = render(scene, View(camera, poses, jitter))
    np.testing.assert_allclose(blurred[..., 0], np.mean(singles, axis=0)[..., 0], atol=1e-3)
    assert np.ptp(blurred[28, 36:48, 0]) > 0.05 and ((blurred > 0.1) & (blurred < 0.9)).any()


def test_mirror_shows_a_surface_at_its_mirror_image() -> None:
    # A mirror at z = 2 facing the camera; a lit patch behind the camera at z = -1 appears at z = 5.
    glass = Rectangle(
        np.array([-2, -2, 2.0]),
        np.array([4, 0, 0.0]),
        np.array([0, 4, 0.0]),
        np.zeros((9, 9, 3), np.float32),
        gloss=0.5,
    )
    patch = Rectangle(
        np.array([1.0, -0.2, -1.0]), np.array([-0.5, 0, 0.0]), np.array([0, 0.4, 0.0]), np.ones((40, 40, 3), np.float32)
    )
    image = render(build_scene([glass, patch]), View(small_camera(), IDENTITY[None], np.zeros((1, 2))))[..., 0]
    x = 41.3 + 70.0 * np.array([0.5, 1.0]) / 5.0
    expected = (np.arange(80) > x[0]) & (np.arange(80) < x[1])
    np.testing.assert_allclose(image[28], 0.5 * expected, atol=1e-3)


def test_light_falls_off_and_is_blocked() -> None:
    floor: list[Surface] = [
        Rectangle(
            np.array([-2, 2, 0.0]), np.array([4, 0, 0.0]), np.array([0, -4, 0.0]), np.ones((200, 200, 3), np.float32)
        )
    ]
    lamp = Lamp(
        np.array([-0.01, -0.01, 2.0]),
        np.array([0.02, 0, 0]),
        np.array([0, 0.02, 0]),
        np.array([0, 0, -1.0]),
        np.ones(3),
    )
    box = np.array([[-9.0, -9, 0], [9, 9, 9]])
    bright = lit(floor, [], [lamp], box, np.zeros(3))[0].texture[..., 0]
    # A point source over a plane: cos^2 / r^2 with its own and the floor's cosine, height 2 m.
    for row, column in ((100, 100), (100, 160), (30, 60)):
        x, y = (column + 0.5) / 50 - 2, 2 - (row + 0.5) / 50
        assert bright[row, column] == pytest.approx(4.0 / (x * x + y * y + 4.0) ** 2, rel=0.02)

    shadowed = lit(floor, [Blocker(np.array([0, 0, 1.0]), np.array([0.5, 0.5, 0.01]), 0.0)], [lamp], box, np.zeros(3))
    assert shadowed[0].texture[100, 100, 0] == 0.0
    assert shadowed[0].texture[100, 5, 0] == pytest.approx(bright[100, 5], rel=1e-5)


def test_camera_of_half_size_sees_the_image_shrunk() -> None:
    full, half = make_sample.sample_camera(), make_sample.sample_camera(0.5)
    point = np.array([0.3, -0.2, 1.7])
    p_full, p_half = full.K @ point / point[2], half.K @ point / point[2]
    np.testing.assert_allclose((p_full[:2] + 0.5) * 0.5 - 0.5, p_half[:2], atol=1e-12)


@pytest.mark.parametrize("index", [0, 150, 197])
def test_samples_of_an_exposure_are_centred_and_uncorrelated(index: int) -> None:
    poses, jitter = make_sample.sub_exposures(index / 30.0)
    time = np.arange(len(poses)) - (len(poses) - 1) / 2.0
    np.testing.assert_allclose(jitter.mean(axis=0), 0.0, atol=1e-12)
    np.testing.assert_allclose(jitter[:8].T @ time[:8] - jitter[:8].sum(axis=0) * time[:8].mean(), 0.0, atol=1e-12)
    middle = camera_poses(np.array([index / 30.0]), make_sample.SEED)[0]
    np.testing.assert_allclose(poses[:, :3, 3].mean(axis=0), middle[:3, 3], atol=5e-5)


def test_files_agree_in_number_and_time(
    clip: list[NDArray[np.uint8]], ground_truth: tuple[FloatArray, FloatArray]
) -> None:
    times = np.loadtxt(SAMPLE / "times.txt")
    assert len(clip) == len(times) == len(ground_truth[0]) == make_sample.NUM_FRAMES
    capture = cv2.VideoCapture(str(SAMPLE / "clip.mp4"))
    assert int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) == len(clip)
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(30.0)
    np.testing.assert_array_equal(times, ground_truth[0])
    np.testing.assert_allclose(np.diff(times), 1.0 / 30.0, atol=2e-9)
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) < 4_000_000
    camera = read_camera(SAMPLE / "camera.yaml").camera
    assert clip[0].shape == (camera.height, camera.width, 3)
    np.testing.assert_array_equal(camera.K, make_sample.sample_camera().K)
    assert len(camera.distortion) == 0


def test_motion_is_that_of_a_hand_held_camera(ground_truth: tuple[FloatArray, FloatArray]) -> None:
    _, poses = ground_truth
    quaternions = np.loadtxt(SAMPLE / "groundtruth.txt")[:, 4:]
    np.testing.assert_allclose(np.linalg.norm(quaternions, axis=1), 1.0, atol=1e-8)
    steps = np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1)
    turns = Rotation.from_matrix(poses[:-1, :3, :3]).inv() * Rotation.from_matrix(poses[1:, :3, :3])
    rates_deg = np.rad2deg(turns.magnitude()) * 30.0
    assert 3.0 < steps.sum() < 5.0
    assert steps.max() * 30.0 < 0.8 and steps[:20].sum() > 0.12
    assert np.mean(steps[145:170]) * 30.0 < 0.2, "stands nearly still about then"
    assert 45.0 < rates_deg.max() < 90.0
    assert np.abs(np.diff(steps)).max() * 900.0 < 3.0, "no jerk that a hand could not make"


def test_ground_truth_file_is_the_path(ground_truth: tuple[FloatArray, FloatArray]) -> None:
    times, poses = ground_truth
    exact = camera_poses(make_sample.frame_times(len(times)), make_sample.SEED)
    np.testing.assert_allclose(poses, exact, atol=1e-8)


def psnr(image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> float:
    """dB, of the grey images."""
    gray0, gray1 = (cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float) for image in (image0, image1))
    return float(10.0 * np.log10(255.0**2 / np.mean((gray0 - gray1) ** 2)))


@pytest.mark.parametrize("index", [25, 197])
def test_clip_shows_what_the_renderer_makes(room: Scene, clip: list[NDArray[np.uint8]], index: int) -> None:
    image = make_sample.photograph(room, make_sample.sample_camera(), index)
    assert psnr(image, clip[index]) > 35.0
    assert psnr(image, clip[index]) > max(psnr(image, clip[index - 1]), psnr(image, clip[index + 1])) + 3.0


def test_renderer_is_deterministic(room: Scene) -> None:
    camera = make_sample.sample_camera(0.25)
    first, again = (make_sample.photograph(room, camera, 40) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert (make_sample.photograph(room, camera, 41) != first).any()


def local_shifts(gray0: FloatArray, gray1: FloatArray, usable: NDArray[np.bool_], size: int = 24) -> FloatArray:
    """(N, 2) px by which textured patches of image 1 are off image 0: one Lucas-Kanade step per patch."""
    gx, gy = (cv2.Sobel(gray0, cv2.CV_64F, *order, scale=1 / 8) for order in ((1, 0), (0, 1)))
    shifts = []
    for top in range(size, gray0.shape[0] - 2 * size, size):
        for left in range(size, gray0.shape[1] - 2 * size, size):
            patch = np.s_[top : top + size, left : left + size]
            gradient = np.stack((gx[patch].ravel(), gy[patch].ravel()), axis=1)
            if usable[patch].all() and np.linalg.eigvalsh(gradient.T @ gradient)[0] > 6000.0:
                difference = (gray1 - gray0)[patch].ravel()
                # The exposures differ: brightness is no displacement.
                shifts.append(np.linalg.lstsq(gradient, difference - difference.mean(), rcond=None)[0])
    return np.array(shifts)


@pytest.mark.parametrize("pair", [(20, 26), (150, 158), (296, 300)])
def test_depth_and_poses_carry_one_frame_of_the_clip_onto_another(
    room: Scene, clip: list[NDArray[np.uint8]], ground_truth: tuple[FloatArray, FloatArray], pair: tuple[int, int]
) -> None:
    camera = read_camera(SAMPLE / "camera.yaml").camera
    poses = ground_truth[1][list(pair)]
    depth0, depth1 = (depth_map(room, camera, pose) for pose in poses)
    inside1 = np.linalg.inv(poses[1])
    points = unprojected(camera, poses[0], depth0) @ inside1[:3, :3].T + inside1[:3, 3]
    pixels = ((points / points[..., 2:]) @ camera.K.T)[..., :2].astype(np.float32)
    there = cv2.remap(depth1, pixels[..., 0], pixels[..., 1], cv2.INTER_LINEAR)
    visible = np.abs(there - points[..., 2]) < 0.01 * points[..., 2]
    gray0, gray1 = (cv2.cvtColor(clip[k], cv2.COLOR_RGB2GRAY).astype(np.float32) for k in pair)
    carried = cv2.remap(gray1, pixels[..., 0], pixels[..., 1], cv2.INTER_CUBIC)
    usable = cv2.erode(visible.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    shifts = local_shifts(gray0.astype(float), carried.astype(float), usable)
    assert len(shifts) > 30
    assert np.linalg.norm(np.median(shifts, axis=0)) < 0.06
    assert np.median(np.linalg.norm(shifts, axis=1)) < 0.15


def epipolar_distances(
    image0: NDArray[np.uint8], image1: NDArray[np.uint8], K: FloatArray, T_camera1_camera0: FloatArray
) -> FloatArray:
    """(N,) px, mean of the distances to both epipolar lines, of SIFT matches."""
    sift = cv2.SIFT_create(1500)
    (keypoints0, descriptors0), (keypoints1, descriptors1) = (
        sift.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None) for image in (image0, image1)
    )
    pairs = cv2.BFMatcher(cv2.NORM_L2).knnMatch(descriptors0, descriptors1, 2)
    good = [best for best, second in pairs if best.distance < 0.8 * second.distance]
    p0 = np.array([(*keypoints0[match.queryIdx].pt, 1.0) for match in good])
    p1 = np.array([(*keypoints1[match.trainIdx].pt, 1.0) for match in good])
    x, y, z = T_camera1_camera0[:3, 3]
    E = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]]) @ T_camera1_camera0[:3, :3]
    F = np.linalg.inv(K).T @ E @ np.linalg.inv(K)
    lines1, lines0 = p0 @ F.T, p1 @ F
    residual = np.abs((p1 * lines1).sum(axis=1))
    lengths = [np.linalg.norm(lines[:, :2], axis=1) for lines in (lines0, lines1)]
    return np.asarray(0.5 * residual * (1.0 / lengths[0] + 1.0 / lengths[1]))


@pytest.mark.parametrize("pair", [(0, 10), (100, 106), (192, 197), (288, 298)])
def test_matches_obey_the_epipolar_geometry_of_the_ground_truth(
    clip: list[NDArray[np.uint8]], ground_truth: tuple[FloatArray, FloatArray], pair: tuple[int, int]
) -> None:
    poses, K = ground_truth[1], read_camera(SAMPLE / "camera.yaml").camera.K
    relative = np.linalg.inv(poses[pair[1]]) @ poses[pair[0]]
    distances = epipolar_distances(clip[pair[0]], clip[pair[1]], K, relative)
    assert len(distances) > 120
    assert np.median(distances) < 0.4
    assert np.mean(distances < 2.0) > 0.75
    # The check can fail: half a degree of yaw is seen in most matches.
    wrong = relative.copy()
    wrong[:3, :3] = Rotation.from_euler("xyz", (0.5, 0.5, 0.5), degrees=True).as_matrix() @ wrong[:3, :3]
    assert np.median(epipolar_distances(clip[pair[0]], clip[pair[1]], K, wrong)) > 0.8


def test_first_frames_of_the_command_are_those_of_the_clip(
    room: Scene, clip: list[NDArray[np.uint8]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("av", reason="encoding needs PyAV (pip install av)")
    monkeypatch.setattr(make_sample, "sample_scene", lambda seed: room)
    make_sample.make_sample(tmp_path, 2)
    capture = cv2.VideoCapture(str(tmp_path / "clip.mp4"))
    images = [capture.read()[1] for _ in range(2)]
    assert not capture.read()[0]
    assert psnr(cv2.cvtColor(images[1], cv2.COLOR_BGR2RGB), clip[1]) > 35.0
    assert (tmp_path / "camera.yaml").read_text() == (SAMPLE / "camera.yaml").read_text()
    assert len(np.loadtxt(tmp_path / "times.txt")) == len(np.loadtxt(tmp_path / "groundtruth.txt")) == 2


def test_encoding_without_pyav_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SystemExit, match="pip install av"):
        make_sample.write_clip(tmp_path / "clip.mp4", [])
