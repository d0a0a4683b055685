"""What a user types is what a command is asked for: every flag reaches the field of its request."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import shlex
from pathlib import Path

import pytest

from vo import cli
from vo.scene_view import Eye
from vo.shared_options import request

# module, what it runs, what is typed, fields of the request that then differ from what they are without flags
COMMANDS = (
    (
        "vo.run_command.run_command",
        "run demo --config orb --set a.b=1 --set c.d=2 --output out --publish off --keys k --record r.mcap --view "
        "--save-tracks --device cpu --max-frames 3 --realtime --camera c.yaml --fps 25 --watchdog-s 9 "
        "--self-calibrate --quiet --fallback-orb",
        {
            "source": "demo",
            "config": "orb",
            "overrides": ("a.b=1", "c.d=2"),
            "output": Path("out"),
            "publish": "off",
            "keys": Path("k"),
            "record": Path("r.mcap"),
            "views": True,
            "saves_tracks": True,
            "device": "cpu",
            "max_frames": 3,
            "is_realtime": True,
            "camera_file": Path("c.yaml"),
            "fps": 25.0,
            "watchdog_s": 9.0,
            "self_calibrates": True,
            "is_quiet": True,
            "falls_back_to_orb": True,
        },
    ),
    (
        "vo.view_command.view_command",
        "view tcp://h:1 --truth t --overview --hide truth,camera --headless --screenshot s.png --video v.mp4 "
        "--video-fps 5 --size 320x240 --after-s 2 --until-finished",
        {
            "endpoint": "tcp://h:1",
            "truth": Path("t"),
            "eye": Eye.OVERVIEW,
            "hidden": ("truth", "camera"),
            "is_headless": True,
            "screenshot": Path("s.png"),
            "video": Path("v.mp4"),
            "video_fps": 5.0,
            "width": 320,
            "height": 240,
            "after_s": 2.0,
            "until_finished": True,
        },
    ),
    (
        "vo.replay_command.replay_command",
        "replay f.mcap --publish tcp://h:1 --keys k --rate 2 --start 1 --end 3 --delay 0 --loop --quiet",
        {
            "path": Path("f.mcap"),
            "endpoint": "tcp://h:1",
            "keys": "k",
            "rate": 2.0,
            "start_s": 1.0,
            "end_s": 3.0,
            "delay_s": 0.0,
            "is_looped": True,
            "is_quiet": True,
        },
    ),
    (
        "vo.export_command.export_command",
        "export colmap run --output o --source s --camera c --frames all --every 2 --undistort --max-error-px 1",
        {
            "kind": "colmap",
            "path": Path("run"),
            "output": Path("o"),
            "writes_images": True,
            "source": "s",
            "camera_file": Path("c"),
            "frames": "all",
            "every": 2,
            "undistorts": True,
            "max_error_px": 1.0,
        },
    ),
    (
        "vo.eval_command.eval_command",
        "eval a b --truth t --truth-times u --truth-sensor v --align none --max-time-difference-s 1 --report r --json",
        {
            "trajectories": (Path("a"), Path("b")),
            "truth": Path("t"),
            "truth_times": Path("u"),
            "truth_sensor": Path("v"),
            "align": "none",
            "max_time_difference_s": 1.0,
            "report": Path("r"),
            "is_json": True,
        },
    ),
    (
        "vo.batch_command.batch_command",
        "batch m --output o --data d --jobs 2 --device cpu --max-frames 3 --ray local --ray-cpus 2 "
        "--ray-gpus 0.5 --quiet",
        {
            "manifest": "m",
            "output": Path("o"),
            "data": "d",
            "num_jobs": 2,
            "device": "cpu",
            "max_frames": 3,
            "ray": "local",
            "ray_cpus": 2.0,
            "ray_gpus": 0.5,
            "is_quiet": True,
        },
    ),
    (
        "vo.bench.bench_command",
        "bench demo --set a.b=1 --against orb,opencv --repeats 2 --frames 3 --threads 1 --opencv-models a,b "
        "--fov-deg 60 --stream latest --stream-frames 4 --stream-hz 5 --json",
        {
            "source": "demo",
            "overrides": ("a.b=1",),
            "against": ("orb", "opencv"),
            "num_repeats": 2,
            "num_frames": 3,
            "num_threads": 1,
            "model_files": ("a", "b"),
            "fov_deg": 60.0,
            "stream_modes": ("latest",),
            "num_stream_frames": 4,
            "stream_hz": 5.0,
            "is_json": True,
        },
    ),
    (
        "vo.bench_matching.bench_matching_command",
        "bench-matching p --images i --config orb --max-pairs 2 --skip-large --epipolar-threshold 0.1 "
        "--output o --json",
        {
            "pairs": Path("p"),
            "images": Path("i"),
            "config": "orb",
            "max_pairs": 2,
            "skips_large": True,
            "epipolar_threshold": 0.1,
            "output": Path("o"),
            "is_json": True,
        },
    ),
    (
        "vo.calibrate_command.calibrate_command",
        "calibrate webcam:0 --board chessboard:9x6 --square-m 0.03 -o c --model brown --print-board p.pdf --paper a3 "
        "--views 9 --save-images s --picture q --headless --strict --json --quiet",
        {
            "source": "webcam:0",
            "board": "chessboard:9x6",
            "square_m": 0.03,
            "output": Path("c"),
            "model": "brown",
            "print_board": Path("p.pdf"),
            "paper": "a3",
            "num_views": 9,
            "save_images": Path("s"),
            "picture": Path("q"),
            "is_headless": True,
            "is_strict": True,
            "is_json": True,
            "is_quiet": True,
        },
    ),
)


@pytest.mark.parametrize(("target", "typed", "fields"), COMMANDS, ids=[target for target, _, _ in COMMANDS])
def test_flags_reach_the_request(
    target: str, typed: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    module, _, name = target.rpartition(".")
    monkeypatch.setattr(importlib.import_module(module), name, lambda given: asked.append(given) or 0)
    assert cli.main(shlex.split(typed)) == 0
    (given,) = asked
    assert dataclasses.is_dataclass(given)
    got = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    assert {name: got[name] for name in fields} == fields
    left = {name for name in got if name not in fields}
    assert all(not got[name] for name in left), f"set without a flag: {left}"


def test_a_field_without_a_flag_is_no_silent_default() -> None:
    @dataclasses.dataclass
    class Asked:
        names: tuple[str, ...] = ()
        forgotten: int = 7

    options = argparse.Namespace(names=["a", "b"])
    with pytest.raises(AttributeError, match="forgotten"):
        request(Asked, options)
    assert request(Asked, options, forgotten=1) == Asked(("a", "b"), 1)
