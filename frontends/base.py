"""What flows between the stages of a frontend, and the contract every frontend keeps.

Nothing here knows a camera, a clock or a pose: an image goes in, keypoints and matches come out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # programs that only read poses import this module for its errors, and torch takes seconds
    import torch
    from torch import Tensor


class VoError(Exception):
    """What the user's environment did wrong, in one line: file, field, remedy. The command line exits with 2."""


class WeightsError(VoError):
    """Weights that are missing, damaged, or made for another network."""


class DeviceError(VoError):
    """A GPU that fails: no memory left, a kernel that faults, a device that is gone."""


class FeatureMemory(Protocol):
    """Memory of a device that an engine lends to the features of one image, and takes back once nobody holds it."""

    def num_valid(self) -> int:
        """How many keypoints there are; waits until they have been computed. Raises DeviceError."""
        ...

    def host_keypoints(self) -> NDArray[np.float32]:
        """(K, 2) float32 px, a copy in the memory of the host; waits like `num_valid`."""
        ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Features:
    """Keypoints of one image, at a fixed capacity K of which the first `num_valid` rows count.

    keypoints    (K, 2) float32, px: (x, y) in the full image, (0, 0) is the centre of the top-left pixel.
    scores       (K,) float32, larger is better.
    descriptors  (K, D) float32 of unit length, or (K, B) uint8 for binary ones; on the extractor's device.
    num_valid    number of leading rows that hold keypoints; what follows them is padding.
    image_size   (width, height) px of the full image.
    kind         what made them, for example "aliked-t16"; a matcher refuses kinds it was not made for.
    scales       (K,) float32 px and
    orientations (K,) float32 rad, for methods that have them (SIFT); None otherwise.
    memory       where an engine lends the tensors: they stay as they are while somebody holds it. None: nobody lends.

    An engine gives features away before the device has computed them (`pending`): reading `num_valid` waits for that.
    Whoever else reads the tensors on a stream of his own reads `num_valid` first, and ends the reading before he lets
    go of the features.
    Raises ValueError on shapes that do not agree.
    """

    keypoints: Tensor
    scores: Tensor
    descriptors: Tensor
    num_valid: int
    image_size: tuple[int, int]
    kind: str
    scales: Tensor | None = None
    orientations: Tensor | None = None
    memory: FeatureMemory | None = None

    @classmethod
    def pending(
        cls,
        keypoints: Tensor,
        scores: Tensor,
        descriptors: Tensor,
        memory: FeatureMemory,
        image_size: tuple[int, int],
        kind: str,
    ) -> Features:
        """Features whose tensors are still being computed; their number is asked of the memory when it is wanted."""
        features = cls(keypoints, scores, descriptors, 0, image_size, kind, memory=memory)
        object.__delattr__(features, "num_valid")
        return features

    def __getattr__(self, name: str) -> int:
        """Python asks here for a field that has no value yet: `num_valid` of pending features."""
        if name != "num_valid" or self.memory is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        object.__setattr__(self, name, self.memory.num_valid())
        return self.num_valid

    @property
    def is_counted(self) -> bool:
        """Whether `num_valid` can be read without waiting."""
        try:
            object.__getattribute__(self, "num_valid")
        except AttributeError:
            return False
        return True

    def __post_init__(self) -> None:
        capacity = self.keypoints.shape[0]
        if self.keypoints.shape != (capacity, 2):
            raise ValueError(f"keypoints: expected (K, 2), got {tuple(self.keypoints.shape)}")
        if self.scores.shape != (capacity,):
            raise ValueError(f"scores: expected ({capacity},), got {tuple(self.scores.shape)}")
        for name, values in (("scales", self.scales), ("orientations", self.orientations)):
            if values is not None and values.shape != (capacity,):
                raise ValueError(f"{name}: expected ({capacity},), got {tuple(values.shape)}")
        if self.descriptors.ndim != 2 or self.descriptors.shape[0] != capacity:
            raise ValueError(f"descriptors: expected ({capacity}, D), got {tuple(self.descriptors.shape)}")
        if not 0 <= self.num_valid <= capacity:
            raise ValueError(f"num_valid: expected 0..{capacity}, got {self.num_valid}")

    @property
    def device(self) -> torch.device:
        return self.descriptors.device

    def valid_keypoints(self) -> NDArray[np.float32]:
        """(num_valid, 2) float32 px, on the host."""
        if self.memory is not None:
            return self.memory.host_keypoints()[: self.num_valid]
        keypoints: NDArray[np.float32] = self.keypoints[: self.num_valid].cpu().numpy()
        return keypoints


