"""LoFTR, detector-free: matches the cells of two images and refines every match below the pixel.

Sun et al., "LoFTR: Detector-Free Local Feature Matching with Transformers", CVPR 2021; the network is kornia's. It is
given images padded to multiples of 8 px, never distorted. Its coordinates have the centre of the first pixel at
(0.5, 0.5); ours at (0, 0).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import (
    Features,
    Matches,
    VoError,
    WeightsError,
    check_settings,
    resized_shape,
    setting,
    to_full_resolution,
)
from frontends.followed_points import FollowingConfig

CELL_PX = 8
# Cells at the edge in which the coarse stage never finds a match, as in the published configuration.
_BORDER_CELLS = 2
_MIN_SIDE_PX = CELL_PX * (2 * _BORDER_CELLS + 1)
# Centre of the first pixel, in LoFTR's coordinates.
_HALF_PX = 0.5
_REMEDY = "give a checkpoint of LoFTR as kornia takes it, or set weights: random to run without meaning"


@dataclass(frozen=True, slots=True)
class LoftrConfig:
    """LoFTR: at which resolution, how sure a match has to be, and which points are followed."""

    name: Literal["loftr"] = "loftr"
    max_side: int | None = setting(640, minimum=64, help="larger images are shrunk to this longer side, px")
    min_confidence: float = setting(0.2, minimum=0.0, maximum=1.0, help="of a match between cells, to exceed")
    is_fixed_encoding: bool = setting(
        False, help="positions are encoded as for the checkpoint indoor-new, not as for the older ones"
    )
    weights: str | None = setting(None, help='checkpoint, or "random" for weights that mean nothing')
    following: FollowingConfig = field(default_factory=FollowingConfig)

    def __post_init__(self) -> None:
        check_settings(self)

    @property
    def max_keypoints(self) -> int:
        return self.following.max_keypoints


class PairNetwork(Protocol):
    """What kornia's LoFTR does: a mapping with image0 and image1 (1, 1, H, W) to keypoints0/1 (M, 2), confidence."""

    def __call__(self, data: Mapping[str, Tensor]) -> Mapping[str, Tensor]: ...


