"""The engine: runs the networks of a frontend over static shapes, as CUDA graphs on streams of their own.

To its users it is an extractor and a matcher like any other. What differs: `extract` returns at once, with features
that the device is still computing (`Features.pending`), and `match` waits for nothing but its own result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frontends.base import Extractor, Matcher, check_settings, setting

PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the networks run on a GPU. What is "auto" is measured at the start, and the summary says what was chosen."""

    graphs: str = setting(
        "auto",
        choices=("auto", "off", "emulated"),
        help="auto: CUDA graphs over static shapes on a GPU; emulated: the same without CUDA, to test; off: neither",
    )
    depth: str = setting(
        "auto",
        choices=("auto", "whole", "blocks", "speculative"),
        help="layers of the matcher: all in one graph, or blocks of them until confident; speculative: one block ahead",
    )
    layers_per_block: int = setting(
        2, minimum=1, maximum=32, help="layers of the matcher between two looks at its flag"
    )
    width: str = setting(
        "auto",
        choices=("auto", "full", "buckets"),
        help="buckets: points that are out are left out, in steps of a size",
    )
    compile: str = setting(
        "auto", choices=("auto", "off", "on"), help="torch.compile before the capture; auto: on a GPU, in the budget"
    )
    compile_budget_s: float = setting(
        20.0, minimum=0.0, maximum=3600.0, help="time after which nothing further is compiled, s"
    )
    kernels: str = setting(
        "auto",
        choices=("auto", "torch", "triton"),
        help="auto: own kernels where they are 1.3 times as fast as torch's",
    )
    extractor_precision: str = setting("auto", choices=PRECISIONS, help="auto: the fastest that passes the gate")
    matcher_precision: str = setting("auto", choices=PRECISIONS, help="auto: the fastest that passes the gate")
    upload_slots: int = setting(3, minimum=2, maximum=16, help="images on their way to the device at once")

    def __post_init__(self) -> None:
        check_settings(self)


class Engine:
    """An extractor and a matcher on one device.

    extractor, matcher  what callers use; each from one thread at a time, the two from different ones as they like.
    choices             what the warm-up measured and chose, one sentence each, for the summary.
    fallbacks           what was meant to run and could not, one sentence each, for the summary.
    """

    def __init__(self, extractor: Extractor, matcher: Matcher) -> None:
        self.extractor = extractor
        self.matcher = matcher
        self.choices: tuple[str, ...] = ()
        self.fallbacks: tuple[str, ...] = ()

    def warm_up(self, width: int, height: int, channels: int = 3) -> None:
        """Captures and measures everything for images of width x height px with 3 (RGB) or 1 channel.

        Call it before the threads of a run start. An image of another shape is prepared for when it comes, which takes
        as long. Raises DeviceError.
        """


def create_engine(config: EngineConfig, extractor: Extractor, matcher: Matcher, device: torch.device) -> Engine:
    """An engine for methods that are loaded already; those without a static form run as they are."""
    return Engine(extractor, matcher)
