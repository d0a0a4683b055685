"""Photographs for training, made up."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray


def photo(seed: int = 0, side: int = 160) -> NDArray[np.uint8]:
    """Smooth blobs, so that it can be read between its pixels."""
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(0, 255, (side // 8, side // 8, 3)).astype(np.float32)
    return np.clip(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
