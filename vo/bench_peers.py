"""Other implementations to measure against, as extractors and matchers like our own.

kornia  the same networks with the same weights: ALIKED, XFeat, LightGlue, mutual nearest neighbours.
orb     OpenCV's ORB with brute-force matching: the method without a network.
opencv  OpenCV 5's own ALIKED and LightGlue, for which the user has the model files (ONNX).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, cast

import cv2
import numpy as np
import torch
from cv2.typing import MatLike
from numpy.typing import NDArray
from torch import Tensor

from frontends.aliked import AlikedConfig
from frontends.base import Extractor, Features, Matcher, Matches, resized_shape, to_full_resolution
from frontends.frontend import matcher_weights
from frontends.lightglue import LightGlueConfig
from frontends.lightglue_network import published_names, read_architecture
from frontends.nearest import NearestConfig
from frontends.orb import OrbConfig
from frontends.weights import load_extractor_weights, load_file, load_state_dict
from frontends.xfeat import XFeatConfig
from vo.config import FrontendConfig
from vo.frontend import Frontend
from vo.types import ConfigError

PEERS = ("kornia", "orb", "opencv")


class NotComparable(Exception):
    """Why a peer cannot be measured here, in one line: not installed, no such method, no model file."""


@dataclass(frozen=True, slots=True, eq=False)
class Peer:
    """Another implementation.

    extractor, matcher  None where `reasons` says why it has none for this configuration.
    is_same_network     it computes what ours does: its results can be compared, and its matcher takes our features.
    """

    name: str
    description: str
    extractor: Extractor | None
    matcher: Matcher | None
    is_same_network: bool
    reasons: tuple[str, ...] = ()


def create_peer(
    name: str, config: FrontendConfig, frontend: Frontend, device: torch.device, model_files: tuple[str, ...] = ()
) -> Peer:
    """The peer of that name for our `frontend`, with as many keypoints as its `config` asks for.

    Raises NotComparable where it cannot be had, ConfigError for a name that is none of PEERS.
    """
    match name:
        case "kornia":
            return _kornia(config, frontend, device)
        case "orb":
            return Peer("orb", _opencv_version("ORB and brute force"), *_orb(config), is_same_network=False)
        case "opencv":
            return _opencv(config, model_files)
    raise ConfigError(f"--against: {name!r} is not known; choose from {', '.join(PEERS)}")


# --- kornia ---------------------------------------------------------------------------------------------------------


def _kornia(config: FrontendConfig, frontend: Frontend, device: torch.device) -> Peer:
    features = _imported("kornia.feature", "kornia")
    extractor, no_extractor = _or_reason(lambda: _kornia_extractor(config, frontend, features, device))
    matcher, no_matcher = _or_reason(lambda: _kornia_matcher(config, frontend, features, device))
    reasons = tuple(reason for reason in (no_extractor, no_matcher) if reason)
    if extractor is None and matcher is None:
        raise NotComparable("; ".join(reasons))
    return Peer("kornia", f"kornia {metadata.version('kornia')}, float32", extractor, matcher, True, reasons)


def _kornia_extractor(
    config: FrontendConfig, frontend: Frontend, kornia_feature: ModuleType, device: torch.device
) -> Extractor:
    if isinstance(config.extractor, OrbConfig):
        raise NotComparable("kornia: has no ORB")
    if not isinstance(config.extractor, AlikedConfig | XFeatConfig):
        raise NotComparable(f"kornia: has no {config.extractor.name} other than what runs here")
    state_dict, _, _ = load_extractor_weights(frontend.extractor.kind, config.extractor.weights)
    return KorniaExtractor(config.extractor, state_dict, kornia_feature, device)


def _kornia_matcher(
    config: FrontendConfig, frontend: Frontend, kornia_feature: ModuleType, device: torch.device
) -> Matcher:
    if isinstance(config.matcher, NearestConfig):
        if isinstance(config.extractor, OrbConfig):
            raise NotComparable("kornia: its mutual nearest neighbours take no binary descriptors")
        return KorniaNearest(config.matcher, kornia_feature)
    if not isinstance(config.matcher, LightGlueConfig):
        raise NotComparable(f"kornia: has no matcher like {config.matcher.name}")
    if config.matcher.weights is None:
        state_dict, _ = load_state_dict(matcher_weights(frontend.extractor.kind))
    else:
        state_dict, _ = load_file(config.matcher.weights)
    return KorniaLightGlue(config.matcher, state_dict, kornia_feature, device)


class KorniaExtractor:
    """kornia's ALIKED or XFeat with the weights of our own extractor."""

    def __init__(
        self,
        config: AlikedConfig | XFeatConfig,
        state_dict: Mapping[str, Tensor],
        kornia_feature: ModuleType,
        device: torch.device,
    ) -> None:
        self._device = device
        self._max_side = config.max_side
        self._network: torch.nn.Module
        match config:
            case AlikedConfig():
                self.kind = f"aliked-{config.variant}"
                # A threshold that is not positive is kornia's way to ask for the best ones whatever they score.
                threshold = config.score_threshold if config.score_threshold is not None else -1.0
                self._network = kornia_feature.ALIKED(self.kind, config.max_keypoints, threshold)
                _load(self._network, state_dict, may_miss=("dkd.hw_grid",))
            case XFeatConfig():
                self.kind = "xfeat"
                self._network = kornia_feature.XFeat(config.max_keypoints, config.detection_threshold)
                _load(cast(torch.nn.Module, self._network.net), state_dict, may_miss=("fine_matcher.",))
        self._network = self._network.to(device).eval()

    @torch.inference_mode()
    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of an image as our extractors take it, from the same pixels."""
        full = (image.shape[1], image.shape[0])
        resized = resized_shape(*full, self._max_side)
        if resized != full:
            image = np.asarray(cv2.resize(image, resized, interpolation=cv2.INTER_AREA), dtype=np.uint8)
        # A copy, because images of frames are read-only, which PyTorch does not like.
        pixels = torch.from_numpy(image.copy()).to(self._device)
        batch = (pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)[None].float() / 255
        keypoints, scores, descriptors = self._found(batch)
        keypoints = to_full_resolution(keypoints, resized, full) if resized != full else keypoints
        return Features(keypoints, scores, descriptors, len(keypoints), full, self.kind)

    def _found(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.kind == "xfeat":
            detect_and_compute = cast(Callable[[Tensor], Any], self._network.detectAndCompute)
            found = detect_and_compute(batch)[0]
            return found["keypoints"], found["scores"], found["descriptors"]
        found = self._network(batch)[0]
        return found.keypoints, found.keypoint_scores, found.descriptors


class KorniaLightGlue:
    """kornia's LightGlue with the weights and the adaptive settings of our own."""

    def __init__(
        self,
        config: LightGlueConfig,
        state_dict: Mapping[str, Tensor],
        kornia_feature: ModuleType,
        device: torch.device,
    ) -> None:
        named = published_names(state_dict)
        shape = read_architecture(named, "weights of LightGlue")
        depth_confidence, width_confidence, max_layers = config.limits()
        num_layers = min(max_layers or shape.num_layers, shape.num_layers)
        network = kornia_feature.LightGlue(
            None,
            input_dim=shape.input_dim,
            descriptor_dim=shape.width,
            num_heads=shape.num_heads,
            n_layers=num_layers,
            add_scale_ori=shape.num_coordinates == 4,
            # -1 is kornia's way to switch it off.
            depth_confidence=depth_confidence if depth_confidence < 1 else -1,
            width_confidence=width_confidence if width_confidence < 1 else -1,
            filter_threshold=config.filter_threshold,
        )
        may_miss = ("confidence_thresholds",) if shape.has_confidence else ("confidence_thresholds", "token_confidence")
        _load(network, _first_layers(named, num_layers), may_miss=may_miss)
        self._network = network.to(device).eval()
        self._device = device

    @torch.inference_mode()
    def match(self, features0: Features, features1: Features) -> Matches:
        """Matches of features as our extractors, or kornia's, make them."""
        found = self._network({"image0": self._image(features0), "image1": self._image(features1)})
        indices, scores = found["matches"][0].cpu().numpy(), found["scores"][0].float().cpu().numpy()
        return Matches(indices, scores, int(found["stop"]), features0.num_valid, features1.num_valid)

    def _image(self, features: Features) -> dict[str, Tensor]:
        valid = slice(features.num_valid)
        image = {
            "keypoints": features.keypoints[None, valid].to(self._device),
            "descriptors": features.descriptors[None, valid].to(self._device),
            "image_size": torch.tensor([features.image_size], device=self._device),
        }
        if features.scales is not None and features.orientations is not None:
            image["scales"] = features.scales[None, valid].to(self._device)
            image["oris"] = features.orientations[None, valid].to(self._device)
        return image


