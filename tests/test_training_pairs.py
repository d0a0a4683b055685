"""Training pairs against brute force: where points go, what is hidden, which keypoints match; light; posed data."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from frontends.training.labels import IGNORED, UNMATCHABLE, MatchLabels, match_labels, match_score
from frontends.training.pairs_homography import (
    MotionConfig,
    is_inside,
    pixel_grid,
    random_homographies,
    transformed,
    warped,
)
from frontends.training.pairs_layers import LayeredPairs, LayersConfig, Transfer, layered_pairs
from frontends.training.pairs_posed import (
    PosedPairs,
    load_posed_pairs,
    read_depth,
    read_megadepth,
    read_tum,
    smooth_depth,
)
from frontends.training.photometry import (
    NO_CHANGE,
    PhotometryConfig,
    block_quantised,
    blurred,
    cosine_basis,
    gaussian_kernels,
    line_kernels,
    relit,
)
from frontends.training.photos import PhotoBank, TrainingError

CPU = torch.device("cpu")


def bank(count: int = 6, side: int = 96) -> PhotoBank:
    """Smooth colours, every photograph another mean, so that layers can be told apart by what they look like."""
    generator = np.random.default_rng(0)
    photos = []
    for index in range(count):
        coarse = generator.uniform(-25, 25, (side // 12, side // 12, 3)).astype(np.float32)
        smooth = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        photos.append(np.clip(smooth + 40 + 170 * index / count, 0, 255).astype(np.uint8))
    return PhotoBank(torch.from_numpy(np.stack(photos)).permute(0, 3, 1, 2).contiguous(), count)


def pairs_of(seed: int, **changes: object) -> LayeredPairs:
    config = LayersConfig(size=(80, 64), **changes)  # type: ignore[arg-type]
    return layered_pairs(bank(), 4, torch.Generator().manual_seed(seed), config, NO_CHANGE)


# ---------------------------------------------------------------- homographies


def test_a_point_moves_as_opencv_says() -> None:
    motion = random_homographies(5, (80, 64), torch.Generator().manual_seed(1), MotionConfig(), CPU)
    points = torch.rand(5, 30, 2) * 60
    expected = [
        cv2.perspectiveTransform(p[:, None].numpy(), H.double().numpy())[:, 0]
        for p, H in zip(points, motion, strict=True)
    ]
    np.testing.assert_allclose(transformed(motion, points).numpy(), np.stack(expected), atol=1e-3)


def test_points_behind_the_horizon_are_nowhere() -> None:
    tilted = torch.eye(3)[None].clone()
    tilted[0, 2, 0] = -0.1
    moved = transformed(tilted, torch.tensor([[[5.0, 0.0], [20.0, 0.0]]]))
    assert torch.isfinite(moved[0, 0]).all() and torch.isinf(moved[0, 1]).all()


def test_a_warped_view_is_what_opencv_warps() -> None:
    image = bank(1).pixels.float()
    motion = random_homographies(1, (96, 96), torch.Generator().manual_seed(2), MotionConfig(shift=0.05), CPU)
    view = warped(image, motion, (96, 96))[0].permute(1, 2, 0).numpy()
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    expected = cv2.warpPerspective(image[0].permute(1, 2, 0).numpy(), motion[0].numpy(), (96, 96), flags=flags)
    inside = is_inside(transformed(motion, pixel_grid((96, 96), CPU)[None]), (96, 96)).view(96, 96).numpy()
    assert inside.mean() > 0.3
    # OpenCV reads its places with 5 bits behind the point.
    assert np.abs(view - expected)[inside].max() < 1.0


@pytest.mark.parametrize("field", ["rotation_deg", "scale", "shear", "perspective", "shift"])
def test_no_motion_is_the_identity_and_each_kind_is_one(field: str) -> None:
    none = {"rotation_deg": 0.0, "spin": 0.0, "scale": 1.0, "shear": 0.0, "perspective": 0.0, "shift": 0.0}
    still = random_homographies(3, (80, 64), torch.Generator().manual_seed(0), MotionConfig(**none), CPU)
    torch.testing.assert_close(still, torch.eye(3).expand(3, 3, 3), atol=1e-5, rtol=0)
    moving = MotionConfig(**{**none, field: 1.3 if field == "scale" else 20.0 if field == "rotation_deg" else 0.3})
    moved = random_homographies(3, (80, 64), torch.Generator().manual_seed(0), moving, CPU)
    assert float((moved - still).abs().amax()) > 1e-3


# ---------------------------------------------------------------- layers


def brute_force_layer(pairs: LayeredPairs, side: int, item: int, point: tuple[float, float]) -> int:
    """The foremost layer at a point, one layer and one outline after the other, in float64."""
    for layer in reversed(range(1, pairs.outlines.shape[1])):
        H = pairs.to_photo[side, item, layer].double().numpy()
        x, y, z = H @ [*point, 1.0]
        shape = pairs.outlines[item, layer].double().numpy()
        if shape[0] == 0 or z <= 1e-6:
            continue
        dx, dy = x / z - shape[1], y / z - shape[2]
        angle = math.atan2(dy, dx)
        wave = sum(shape[4 + k] * math.cos((k + 1) * angle + shape[8 + k]) for k in range(4))
        if math.hypot(dx, dy) < shape[3] * (1 + wave):
            return layer
    return 0


def brute_force_transfer(
    pairs: LayeredPairs, side: int, item: int, point: tuple[float, float]
) -> tuple[tuple[float, float], bool]:
    layer = brute_force_layer(pairs, side, item, point)
    there, here = (pairs.to_photo[s, item, layer].double().numpy() for s in (1 - side, side))
    x, y, z = np.linalg.inv(there) @ here @ [*point, 1.0]
    width, height = pairs.size
    moved = (x / z, y / z)
    inside = z > 0 and 0 <= moved[0] <= width - 1 and 0 <= moved[1] <= height - 1
    return moved, bool(inside) and brute_force_layer(pairs, 1 - side, item, moved) == layer


@pytest.mark.parametrize("side", [0, 1])
def test_layers_and_visibility_are_those_of_brute_force(side: int) -> None:
    pairs = pairs_of(3, max_cutouts=4, cutout_share=1.0)
    points = torch.rand(4, 60, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([79.0, 63.0])
    transfer, layers = pairs.transfer(side, points), pairs.layers_at(side, points)
    num_hidden = num_compared = 0
    for item in range(4):
        for index in range(60):
            point = (float(points[item, index, 0]), float(points[item, index, 1]))
            assert int(layers[item, index]) == brute_force_layer(pairs, side, item, point)
            moved, visible = brute_force_transfer(pairs, side, item, point)
            if not bool(transfer.is_known[item, index]):
                continue
            num_compared += 1
            assert bool(transfer.is_visible[item, index]) == visible
            if visible:
                np.testing.assert_allclose(transfer.points[item, index].numpy(), moved, atol=2e-3)
            width, height = pairs.size
            num_hidden += not visible and 0 < moved[0] < width - 1 and 0 < moved[1] < height - 1
    assert num_compared > 120 and num_hidden > 2 and int(layers.max()) >= 3


def test_corresponding_points_look_the_same_and_hidden_ones_do_not() -> None:
    pairs = pairs_of(5, max_cutouts=3, cutout_share=1.0)
    grid = pixel_grid(pairs.size, CPU).expand(4, -1, -1)
    transfer = pairs.transfer(0, grid)
    grey0, grey1 = (image.mean(dim=1).numpy() for image in (pairs.images0, pairs.images1))
    same, other = [], []
    for item in range(4):
        places = transfer.points[item].view(64, 80, 2).nan_to_num(posinf=-1).numpy().astype(np.float32)
        read = cv2.remap(grey1[item], places, None, cv2.INTER_LINEAR)
        difference = np.abs(read - grey0[item]).ravel()
        known, visible = transfer.is_known[item].numpy(), transfer.is_visible[item].numpy()
        inside = is_inside(transfer.points[item], pairs.size).numpy()
        same.append(difference[known & visible])
        other.append(difference[known & ~visible & inside])
    assert np.percentile(np.concatenate(same), 99) < 0.05
    assert np.median(np.concatenate(other)) > 0.05


def test_there_and_back_is_where_one_started() -> None:
    pairs = pairs_of(7)
    points = torch.rand(4, 80, 2) * torch.tensor([79.0, 63.0])
    there = pairs.transfer(0, points)
    back = pairs.transfer(1, torch.where(there.is_visible[..., None], there.points, 0.0))
    chosen = there.is_visible & there.is_known
    assert int(chosen.sum()) > 60
    torch.testing.assert_close(back.points[chosen], points[chosen], atol=2e-2, rtol=0)
    assert bool(back.is_visible[chosen].all())


def test_video_pairs_move_little_and_wide_ones_far() -> None:
    points = torch.tensor([[[40.0, 32.0]]]).expand(4, 1, 2)
    lengths = []
    for share in (1.0, 0.0):
        moved = [pairs_of(s, max_cutouts=0, video_share=share).transfer(0, points).points for s in range(10)]
        lengths.append(torch.linalg.vector_norm(torch.cat(moved) - points[0], dim=-1).median())
    assert float(lengths[0]) < 6 < float(lengths[1])


def test_pairs_depend_on_the_generator_alone() -> None:
    one, same, other = pairs_of(1), pairs_of(1), pairs_of(2)
    assert torch.equal(one.images1, same.images1) and not torch.equal(one.images1, other.images1)


# ---------------------------------------------------------------- labels


class GivenTransfers:
    """Geometry that says what it was told."""

    def __init__(self, *sides: Transfer) -> None:
        self.sides = sides

    def transfer(self, side: int, points: Tensor) -> Transfer:
        return self.sides[side]


def brute_force_labels(
    moved: tuple[Transfer, Transfer], keypoints: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]
) -> list[list[int]]:
    """Partners of both sides of one pair, by looking at every two points."""
    counts = [len(k) for k in keypoints]

    def distance(side: int, i: int, j: int) -> float:
        return math.dist(moved[side].points[0, i].tolist(), keypoints[1 - side][j].tolist())

    def possible(side: int, i: int) -> bool:
        return bool(valid[side][i] and moved[side].is_visible[0, i] and moved[side].is_known[0, i])

    errors = {
        (i, j): max(distance(0, i, j), distance(1, j, i))
        for i in range(counts[0])
        for j in range(counts[1])
        if possible(0, i) and possible(1, j)
    }
    result = []
    for side in (0, 1):
        partners = []
        for i in range(counts[side]):
            mine = {key[1 - side]: error for key, error in errors.items() if key[side] == i}
            label = IGNORED
            if mine:
                j, error = min(mine.items(), key=lambda item: item[1])
                theirs = [e for key, e in errors.items() if key[1 - side] == j]
                if error < 3 and error == min(theirs):
                    label = j
            if label == IGNORED and valid[side][i] and moved[side].is_known[0, i]:
                near = [distance(side, i, j) for j in range(counts[1 - side]) if valid[1 - side][j]]
                if not moved[side].is_visible[0, i] or min(near, default=math.inf) > 5:
                    label = UNMATCHABLE
            partners.append(label)
        result.append(partners)
    return result


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000))
def test_labels_are_those_of_brute_force(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    keypoints = (uniform(12, 2) * 25, uniform(9, 2) * 25)
    moved = tuple(
        Transfer(k[None] + uniform(1, len(k), 2) * 6 - 3, uniform(1, len(k)) < 0.8, uniform(1, len(k)) < 0.8)
        for k in keypoints
    )
    valid = (uniform(12) < 0.9, uniform(9) < 0.9)
    labels = match_labels(
        GivenTransfers(*moved), keypoints[0][None], keypoints[1][None], valid[0][None], valid[1][None]
    )
    expected = brute_force_labels(moved, keypoints, valid)  # type: ignore[arg-type]
    assert labels.partner0[0].tolist() == expected[0]
    assert labels.partner1[0].tolist() == expected[1]


def test_matches_of_a_real_pair_point_at_each_other_and_every_label_occurs() -> None:
    pairs = pairs_of(11, cutout_share=1.0)
    points = torch.rand(4, 120, 2) * torch.tensor([79.0, 63.0])
    moved = pairs.transfer(0, points).points
    moved = torch.where(is_inside(moved, pairs.size)[..., None], moved, torch.rand(4, 120, 2) * 60)
    order = torch.randperm(120)
    labels = match_labels(pairs, points, moved[:, order])
    matched = labels.partner0 >= 0
    assert set(labels.partner0.clamp(max=0).unique().tolist()) == {IGNORED, UNMATCHABLE, 0}
    back = labels.partner1.gather(1, labels.partner0.clamp(min=0))
    assert bool((back == torch.arange(120))[matched].all()) and int(matched.sum()) > 100
    assert match_score(labels.partner0, labels).recall == match_score(labels.partner0, labels).precision == 1.0


def test_the_score_counts_right_wrong_and_missed() -> None:
    labels = MatchLabels(torch.tensor([[1, 0, UNMATCHABLE, IGNORED]]), torch.tensor([[1, 0, IGNORED]]))
    score = match_score(torch.tensor([[1, -1, 0, 0]]), labels)
    assert score.precision == pytest.approx(1 / 2) and score.recall == pytest.approx(1 / 2)
    assert match_score(torch.tensor([[-1, -1, 2, -1]]), labels).precision == 0.0


# ---------------------------------------------------------------- light


def test_without_change_images_stay_as_they_are() -> None:
    images = torch.rand(2, 3, 20, 24) * 0.98 + 0.01
    out = relit(images, torch.Generator().manual_seed(0), NO_CHANGE)
    torch.testing.assert_close(out, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", ["contrast", "brightness", "gamma", "colour", "illumination", "noise"])
def test_every_kind_of_light_changes_every_image_its_own_way(field: str) -> None:
    values = {name: getattr(NO_CHANGE, name) for name in NO_CHANGE.__slots__}
    config = PhotometryConfig(**{**values, field: 1.5 if field in ("contrast", "gamma", "colour") else 0.2})
    images = torch.full((3, 3, 16, 16), 0.4)
    out = relit(images, torch.Generator().manual_seed(1), config)
    means = (out - images).abs().mean(dim=(1, 2, 3))
    assert float(means.min()) > 1e-4 and len(set(means.tolist())) == 3
    assert float(out.min()) >= 0 and float(out.max()) <= 1


def test_blur_is_what_opencv_filters() -> None:
    image = torch.rand(2, 3, 24, 30)
    kernels = torch.cat((gaussian_kernels(torch.tensor([1.1])), line_kernels(torch.tensor([6.0]), torch.tensor([0.4]))))
    assert torch.allclose(kernels.sum(dim=(1, 2)), torch.ones(2))
    out = blurred(image, kernels)
    for index in range(2):
        for channel in range(3):
            expected = cv2.filter2D(
                image[index, channel].numpy(), -1, kernels[index].numpy(), borderType=cv2.BORDER_REFLECT_101
            )
            np.testing.assert_allclose(out[index, channel].numpy(), expected, atol=1e-5)


def test_a_motion_blur_has_the_direction_and_length_it_claims() -> None:
    kernel = line_kernels(torch.tensor([6.0]), torch.tensor([0.0]))[0]
    assert float(kernel[4].sum()) > 0.99 and int((kernel[4] > 0.01).sum()) == 7
    assert float(line_kernels(torch.zeros(1), torch.ones(1))[0, 4, 4]) > 0.5


def test_block_quantisation_rounds_the_coefficients_of_blocks() -> None:
    image = torch.rand(1, 1, 19, 24)
    steps = torch.full((1, 1, 1, 1), 0.2)
    out = block_quantised(image, steps)
    assert torch.equal(out[:, :, 16:], image[:, :, 16:])
    block, given_block = out[0, 0, 8:16, 16:24].numpy(), image[0, 0, 8:16, 16:24].numpy()
    scale = 0.2 * (1 + (np.arange(8)[:, None] + np.arange(8)[None]) / 2)
    coefficients = cv2.dct(given_block)
    np.testing.assert_allclose(cv2.dct(block) / scale, np.round(coefficients / scale), atol=1e-3)
    basis = cosine_basis(CPU)
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-5, rtol=0)


# ---------------------------------------------------------------- posed pairs


def plane_pairs() -> tuple[PosedPairs, Tensor]:
    """A slanted plane n . p = d seen by two cameras, with a square hole of unknown depth; and its homography."""
    K = torch.tensor([[60.0, 0.0, 39.5], [0.0, 60.0, 29.5], [0.0, 0.0, 1.0]])
    normal, distance = torch.tensor([0.2, -0.1, 1.0]), 3.0
    T = torch.eye(4)
    T[:3, :3] = torch.from_numpy(cv2.Rodrigues(np.array([0.02, -0.06, 0.05]))[0]).float()
    T[:3, 3] = torch.tensor([0.3, 0.05, -0.2])

    def depth_of(n: Tensor, d: float) -> Tensor:
        grid = torch.nn.functional.pad(pixel_grid((80, 60), CPU), (0, 1), value=1.0)
        return (d / ((grid @ torch.linalg.inv(K).T) @ n)).view(1, 60, 80)

    normal1 = T[:3, :3] @ normal
    depth0, depth1 = depth_of(normal, distance), depth_of(normal1, distance + float(normal1 @ T[:3, 3]))
    depth0[:, 10:14, 10:14] = 0.0
    image = torch.zeros(1, 3, 60, 80)
    H = K @ (T[:3, :3] + torch.outer(T[:3, 3], normal) / distance) @ torch.linalg.inv(K)
    return PosedPairs(image, image, depth0, depth1, K[None], K[None], T[None]), H


def test_depth_of_a_plane_moves_points_by_its_homography() -> None:
    pairs, H = plane_pairs()
    points = torch.rand(1, 300, 2) * torch.tensor([77.0, 57.0]) + 1
    transfer = pairs.transfer(0, points)
    expected = transformed(H[None], points)
    chosen = transfer.is_known & transfer.is_visible
    assert int(chosen.sum()) > 100
    # Depth is linear between pixels only where the plane faces the camera.
    torch.testing.assert_close(transfer.points[chosen], expected[chosen], atol=2e-2, rtol=0)
    in_hole = ((points > 10) & (points < 13)).all(dim=-1)
    assert not bool(transfer.is_known[in_hole].any())
    outside = ~is_inside(expected, (80, 60)) & transfer.is_known
    assert int(outside.sum()) > 5 and not bool(transfer.is_visible[outside].any())


def test_what_stands_in_front_hides_and_what_contradicts_is_unknown() -> None:
    pairs, _ = plane_pairs()
    nearer, farther = (
        PosedPairs(*(pairs.images0,) * 2, pairs.depths0, pairs.depths1 * f, pairs.K0, pairs.K1, pairs.T_camera1_camera0)
        for f in (0.7, 1.4)
    )
    points = torch.tensor([[[45.0, 30.0], [50.0, 40.0]]])
    hidden, contradicted = nearer.transfer(0, points), farther.transfer(0, points)
    assert bool(pairs.transfer(0, points).is_visible.all())
    assert bool(hidden.is_known.all()) and not bool(hidden.is_visible.any())
    assert not bool(contradicted.is_known.any())


def test_no_depth_is_made_up_across_edges() -> None:
    depth = torch.full((1, 10, 10), 2.0)
    depth[:, :, 5:] = 4.0
    points = torch.tensor([[[2.5, 3.0], [4.5, 3.0], [7.2, 3.0], [-1.0, 3.0]]])
    assert smooth_depth(depth, points)[0].tolist() == pytest.approx([2.0, 0.0, 4.0, 0.0])


def write_recording(directory: Path) -> None:
    """Three frames of the plane in TUM layout."""
    pairs, _ = plane_pairs()
    (directory / "rgb").mkdir(parents=True)
    (directory / "depth").mkdir()
    T_camera_world = [torch.eye(4), pairs.T_camera1_camera0[0]]
    lines: dict[str, list[str]] = {"rgb": [], "depth": [], "groundtruth": ["# t tx ty tz qx qy qz qw"]}
    for index, (T, depth) in enumerate(zip(T_camera_world, (pairs.depths0, pairs.depths1), strict=True)):
        cv2.imwrite(str(directory / f"rgb/{index}.png"), np.full((60, 80, 3), 50 * index, np.uint8))
        cv2.imwrite(str(directory / f"depth/{index}.png"), (depth[0].numpy() * 5000).round().astype(np.uint16))
        pose = np.linalg.inv(T.double().numpy())
        axis = cv2.Rodrigues(pose[:3, :3])[0].ravel()
        angle = np.linalg.norm(axis)
        quaternion = [*(axis / max(angle, 1e-12) * math.sin(angle / 2)), math.cos(angle / 2)]
        lines["rgb"].append(f"{index}.0 rgb/{index}.png")
        lines["depth"].append(f"{index}.01 depth/{index}.png")
        lines["groundtruth"].append(" ".join(map(str, [f"{index}.005", *pose[:3, 3], *quaternion])))
    lines["rgb"].append("9.0 rgb/nowhere.png")
    for name, rows in lines.items():
        (directory / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (directory / "camera.yaml").write_text("{fx: 60, fy: 60, cx: 39.5, cy: 29.5, depth_scale: 5000}")


def test_a_recording_in_tum_layout_gives_the_pair_it_was_written_from(tmp_path: Path) -> None:
    write_recording(tmp_path)
    collection = read_tum(tmp_path, gaps=(1,))
    assert collection.pairs.tolist() == [[0, 1]] and len(collection.views) == 2
    loaded = load_posed_pairs(collection, np.array([0]), (80, 60), CPU)
    given_pairs, _ = plane_pairs()
    torch.testing.assert_close(loaded.T_camera1_camera0, given_pairs.T_camera1_camera0, atol=1e-4, rtol=0)
    torch.testing.assert_close(loaded.depths0, given_pairs.depths0, atol=2e-4, rtol=0)
    points = torch.tensor([[[45.0, 30.0], [60.0, 20.0]]])
    torch.testing.assert_close(
        loaded.transfer(0, points).points, given_pairs.transfer(0, points).points, atol=1e-1, rtol=0
    )
    half = load_posed_pairs(collection, np.array([0]), (40, 30), CPU)
    there = half.transfer(0, (points + 0.5) / 2 - 0.5)
    torch.testing.assert_close((there.points + 0.5) * 2 - 0.5, given_pairs.transfer(0, points).points, atol=0.3, rtol=0)


def test_a_scene_of_megadepth_gives_the_same_pair(tmp_path: Path) -> None:
    write_recording(tmp_path)
    pairs, _ = plane_pairs()
    for index, depth in enumerate((pairs.depths0, pairs.depths1)):
        np.save(tmp_path / f"{index}.npy", depth[0].numpy())
    np.savez(
        tmp_path / "scene_info.npz",
        image_paths=np.array(["rgb/0.png", "rgb/1.png"]),
        depth_paths=np.array(["0.npy", "1.npy"]),
        intrinsics=np.stack([pairs.K0[0].numpy()] * 2),
        poses=np.stack([np.eye(4), pairs.T_camera1_camera0[0].numpy()]),
        pairs=np.array([[0, 1]]),
    )
    loaded = load_posed_pairs(read_megadepth(tmp_path / "scene_info.npz"), np.array([0]), (80, 60), CPU)
    points = torch.rand(1, 50, 2) * 55 + 2
    torch.testing.assert_close(loaded.transfer(0, points).points, pairs.transfer(0, points).points, atol=1e-3, rtol=0)


def test_wrong_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"camera\.yaml"):
        read_tum(tmp_path)
    write_recording(tmp_path / "a")
    (tmp_path / "a" / "groundtruth.txt").write_text("0.0 1 2 3\n")
    with pytest.raises(TrainingError, match=r"groundtruth\.txt"):
        read_tum(tmp_path / "a")
    np.savez(tmp_path / "objects.npz", image_paths=np.array(["a", None], dtype=object))
    with pytest.raises(TrainingError, match=r"objects\.npz"):
        read_megadepth(tmp_path / "objects.npz")
    np.savez(
        tmp_path / "short.npz",
        image_paths=np.array(["a", "b"]),
        depth_paths=np.array(["a"]),
        intrinsics=np.zeros((2, 3, 3)),
        poses=np.zeros((2, 4, 4)),
        pairs=np.array([[0, 1]]),
    )
    with pytest.raises(TrainingError, match="depth_paths: expected"):
        read_megadepth(tmp_path / "short.npz")
    (tmp_path / "not.png").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"not\.png"):
        read_depth(tmp_path / "not.png", 5000.0)
