"""A GPU that fails: one line for the user, the CPU instead where that is allowed, and results in any case."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_pipeline import PointExtractor, PointMatcher, PointSource, point_frontend

import vo.frontend
import vo.run_command
from frontends.base import DeviceError, Features, Matches
from frontends.device_faults import device_error
from frontends.engine import Engine
from vo.cli import main
from vo.config import Config
from vo.frontend import Frontend, on_device
from vo.pipeline import run
from vo.run_meter import RunMeter
from vo.types import Camera, ConfigError, SourceError

CAMERA = Camera(64, 48, np.array([[50.0, 0, 32], [0, 50.0, 24], [0, 0, 1]]))
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total of ...")
DEVICE_LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with ...")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OUT_OF_MEMORY,
            r"GPU is out of memory \(CUDA out of memory\. Tried to allocate 2\.00 GiB\); lower .*--device cpu",
        ),
        (DEVICE_LOST, r"GPU failed \(CUDA error: an illegal memory access was encountered\); check nvidia-smi"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), r"GPU failed \(cuDNN error"),
        (torch.AcceleratorError(""), r"GPU failed \(AcceleratorError\)"),
    ],
)
def test_one_line_for_what_the_device_does(error: RuntimeError, says: str) -> None:
    found = device_error(error)
    assert isinstance(found, DeviceError)
    assert "\n" not in str(found)
    with pytest.raises(DeviceError, match=rf"^frontend\.device: the {says}"):
        raise found


@pytest.mark.parametrize("error", [RuntimeError("shapes do not agree"), ValueError("CUDA error"), SourceError("gone")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    assert device_error(error) is None


class FailingExtractor(PointExtractor):
    def __init__(self, at: int, error: Exception) -> None:
        self._at, self._error = at, error

    def extract(self, image: NDArray[np.uint8]) -> Features:
        if int(image[0, 0]) == self._at:
            raise self._error
        return super().extract(image)


class FailingMatcher(PointMatcher):
    def __init__(self, at: int, error: Exception) -> None:
        self._num_left, self._error = at, error

    def match(self, features0: Features, features1: Features) -> Matches:
        self._num_left -= 1
        if self._num_left == 0:
            raise self._error
        return super().match(features0, features1)


@pytest.mark.parametrize("threaded", [True, False])
@pytest.mark.parametrize("where", ["extract", "match"])
@pytest.mark.parametrize("error", [OUT_OF_MEMORY, DEVICE_LOST], ids=["memory", "lost"])
def test_a_kernel_that_fails_ends_the_run_and_what_was_posed_is_delivered(
    threaded: bool, where: str, error: RuntimeError
) -> None:
    frontend = point_frontend()
    if where == "extract":
        frontend = replace(frontend, extractor=FailingExtractor(10, error))
    else:
        frontend = replace(frontend, matcher=FailingMatcher(12, error))
    delivered: list[int] = []
    meter = RunMeter()
    start_s = time.monotonic()
    with pytest.raises(DeviceError, match=r"^frontend\.device: the GPU"):
        run(
            Config(),
            PointSource(),
            frontend,
            [lambda result: delivered.append(result.captured.frame.index)],
            threaded=threaded,
            meter=meter,
        )
    assert time.monotonic() - start_s < 30
    assert delivered == list(range(len(delivered)))
    assert len(delivered) == meter.num_processed >= 3


# --- the CPU in the place of the GPU ----------------------------------------------------------------------------------


def pretend_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vo.frontend, "select_device", lambda name: CPU if name == "cpu" else CUDA)


class FailingEngine(Engine):
    def __init__(self, error: Exception | None) -> None:
        self.extractor, self.matcher = PointExtractor(), PointMatcher()
        self.choices, self.fallbacks = ("a choice",), ("no graphs",)
        self._error = error

    def warm_up(self, width: int, height: int, channels: int = 3, images: object = ()) -> None:
        assert (width, height, channels, images) == (64, 48, 3, ())
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("where", ["load", "warm-up"])
def test_auto_falls_back_to_the_cpu_and_says_so(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    pretend_there_is_a_gpu(monkeypatch)
    asked: list[str] = []

    def load(device: torch.device) -> tuple[Config, Frontend]:
        asked.append(device.type)
        if device.type == "cuda" and where == "load":
            raise OUT_OF_MEMORY
        engine = FailingEngine(DeviceError("frontend.device: the GPU is gone")) if device.type == "cuda" else None
        return Config(), replace(point_frontend(), engine=engine)

    _, frontend = on_device("auto", load, CAMERA)
    assert asked == ["cuda", "cpu"]
    assert frontend.fallbacks[0] == "a fallback"
    assert frontend.fallbacks[1].startswith("the CPU takes the place of the GPU: the GPU is ")
    with pytest.raises(DeviceError, match=r"^frontend\.device: "):
        on_device("cuda", load, CAMERA)
    assert asked == ["cuda", "cpu", "cuda"], "nothing else is tried where the user asked for the GPU"


def test_what_the_engine_replaced_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_there_is_a_gpu(monkeypatch)
    engine = FailingEngine(None)
    _, frontend = on_device("cpu", lambda device: (Config(), replace(point_frontend(), engine=engine)), CAMERA)
    assert frontend.extractor is engine.extractor and frontend.matcher is engine.matcher
    assert frontend.fallbacks == ("a fallback", "no graphs")
    summary = run(Config(), PointSource(), frontend, max_frames=3)
    assert summary.engine == ("a choice",)


def test_other_errors_of_loading_are_not_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_there_is_a_gpu(monkeypatch)

    def load(device: torch.device) -> tuple[Config, Frontend]:
        raise ConfigError("not the GPU's fault")

    with pytest.raises(ConfigError, match="not the GPU's fault"):
        on_device("auto", load, CAMERA)


# --- the whole command ------------------------------------------------------------------------------------------------

_RUN = """
import sys, time
import numpy as np, torch
import frontends.orb
from vo.cli import program
kind = sys.argv[1]
extract, seen = frontends.orb.Orb.extract, [0]
def extracting(self, image):
    seen[0] += 1
    if seen[0] == 12 and kind != "interrupt":
        if kind == "hang":
            print("hanging", flush=True)
            time.sleep(60)
        raise {"memory": torch.OutOfMemoryError("CUDA out of memory"), "lost": torch.AcceleratorError("CUDA error: x"),
               "bug": KeyError("a bug")}[kind]
    if seen[0] == 14:
        print("running", flush=True)
    return extract(self, image)