@dataclass(frozen=True, slots=True, eq=False)
class Matches:
    """Correspondences between two sets of features; every feature appears at most once.

    indices        (M, 2) int64: rows of features 0 and of features 1.
    scores         (M,) float32 in [0, 1].
    stop_layer     layers the matcher ran before it was confident (0: it has no layers).
    num_kept0/1    points left after pruning, of those that went in.

    Raises ValueError on shapes that do not agree.
    """

    indices: NDArray[np.int64]
    scores: NDArray[np.float32]
    stop_layer: int = 0
    num_kept0: int = 0
    num_kept1: int = 0

    def __post_init__(self) -> None:
        if self.indices.ndim != 2 or self.indices.shape[1] != 2:
            raise ValueError(f"indices: expected (M, 2), got {self.indices.shape}")
        if self.scores.shape != self.indices.shape[:1]:
            raise ValueError(f"scores: expected ({len(self.indices)},), got {self.scores.shape}")
        self.indices.setflags(write=False)
        self.scores.setflags(write=False)

    def __len__(self) -> int:
        return len(self.indices)


@runtime_checkable
class Extractor(Protocol):
    """Finds and describes keypoints in one image."""

    @property
    def kind(self) -> str: ...

    def extract(self, image: NDArray[np.uint8]) -> Features:
        """`image` (H, W, 3) RGB or (H, W) gray, uint8."""
        ...


@runtime_checkable
class Matcher(Protocol):
    """Matches two sets of features."""

    def match(self, features0: Features, features1: Features) -> Matches: ...


@runtime_checkable
class PairMatcher(Protocol):
    """Matches two images directly: semi-dense and detector-free methods, which have no features of one image alone.

    `frontends.followed_points` makes an extractor of it, whose points keep their identity over frames.
    """

    @property
    def kind(self) -> str: ...

    def seeds(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Points (N, 2) px of an image at which matches may begin, best first."""
        ...

    def match_images(
        self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]
    ) -> tuple[Features, Features, Matches]: ...


def resized_shape(width: int, height: int, max_side: int | None) -> tuple[int, int]:
    """(width, height) in px after shrinking so that the longer side is at most `max_side` px; never enlarges."""
    longest = max(width, height)
    if max_side is None or longest <= max_side:
        return width, height
    scale = max_side / longest
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_full_resolution(keypoints: Tensor, resized: tuple[int, int], full: tuple[int, int]) -> Tensor:
    """Keypoints (..., 2) px of a resized image in px of the full one; both sizes are (width, height).

    Pixel centres are at integers, so the map is (p + 0.5) s - 0.5 and not p s.
    """
    return (keypoints + 0.5) * per_axis(keypoints, full[0] / resized[0], full[1] / resized[1]) - 0.5


def per_axis(like: Tensor, x: float, y: float) -> Tensor:
    """The tensor (x, y), of the device and type of another, made there: a CUDA graph takes nothing from the host."""
    numbers = like.new_empty(2)
    numbers[0].fill_(x)
    numbers[1].fill_(y)
    return numbers


def setting(
    default: Any,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] = (),
    help: str = "",
) -> Any:
    """A config field with its default, inclusive limits, allowed values and one line of help (with the unit)."""
    limits = {"minimum": minimum, "maximum": maximum, "choices": choices, "help": help}
    return field(default=default, metadata=limits)


def check_settings(config: Any) -> None:
    """Raise ValueError naming the first field of a config dataclass that is outside its limits."""
    for item in fields(config):
        value, limits = getattr(config, item.name), item.metadata
        if value is None or not limits:
            continue
        if limits["choices"] and value not in limits["choices"]:
            raise ValueError(f"{item.name}: {value!r} is not one of {', '.join(limits['choices'])}")
        if limits["minimum"] is not None and value < limits["minimum"]:
            raise ValueError(f"{item.name}: {value} is below {limits['minimum']}")
        if limits["maximum"] is not None and value > limits["maximum"]:
            raise ValueError(f"{item.name}: {value} is above {limits['maximum']}")
