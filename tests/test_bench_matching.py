"""Scores of matches: against hand-made answers, brute force, and drawn scenes whose answers are exact."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.spatial.transform import Rotation
from synthetic_drive import FOCAL_PX, HEIGHT, STEP_M, WIDTH, write_drive

from vo.cli import main
from vo.config import TwoViewConfig
from vo.geometry import essential_matrix, invert_pose, transform
from vo.matching_pairs import HomographyPair, PosedPair, read_hpatches, read_pair_list, read_pairs
from vo.matching_scores import (
    area_under_curve,
    corner_error_px,
    map_points,
    pose_error_deg,
    rays_of,
    score_homography,
    score_posed,
    summarise,
    symmetric_epipolar_distances,
    true_correspondences,
)
from vo.types import SourceError

H = np.array([[1.1, 0.05, -12.0], [-0.02, 0.95, 7.0], [1e-4, -5e-5, 1.0]])
K = np.array([[500.0, 0.0, 320.0], [0.0, 510.0, 240.0], [0.0, 0.0, 1.0]])


def homography_pair(matrix: np.ndarray = H) -> HomographyPair:
    return HomographyPair("v_a/1-2", "viewpoint", Path("1.ppm"), Path("2.ppm"), matrix)


def pose(rotation_deg: float = 10.0) -> np.ndarray:
    T = np.eye(4)
    T[:3, :3] = Rotation.from_rotvec(np.deg2rad(rotation_deg) * np.array([0.0, 0.8, 0.6])).as_matrix()
    T[:3, 3] = (0.6, 0.0, 0.8)
    return T


# --- scores ---------------------------------------------------------------------------------------------------------


def test_a_homography_pair_with_known_answers() -> None:
    """100 true matches, of them 20 moved by 1.9 px and 10 by 4.9 px; 30 keypoints more that are not matched."""
    rng = np.random.default_rng(0)
    keypoints0 = (
        np.stack(np.meshgrid(np.arange(40, 600, 45), np.arange(30, 460, 40)), axis=-1).reshape(-1, 2)[:130] * 1.0
    )
    keypoints1 = map_points(H, keypoints0)
    direction = rng.normal(size=(130, 2))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    keypoints1[:20] += 1.9 * direction[:20]
    keypoints1[20:30] += 4.9 * direction[20:30]
    indices = np.repeat(np.arange(100)[:, None], 2, axis=1)
    score = score_homography(homography_pair(), keypoints0, keypoints1, indices, (640, 480))
    assert score.precision == 0.9 and score.matching_score == 90 / 130
    assert score.recall == 90 / 120, "130 correspond, but for the 10 that were moved too far; 90 of them are matched"
    assert score.mma == pytest.approx((0.7, 0.9, 0.9, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0))
    assert score.error < 0.2, "the homography is found in spite of them"
    nothing = score_homography(homography_pair(), keypoints0, keypoints1, np.zeros((0, 2), np.int64), (640, 480))
    assert (nothing.precision, nothing.recall, nothing.error) == (0.0, 0.0, float("inf"))
    assert nothing.mma == (0.0,) * 10


def test_the_error_of_corners_is_their_mean_distance() -> None:
    rng = np.random.default_rng(1)
    points0 = rng.uniform([0, 0], [640, 480], (60, 2))
    shift = np.array([[1.0, 0.0, 3.0], [0.0, 1.0, 4.0], [0.0, 0.0, 1.0]])
    assert corner_error_px(H, points0, map_points(H, points0), (640, 480)) < 1e-3
    assert corner_error_px(np.eye(3), points0, map_points(shift, points0), (640, 480)) == pytest.approx(5.0, abs=1e-3)
    assert corner_error_px(H, points0[:3], points0[:3], (640, 480)) == float("inf")


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_true_correspondences_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    keypoints0, keypoints1 = rng.uniform(0, 40, (rng.integers(1, 30), 2)), rng.uniform(0, 40, (rng.integers(1, 30), 2))
    mapped = map_points(H, keypoints0)
    distances = np.linalg.norm(mapped[:, None] - keypoints1[None], axis=2)
    expected = [
        (i, j)
        for i in range(len(keypoints0))
        for j in [int(distances[i].argmin())]
        if distances[:, j].argmin() == i and distances[i, j] <= 3.0
    ]
    assert list(map(tuple, true_correspondences(H, keypoints0, keypoints1).tolist())) == expected


def test_points_at_infinity_correspond_to_nothing() -> None:
    vanishing = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, -5.0]])
    points = np.array([[5.0, 1.0], [6.0, 1.0]])
    assert np.isinf(map_points(vanishing, points)[0]).all()
    assert len(true_correspondences(vanishing, points[:1], points)) == 0
    assert len(true_correspondences(vanishing, np.zeros((0, 2)), points)) == 0


def test_a_posed_pair_with_known_answers() -> None:
    rng = np.random.default_rng(2)
    points = rng.uniform([-2, -2, 4], [2, 2, 9], (200, 3))
    T = pose()
    moved = transform(invert_pose(T), points)
    pixels0, pixels1 = ((p / p[:, 2:]) @ K.T for p in (points, moved))
    keypoints0, keypoints1 = pixels0[:, :2], pixels1[:, :2]
    pair = PosedPair("a b", "posed", Path("a"), Path("b"), K, K, T)
    indices = np.repeat(np.arange(160)[:, None], 2, axis=1)
    wrong = np.array([[row, 199 - row] for row in range(40)])
    score = score_posed(pair, keypoints0, keypoints1, np.concatenate([indices, wrong]), TwoViewConfig(), 1e-4)
    rays0, rays1 = rays_of(keypoints0[wrong[:, 0]], K), rays_of(keypoints1[wrong[:, 1]], K)
    num_lucky = int((symmetric_epipolar_distances(essential_matrix(T), rays0, rays1) < 1e-4).sum())
    assert score.precision == (160 + num_lucky) / 200 and num_lucky < 5
    assert score.error < 0.01 and score.recall is None and score.mma == ()
    few = score_posed(pair, keypoints0, keypoints1, indices[:5], TwoViewConfig(), 1e-4)
    assert few.error == float("inf") and few.precision == 1.0


def test_epipolar_distances_and_rays_are_their_formulas() -> None:
    rng = np.random.default_rng(3)
    skewed = K + np.array([[0, 3.0, 0], [0, 0, 0], [0, 0, 0]])
    pixels = rng.uniform(0, 400, (7, 2))
    rays = rays_of(pixels, skewed)
    assert_allclose((np.column_stack([rays, np.ones(7)]) @ skewed.T)[:, :2], pixels, atol=1e-9)
    E, other = essential_matrix(pose()), rng.normal(size=(7, 2))
    for row, distance in enumerate(symmetric_epipolar_distances(E, rays, other)):
        x0, x1 = np.append(rays[row], 1.0), np.append(other[row], 1.0)
        line0, line1 = E @ x1, E.T @ x0
        expected = (x0 @ line0 / np.hypot(*line0[:2])) ** 2 + (x1 @ line1 / np.hypot(*line1[:2])) ** 2
        assert distance == pytest.approx(expected, rel=1e-12)


def test_the_pose_error_is_the_larger_one_and_knows_no_sign() -> None:
    T = pose(10.0)
    turned = T.copy()
    turned[:3, 3] = -turned[:3, 3] * 7.0
    assert pose_error_deg(turned, T) == pytest.approx(0.0, abs=1e-6)
    turned[:3, :3] = pose(14.0)[:3, :3]
    assert pose_error_deg(turned, T) == pytest.approx(4.0)
    turned[:3, 3] = (0.8, 0.0, -0.6)
    assert pose_error_deg(turned, T) == pytest.approx(90.0)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.one_of(st.floats(0.0, 30.0), st.just(float("inf"))), min_size=1, max_size=12),
    st.sampled_from([1.0, 5.0, 20.0]),
)
def test_the_area_against_a_fine_sum(errors: list[float], threshold: float) -> None:
    ordered = sorted(errors)
    knots = [(0.0, 0.0), *((error, (row + 1) / len(errors)) for row, error in enumerate(ordered) if error < threshold)]
    x = np.linspace(0.0, threshold, 200_001)
    y = np.interp(x, [knot[0] for knot in knots], [knot[1] for knot in knots])
    # Where several errors are equal, the curve jumps, and a sum sees the jump only to its own width.
    assert area_under_curve(errors, threshold) == pytest.approx(y.mean(), abs=2e-4)


def test_areas_with_known_answers() -> None:
    assert area_under_curve([0.0, 0.0], 5.0) == pytest.approx(1.0)
    assert area_under_curve([float("inf")] * 3, 5.0) == 0.0
    assert area_under_curve([], 5.0) == 0.0
    # One pair with an error of half the threshold: a triangle up to there, then all.
    assert area_under_curve([2.5], 5.0) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="at least one pair"):
        summarise("all", [], (5.0,))


# --- files ----------------------------------------------------------------------------------------------------------


def scene_image(seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (48, 64), np.uint8)
    gray = cv2.GaussianBlur(cv2.resize(coarse, (320, 240), interpolation=cv2.INTER_NEAREST), (3, 3), 0.8)
    return np.repeat(gray[..., None], 3, axis=2)


def write_hpatches(root: Path) -> Path:
    """i_same: the same image twice. v_moved: shifted by whole pixels, so that corners are the very same ones."""
    for name, shift in (("i_same", (0, 0)), ("v_moved", (24, 16))):
        scene = root / name
        scene.mkdir(parents=True)
        large = np.pad(scene_image(), ((shift[1], 0), (shift[0], 0), (0, 0)), mode="reflect")
        cv2.imwrite(str(scene / "1.ppm"), scene_image())
        for number in (2, 3):
            cv2.imwrite(str(scene / f"{number}.ppm"), large[:240, :320])
            matrix = f"1 0 {shift[0]}\n0 1 {shift[1]}\n0 0 1\n"
            (scene / f"H_1_{number}").write_text(matrix)
    return root


def test_hpatches_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_hpatches(tmp_path / "hpatches")
    result = tmp_path / "result.json"
    assert main(["bench-matching", str(root), "--config", "orb", "--device", "cpu", "--output", str(result)]) == 0
    out = capsys.readouterr().out
    assert "orb + nearest" in out and "MMA @1 " in out and "corners, px" in out
    tree = json.loads(result.read_text())
    same, moved, everything = tree["groups"]
    assert (same["group"], moved["group"], everything["group"]) == ("illumination", "viewpoint", "all")
    # The same image: every keypoint is matched with itself, and all is exact.
    assert same["num_pairs"] == 2 and same["precision"] == same["recall"] == 1.0 and same["mma"] == [1.0] * 10
    assert all(area > 0.999 for _, area in same["auc"])
    assert moved["precision"] > 0.7 and moved["mma"][0] > 0.6 and moved["auc"][1][1] > 0.9
    assert everything["precision"] == pytest.approx((same["precision"] + moved["precision"]) / 2)
    assert main(["bench-matching", str(root), "--config", "orb", "--device", "cpu", "--json", "--max-pairs", "1"]) == 0
    assert len(json.loads(capsys.readouterr().out)["pairs"]) == 1


def pair_line(T_1_0: np.ndarray, *, turns: str = "", short: bool = False) -> str:
    camera = f"{FOCAL_PX} 0 {(WIDTH - 1) / 2} 0 {FOCAL_PX} {(HEIGHT - 1) / 2} 0 0 1"
    motion = [*T_1_0[:3, :3].ravel(), *T_1_0[:3, 3]] if short else T_1_0.ravel().tolist()
    return f"000000.png 000003.png {turns} {camera} {camera} {' '.join(map(str, motion))}\n"


def test_posed_pairs_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_drive(tmp_path, 8) / "image_0"
    T_1_0 = np.eye(4)
    T_1_0[0, 3] = -3 * STEP_M
    (tmp_path / "pairs.txt").write_text("# two\n" + pair_line(T_1_0, turns="0 0") + pair_line(T_1_0, short=True))
    arguments = ["bench-matching", str(tmp_path / "pairs.txt"), "--images", str(images), "--config", "orb"]
    assert main([*arguments, "--device", "cpu", "--json", "--epipolar-threshold", "1e-4"]) == 0
    tree = json.loads(capsys.readouterr().out)
    first, second = tree["pairs"]
    assert {**first, "name": ""} == {**second, "name": ""}, "both ways to write a motion"
    (group,) = tree["groups"]
    assert group["group"] == "posed" and group["recall"] is None and group["num_failed"] == 0
    assert group["precision"] > 0.8 and first["error"] < 5.0
    assert [threshold for threshold, _ in group["auc"]] == [5.0, 10.0, 20.0]
    # Two pairs with the same error e: half of it is lost on the way up, the rest of the curve is whole.
    assert group["auc"][2][1] == pytest.approx(1 - 0.75 * first["error"] / 20.0, abs=1e-9)
    assert main([*arguments, "--device", "cpu"]) == 0
    assert "pose, deg" in capsys.readouterr().out


def test_the_motion_of_a_list_is_camera_1_in_camera_0(tmp_path: Path) -> None:
    images = write_drive(tmp_path, 4) / "image_0"
    T = pose()
    (tmp_path / "pairs.txt").write_text(pair_line(invert_pose(T)))
    (pair,) = read_pair_list(tmp_path / "pairs.txt", images)
    assert_allclose(pair.T_camera0_camera1, T, atol=1e-12)
    assert_array_equal(pair.K0, [[FOCAL_PX, 0, 159.5], [0, FOCAL_PX, 119.5], [0, 0, 1]])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a.png b.png 1 2 3\n", r"pairs\.txt:1: 3 numbers after the names"),
        (pair_line(np.eye(4), turns="1 0"), r"pairs\.txt:1: images turned by 1 and 0 quarters"),
        (pair_line(np.eye(4)).replace("250.0", "wide", 1), r"pairs\.txt:1: could not convert"),
        (pair_line(np.eye(4)).replace("250.0", "nan", 1), r"pairs\.txt:1: expected finite numbers"),
        (pair_line(2 * np.eye(4)), r"pairs\.txt:1: the motion holds no rotation"),
        (pair_line(np.eye(4)), r"000000\.png: not found; name the directory"),
        ("", "holds no pair"),
    ],
)
def test_a_wrong_list_is_named_with_its_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(SourceError, match=complaint):
        read_pairs(tmp_path / "pairs.txt")


def test_a_wrong_hpatches_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected scenes i_"):
        read_hpatches(tmp_path)
    root = write_hpatches(tmp_path / "h")
    assert len(read_pairs(root)) == 4
    assert {pair.name.split("/")[0] for pair in read_pairs(root, skip=("i_same",))} == {"v_moved"}
    (root / "i_same" / "H_1_3").write_text("1 0 0 0 1 0\n")
    with pytest.raises(SourceError, match=r"H_1_3: 6 numbers"):
        read_hpatches(root)
    (root / "i_same" / "H_1_3").write_text("1 0 0 1 0 0 0 0 1\n")
    with pytest.raises(SourceError, match=r"H_1_3: not a homography"):
        read_hpatches(root)
    (root / "i_same" / "H_1_3").unlink()
    (root / "i_same" / "2.ppm").unlink()
    with pytest.raises(SourceError, match=r"2\.ppm: not found"):
        read_hpatches(root)
    (root / "i_same" / "2.ppm").write_text("no image")
    (root / "v_moved" / "2.ppm").write_text("no image")
    assert main(["bench-matching", str(root), "--config", "orb", "--device", "cpu"]) == 2
    for file in (root / "v_moved").glob("H_*"):
        file.unlink()
    with pytest.raises(SourceError, match="no H_1_2"):
        read_hpatches(root)
