"""What the user writes, and what is recognised in a bare path."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from synthetic_sources import (
    CAMERA_YAML,
    gray_image,
    write_euroc,
    write_image,
    write_images,
    write_kitti,
    write_tum,
    write_video,
)

from vo.sources import Source, open_source
from vo.sources.manifest import datasets_directory
from vo.sources.opener import recognise
from vo.types import SourceError


def test_bare_paths_are_recognised(tmp_path: Path) -> None:
    kitti = write_kitti(tmp_path / "kitti")
    tum = write_tum(tmp_path, ["1.0"], [])
    euroc = write_euroc(tmp_path)
    clip = write_video(tmp_path / "clips" / "clip.mp4").parent
    (clip / "camera.yaml").write_text(CAMERA_YAML)
    write_images(tmp_path / "images", 2)
    recognised = {path: recognise(path) for path in (kitti, tum, euroc, euroc / "mav0", clip, tmp_path / "images")}
    assert list(recognised.values()) == ["kitti", "tum", "euroc", "euroc", "clip", "images"]
    assert open_source(str(kitti)).name == str(kitti)
    (kitti / "calib.txt").unlink()
    with pytest.raises(SourceError, match=r"calib\.txt: not found"):
        open_source(str(kitti))


def test_what_fits_nothing_says_what_is_there_and_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"is empty; expected images, calib\.txt with image_0 \(KITTI\)"):
        open_source(str(tmp_path))
    for name in ("notes.txt", "b.csv", "c.csv", "d.csv", "e.csv", "f.csv"):
        (tmp_path / name).touch()
    (tmp_path / "a").mkdir()
    with pytest.raises(SourceError, match=r"holds a/, b\.csv, c\.csv, d\.csv, e\.csv and 2 more; expected images"):
        open_source(str(tmp_path))
    with pytest.raises(SourceError, match=r"none: no such file or directory; expected `demo`, `webcam:0`"):
        open_source(str(tmp_path / "none"))
    with pytest.raises(SourceError, match="holds no images"):
        open_source(f"images:{tmp_path}")
    with pytest.raises(SourceError, match="no such directory"):
        open_source(f"images:{tmp_path / 'none'}")
    with pytest.raises(SourceError, match="names nothing"):
        open_source("")
    with pytest.raises(SourceError, match="cannot be opened as a video"):
        open_source(str(tmp_path / "notes.txt"), fov_deg=60.0)
    with pytest.raises(SourceError, match="a device; write webcam:/dev/null"):
        open_source("/dev/null")


def test_one_image_is_no_sequence(tmp_path: Path) -> None:
    write_image(tmp_path / "one.png", gray_image(0))
    with pytest.raises(SourceError, match=f"name its directory: {tmp_path}"):
        open_source(str(tmp_path / "one.png"))


def test_a_directory_may_be_called_like_a_prefix(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "webcam", 1)
    assert open_source("webcam", fov_deg=60.0).num_frames == 1
    write_images(tmp_path / "12:30", 1)
    assert open_source("12:30", fov_deg=60.0).num_frames == 1


def test_every_source_keeps_the_contract(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 1)
    sources: list[Source] = [
        open_source(f"kitti:{write_kitti(tmp_path)}"),
        open_source(str(tmp_path / "images"), fov_deg=60.0),
        open_source(str(write_video(tmp_path / "clip.mp4")), fov_deg=60.0),
    ]
    for source in sources:
        frames = list(source.frames())
        assert (frames[0].camera, source.num_frames) == (source.camera, len(frames))
        assert not source.is_live
        source.close()


def test_the_bundled_clip() -> None:
    sample = datasets_directory() / "sample"
    if not (sample / "clip.mp4").is_file():
        pytest.skip("datasets/sample is not there yet")
    source = open_source("demo")
    frames = list(source.frames())
    assert (source.name, source.skipped) == ("demo", ())
    assert len(frames) == source.num_frames == len((sample / "times.txt").read_text().split())
    assert source.ground_truth == sample / "groundtruth.txt"


def test_opening_imports_nothing_heavy_beforehand() -> None:
    program = "import sys; import vo.sources; print([m for m in ('cv2', 'torch') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
