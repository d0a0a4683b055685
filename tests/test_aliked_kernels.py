"""ALIKED's Triton kernels against PyTorch's operations: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

from test_aliked import random_network, smooth_image

from frontends.aliked import Aliked, AlikedConfig
from frontends.aliked_detection import suppress_non_maxima
from frontends.aliked_static import AlikedStatic
from frontends.static_form import ExtractorChoice

pytest.importorskip("triton", reason="triton is not installed (pip install 'lightvo[dev]' on Linux)")
from frontends import aliked_kernels
from frontends.aliked_kernels import TritonKernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes its time per program and little per lane."""
    if DEVICE.type == "cuda":
        return
    for name in ("_PIXELS", "_SAMPLES", "_TAPS"):
        monkeypatch.setattr(aliked_kernels, name, 1024)


@pytest.mark.parametrize(("size", "num_rounds"), [((33, 27), 1), ((23, 37), 3), ((5, 5), 2)])
def test_suppression(size: tuple[int, int], num_rounds: int):
    generator = torch.Generator().manual_seed(num_rounds)
    scores = (torch.randint(0, 12, (1, 1, *size), generator=generator) / 12).to(DEVICE)  # with ties
    torch.testing.assert_close(
        TritonKernels().suppress(scores, num_rounds), suppress_non_maxima(scores, num_rounds), rtol=0, atol=0
    )


def test_the_whole_network_with_its_deformable_convolutions_and_features():
    extractor = Aliked(AlikedConfig(max_keypoints=48), random_network("t16").state_dict(), DEVICE)
    form, image = AlikedStatic(extractor), torch.from_numpy(smooth_image(64, 64)).to(DEVICE)
    with torch.no_grad():
        expected = form.program(image.shape, ExtractorChoice())(image)
        found = form.program(image.shape, ExtractorChoice(kernels="triton"))(image)
    assert int(found.count) == int(expected.count) > 20
    # The scores of a random network saturate: of two neighbours that are all but equal either may be the keypoint.
    distances = (expected.keypoints[:, None] - found.keypoints[None]).norm(dim=2)
    same, nearest = distances.amin(dim=1) < 1e-4, distances.argmin(dim=1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found.scores[nearest][same], expected.scores[same], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.descriptors[nearest][same], expected.descriptors[same], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu_that_is_not_there():
    """Triton's interpreter allows more than its compiler: these are the types that the network calls them with."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["local_maxima_kernel", "deformed_taps_kernel", "features_kernel"]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from frontends import aliked_kernels as kernels

POINTERS = {"is_maximum": "*u8", "row_cells": "*i32", "column_cells": "*i32"}
NUMBERS = {name: "i32" for name in ("height", "width", "num_taps", "count", "top", "left", "padded_width")}
NUMBERS |= {name: "fp32" for name in ("limit", "gain", "alpha")}
for kernel, constants in (
    (kernels.local_maxima_kernel, {"RADIUS": 2, "BLOCK": 256}),
    (kernels.deformed_taps_kernel, {"CHANNELS": 16, "BLOCK": 64}),
    (kernels.features_kernel, {"CHANNELS": 8, "QUARTER": 16, "CORNERS": 1, "BLOCK": 32}),
):
    types = {name: "constexpr" if name in constants else NUMBERS.get(name, POINTERS.get(name, "*fp32"))
             for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = compile(ASTSource(fn=kernel, signature=types, constexprs=values), target=GPUTarget("cuda", 90, 32))
    assert len(made.asm["cubin"]) > 0
    print(kernel.__name__)
"""


def test_taps_far_outside_the_map_are_zero():
    x = torch.ones(1, 16, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    offsets = torch.full((64, 18), 100.0, device=DEVICE)
    assert not TritonKernels().deformed_taps(x, offsets, 100.0).any()
    assert TritonKernels().deformed_taps(x, offsets * 0, 2.0)[9].sum() == 9 * 16


def test_several_images_are_refused():
    with pytest.raises(ValueError, match="one image, got 2"):
        TritonKernels().deformed_taps(torch.zeros(2, 16, 4, 4), torch.zeros(32, 18), 1.0)
