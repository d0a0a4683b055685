"""ORB: oriented FAST corners with binary descriptors, the method without weights and without a GPU.

Rublee et al., "ORB: an efficient alternative to SIFT or SURF", ICCV 2011; detector and descriptor are OpenCV's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from cv2.typing import MatLike
from numpy.typing import NDArray
from torch import Tensor

from frontends.base import Features, check_settings, resized_shape, setting, to_full_resolution
from frontends.selection import spread_order

# OpenCV keeps 31 px clear on every side of every level, for the patch that the descriptor reads.
_MIN_SIDE_PX = 63
_DESCRIPTOR_BYTES = 32
# All corners are wanted, so that weakly textured places can be represented; that costs few milliseconds more.
_MAX_CORNERS = 1 << 16


@dataclass(frozen=True, slots=True)
class OrbConfig:
    """ORB: how many corners, how strong, how evenly spread, over which pyramid."""

    name: Literal["orb"] = "orb"
    max_keypoints: int = setting(1024, minimum=1, maximum=16384, help="keypoints per image at most")
    max_side: int | None = setting(None, minimum=64, help="larger images are shrunk to this longer side, px")
    fast_threshold: int = setting(20, minimum=1, maximum=255, help="contrast a corner needs, grey levels")
    min_fast_threshold: int = setting(7, minimum=1, maximum=255, help="contrast tried where corners are too few")
    spread_cell_px: int | None = setting(
        40, minimum=8, help="cells that share the keypoints evenly, px; none: no cells"
    )
    num_levels: int = setting(8, minimum=1, maximum=16, help="levels of the pyramid")
    scale_factor: float = setting(1.2, minimum=1.01, maximum=2.0, help="size ratio of neighbouring levels")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.min_fast_threshold > self.fast_threshold:
            raise ValueError(
                f"min_fast_threshold: {self.min_fast_threshold} is above fast_threshold, {self.fast_threshold}"
            )


class Orb:
    """Extracts ORB features on the CPU: (K, 32) uint8 descriptors, compared by Hamming distance."""

    def __init__(self, config: OrbConfig) -> None:
        self.config = config

    @property
    def kind(self) -> str:
        return "orb"

    def extract(self, image: NDArray[np.uint8]) -> Features:
        """Features of one image (H, W, 3) RGB or (H, W) gray, uint8, best first; rows beyond `num_valid` are zeros.

        Scores are Harris responses, scales the diameter of the described patch in px, orientations in rad from the
        x axis towards y. An image below 63 px has no keypoints. Raises ValueError for other shapes and types.
        """
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
            raise ValueError(f"image: expected (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}")
        full = (image.shape[1], image.shape[0])
        resized = resized_shape(*full, self.config.max_side)
        gray: MatLike = np.ascontiguousarray(image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
        if resized != full:
            gray = cv2.resize(gray, resized, interpolation=cv2.INTER_AREA)
        if min(resized) < _MIN_SIDE_PX:
            return self._features([], None, resized, full)
        detector = self._detector(min(resized))
        corners, descriptors = detector.compute(gray, self._spread(self._detect(detector, gray)))
        return self._features(corners, descriptors, resized, full)

    def _detector(self, side_px: int) -> cv2.ORB:
        """A detector without the levels of the pyramid that are too small to hold a keypoint."""
        num_useful = 1 + int(math.log(side_px / _MIN_SIDE_PX) / math.log(self.config.scale_factor))
        return cv2.ORB.create(
            nfeatures=_MAX_CORNERS,
            scaleFactor=self.config.scale_factor,
            nlevels=min(self.config.num_levels, num_useful),
        )

    def _detect(self, detector: cv2.ORB, gray: MatLike) -> Sequence[cv2.KeyPoint]:
        """Corners at the usual threshold, or at the lower one where that finds too few."""
        corners: Sequence[cv2.KeyPoint] = ()
        for threshold in dict.fromkeys((self.config.fast_threshold, self.config.min_fast_threshold)):
            detector.setFastThreshold(threshold)
            corners = detector.detect(gray)
            if len(corners) >= self.config.max_keypoints:
                break
        return corners

    def _spread(self, corners: Sequence[cv2.KeyPoint]) -> list[cv2.KeyPoint]:
        """The strongest of every cell, then the second of every cell, and so on until there are enough."""
        if not corners:
            return []
        points = np.asarray(cv2.KeyPoint.convert(corners), dtype=np.float32)
        responses = np.array([corner.response for corner in corners])
        # Position breaks ties, so that the order in which OpenCV finds the corners does not matter.
        order = np.lexsort((points[:, 0], points[:, 1], -responses))
        if self.config.spread_cell_px is not None:
            order = order[spread_order(torch.from_numpy(points[order]), self.config.spread_cell_px).numpy()]
        return [corners[index] for index in order[: self.config.max_keypoints]]

    def _features(
        self,
        corners: Sequence[cv2.KeyPoint],
        descriptors: MatLike | None,
        resized: tuple[int, int],
        full: tuple[int, int],
    ) -> Features:
        capacity, num_valid = self.config.max_keypoints, len(corners)
        keypoints, padded = torch.zeros(capacity, 2), torch.zeros(capacity, _DESCRIPTOR_BYTES, dtype=torch.uint8)
        scores, scales, orientations = (torch.zeros(capacity) for _ in range(3))
        if descriptors is not None and num_valid:
            values = np.array([(*corner.pt, corner.response, corner.size, corner.angle) for corner in corners])
            order = np.lexsort((values[:, 0], values[:, 1], -values[:, 2]))
            levels = np.array([corner.octave for corner in corners])[order]
            values = values[order]
            points = self._level_points(values[:, :2], levels, resized)
            keypoints[:num_valid] = to_full_resolution(points, resized, full)
            padded[:num_valid] = torch.from_numpy(descriptors[order])
            scores[:num_valid] = torch.from_numpy(values[:, 2])
            scales[:num_valid] = torch.from_numpy(values[:, 3] * full[0] / resized[0])
            orientations[:num_valid] = torch.from_numpy(np.deg2rad(values[:, 4]))
        return Features(keypoints, scores, padded, num_valid, full, self.kind, scales, orientations)

    def _level_points(self, points: NDArray[np.float64], levels: NDArray[np.int64], size: tuple[int, int]) -> Tensor:
        """(N, 2) float32 px of the detected image, pixel centres at integers.

        OpenCV multiplies the pixel of a level by the nominal scale. That forgets half a pixel of the level and the
        rounding of its size: up to 2 px on the upper levels, of one sign, and different for each level.
        """
        scales = (self.config.scale_factor**levels)[:, None]
        full = np.array(size, dtype=np.float64)
        corrected = (points / scales + 0.5) * (full / np.rint(full / scales)) - 0.5
        return torch.from_numpy(corrected.astype(np.float32))