def _first_layers(state_dict: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """The weights of a LightGlue that ends after so many layers."""

    def is_used(name: str) -> bool:
        part, _, rest = name.partition(".")
        limits = {"transformers": num_layers, "log_assignment": num_layers, "token_confidence": num_layers - 1}
        return part not in limits or int(rest.partition(".")[0]) < limits[part]

    return {name: value for name, value in state_dict.items() if is_used(name)}


class KorniaNearest:
    """kornia's mutual nearest neighbours."""

    def __init__(self, config: NearestConfig, kornia_feature: ModuleType) -> None:
        if config.max_ratio is not None or config.min_similarity > 0:
            raise NotComparable("kornia: its mutual nearest neighbours have no ratio test or threshold like ours")
        self._match = kornia_feature.match_mnn

    @torch.inference_mode()
    def match(self, features0: Features, features1: Features) -> Matches:
        """Matches of float descriptors; scores are cosines."""
        descriptors0, descriptors1 = (f.descriptors[: f.num_valid] for f in (features0, features1))
        distances, indices = self._match(descriptors0, descriptors1)
        scores = (1 - distances[:, 0] ** 2 / 2).clamp(0, 1)
        return Matches(indices.cpu().numpy(), scores.cpu().numpy(), 0, features0.num_valid, features1.num_valid)


def _load(network: torch.nn.Module, state_dict: Mapping[str, Tensor], *, may_miss: tuple[str, ...]) -> None:
    """Loads weights; NotComparable where the peer's network is not the one these weights are for."""
    missing, unexpected = network.load_state_dict(dict(state_dict), strict=False)
    wrong = [name for name in missing if not name.startswith(may_miss)] + unexpected
    if wrong:
        raise NotComparable(f"kornia: {type(network).__name__} does not take these weights: {wrong[0]}")


# --- OpenCV ---------------------------------------------------------------------------------------------------------


class OpenCvExtractor:
    """A Feature2D of OpenCV as an extractor."""

    def __init__(self, kind: str, detector: cv2.Feature2D, max_keypoints: int, *, takes_color: bool) -> None:
        self.kind = kind
        self._detector = detector
        self._max_keypoints = max_keypoints
        self._takes_color = takes_color

    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of an image; no more than the strongest `max_keypoints`."""
        if self._takes_color:
            pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR if image.ndim == 3 else cv2.COLOR_GRAY2BGR)
        else:
            pixels = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        # OpenCV gives None where it finds nothing, which its annotations do not say.
        found = cast(tuple[Sequence[cv2.KeyPoint], MatLike | None], self._detector.detectAndCompute(pixels, None))
        corners, descriptors = found
        if descriptors is None:
            descriptors = np.zeros((0, self._detector.descriptorSize()), np.uint8)
        points = np.asarray(cv2.KeyPoint.convert(corners), np.float32).reshape(-1, 2)
        scores = np.array([corner.response for corner in corners], np.float32)
        if len(points) > self._max_keypoints:
            strongest = np.argsort(-scores, kind="stable")[: self._max_keypoints]
            points, scores, descriptors = points[strongest], scores[strongest], descriptors[strongest]
        return Features(
            torch.from_numpy(points),
            torch.from_numpy(scores),
            torch.from_numpy(descriptors),
            num_valid=len(points),
            image_size=(image.shape[1], image.shape[0]),
            kind=self.kind,
        )


class OpenCvMatcher:
    """A DescriptorMatcher of OpenCV as a matcher; one that wants keypoints and image sizes gets them first."""

    def __init__(self, matcher: Any, *, wants_keypoints: bool) -> None:
        self._matcher = matcher
        self._wants_keypoints = wants_keypoints

    def match(self, features0: Features, features1: Features) -> Matches:
        """Matches with score 1 / (1 + distance)."""
        if self._wants_keypoints:
            points0, points1 = features0.valid_keypoints(), features1.valid_keypoints()
            self._matcher.setPairInfo(points0, points1, features0.image_size, features1.image_size)
        descriptors0, descriptors1 = (f.descriptors[: f.num_valid].cpu().numpy() for f in (features0, features1))
        found = self._matcher.match(descriptors0, descriptors1)
        indices = np.array([(match.queryIdx, match.trainIdx) for match in found], np.int64).reshape(-1, 2)
        scores = np.array([1 / (1 + match.distance) for match in found], np.float32)
        return Matches(indices, scores, 0, features0.num_valid, features1.num_valid)


def _orb(config: FrontendConfig) -> tuple[Extractor, Matcher]:
    max_keypoints = config.extractor.max_keypoints
    extractor = OpenCvExtractor("orb", cv2.ORB.create(nfeatures=max_keypoints), max_keypoints, takes_color=False)
    return extractor, OpenCvMatcher(cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True), wants_keypoints=False)


def _opencv(config: FrontendConfig, model_files: tuple[str, ...]) -> Peer:
    if not hasattr(cv2, "ALIKED"):
        raise NotComparable(f"opencv: version {cv2.__version__} has no ALIKED; it came with 5.0")
    if not model_files:
        raise NotComparable(
            "opencv: its networks come without weights; give --opencv-models ALIKED.onnx[,LIGHTGLUE.onnx]"
        )
    try:
        detector = cv2.ALIKED.create(model_files[0])
        matcher = cv2.LightGlueMatcher.create(model_files[1]) if len(model_files) > 1 else None
    except cv2.error as error:
        reason = " ".join(str(error).split())
        raise NotComparable(f"opencv: {', '.join(model_files)} cannot be used: {reason}") from error
    max_keypoints = config.extractor.max_keypoints
    return Peer(
        "opencv",
        _opencv_version("ALIKED" if matcher is None else "ALIKED and LightGlue"),
        OpenCvExtractor("opencv-aliked", detector, max_keypoints, takes_color=True),
        OpenCvMatcher(matcher, wants_keypoints=True) if matcher is not None else None,
        is_same_network=False,
        reasons=() if matcher is not None else ("opencv: no model file for its LightGlue",),
    )


def _opencv_version(method: str) -> str:
    return f"OpenCV {cv2.__version__} {method}"


def _imported(module: str, distribution: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotComparable(f"{distribution}: not installed ({error}); pip install {distribution}") from error


def _or_reason(create: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return create(), None
    except NotComparable as reason:
        return None, str(reason)
