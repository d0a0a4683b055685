"""The `vo` command as a user types it: exit codes, what is printed, what is left on disk."""

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
from command_line import NUM_FRAMES, ORB, ROOT, leave_nothing, refused, vo, vo_process, wait_for_lines
from rich.console import Console
from synthetic_drive import write_drive
from synthetic_sources import write_tum

from vo import cli
from vo.config import Config
from vo.config_loader import load_config
from vo.progress import progress
from vo.trajectory import read_trajectory


@pytest.fixture(scope="module")
def drive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drive(tmp_path_factory.mktemp("drive"), NUM_FRAMES)


@pytest.fixture
def without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_nothing(tmp_path, monkeypatch)


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