class Loftr:
    """Matches two images with a network of one device.

    `network` is what `load_network` or `random_network` made.
    """

    def __init__(self, config: LoftrConfig, network: PairNetwork, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self._network = network
        # kornia's network keeps a table of positions that grows with the images, and two threads match images.
        self._lock = threading.Lock()

    @property
    def kind(self) -> str:
        return self.config.name

    @torch.inference_mode()
    def match_images(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> tuple[Features, Features, Matches]:
        """Matched keypoints of both images (H, W, 3) RGB or (H, W) gray, uint8, at any two sizes.

        Row i of one belongs to row i of the other. Those of image 0 are centres of cells, those of image 1 refined.
        Raises ValueError for other shapes and types, and for images whose shorter side is below 40 px once resized.
        """
        sizes = [self._network_size(image) for image in (image0, image1)]
        with self._lock:
            found = self._network({"image0": self.padded(image0), "image1": self.padded(image1)})
        points = [found[name] - _HALF_PX for name in ("keypoints0", "keypoints1")]
        kept = torch.ones(len(points[0]), dtype=torch.bool, device=points[0].device)
        for keypoints, size in zip(points, sizes, strict=True):
            # What was matched in the padding is nowhere in the image.
            kept &= ((keypoints >= -_HALF_PX) & (keypoints <= keypoints.new_tensor(size) - _HALF_PX)).all(dim=1)
        scores = found["confidence"][kept].float()
        features = [
            self._features(image, keypoints[kept], size, scores)
            for image, keypoints, size in zip((image0, image1), points, sizes, strict=True)
        ]
        indices = np.repeat(np.arange(len(scores), dtype=np.int64)[:, None], 2, axis=1)
        num_cells = [-(-width // CELL_PX) * -(-height // CELL_PX) for width, height in sizes]
        return features[0], features[1], Matches(indices, scores.cpu().numpy(), 0, num_cells[0], num_cells[1])

    def seeds(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Cells (N, 2) px in which matches may begin, those with the most texture first."""
        width, height = size = self._network_size(image)
        gray = _resized_gray(image, size)
        margin = _BORDER_CELLS * CELL_PX
        grid = np.meshgrid(np.arange(margin, width - margin, CELL_PX), np.arange(margin, height - margin, CELL_PX))
        columns, rows = (indices.ravel() for indices in grid)
        texture = np.asarray(cv2.cornerMinEigenVal(gray, CELL_PX))[rows, columns]
        order = np.argsort(-texture, kind="stable")
        cells = torch.from_numpy(np.stack((columns, rows), axis=1)[order].astype(np.float32)) - _HALF_PX
        return np.asarray(to_full_resolution(cells, size, (image.shape[1], image.shape[0])).numpy(), np.float32)

    def padded(self, image: NDArray[np.uint8]) -> Tensor:
        """(1, 1, H, W) in [0, 1], sides brought to multiples of 8 px by repeating the last row and column."""
        gray = _resized_gray(image, self._network_size(image))
        batch = torch.from_numpy(gray).to(self.device)[None, None].float() / 255
        return F.pad(batch, (0, -gray.shape[1] % CELL_PX, 0, -gray.shape[0] % CELL_PX), mode="replicate")

    def _network_size(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"image: expected (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}")
        size = resized_shape(image.shape[1], image.shape[0], self.config.max_side)
        if min(size) < _MIN_SIDE_PX:
            raise ValueError(f"image: expected sides of at least {_MIN_SIDE_PX} px, got {size[0]}x{size[1]}")
        return size

    def _features(self, image: NDArray[np.uint8], points: Tensor, size: tuple[int, int], scores: Tensor) -> Features:
        full = (image.shape[1], image.shape[0])
        keypoints = to_full_resolution(points.float(), size, full)
        return Features(keypoints, scores, keypoints.new_zeros((len(scores), 0)), len(scores), full, self.kind)


def load_network(config: LoftrConfig, state_dict: Mapping[str, Tensor], device: torch.device) -> PairNetwork:
    """kornia's network with the tensors of a checkpoint. Raises WeightsError for those of another network."""
    network = _kornia_network(config)
    tensors = {name.removeprefix("matcher."): tensor for name, tensor in state_dict.items()}
    expected = network.state_dict()
    for name, tensor in expected.items():
        if name not in tensors:
            raise WeightsError(f"weights for LoFTR lack {name!r}; {_REMEDY}")
        if tensors[name].shape != tensor.shape:
            raise WeightsError(
                f"weights for LoFTR: {name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}; {_REMEDY}"
            )
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise WeightsError(f"weights for LoFTR hold {unknown[0]!r}, which LoFTR has not; {_REMEDY}")
    network.load_state_dict(tensors)
    return _for_inference(network, device)


def random_network(config: LoftrConfig, device: torch.device, seed: int = 0) -> PairNetwork:
    """kornia's network with weights drawn from a seed: it runs, and its matches mean nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _kornia_network(config)
    return _for_inference(network, device)


def _for_inference(network: Any, device: torch.device) -> PairNetwork:
    prepared: PairNetwork = network.eval().requires_grad_(False).to(device)
    return prepared


def _kornia_network(config: LoftrConfig) -> Any:
    """An untrained network of kornia with the published configuration. VoError where kornia is not installed."""
    try:
        from kornia.feature import LoFTR
        from kornia.feature.loftr.loftr import default_cfg
    except ImportError as error:
        raise VoError(
            f"frontend.extractor: loftr needs kornia ({error}); install it with: pip install 'lightvo[loftr]'"
        ) from error
    settings: dict[str, Any] = copy.deepcopy(default_cfg)
    settings["match_coarse"].update(thr=config.min_confidence, border_rm=_BORDER_CELLS)
    settings["coarse"].update(temp_bug_fix=config.is_fixed_encoding)
    return LoFTR(pretrained=None, config=settings)


def _resized_gray(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W) uint8 of that (width, height) px."""
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if size != (image.shape[1], image.shape[0]):
        gray = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return np.array(gray, np.uint8, order="C")
