"""The engine: runs the networks of a frontend over static shapes, as CUDA graphs on streams of their own.

To its users it is an extractor and a matcher like any other. What differs: `extract` returns at once, with features
that the device is still computing (`Features.pending`), and `match` waits for nothing but its own result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from frontends.accuracy_gate import Image
from frontends.aliked import Aliked
from frontends.aliked_static import AlikedStatic
from frontends.base import DeviceError, Extractor, Matcher, check_settings, setting
from frontends.device_faults import device_error
from frontends.graphs import Backend, CudaBackend, EmulatedBackend, GraphError
from frontends.lightglue import LightGlue
from frontends.lightglue_static import DTYPES
from frontends.static_extractor import StaticExtractor
from frontends.static_form import StaticForm
from frontends.static_matcher import StaticMatcher
from frontends.tuning import TuningOptions, synthetic_images, tune_extractor, tune_matcher
from frontends.xfeat import XFeat
from frontends.xfeat_static import XFeatStatic

_LOG = logging.getLogger(__name__)

DEPTHS = ("whole", "blocks", "speculative")
WIDTHS = ("full", "buckets")
PRECISIONS = ("auto", "float32", "tf32", "bfloat16", "float16")
_MAX_TUNING_IMAGES = 6  # thousands of keypoints and matches; a start is waited for


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How the networks run on a GPU. What is "auto" is measured at the start, and the summary says what was chosen."""

    graphs: str = setting(
        "auto",
        choices=("auto", "on", "off", "emulated"),
        help="auto: CUDA graphs on a GPU if they can be captured; on: an error if not; emulated: without CUDA, to test",
    )
    depth: str = setting(
        "auto",
        choices=("auto", *DEPTHS),
        help="layers of the matcher: all in one graph, or blocks of them until confident; speculative: one block ahead",
    )
    layers_per_block: int = setting(
        2, minimum=1, maximum=32, help="layers of the matcher between two looks at its flag"
    )
    width: str = setting(
        "auto",
        choices=("auto", *WIDTHS),
        help="buckets: points that are out are left out, in steps of a size",
    )
    compile: str = setting(
        "auto",
        choices=("auto", "off", "matcher", "on"),
        help="torch.compile; auto: the matcher on a GPU, once `vo bench` or `matcher` has filled the cache; on: all",
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

    extractor, matcher  what callers use; the extractor from one thread at a time, the matcher from any.
    choices             what the warm-up measured and chose, one sentence each, for the summary.
    fallbacks           what was meant to run and could not, one sentence each, for the summary.
    """

    def __init__(self, config: EngineConfig, extractor: Extractor, matcher: Matcher, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.extractor = extractor
        self.matcher = matcher
        self.choices: tuple[str, ...] = ()
        self.fallbacks: tuple[str, ...] = ()
        self._plain = extractor, matcher
        self._is_tuned = False
        backend = create_backend(config.graphs, device)
        if backend is not None:
            self._make_static(backend)

    @property
    def is_static(self) -> bool:
        """Whether graphs run, on a GPU or emulated, instead of the methods as they are."""
        return isinstance(self.extractor, StaticExtractor)

    def warm_up(self, width: int, height: int, channels: int = 3, images: Sequence[Image] = ()) -> None:
        """Captures and measures everything for images of width x height px with 3 (RGB) or 1 channel.

        Call it before the threads of a run start. `images`, two or more consecutive ones, are what is measured on and
        held to the accuracy gate, whatever size is named; without them an artificial scene is. An image of another
        shape is prepared for when it comes, which takes a capture but no measuring. Raises DeviceError.
        """
        if not isinstance(self.extractor, StaticExtractor):
            return
        shape: tuple[int, ...] = (height, width) if channels == 1 else (height, width, channels)
        # Images know best how they will come.
        shape = images[0].shape if len(images) else shape
        shown = [image for image in images if image.shape == shape]
        shown = shown[:_MAX_TUNING_IMAGES] if len(shown) > 1 else synthetic_images(shape)
        try:
            if not self._is_tuned:
                self.choices = tuple(self._tune(self.extractor, shown))
                self._is_tuned = True
            self.extractor.prepare(shape)
            if isinstance(self.matcher, StaticMatcher):
                self.matcher.prepare()
            _run_once(self.extractor, self.matcher, shown)
        except GraphError:
            raise
        except RuntimeError as error:
            self._fall_back(error)

    def _make_static(self, backend: Backend) -> None:
        extractor, matcher = self._plain
        form = static_form(extractor)
        if form is None:
            return
        self.extractor = StaticExtractor(form, backend, self.config.upload_slots)
        if isinstance(matcher, LightGlue) and matcher.architecture.num_coordinates == 2:
            self.matcher = StaticMatcher(matcher, self.extractor.layout, backend)

    def _tune(self, extractor: StaticExtractor, images: Sequence[Image]) -> list[str]:
        """Measures on a GPU, where it means something; an emulation takes the first of everything."""
        measures = self.config.graphs != "emulated"
        matcher = self.matcher
        sentences = tune_extractor(extractor, matcher, images, self._extractor_options(extractor.form, measures))
        if isinstance(matcher, StaticMatcher):
            features = [extractor.extract(image) for image in images]
            sentences += tune_matcher(matcher, features, self._matcher_options(measures))
        return sentences

    def _extractor_options(self, form: StaticForm, measures: bool) -> TuningOptions:
        config = self.config
        kernels = form.kernels if config.kernels == "auto" else (config.kernels,)
        compiles = config.compile == "on"
        return TuningOptions(
            precisions=_candidates(config.extractor_precision, form.precisions, measures),
            kernels=kernels if measures else kernels[:1],
            convolutions=form.convolutions if measures else form.convolutions[:1],
            compiles=compiles,
            compile_budget_s=config.compile_budget_s,
        )

    def _matcher_options(self, measures: bool) -> TuningOptions:
        config = self.config
        depths = DEPTHS if config.depth == "auto" else (config.depth,)
        widths = WIDTHS if config.width == "auto" else (config.width,)
        return TuningOptions(
            precisions=_candidates(config.matcher_precision, tuple(DTYPES), measures),
            depths=depths if measures else depths[:1],
            widths=widths if measures else widths[:1],
            compiles=config.compile in ("on", "matcher") or (config.compile == "auto" and measures),
            compile_budget_s=config.compile_budget_s,
            only_from_cache=config.compile == "auto",
            layers_per_block=config.layers_per_block,
        )

    def _fall_back(self, error: RuntimeError) -> None:
        """The methods as they are take the place of graphs that could not be captured, where that is allowed."""
        failure = device_error(error)
        if failure is not None:
            raise failure from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        if self.config.graphs != "auto":
            raise DeviceError(
                f"frontend.engine.graphs: the networks could not be captured ({reason}); set it to auto or off"
            ) from error
        self.extractor, self.matcher = self._plain
        self.choices = ()
        self.fallbacks = (f"the networks run without CUDA graphs, slower: they could not be captured ({reason})",)
        _LOG.warning("%s", self.fallbacks[0])


def create_engine(config: EngineConfig, extractor: Extractor, matcher: Matcher, device: torch.device) -> Engine:
    """An engine for methods that are loaded already; those without a static form run as they are."""
    return Engine(config, extractor, matcher, device)


def create_backend(graphs: str, device: torch.device) -> Backend | None:
    """What captures graphs for a value of `EngineConfig.graphs`; None where the methods run as they are."""
    if graphs == "emulated":
        return EmulatedBackend(device)
    if graphs == "off" or device.type != "cuda":
        return None
    return CudaBackend(device)


def static_form(extractor: Extractor) -> StaticForm | None:
    """The static form of an extractor, None where it has none."""
    if isinstance(extractor, Aliked):
        return AlikedStatic(extractor)
    return XFeatStatic(extractor) if isinstance(extractor, XFeat) else None


def _candidates(wanted: str, known: Sequence[str], measures: bool) -> tuple[str, ...]:
    """Precisions to try, float32 first; a wanted one is not questioned."""
    if wanted != "auto":
        return (wanted,) if wanted in known else (known[0],)
    return tuple(known) if measures else (known[0],)


def _run_once(extractor: Extractor, matcher: Matcher, images: Sequence[Image]) -> None:
    """Everything that is done per frame, so that nothing is done for the first time in a run."""
    features = [extractor.extract(image) for image in (images[0], images[-1])]
    matcher.match(*features)
    for each in features:
        each.valid_keypoints()
