"""Image files of every kind, whole and broken, and directories of them."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_sources import CAMERA_YAML, cut_short, depth_image, gray_image, rgb_image, write_image, write_images

from vo.sources import open_source
from vo.sources.decode import UnreadableImageError, read_depth, read_image
from vo.sources.images import list_images, natural_key
from vo.types import SourceError


def test_pixels_come_back_as_rgb_or_gray(tmp_path: Path) -> None:
    for image in (rgb_image(1), gray_image(1)):
        write_image(tmp_path / "image.png", image)
        read = read_image(tmp_path / "image.png")
        np.testing.assert_array_equal(read, image)
        assert read.dtype == np.uint8


def test_alpha_is_dropped(tmp_path: Path) -> None:
    rgba = np.dstack([rgb_image(2), gray_image(3)])
    cv2.imwrite(str(tmp_path / "image.png"), cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))
    np.testing.assert_array_equal(read_image(tmp_path / "image.png"), rgba[..., :3])


def test_sixteen_bits_keep_the_full_range(tmp_path: Path) -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    write_image(tmp_path / "gray.png", ramp)
    read = read_image(tmp_path / "gray.png")
    np.testing.assert_array_equal(read, np.rint(ramp / 65535 * 255).astype(np.uint8))
    colour = np.dstack([ramp, ramp[::-1], ramp.T])
    write_image(tmp_path / "colour.png", colour)
    np.testing.assert_array_equal(read_image(tmp_path / "colour.png"), np.rint(colour / 65535 * 255).astype(np.uint8))


def test_exif_orientation_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    write_image(path, gray_image(4))
    plain = path.read_bytes()
    tiff = b"MM\x00\x2a\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
    segment = b"Exif\x00\x00" + tiff
    path.write_bytes(plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:])
    assert cv2.imread(str(path)).shape[:2] == (32, 24)  # the tag is understood, and turns the image
    assert read_image(path).shape == (24, 32)


def test_depth_in_metres(tmp_path: Path) -> None:
    raw = depth_image(5)
    raw[0, 0] = 0
    write_image(tmp_path / "depth.png", raw)
    depth = read_depth(tmp_path / "depth.png", 5000.0)
    assert depth.dtype == np.float32
    assert depth[0, 0] == 0
    np.testing.assert_allclose(depth, raw / 5000.0, rtol=1e-6)
    write_image(tmp_path / "depth.png", gray_image(5))
    with pytest.raises(UnreadableImageError, match="16-bit"):
        read_depth(tmp_path / "depth.png", 5000.0)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_a_file_cut_short_is_unreadable_and_silent(tmp_path: Path, capfd, suffix: str, kept: float) -> None:
    path = tmp_path / f"image{suffix}"
    write_image(path, rgb_image(6))
    cut_short(path, kept)
    with pytest.raises(UnreadableImageError, match="empty" if kept == 0 else "cannot be decoded"):
        read_image(path)
    assert capfd.readouterr() == ("", "")


@given(st.integers(8, 1500), st.integers(1, 255))
@settings(deadline=None, max_examples=100)
def test_a_flipped_bit_in_a_png_is_noticed(tmp_path_factory, position: int, mask: int) -> None:
    path = tmp_path_factory.mktemp("png") / "image.png"
    write_image(path, rgb_image(7))
    content = bytearray(path.read_bytes())
    content[position % (len(content) - 8) + 8] ^= mask
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match="cannot be decoded"):
        read_image(path)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=100)
def test_no_bytes_break_the_reader(tmp_path_factory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("junk") / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError):
        read_image(path)


def test_a_missing_file_is_unreadable(tmp_path: Path) -> None:
    with pytest.raises(UnreadableImageError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(UnreadableImageError, match="directory"):
        read_image(tmp_path)


def test_natural_order(tmp_path: Path) -> None:
    names = ["b10.png", "b9.png", "b09.png", "a.jpg", "A2.PNG", "10.png", "9.png", "b9x.png"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    (tmp_path / "folder.png").mkdir()
    listed = [path.name for path in list_images(tmp_path)]
    assert listed == ["9.png", "10.png", "A2.PNG", "a.jpg", "b09.png", "b9.png", "b9x.png", "b10.png"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=8)))
@settings(deadline=None, max_examples=50)
def test_any_names_can_be_ordered(names: list[str]) -> None:
    paths = [Path(f"x{name}.png") for name in names]
    assert sorted(sorted(paths), key=natural_key) == sorted(reversed(sorted(paths)), key=natural_key)


def test_a_directory_of_images(tmp_path: Path) -> None:
    write_images(tmp_path, 12)
    source = open_source(str(tmp_path), fov_deg=60.0)
    frames = list(source.frames())
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.timestamp_ns for frame in frames] == [round(index * 1e9 / 30) for index in range(12)]
    np.testing.assert_array_equal(frames[10].image, rgb_image(10))
    assert (source.camera.width, source.camera.height) == (32, 24)
    assert not frames[0].image.flags.writeable
    assert (source.name, source.num_frames, source.is_live) == (str(tmp_path), 12, False)
    assert (source.skipped, source.ground_truth) == ((), None)


def test_times_of_images(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    rate = open_source(str(tmp_path), fov_deg=60.0, fps=12.5)
    assert [frame.timestamp_ns for frame in rate.frames()] == [0, 80_000_000, 160_000_000]
    (tmp_path / "times.txt").write_text("10.25\n10.5\n11\n")
    listed = open_source(str(tmp_path), fov_deg=60.0)
    assert [frame.timestamp_ns for frame in listed.frames()] == [10_250_000_000, 10_500_000_000, 11_000_000_000]
    with pytest.raises(SourceError, match="drop --fps"):
        open_source(str(tmp_path), fov_deg=60.0, fps=30.0)
    (tmp_path / "times.txt").write_text("10.25\n10.5\n")
    with pytest.raises(SourceError, match="2 times for 3 images"):
        open_source(str(tmp_path), fov_deg=60.0)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_rate_that_cannot_be(tmp_path: Path, fps: float) -> None:
    write_images(tmp_path, 1)
    with pytest.raises(SourceError, match="--fps"):
        open_source(str(tmp_path), fov_deg=60.0, fps=fps)


def test_times_in_file_names_only_when_told(tmp_path: Path) -> None:
    for time_ns in (1403715275762142976, 99, 1403715275812143104):
        write_image(tmp_path / f"{time_ns}.png", gray_image(1))
    told = open_source(f"images-ns:{tmp_path}", fov_deg=60.0)
    assert [frame.timestamp_ns for frame in told.frames()] == [99, 1403715275762142976, 1403715275812143104]
    plain = open_source(f"images:{tmp_path}", fov_deg=60.0)
    assert next(plain.frames()).timestamp_ns == 0
    write_image(tmp_path / "cover.png", gray_image(1))
    with pytest.raises(SourceError, match=r"cover\.png.*images-ns"):
        open_source(f"images-ns:{tmp_path}", fov_deg=60.0)


def test_intrinsics_of_images(tmp_path: Path) -> None:
    write_images(tmp_path, 1)
    with pytest.raises(SourceError, match=r"no intrinsics; pass --camera FILE .* --fov-deg"):
        open_source(str(tmp_path))
    (tmp_path / "camera.yaml").write_text(CAMERA_YAML)
    assert open_source(str(tmp_path)).camera.K[0, 0] == 30.0
    other = tmp_path / "other.yaml"
    other.write_text(CAMERA_YAML.replace("30.0", "40.0"))
    assert open_source(str(tmp_path), camera_file=other).camera.K[0, 0] == 40.0
    assert open_source(str(tmp_path), fov_deg=90.0).camera.K[0, 0] == pytest.approx(16.0)


def test_a_corrupt_image_is_skipped_and_counted(tmp_path: Path, capfd) -> None:
    write_images(tmp_path, 6)
    cut_short(tmp_path / "frame0.png")
    cut_short(tmp_path / "frame3.png")
    (tmp_path / "frame4.png").write_text("not an image")
    source = open_source(str(tmp_path), fov_deg=60.0)
    assert [(frame.index, frame.timestamp_ns) for frame in source.frames()] == [
        (1, 33333333),
        (2, 66666667),
        (5, 166666667),
    ]
    assert [(skipped.index, skipped.name) for skipped in source.skipped] == [
        (0, "frame0.png"),
        (3, "frame3.png"),
        (4, "frame4.png"),
    ]
    assert all("cannot be decoded" in skipped.reason and not skipped.is_kept for skipped in source.skipped)
    assert capfd.readouterr() == ("", "")


def test_times_that_do_not_rise_are_skipped_and_counted(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    (tmp_path / "times.txt").write_text("1\n2\n2\n1.5\n3\n")
    source = open_source(str(tmp_path), fov_deg=60.0)
    assert [frame.index for frame in source.frames()] == [0, 1, 4]
    assert [skipped.index for skipped in source.skipped] == [2, 3]
    assert "2000000000 ns does not rise above 2000000000 ns" in source.skipped[0].reason


def test_images_of_which_none_can_be_read(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_text("not an image")
    for camera_file in (None, tmp_path / "camera.yaml"):
        with pytest.raises(SourceError, match=r"none of 3 images can be read \(first: 0\.png: cannot be decoded"):
            open_source(str(tmp_path), camera_file=camera_file)


def test_a_frame_of_another_size_ends_the_run(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    write_image(tmp_path / "frame2.png", rgb_image(2, width=40))
    frames = open_source(str(tmp_path), fov_deg=60.0).frames()
    assert [next(frames).index, next(frames).index] == [0, 1]
    with pytest.raises(SourceError, match=r"frame2\.png: 40x24 px, but the camera is 32x24 px.*--camera"):
        next(frames)


def test_a_camera_of_another_size_is_noticed(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 2)
    camera = tmp_path / "camera.yaml"
    camera.write_text(CAMERA_YAML.replace("32", "64"))
    with pytest.raises(SourceError, match=r"frame0\.png: 32x24 px, but the camera is 64x24 px"):
        next(open_source(str(tmp_path / "images"), camera_file=camera).frames())


def test_closing_ends_the_frames(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    source = open_source(str(tmp_path), fov_deg=60.0)
    frames = source.frames()
    next(frames)
    source.close()
    source.close()
    assert list(frames) == []
