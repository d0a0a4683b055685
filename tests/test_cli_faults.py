"""What `vo run` makes of bad input and of interruption: one line for every fault, and what it had computed."""

from __future__ import annotations

import json
import re
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
from command_line import NUM_FRAMES, ORB, leave_nothing, refused, vo, vo_process, wait_for_lines
from synthetic_drive import HEIGHT, WIDTH, write_drive
from synthetic_sources import cut_short, gray_image, write_image, write_kitti, write_video

from vo.config_loader import load_config
from vo.trajectory import read_trajectory


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), NUM_FRAMES)


@pytest.fixture
def without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_nothing(tmp_path, monkeypatch)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in refused(capfd, "run", tmp_path / "nowhere", *ORB)
    assert "nowhere" in refused(capfd, "run", f"kitti:{tmp_path / 'nowhere'}", *ORB)


def test_empty_directory(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert str(tmp_path) in refused(capfd, "run", tmp_path, *ORB)
    for kind in ("kitti", "tum", "euroc", "images"):
        assert str(tmp_path) in refused(capfd, "run", f"{kind}:{tmp_path}", *ORB)


def test_missing_calibration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sequence = write_kitti(tmp_path)
    (sequence / "calib.txt").unlink()
    assert "calib.txt" in refused(capfd, "run", f"kitti:{sequence}", *ORB)
    write_image(tmp_path / "plain" / "0.png", gray_image(0))
    assert "--camera" in refused(capfd, "run", tmp_path / "plain", *ORB)
    assert "camera.yaml" in refused(capfd, "run", tmp_path / "plain", *ORB, "--camera", tmp_path / "camera.yaml")


def test_unknown_config_key(drive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("frontend: {extractor: {name: orb, max_keypiont: 3}}\n")
    message = refused(capfd, "run", drive, "--config", own)
    assert message.startswith(
        "own.yaml: frontend.extractor.max_keypiont: unknown key; did you mean max_keypoints? valid: "
    )
    message = refused(capfd, "run", drive, *ORB, "--set", "frontend.extractor.max_keypiont=3")
    assert message.startswith("--set: frontend.extractor.max_keypiont: unknown key; did you mean max_keypoints?")
    assert "presets: " in refused(capfd, "run", drive, "--config", "kity")


def test_wrong_type(drive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("odometry:\n  window_size: many\n")
    message = refused(capfd, "run", drive, "--config", own)
    assert message == "own.yaml: odometry.window_size: expected an integer, got the string 'many'"
    message = refused(capfd, "run", drive, *ORB, "--set", "pipeline.threaded=1")
    assert message == "--set: pipeline.threaded: expected true or false, got the integer 1"


def test_corrupt_image_in_the_middle_is_skipped_and_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sequence = write_drive(tmp_path)
    (sequence / "image_0" / "000007.png").write_bytes(b"\x89PNG but no more")
    assert vo("run", sequence, *ORB, "--output", tmp_path / "out") == 0
    out, err = capfd.readouterr()
    assert re.search(r"19 read, 19 with a pose, \d+ keyframes; 0 dropped, 1 skipped", out)
    assert re.search(r"skipped +000007\.png: ", out)
    assert all(line.startswith("frame ") for line in err.splitlines()), err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["frames_skipped"], summary["poses"]) == (1, 19)
    assert (tmp_path / "out" / "trajectory_kitti_frames.txt").read_text().split() == [
        str(index) for index in range(NUM_FRAMES) if index != 7
    ]


def test_frames_of_changing_size(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Refused where it happens; what was computed until then is on the disk."""
    sequence = write_drive(tmp_path)
    write_image(sequence / "image_0" / "000012.png", gray_image(0, WIDTH // 2, HEIGHT // 2))
    code = vo("run", sequence, *ORB, "--quiet", "--output", tmp_path / "out")
    out, err = capfd.readouterr()
    assert (code, out) == (2, "")
    assert re.fullmatch(r"vo: error: .*000012\.png: 160x120 px, but the camera is 320x240 px.*\n", err)
    assert len(read_trajectory(tmp_path / "out" / "trajectory_tum.txt")) == 12
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["frames_processed"] == 12


@pytest.mark.parametrize("damage", ["noise", "empty", "header"])
def test_video_that_cannot_be_decoded(tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str) -> None:
    path = tmp_path / "clip.mp4"
    match damage:
        case "noise":
            path.write_bytes(np.random.default_rng(0).bytes(5000))
        case "empty":
            path.touch()
        case _:
            write_video(path)
            cut_short(path, 0.1)
    assert "clip.mp4" in refused(capfd, "run", path, *ORB, "--fov-deg", 60)


def test_missing_weights_offline(
    drive: Path, tmp_path: Path, without_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """One line with the remedy, before anything is written or computed."""
    output = tmp_path / "out"
    arguments = ("--set", "frontend.extractor.weights=aliked-t16", "--publish", "off", "--output", output)
    err = refused(capfd, "run", drive, *arguments)
    assert "aliked-t16" in err and "vo weights fetch" in err and "--fallback-orb" in err
    assert not (output / "trajectory_tum.txt").exists()


def test_missing_weights_offline_with_a_way_out(
    drive: Path, tmp_path: Path, without_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    wanted = ("--set", "frontend.extractor.weights=aliked-t16")
    arguments = (*wanted, "--publish", "off", "--fallback-orb", "--max-frames", 5, "--output", output)
    assert vo("run", drive, *arguments) == 0
    out, err = capfd.readouterr()
    assert re.search(r"fallback +ORB .*aliked-t16", out)
    assert "ORB" in err.splitlines()[0]
    (fallback,) = json.loads((output / "summary.json").read_text())["fallbacks"]
    assert "aliked-t16" in fallback
    assert load_config(output / "config.yaml").frontend.extractor.name == "orb"


def test_port_already_in_use(drive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], free_port: int) -> None:
    """Refused before anything is computed, for either of the two ports."""
    for port in (free_port, free_port + 1):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", port))
            taken.listen()
            arguments = ("--config", "orb", "--publish", f"tcp://127.0.0.1:{free_port}", "--output", tmp_path / "out")
            message = refused(capfd, "run", drive, *arguments)
        assert str(port) in message and "in use" in message and "--publish off" in message
    assert not (tmp_path / "out" / "trajectory_tum.txt").exists()


@pytest.mark.parametrize("endpoint", ["5570", "tcp://0.0.0.0:5570", "udp://127.0.0.1:5570", "tcp://127.0.0.1:99999"])
def test_bad_endpoint(drive: Path, capfd: pytest.CaptureFixture[str], endpoint: str) -> None:
    assert endpoint in refused(capfd, "run", drive, "--config", "orb", "--publish", endpoint)


def test_output_that_cannot_be_written(drive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert "file" in refused(capfd, "run", drive, *ORB, "--output", tmp_path / "file" / "out")


def test_cuda_that_is_not_there(drive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "frontend.device: cuda is not available" in refused(capfd, "run", drive, *ORB, "--device", "cuda")


def test_camera_file_of_another_size(drive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    camera = tmp_path / "camera.yaml"
    camera.write_text("model: pinhole\nwidth: 64\nheight: 48\nfx: 60\nfy: 60\ncx: 32\ncy: 24\ndistortion: []\n")
    assert "320x240" in refused(capfd, "run", drive, *ORB, "--quiet", "--camera", camera)


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threaded", "number"),
    [("true", signal.SIGINT), ("true", signal.SIGTERM), ("true", signal.SIGHUP), ("false", signal.SIGINT)],
)
def test_interrupt_writes_what_was_computed(drive: Path, tmp_path: Path, threaded: str, number: signal.Signals) -> None:
    output = tmp_path / "out"
    # Paced, so that the run is certain to be in the middle when the signal comes.
    arguments = (*ORB, "--realtime", "--set", f"pipeline.threaded={threaded}", "--output", output)
    process = vo_process("run", drive, *arguments)
    wait_for_lines(output / "trajectory_tum.txt", 4)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    trajectory = read_trajectory(output / "trajectory_tum.txt")
    summary = json.loads((output / "summary.json").read_text())
    assert 4 <= len(trajectory) < NUM_FRAMES
    assert summary["interrupted"]
    assert summary["poses"] == len(trajectory)
    assert (output / "trajectory.png").stat().st_size > 1000
    assert f"(interrupted after {len(trajectory)})" in out
