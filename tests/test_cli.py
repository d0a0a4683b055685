"""The `vo` command as a user types it: exit codes, one line for every fault, what is printed, what is left on disk."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
from rich.console import Console
from synthetic_drive import HEIGHT, WIDTH, write_drive
from synthetic_sources import cut_short, gray_image, write_image, write_kitti, write_tum, write_video

from vo import cli
from vo.config import Config
from vo.config_loader import load_config
from vo.progress import progress
from vo.trajectory import read_trajectory

ROOT = Path(__file__).parents[1]
ORB = ("--config", "orb", "--publish", "off")
NUM_FRAMES = 20


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), NUM_FRAMES)


def vo(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Runs `vo`, which must end with exit code 2 and one line on standard error, nothing on standard output."""
    code = vo(*arguments)
    out, err = capfd.readouterr()
    assert code == 2, f"exit code {code}: {err}"
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("vo: error: ")
    return err.removeprefix("vo: error: ").rstrip("\n")


def vo_process(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-m", "vo", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.fixture
def without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights in any place, no caches, and a network that refuses every connection at once."""
    dropped = ("LIGHTVO_", "XDG_", "HTTP", "http", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")
    for name in [name for name in os.environ if name.startswith(dropped)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


# --- help ------------------------------------------------------------------------------------------------------------


def test_importing_the_command_imports_nothing_heavy() -> None:
    """What makes `vo --help` answer at once, without a stopwatch."""
    code = "import sys, vo.cli; vo.cli.build_parser().format_help(); print(*sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    heavy = {"torch", "cv2", "zmq", "numpy", "yaml", "scipy", "matplotlib", "rich", "evo", "msgpack"}
    assert not heavy & {name.partition(".")[0] for name in printed.split()}


@pytest.mark.parametrize("command", ["", "run", "listen", "eval", "weights", "doctor"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        vo(*command.split(), "--help")
    assert ended.value.code == 0
    assert "usage: vo" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("fly",),
        ("run",),
        ("run", "demo", "--fast"),
        ("run", "demo", "--max-frames", "0"),
        ("run", "demo", "--max-frames", "x"),
        ("run", "demo", "--device", "tpu"),
        ("eval", "a.txt"),
        ("weights",),
    ],
)
def test_wrong_usage_is_one_line(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        vo(*arguments)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"vo: error: .*\(see vo[a-z ]* --help\)\n", err)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vo("--version")
    assert re.fullmatch(r"lightvo \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_the_command_knows_the_default_endpoint() -> None:
    assert Config().publisher.endpoint == cli.DEFAULT_ENDPOINT


# --- a run -----------------------------------------------------------------------------------------------------------


def test_run_leaves_everything_in_the_output(drive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "deep" / "out"
    assert vo("run", f"kitti:{drive}", *ORB, "--output", output) == 0
    out, err = capsys.readouterr()
    assert re.search(r"frames +20 read, 20 with a pose, [1-9]\d* keyframes; 0 dropped, 0 skipped, lost never", out)
    assert re.search(r"evaluation +ATE [\d.e-]+ m over 1\.9 m \(sim3\)", out)
    assert re.search(r"speed +[\d.]+ fps with orb \+ nearest on cpu; latency p50 \d+ ms, p95 \d+ ms", out)
    assert str(output) in out
    assert err.startswith("frame 1 of 20: ")
    expected = {"trajectory_tum.txt", "trajectory_kitti.txt", "summary.json", "config.yaml", "trajectory.png"}
    assert expected <= {path.name for path in output.iterdir()}
    assert len(read_trajectory(output / "trajectory_tum.txt")) == NUM_FRAMES
    assert load_config(output / "config.yaml") == load_config("orb", ["publisher.endpoint=off"])
    summary = json.loads((output / "summary.json").read_text())
    assert summary["frames_read"] == summary["frames_processed"] == summary["poses"] == NUM_FRAMES
    assert summary["evaluation"]["ate_rmse_m"] < 0.1
    assert summary["evaluation"]["rpe_rot_deg"] < 0.3
    assert set(summary["stages_ms"]) == {"capture", "extract", "match", "track", "publish"}
    assert list(summary["latency_ms"]) == ["p50", "p95", "p99", "max"]
    assert summary["weights"] == [] and summary["fallbacks"] == []


def test_quiet_run_says_nothing(drive: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert vo("run", drive, *ORB, "--quiet", "--max-frames", 3) == 0
    assert capfd.readouterr() == ("", "")


def test_flags_override_the_file(drive: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("frontend: {extractor: {name: orb}, matcher: {name: nearest}, device: auto}\n")
    arguments = ("--config", own, "--set", "odometry.window_size=7", "--device", "cpu", "--publish", "off")
    assert vo("run", drive, *arguments, "--quiet", "--max-frames", 4, "--output", tmp_path / "out") == 0
    config = load_config(tmp_path / "out" / "config.yaml")
    assert config.odometry.window_size == 7
    assert (config.frontend.device, config.publisher.endpoint) == ("cpu", "off")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["frames_read"] == 4


def test_two_runs_give_the_same_trajectory(drive: Path, tmp_path: Path) -> None:
    """Bit for bit, with threads and without."""
    for name, threaded in (("a", "true"), ("b", "true"), ("c", "false")):
        arguments = ("--max-frames", 12, "--set", f"pipeline.threaded={threaded}", "--output", tmp_path / name)
        assert vo("run", drive, *ORB, "--quiet", *arguments) == 0
    first, *others = [(tmp_path / name / "trajectory_kitti.txt").read_bytes() for name in "abc"]
    assert all(other == first for other in others)


def test_realtime_replays_at_the_pace_of_the_file(drive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.monotonic()
    assert vo("run", drive, *ORB, "--realtime", "--max-frames", 11) == 0
    # 11 frames at 10 Hz.
    assert time.monotonic() - start > 1.0
    assert "11 read" in capsys.readouterr().out


def test_evaluation_that_is_not_possible_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sequence = write_drive(tmp_path, 6)
    (tmp_path / "poses" / "05.txt").write_text("1 0 0 0 0 1 0 0 0 0 1 0\n")
    assert vo("run", sequence, *ORB) == 0
    assert "evaluation  none: " in capsys.readouterr().out


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    terminal, file = StringIO(), StringIO()
    with progress(3, console=Console(file=terminal, force_terminal=True, width=80)) as advance:
        for _ in range(3):
            advance("tracking, 9.0 fps")
    assert "3/3" in terminal.getvalue() and "tracking, 9.0 fps" in terminal.getvalue()
    with progress(None, console=Console(file=file)) as advance:
        for _ in range(3):
            advance("tracking, 9.0 fps")
    assert file.getvalue() == "frame 1: tracking, 9.0 fps\n", "the next line is seconds away"


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


def wait_for_lines(path: Path, num_lines: int, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if path.exists() and len(path.read_text().splitlines()) >= num_lines:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{path} did not grow to {num_lines} lines")


# --- publishing ------------------------------------------------------------------------------------------------------


def test_listen_receives_every_pose(drive: Path, tmp_path: Path, free_port: int) -> None:
    """In another process; the sequence numbers prove it."""
    endpoint = f"tcp://127.0.0.1:{free_port}"
    listener = vo_process("listen", endpoint, "--topic", "pose", "--json", "--until-finished")
    assert (
        vo(
            "run",
            drive,
            "--config",
            "orb",
            "--publish",
            endpoint,
            "--quiet",
            "--output",
            tmp_path / "out",
            "--set",
            "publisher.linger_ms=20000",
        )
        == 0
    )
    out, err = listener.communicate(timeout=60)
    assert listener.returncode == 0, err
    messages = [json.loads(line) for line in out.splitlines()]
    assert [message["sequence"] for message in messages] == list(range(NUM_FRAMES))
    assert "the run is over: finished" in err
    written = read_trajectory(tmp_path / "out" / "trajectory_tum.txt")
    assert np.array_equal(written.positions, [message["position_xyz"] for message in messages])


def test_listen_hears_how_a_run_ended(drive: Path, tmp_path: Path, free_port: int) -> None:
    endpoint, output = f"tcp://127.0.0.1:{free_port}", tmp_path / "out"
    listener = vo_process("listen", endpoint, "--until-finished")
    run = vo_process("run", drive, "--config", "orb", "--publish", endpoint, "--realtime", "--output", output)
    wait_for_lines(output / "trajectory_tum.txt", 3)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    out, err = listener.communicate(timeout=60)
    assert "the run is over: interrupted" in err
    assert len(out.splitlines()) == len(read_trajectory(output / "trajectory_tum.txt"))
    run.communicate()


def test_listen_refuses_a_bad_address(capfd: pytest.CaptureFixture[str]) -> None:
    assert "5570" in refused(capfd, "listen", "5570")
    assert "--topic poses" in refused(capfd, "listen", "--topic", "poses")


# --- eval, weights, doctor -------------------------------------------------------------------------------------------


def test_eval(drive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert vo("run", drive, *ORB, "--quiet", "--output", tmp_path / "out") == 0
    truth = drive.parents[1] / "poses" / "05.txt"
    trajectory = tmp_path / "out" / "trajectory_tum.txt"
    assert vo("eval", trajectory, "--truth", truth, "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {
        "ate_rmse_m",
        "rpe_rot_deg",
        "rpe_trans_m",
        "rpe_distance_m",
        "rpe_distance_rot_deg",
        "rpe_distance_trans_m",
        "kitti_t_err_percent",
        "kitti_r_err_deg_per_100m",
        "coverage",
        "scale",
        "num_poses",
        "lost_episodes",
        "latency_ms",
    }
    assert (figures["coverage"], figures["num_poses"]) == (1.0, NUM_FRAMES)
    in_run = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]
    assert figures["ate_rmse_m"] == pytest.approx(in_run["ate_rmse_m"], rel=1e-9)
    assert vo("eval", trajectory, "--truth", truth, "--align", "se3", "--report", tmp_path / "report") == 0
    assert "ATE" in capsys.readouterr().out
    assert (tmp_path / "report" / "path.png").exists()


def test_eval_refuses(drive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    truth = drive.parents[1] / "poses" / "05.txt"
    assert "nowhere.txt" in refused(capfd, "eval", tmp_path / "nowhere.txt", "--truth", truth)
    (tmp_path / "words.txt").write_text("no pose at all\n")
    assert "words.txt:1" in refused(capfd, "eval", tmp_path / "words.txt", "--truth", truth)


def test_weights(without_network: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert vo("weights", "list") == 0
    assert "aliked-t16" in capfd.readouterr().out
    assert vo("weights", "list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert rows["aliked-t16"]["path"] is None
    assert rows["lightglue-light-aliked-t16"]["origin"] == "package data"
    assert vo("weights", "verify", "lightglue-light-xfeat") == 0
    assert capfd.readouterr().out.startswith("ok   lightglue-light-xfeat: ")
    assert vo("weights", "fetch", "lightglue-light-xfeat") == 0
    assert "package data" in capfd.readouterr().out
    assert "aliked-t16" in refused(capfd, "weights", "fetch", "aliked-t16")
    assert "aliked-t17" in refused(capfd, "weights", "fetch", "aliked-t17")


def test_weights_verify_finds_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "aliked-t16.pth").write_bytes(b"not these")
    monkeypatch.setenv("LIGHTVO_WEIGHTS", str(tmp_path))
    assert vo("weights", "verify") == 2
    out, err = capfd.readouterr()
    assert "bad  aliked-t16: " in out and "ok   lightglue-light-aliked-t16: " in out
    assert re.fullmatch(r"vo: error: 1 of \d+ sets of weights cannot be used; see above\n", err)


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIGHTVO_WEIGHTS", raising=False)
    assert vo("doctor", "--json") == 0, "our weights run in the place of the published ones"
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)}
    assert checks["torch"]["state"] == checks["opencv-python"]["state"] == checks["device"]["state"] == "works"
    assert cv2.__version__.split(".")[0] in checks["opencv-python"]["detail"]
    missing = checks["weights aliked-t16"]
    assert (missing["state"], missing["remedy"]) == ("missing", "vo weights fetch aliked-t16")
    for ours in ("own-aliked-t16", "lightglue-light-aliked-t16"):
        assert checks[f"weights {ours}"]["state"] == "works" and checks[f"weights {ours}"]["is_required"]
    assert vo("doctor") == 0
    assert re.search(
        r"missing +weights aliked-t16 +not at hand \(optional\) -> vo weights fetch", capfd.readouterr().out
    )


def test_doctor_sees_a_port_in_use(free_port: int) -> None:
    from vo.doctor import State, examine

    endpoint = f"tcp://127.0.0.1:{free_port}"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port + 1))
        taken.listen()
        (check,) = [check for check in examine(endpoint) if check.name == "publisher"]
    assert check.state is State.BROKEN and str(free_port + 1) in check.detail
    (check,) = [check for check in examine(endpoint) if check.name == "publisher"]
    assert check.state is State.WORKS


# --- the bundled clip and the datasets themselves --------------------------------------------------------------------

DATA = os.environ.get("LIGHTVO_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="LIGHTVO_DATA is not set")
needs_weights = pytest.mark.skipif(not os.environ.get("LIGHTVO_WEIGHTS"), reason="LIGHTVO_WEIGHTS is not set")


def test_bundled_clip_runs_on_orb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first 40 frames, with its own ground truth and intrinsics; the report says what to try next."""
    assert vo("run", "demo", *ORB, "--max-frames", 40, "--output", tmp_path / "out") == 0
    assert "try next    vo run webcam:0" in capsys.readouterr().out
    evaluation = json.loads((tmp_path / "out" / "summary.json").read_text())["evaluation"]
    assert evaluation["coverage"] > 0.95
    assert evaluation["rpe_rot_deg"] < 0.2
    assert evaluation["ate_rmse_m"] < 0.1 * evaluation["path_length_m"]


def test_bundled_clip_runs_on_our_weights_without_a_network(
    tmp_path: Path, without_network: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """What `make demo` does on a machine without internet: learned features, and one line that says whose they are."""
    arguments = ("--config", "demo", "--publish", "off", "--fallback-orb", "--max-frames", 25)
    assert vo("run", "demo", *arguments, "--output", tmp_path / "out") == 0
    lines = [line for line in capfd.readouterr().err.splitlines() if "own-aliked-t16" in line]
    assert len(lines) == 1 and "vo weights fetch aliked-t16" in lines[0]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["fallbacks"]) == 1 and "own-aliked-t16" in summary["fallbacks"][0]
    assert [used["name"] for used in summary["weights"]] == ["own-aliked-t16", "lightglue-light-aliked-t16"]
    assert summary["evaluation"]["coverage"] > 0.9 and summary["evaluation"]["rpe_rot_deg"] < 0.2


@needs_weights
@pytest.mark.parametrize("preset", ["default", "xfeat"])
def test_bundled_clip_runs_on_learned_features(preset: str, tmp_path: Path) -> None:
    """The same with threads and in a loop, to the last bit; without a warning (pytest makes errors of them)."""
    for threaded in ("true", "false"):
        arguments = ("--config", preset, "--publish", "off", "--quiet", "--max-frames", 10)
        output = ("--set", f"pipeline.threaded={threaded}", "--output", tmp_path / threaded)
        assert vo("run", "demo", *arguments, *output) == 0
    summary = json.loads((tmp_path / "true" / "summary.json").read_text())
    assert summary["poses"] == 10
    assert len(summary["weights"]) == 2
    assert summary["mean_stop_layer"] >= 1
    first, second = [(tmp_path / name / "trajectory_kitti.txt").read_bytes() for name in ("true", "false")]
    assert first == second


@needs_data
@pytest.mark.parametrize(
    "spec", ["kitti:{}/kitti/sequences/00", "tum:{}/tum/rgbd_7scenes_head", "euroc:{}/euroc/V1_01_head"]
)
def test_real_sequences_run(spec: str, tmp_path: Path) -> None:
    assert vo("run", spec.format(DATA), *ORB, "--quiet", "--max-frames", 20, "--output", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["frames_processed"] == 20
    assert summary["evaluation"] is not None
    if spec.startswith("euroc"):
        assert summary["stationary_frames"] > 15, "the vehicle stands still"


def test_tum_directory_with_few_frames(tmp_path: Path) -> None:
    """Images too small for a single keypoint: no pose, no crash, exit code 0."""
    sequence = write_tum(tmp_path, ["1.0", "1.1", "1.2"], [])
    camera = tmp_path / "camera.yaml"
    camera.write_text("model: pinhole\nwidth: 32\nheight: 24\nfx: 30\nfy: 31\ncx: 15.5\ncy: 11.5\ndistortion: []\n")
    assert vo("run", sequence, *ORB, "--quiet", "--camera", camera, "--output", tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["frames_processed"], summary["poses"], summary["lost_episodes"]) == (3, 0, 1)