frontends.orb.Orb.extract = extracting
sys.argv = ["vo", "run", "loop:demo", "--config", "orb", "--output", sys.argv[2], "--publish", "off", "--quiet"]
program()
"""


def start(kind: str, output: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [sys.executable, "-c", _RUN, kind, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.parametrize(
    ("kind", "exit_code", "says"),
    [("memory", 2, "vo: error: frontend.device: the GPU is out of memory"), ("bug", 1, "KeyError: 'a bug'")],
)
def test_a_failing_stage_leaves_results(tmp_path: Path, kind: str, exit_code: int, says: str) -> None:
    process = start(kind, tmp_path / "out")
    _, said = process.communicate(timeout=120)
    assert process.returncode == exit_code
    assert says in said
    assert ("Traceback" in said) == (kind == "bug")
    assert_results(tmp_path / "out", is_interrupted=False)


@pytest.mark.parametrize("kind", ["interrupt", "hang"])
def test_ctrl_c_ends_the_run_with_results(tmp_path: Path, kind: str) -> None:
    """Also where a stage hangs in its driver: it is left behind, and the process ends without it."""
    process = start(kind, tmp_path / "out")
    assert process.stdout is not None
    assert process.stdout.readline().strip() == ("hanging" if kind == "hang" else "running")
    process.send_signal(signal.SIGINT)
    start_s = time.monotonic()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert time.monotonic() - start_s < 40, "a stage that sleeps for a minute must not be waited for"
    summary = assert_results(tmp_path / "out", is_interrupted=True)
    assert any("stage extract was left behind" in text for text in summary["fallbacks"]) == (kind == "hang")


def assert_results(directory: Path, *, is_interrupted: bool) -> dict[str, list[str]]:
    summary = json.loads((directory / "summary.json").read_text())
    lines = (directory / "trajectory_tum.txt").read_text().splitlines()
    assert summary["interrupted"] is is_interrupted
    assert len([line for line in lines if not line.startswith("#")]) == summary["poses"] >= 5
    assert isinstance(summary, dict)
    return summary


def test_no_gpu_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["run", "demo", "--config", "orb", "--device", "cuda", "--publish", "off"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("vo: error: frontend.device: cuda is not available") and "\n" not in said
