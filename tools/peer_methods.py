"""The methods that tools/compare_peers.py compares: ours, OpenCV's, and kornia's with the same weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import cv2
import torch

from frontends.aliked import AlikedConfig
from frontends.base import Extractor, Matcher
from frontends.followed_points import FollowedConfig
from frontends.frontend import ExtractorConfig, matcher_weights
from frontends.lightglue import LightGlueConfig
from frontends.loftr import LoftrConfig
from frontends.nearest import NearestConfig
from frontends.orb import OrbConfig
from frontends.r2d2 import R2d2Config
from frontends.weights import load_state_dict
from frontends.xfeat import XFeatConfig
from frontends.xfeat_star import XFeatStarConfig
from vo.bench_peers import KorniaExtractor, KorniaLightGlue, OpenCvExtractor, OpenCvMatcher
from vo.config import FrontendConfig
from vo.frontend import create_frontend
from vo.types import WeightsError


class NotHere(Exception):
    """Why a method cannot be measured on this machine, in one line."""


@dataclass(frozen=True, slots=True)
class Options:
    """What all methods share.

    aliked_model, lightglue_model   ONNX files for OpenCV's own networks; empty where there are none.
    weights                         (method, file) of ours that come without weights.
    """

    max_keypoints: int
    aliked_model: str = ""
    lightglue_model: str = ""
    weights: tuple[tuple[str, str], ...] = ()

    def weights_of(self, method: str) -> str | None:
        """The file given for a method that has no weights of its own."""
        return dict(self.weights).get(method)


@dataclass(frozen=True, slots=True)
class Method:
    """A front-end to be compared; `create` gives its extractor and its matcher, or raises NotHere."""

    name: str
    description: str
    create: Callable[[Options], tuple[Extractor, Matcher]]


def _ours(
    extractor: ExtractorConfig, matcher: LightGlueConfig | NearestConfig | FollowedConfig
) -> tuple[Extractor, Matcher]:
    try:
        frontend = create_frontend(FrontendConfig(extractor=extractor, matcher=matcher), torch.device("cpu"))
        return frontend.extractor, frontend.matcher
    except WeightsError as error:
        raise NotHere(str(error)) from error


def _our_aliked(options: Options) -> tuple[Extractor, Matcher]:
    return _ours(AlikedConfig(max_keypoints=options.max_keypoints), LightGlueConfig())


def _our_xfeat(options: Options) -> tuple[Extractor, Matcher]:
    return _ours(XFeatConfig(max_keypoints=options.max_keypoints), LightGlueConfig())


def _our_orb(options: Options) -> tuple[Extractor, Matcher]:
    return _ours(OrbConfig(max_keypoints=options.max_keypoints), NearestConfig())


def _our_r2d2(options: Options) -> tuple[Extractor, Matcher]:
    weights = options.weights_of("ours-r2d2")  # None: our own small network
    config = R2d2Config(max_keypoints=options.max_keypoints, max_side=640, min_side=640, weights=weights)
    return _ours(config, NearestConfig())


def _our_loftr(options: Options) -> tuple[Extractor, Matcher]:
    weights = options.weights_of("ours-loftr")
    if weights is None:
        raise NotHere("needs kornia and a checkpoint; give --weights ours-loftr=FILE")
    return _ours(LoftrConfig(weights=weights), FollowedConfig())


def _our_xfeat_star(options: Options) -> tuple[Extractor, Matcher]:
    weights = options.weights_of("ours-xfeat-star")
    if weights is None:
        raise NotHere("needs the fine matcher of xfeat.pt; give --weights ours-xfeat-star=FILE")
    return _ours(XFeatStarConfig(weights=weights), FollowedConfig())


def _kornia(config: AlikedConfig | XFeatConfig, weights: str) -> tuple[Extractor, Matcher]:
    try:
        features = importlib.import_module("kornia.feature")
    except ImportError as error:
        raise NotHere(f"kornia is not installed ({error}); pip install kornia") from error
    device = torch.device("cpu")
    try:
        extractor = KorniaExtractor(config, load_state_dict(weights)[0], features, device)
        matcher_state = load_state_dict(matcher_weights(weights))[0]
    except WeightsError as error:
        raise NotHere(str(error)) from error
    return extractor, KorniaLightGlue(LightGlueConfig(), matcher_state, features, device)


def _kornia_aliked(options: Options) -> tuple[Extractor, Matcher]:
    return _kornia(AlikedConfig(max_keypoints=options.max_keypoints), "aliked-t16")


def _kornia_xfeat(options: Options) -> tuple[Extractor, Matcher]:
    return _kornia(XFeatConfig(max_keypoints=options.max_keypoints), "xfeat")


def _opencv(kind: str, detector: cv2.Feature2D, norm: int, options: Options) -> tuple[Extractor, Matcher]:
    extractor = OpenCvExtractor(kind, detector, options.max_keypoints, takes_color=False)
    return extractor, OpenCvMatcher(cv2.BFMatcher(norm, crossCheck=True), wants_keypoints=False)


def _opencv_orb(options: Options) -> tuple[Extractor, Matcher]:
    return _opencv("opencv-orb", cv2.ORB.create(nfeatures=options.max_keypoints), cv2.NORM_HAMMING, options)


def _opencv_sift(options: Options) -> tuple[Extractor, Matcher]:
    return _opencv("opencv-sift", cv2.SIFT.create(nfeatures=options.max_keypoints), cv2.NORM_L2, options)


def _opencv_aliked(options: Options) -> tuple[Extractor, Matcher]:
    if not hasattr(cv2, "ALIKED") or not hasattr(cv2, "LightGlueMatcher"):
        raise NotHere(f"OpenCV {cv2.__version__} has no ALIKED and LightGlueMatcher; they came with 5.0")
    if not options.aliked_model or not options.lightglue_model:
        raise NotHere(
            "OpenCV brings no weights for its networks; give --opencv-aliked F.onnx and --opencv-lightglue F.onnx"
        )
    try:
        detector = cv2.ALIKED.create(options.aliked_model)
        matcher = cv2.LightGlueMatcher.create(options.lightglue_model)
    except cv2.error as error:
        raise NotHere(f"OpenCV cannot read the models: {' '.join(str(error).split())}") from error
    extractor = OpenCvExtractor("opencv-aliked", detector, options.max_keypoints, takes_color=True)
    return extractor, OpenCvMatcher(matcher, wants_keypoints=True)


def _kornia_version() -> str:
    try:
        return metadata.version("kornia")
    except metadata.PackageNotFoundError:
        return "(not installed)"


METHODS = (
    Method("ours-aliked", "ALIKED-T16 + LightGlue", _our_aliked),
    Method("kornia-aliked", f"ALIKED-T16 + LightGlue, kornia {_kornia_version()}, same weights", _kornia_aliked),
    Method("opencv-aliked", f"ALIKED + LightGlueMatcher, OpenCV {cv2.__version__}", _opencv_aliked),
    Method("ours-xfeat", "XFeat + LightGlue", _our_xfeat),
    Method("kornia-xfeat", f"XFeat + LightGlue, kornia {_kornia_version()}, same weights", _kornia_xfeat),
    Method("ours-orb", "ORB + mutual nearest", _our_orb),
    Method("opencv-orb", f"ORB + brute force, OpenCV {cv2.__version__}", _opencv_orb),
    Method("opencv-sift", f"SIFT + brute force, OpenCV {cv2.__version__}", _opencv_sift),
    Method("ours-xfeat-star", "XFeat*, followed points", _our_xfeat_star),
    Method("ours-r2d2", "R2D2 + mutual nearest", _our_r2d2),
    Method("ours-loftr", "LoFTR, followed points", _our_loftr),
)
