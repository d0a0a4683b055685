"""Exports, judged by pycolmap and by formulas of the test's own: poses, half pixels, distortion, points, images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from recorded_run import (
    BROWN,
    BROWN_5,
    FISHEYE,
    INTERVAL_NS,
    PINHOLE,
    RATIONAL,
    START_NS,
    observed_tracks,
    picture,
    record_run,
    say_run,
)
from synthetic_drive import write_drive
from synthetic_world import CAMERA, driving_path, make_world

from vo import cli
from vo.export_scene import Landmarks, PosedFrame, build_scene, settled, triangulate_tracks
from vo.mcap_recorder import McapRecorder
from vo.message_stream import MessageStream
from vo.recording import Recording
from vo.trajectory import Trajectory, read_trajectory, write_tum
from vo.types import Camera, CameraModel, FrameTracks, PoseEstimate, TrackingStatus

pycolmap = pytest.importorskip("pycolmap", reason="pycolmap reads the exports: pip install 'lightvo[dev]'")

CAMERAS = {
    "PINHOLE": PINHOLE,
    "OPENCV": BROWN,
    "FULL_OPENCV": RATIONAL,
    "OPENCV_FISHEYE": FISHEYE,
    "FULL_OPENCV k3": BROWN_5,
}


def export(*arguments: object) -> int:
    return cli.main(["export", *(str(argument) for argument in arguments)])


def exported(tmp_path: Path, camera: Camera = CAMERA, *arguments: object, **options: object):
    """The truth of a recorded run, and what pycolmap reads of its export."""
    truth = record_run(tmp_path / "run.mcap", 24, camera, **options)
    assert export("colmap", tmp_path / "run.mcap", "--output", tmp_path / "model", *arguments) == 0
    return truth, pycolmap.Reconstruction(str(tmp_path / "model" / "sparse" / "0"))


def opencv_pixels(points_camera: np.ndarray, camera: Camera) -> np.ndarray:
    """(N, 2) px by OpenCV, (0, 0) at the centre of the top-left pixel."""
    project = cv2.fisheye.projectPoints if camera.model is CameraModel.FISHEYE else cv2.projectPoints
    shape = (-1, 1, 3)
    pixels, _ = project(np.reshape(points_camera, shape), np.zeros(3), np.zeros(3), camera.K, camera.distortion)
    return np.reshape(pixels, (-1, 2))


def colmap_errors(model) -> np.ndarray:
    """Reprojection error of every observation as pycolmap computes it."""
    errors = []
    for image in model.images.values():
        for point in image.points2D:
            if point.has_point3D():
                projected = image.project_point(model.points3D[point.point3D_id].xyz)
                errors.append(np.linalg.norm(projected - point.xy))
    return np.array(errors)


# --- COLMAP ---


@pytest.mark.parametrize("name", CAMERAS)
def test_pycolmap_finds_the_reprojection_errors_that_we_find(tmp_path, capfd, name):
    """The same mean, and each one as large as OpenCV says; the noise of 0.3 px shows in them as it should."""
    camera = CAMERAS[name]
    truth, model = exported(tmp_path, camera)
    assert model.cameras[1].model.name == name.split()[0]
    errors = colmap_errors(model)
    assert len(errors) > 1500
    ours = []
    for index, T in truth.keyframes.items():
        seen = {int(track_id): i for i, track_id in enumerate(truth.tracks[index].track_ids)}
        image = model.images[index + 1]
        for point in image.points2D:
            track_id = point.point3D_id - 1
            keypoint = truth.tracks[index].keypoints[seen[track_id]]
            local = (model.points3D[point.point3D_id].xyz - T[:3, 3]) @ T[:3, :3]
            assert_allclose(point.xy, keypoint.astype(float) + 0.5, atol=1e-9)
            ours.append(np.linalg.norm(opencv_pixels(local, camera)[0] - keypoint))
    assert_allclose(sorted(errors), sorted(ours), atol=2e-6)
    # Each point takes 3 of the 2 n numbers that n images know of it.
    num_images = np.mean([point.track.length() for point in model.points3D.values()])
    assert errors.mean() == pytest.approx(0.3 * np.sqrt(np.pi / 2) * np.sqrt(1 - 1.5 / num_images), rel=0.05)
    printed = re.search(r"(\d+) observations, mean reprojection error ([\d.]+) px", capfd.readouterr().out)
    assert printed is not None and int(printed[1]) == len(errors)
    assert float(printed[2]) == pytest.approx(errors.mean(), abs=0.006)
    model.update_point_3d_errors()
    written = {int(line.split()[0]): float(line.split()[7]) for line in points_lines(tmp_path)}
    for point_id, point in model.points3D.items():
        assert point.error == pytest.approx(written[point_id], abs=1e-5)


def points_lines(tmp_path: Path) -> list[str]:
    return (tmp_path / "model" / "sparse" / "0" / "points3D.txt").read_text().splitlines()[1:]


@pytest.mark.parametrize("name", CAMERAS)
def test_without_noise_pycolmap_finds_no_error(tmp_path, name):
    """Half a pixel that is forgotten would show, and so would a coefficient in the wrong place."""
    _, model = exported(tmp_path, CAMERAS[name], noise_px=0.0)
    assert colmap_errors(model).max() < 3e-3  # keypoints are float32, distortion is undone by iteration


def test_poses_and_points_are_those_that_were_corrected(tmp_path):
    truth, model = exported(tmp_path, noise_px=0.02)
    assert sorted(model.images) == [index + 1 for index in sorted(truth.keyframes)]
    for index, T in truth.keyframes.items():
        cam_from_world = np.vstack([model.images[index + 1].cam_from_world().matrix(), [0, 0, 0, 1]])
        assert_allclose(cam_from_world, np.linalg.inv(T), atol=1e-9)
        assert np.abs(truth.published[index] - T).max() > 1e-3 or index == 0
    for point_id, point in model.points3D.items():
        track_id = point_id - 1
        assert track_id < len(truth.points)  # those that do not exist were removed
        assert_allclose(point.xyz, truth.points[track_id], rtol=0.2, atol=0.2)
        assert_array_equal(point.color, [track_id % 256, track_id // 256, 0])
        assert len({element.image_id for element in point.track.elements}) >= 2


def test_observations_that_do_not_fit_are_left_out(tmp_path):
    truth, strict = exported(tmp_path, CAMERA, "--max-error-px", "0.3")
    loose = tmp_path / "loose"
    export("colmap", tmp_path / "run.mcap", "--output", loose, "--every", "2")
    every_other = pycolmap.Reconstruction(str(loose / "sparse" / "0"))
    assert colmap_errors(strict).max() <= 0.3
    assert sorted(every_other.images) == [index + 1 for index in sorted(truth.keyframes)][::2]
    assert 0 < strict.compute_num_observations() < sum(len(truth.tracks[index].track_ids) for index in truth.keyframes)


def test_all_frames_move_with_their_keyframe_and_have_the_images_that_were_published(tmp_path, capfd):
    truth, model = exported(tmp_path, BROWN, "--frames", "all", "--images", reduction=2)
    assert "18 of 23 frames have no image" in capfd.readouterr().err
    assert sorted(model.images) == [1, 6, 11, 16, 21]
    camera = model.cameras[1]
    assert (camera.width, camera.height) == (320, 240)
    assert_allclose(camera.params[:4], [210.0, 215.0, 161.5, 118.25])
    assert_allclose(camera.params[4:], BROWN.distortion)
    for index in (5, 10, 15, 20):
        anchor = index - index % 4
        moved = truth.keyframes[anchor] @ np.linalg.inv(truth.published[anchor]) @ truth.published[index]
        world_from_cam = np.linalg.inv(np.vstack([model.images[index + 1].cam_from_world().matrix(), [0, 0, 0, 1]]))
        assert_allclose(world_from_cam, moved, atol=1e-9)
        image = cv2.imread(str(tmp_path / "model" / "images" / model.images[index + 1].name))
        expected = cv2.resize(picture(index), (320, 240), interpolation=cv2.INTER_AREA)
        assert np.abs(image[:, :, ::-1].astype(int) - expected).mean() < 3
    seen = truth.tracks[5]
    keypoints = {int(i): xy for i, xy in zip(seen.track_ids, seen.keypoints, strict=True)}
    for point in model.images[6].points2D:
        assert_allclose(point.xy, (keypoints[point.point3D_id - 1].astype(float) + 0.5) / 2)


def test_images_are_copied_out_of_the_recording_as_they_are(tmp_path):
    truth, model = exported(tmp_path, CAMERA, "--images")
    for index, expected in truth.images.items():
        content = (tmp_path / "model" / "images" / model.images[index + 1].name).read_bytes()
        assert any(
            content in message.data for message in Recording(tmp_path / "run.mcap").messages(["/camera/keyframe"])
        )
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
        assert np.abs(image.astype(int) - expected).mean() < 3


@pytest.mark.parametrize("camera", [BROWN, RATIONAL, FISHEYE], ids=["brown", "rational", "fisheye"])
def test_undistorted_images_and_keypoints_are_those_of_a_pinhole(tmp_path, camera):
    truth, model = exported(tmp_path, camera, "--undistort", "--images", noise_px=0.0)
    assert model.cameras[1].model.name == "PINHOLE"
    assert_allclose(model.cameras[1].params, [420.0, 430.0, 323.0, 236.5])
    assert colmap_errors(model).max() < 1e-2
    image = cv2.imread(str(tmp_path / "model" / "images" / model.images[5].name))[:, :, ::-1]
    if camera.model is CameraModel.FISHEYE:
        expected = cv2.fisheye.undistortImage(truth.images[4], camera.K, camera.distortion, Knew=camera.K)
    else:
        expected = cv2.undistort(truth.images[4], camera.K, camera.distortion)
    assert np.abs(image.astype(int) - expected).mean() < 3
    assert np.abs(image.astype(int) - truth.images[4]).mean() > 3


def test_a_camera_without_a_model_is_refused_in_one_line_with_the_remedy(tmp_path, capfd):
    thin_prism = Camera(640, 480, PINHOLE.K, np.array([0.1, 0, 0, 0, 0, 0, 0, 0, 0.01, 0, 0.01, 0]), CameraModel.BROWN)
    record_run(tmp_path / "run.mcap", 6, thin_prism)
    for kind in ("colmap", "nerfstudio"):
        assert export(kind, tmp_path / "run.mcap", "--output", tmp_path / kind) == 2
        error = capfd.readouterr().err
        assert len(error.splitlines()) == 1 and "--undistort" in error
        assert export(kind, tmp_path / "run.mcap", "--output", tmp_path / kind, "--undistort") == 0
        capfd.readouterr()


# --- nerfstudio ---


@pytest.mark.parametrize("camera", [PINHOLE, BROWN_5, FISHEYE], ids=["pinhole", "brown", "fisheye"])
def test_a_ray_of_nerfstudio_meets_the_point_where_we_saw_it(tmp_path, camera):
    """Points and poses from the files alone, by the conventions of OpenGL."""
    truth = record_run(tmp_path / "run.mcap", 24, camera, noise_px=0.0)
    assert export("nerfstudio", tmp_path / "run.mcap", "--output", tmp_path / "scene", "--images") == 0
    scene = json.loads((tmp_path / "scene" / "transforms.json").read_text())
    points = read_ply(tmp_path / "scene" / scene["ply_file_path"])
    turn = np.array(scene["applied_transform"])
    assert_allclose(turn[:, :3] @ turn[:, :3].T, np.eye(3))
    assert_allclose(turn[:, :3] @ [0, -1, 0], [0, 0, 1])  # our up is theirs
    originals = points @ turn[:, :3]
    track_ids = np.array([np.linalg.norm(truth.points - p, axis=1).argmin() for p in originals])
    assert_allclose(originals, truth.points[track_ids], rtol=1e-3, atol=1e-3)  # triangulated from float32
    assert len(scene["frames"]) == len(truth.keyframes)
    for frame, (index, T) in zip(scene["frames"], truth.keyframes.items(), strict=True):
        assert (tmp_path / "scene" / frame["file_path"]).is_file()
        pose = np.array(frame["transform_matrix"])
        assert_allclose(pose[:3, 3], turn[:, :3] @ T[:3, 3], atol=1e-12)
        local = np.linalg.inv(pose) @ np.vstack([points.T, np.ones(len(points))])
        opencv = np.stack([local[0], -local[1], -local[2]], axis=1)
        pixels = nerfstudio_pixels(opencv, scene)
        where = {int(i): xy for i, xy in zip(truth.tracks[index].track_ids, truth.tracks[index].keypoints, strict=True)}
        seen = [row for row, track_id in enumerate(track_ids) if int(track_id) in where]
        assert len(seen) > 100
        assert_allclose(pixels[seen], [where[int(track_ids[row])] + 0.5 for row in seen], atol=2e-3)


def nerfstudio_pixels(points: np.ndarray, scene: dict) -> np.ndarray:
    """The formulas of the two models of nerfstudio, written out; (0.5, 0.5) is the centre of the top-left pixel."""
    x, y = points[:, 0] / points[:, 2], points[:, 1] / points[:, 2]
    r2 = x**2 + y**2
    k1, k2, k3, k4, p1, p2 = (scene.get(name, 0.0) for name in ("k1", "k2", "k3", "k4", "p1", "p2"))
    if scene["camera_model"] == "OPENCV_FISHEYE":
        r = np.sqrt(r2)
        theta = np.arctan(r)
        scale = theta * (1 + k1 * theta**2 + k2 * theta**4 + k3 * theta**6 + k4 * theta**8) / np.maximum(r, 1e-12)
        xd, yd = x * scale, y * scale
    else:
        radial = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3
        xd = x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x**2)
        yd = y * radial + p1 * (r2 + 2 * y**2) + 2 * p2 * x * y
    return np.stack([scene["fl_x"] * xd + scene["cx"], scene["fl_y"] * yd + scene["cy"]], axis=1)


def read_ply(path: Path) -> np.ndarray:
    header, _, data = path.read_bytes().partition(b"end_header\n")
    assert b"format binary_little_endian 1.0" in header
    count = int(re.search(rb"element vertex (\d+)", header)[1])
    rows = np.frombuffer(data, np.dtype([("xyz", "<f4", 3), ("rgb", "u1", 3)]))
    assert len(rows) == count
    return rows["xyz"].astype(float)


# --- points from tracks ---


def test_landmarks_that_followed_the_newest_keyframes_are_settled_where_all_see_them():
    points = make_world(200, (-4.0, -3.0, 5.0), (4.0, 3.0, 12.0)).points
    path = driving_path(20)
    tracks = {i: observed_tracks(T, points, PINHOLE, i, i, 0.1) for i, T in enumerate(path)}
    frames = [posed(T, i) for i, T in enumerate(path)]
    ids = np.arange(len(points), dtype=np.int64)
    drifted = Landmarks(ids, points + np.array([0.1, 0.05, 0.1]), None)
    before = build_scene(PINHOLE, frames, tracks, drifted, 1e9).mean_error_px
    landmarks = settled(drifted, PINHOLE, frames, tracks, 4.0)
    after = build_scene(PINHOLE, frames, tracks, landmarks, 1e9).mean_error_px
    assert before > 4.0 and after < 0.2
    unseen = np.setdiff1d(ids, np.concatenate([seen.track_ids for seen in tracks.values()]))
    assert_array_equal(landmarks.points[unseen], drifted.points[unseen])


def posed(T: np.ndarray, index: int) -> PosedFrame:
    return PosedFrame(index, index, T)


@pytest.mark.parametrize("camera", [PINHOLE, BROWN, FISHEYE], ids=["pinhole", "brown", "fisheye"])
def test_tracks_triangulate_to_the_points_that_made_them(camera):
    points = make_world(300, (-6.0, -3.0, 4.0), (6.0, 3.0, 20.0)).points
    path = driving_path(20)
    tracks = {i: observed_tracks(T, points, camera, i, i, 0.0) for i, T in enumerate(path)}
    frames = [posed(T, i) for i, T in enumerate(path)]
    landmarks = triangulate_tracks(camera, frames, tracks, 1.0)
    assert len(landmarks.ids) > 200
    assert_allclose(landmarks.points, points[landmarks.ids], rtol=1e-3, atol=1e-3)


def test_one_wrong_observation_does_not_move_a_point_and_noise_averages_out():
    points = make_world(200, (-4.0, -3.0, 5.0), (4.0, 3.0, 12.0)).points
    path = driving_path(20)
    tracks = {i: observed_tracks(T, points, PINHOLE, i, i, 0.3) for i, T in enumerate(path)}
    keypoints = tracks[10].keypoints.copy()
    keypoints[:, 0] += 60.0
    tracks[10] = FrameTracks(10, 10, tracks[10].track_ids, keypoints, tracks[10].lengths, tracks[10].has_landmark)
    landmarks = triangulate_tracks(PINHOLE, [posed(T, i) for i, T in enumerate(path)], tracks, 2.0)
    errors = np.linalg.norm(landmarks.points - points[landmarks.ids], axis=1)
    assert len(errors) > 100
    assert np.median(errors) < 0.05


def test_points_without_parallax_or_agreement_are_left_out():
    points = np.array([[0.5, 0.2, 8.0], [0.0, 0.0, 5000.0], [-0.5, 0.1, 8.0]])
    path = [np.eye(4), np.eye(4), np.eye(4)]
    path[1][0, 3], path[2][0, 3] = 0.5, 1.0
    tracks = {i: observed_tracks(T, points, PINHOLE, i, i, 0.0) for i, T in enumerate(path)}
    keypoints = tracks[1].keypoints.copy()
    keypoints[2, 1] += 40.0  # off the line that the other two images allow
    tracks[1] = FrameTracks(1, 1, tracks[1].track_ids, keypoints, tracks[1].lengths, tracks[1].has_landmark)
    del tracks[2]
    landmarks = triangulate_tracks(PINHOLE, [posed(T, i) for i, T in enumerate(path)], tracks, 2.0)
    assert landmarks.ids.tolist() == [0]
    assert len(triangulate_tracks(PINHOLE, [], {}, 2.0).ids) == 0


def test_a_recording_without_a_map_gets_points_from_its_tracks(tmp_path, capfd):
    truth, model = exported(tmp_path, CAMERA, "--images", with_map=False, noise_px=0.0)
    told = capfd.readouterr().err
    assert "never revised" in told and "triangulated from the tracks" in told
    for index in truth.keyframes:
        cam_from_world = np.vstack([model.images[index + 1].cam_from_world().matrix(), [0, 0, 0, 1]])
        assert_allclose(cam_from_world, np.linalg.inv(truth.published[index]), atol=1e-9)
    assert len(model.points3D) > 100
    point_id, point = next(iter(model.points3D.items()))
    first = min(point.track.elements, key=lambda element: element.image_id)
    x, y = model.images[first.image_id].points2D[first.point2D_idx].xy - 0.5
    assert np.abs(point.color.astype(int) - picture(first.image_id - 1)[round(y), round(x)]).max() < 25
    assert point_id > 0


# --- what there is to export ---


def test_the_longest_segment_is_exported_and_the_others_are_named(tmp_path, capfd):
    path = tmp_path / "run.mcap"
    with McapRecorder(path) as recorder:
        stream = MessageStream(CAMERA)
        stream.add_consumer(recorder.add)
        truth = say_run(stream)
        for index in (30, 31):
            stream.publish_pose(
                PoseEstimate(
                    index,
                    START_NS + index * INTERVAL_NS,
                    np.eye(4),
                    TrackingStatus.TRACKING,
                    is_keyframe=True,
                    segment_id=1,
                )
            )
    assert export("colmap", path, "--output", tmp_path / "model") == 0
    assert "segment 0 is exported; 1 left out" in capfd.readouterr().err
    assert len(pycolmap.Reconstruction(str(tmp_path / "model" / "sparse" / "0")).images) == len(truth.keyframes)


def test_a_recording_that_was_cut_short_is_exported_as_far_as_it_goes(tmp_path, capfd):
    path = tmp_path / "run.mcap"
    record_run(path)
    chunk = Recording(path)._chunks[-1]
    path.write_bytes(path.read_bytes()[: chunk.offset + chunk.num_bytes])
    assert export("colmap", path, "--output", tmp_path / "model") == 0
    assert "was cut short" in capfd.readouterr().err
    assert len(pycolmap.Reconstruction(str(tmp_path / "model" / "sparse" / "0")).images) == 6


@pytest.fixture(scope="module")
def drive_run(tmp_path_factory: pytest.TempPathFactory):
    """A sequence and the output directory of a run over it."""
    root = tmp_path_factory.mktemp("drive")
    drive = write_drive(root, 14)
    arguments = ["run", str(drive), "--config", "orb", "--publish", "off", "--output", str(root / "out")]
    assert cli.main([*arguments, "--save-tracks", "--quiet"]) == 0
    return drive, root / "out"


def test_an_output_directory_is_exported_with_the_images_of_its_source(drive_run, tmp_path, capfd):
    drive, output = drive_run
    assert export("colmap", output, "--output", tmp_path / "model", "--every", "2", "--source", drive) == 0
    model = pycolmap.Reconstruction(str(tmp_path / "model" / "sparse" / "0"))
    trajectory = read_trajectory(output / "trajectory_refined_tum.txt")
    indices = read_trajectory(output / "trajectory_kitti.txt").frame_indices
    assert indices is not None
    assert sorted(model.images) == [index + 1 for index in indices.tolist()[::2]]
    for row in range(0, len(indices), 2):
        image = model.images[int(indices[row]) + 1]
        T = np.linalg.inv(np.vstack([image.cam_from_world().matrix(), [0, 0, 0, 1]]))
        assert_allclose(T, trajectory.T_world_camera[row], atol=1e-9)
        original = cv2.imread(str(drive / "image_0" / f"{indices[row]:06d}.png"), cv2.IMREAD_UNCHANGED)
        copy = cv2.imread(str(tmp_path / "model" / "images" / image.name), cv2.IMREAD_UNCHANGED)
        assert_array_equal(copy, original)
    assert len(model.points3D) > 50
    errors = colmap_errors(model)
    assert errors.max() <= 4.0 + 1e-6 and errors.mean() < 1.5
    printed = re.search(r"mean reprojection error ([\d.]+) px; in relative units", capfd.readouterr().out)
    assert printed is not None and float(printed[1]) == pytest.approx(errors.mean(), abs=0.006)


def test_the_refined_trajectory_is_taken_where_there_is_one(drive_run, tmp_path):
    _, output = drive_run
    directory = tmp_path / "out"
    directory.mkdir()
    for path in output.iterdir():
        if path.is_file():
            (directory / path.name).write_bytes(path.read_bytes())
    online = read_trajectory(output / "trajectory_tum.txt")
    moved = np.array([T.copy() for T in online.T_world_camera[3:9]])
    moved[:, 0, 3] += 1.0
    write_tum(Trajectory(online.timestamps_ns[3:9].copy(), moved), directory / "trajectory_refined_tum.txt")
    assert export("colmap", directory, "--output", tmp_path / "model") == 0
    model = pycolmap.Reconstruction(str(tmp_path / "model" / "sparse" / "0"))
    indices = read_trajectory(output / "trajectory_kitti.txt").frame_indices
    assert indices is not None
    assert sorted(model.images) == [index + 1 for index in indices.tolist()[3:9]]
    image = model.images[int(indices[3]) + 1]
    assert_allclose(image.cam_from_world().inverse().translation, moved[0][:3, 3], atol=1e-9)
    assert len(model.points3D) == 0  # the tracks were not copied


@pytest.mark.parametrize(
    ("remove", "arguments", "said"),
    [
        (None, ("--images",), "--source"),
        ("camera.yaml", (), "--camera FILE"),
        ("trajectory_tum.txt", (), "vo run --output"),
        (None, ("--max-error-px", "0"), "--max-error-px"),
        (None, ("--camera", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_what_cannot_be_exported_is_one_line(drive_run, tmp_path, capfd, remove, arguments, said):
    directory = tmp_path / "out"
    directory.mkdir()
    for path in drive_run[1].iterdir():
        is_removed = path.name == remove or (remove == "trajectory_tum.txt" and path.suffix == ".txt")
        if path.is_file() and not is_removed:
            (directory / path.name).write_bytes(path.read_bytes())
    assert export("colmap", directory, "--output", tmp_path / "model", *arguments) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and said in error


def test_a_recording_without_images_names_the_remedy(tmp_path, capfd):
    path = tmp_path / "run.mcap"
    with McapRecorder(path, keyframe_quality=0) as recorder:
        stream = MessageStream(CAMERA)
        stream.add_consumer(recorder.add)
        say_run(stream, 8, on_keyframe=recorder.add_keyframe)
    assert export("colmap", path, "--output", tmp_path / "model", "--images") == 2
    assert "--source SOURCE" in capfd.readouterr().err
