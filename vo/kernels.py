"""Loops of the geometry in C, where the package was built with a C compiler; NumPy does the same elsewhere.

`kernels.c` is compiled when the package is built (`tools/build_kernels.py`) into a plain shared library, which is
called through ctypes: other threads have the interpreter meanwhile. What is there is used; `LIGHTVO_KERNELS=off`
leaves it out. A library of another version of the source is left out too, and `status` says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
from ctypes import c_char, c_double, c_int64, c_void_p
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vo.types import FloatArray

_SOURCE = Path(__file__).with_name("kernels.c")
LIBRARY = Path(__file__).with_name("lightvo_kernels.so")
_SWITCH = "LIGHTVO_KERNELS"

_Byte = c_char * 1

_log = logging.getLogger(__name__)


class Window(ctypes.Structure):
    """The structure of this name in kernels.c; `window` fills it in."""

    _fields_ = [
        *((name, c_int64) for name in ("num_poses", "num_fixed", "num_points", "num_observations")),
        *((name, c_int64) for name in ("refines_radial", "refines_focal")),
        *((name, c_void_p) for name in ("poses", "points", "rays", "pose_index", "point_index", "inverse_depths")),
        *((name, c_double) for name in ("focal_px", "kappa", "log_focal", "depth_gain_px", "kernel_px")),
    ]


class Kernels:
    """The functions of one loaded library, on NumPy arrays; shapes are those of kernels.c."""

    def __init__(self, library: ctypes.CDLL) -> None:
        address, number, real = c_void_p, c_int64, c_double
        self._window_cost = _function(library, "window_cost", ctypes.POINTER(Window), result=real)
        self._window_errors = _function(library, "window_errors", ctypes.POINTER(Window), address)
        self._window_linearize = _function(library, "window_linearize", ctypes.POINTER(Window), *[address] * 6)
        counts = [number] * 3
        self._window_reduce = _function(library, "window_reduce", *counts, *[address] * 7, real, *[address] * 3)
        self._window_points = _function(library, "window_points", *counts, *[address] * 9)
        self._matches_seen = _function(library, "matches_seen", number, *[address] * 4)
        self._matches_system = _function(library, "matches_system", number, *[address] * 4, real, real, address)
        self._matches_refine = _function(
            library, "matches_refine", number, *[address] * 2, real, *[address] * 3, result=real
        )
        self._matches_in_front = _function(library, "matches_in_front", number, *[address] * 5)
        self._landmarks_refine = _function(
            library, "landmarks_refine", number, *[address] * 2, real, real, number, address, result=number
        )

    # --- two views and landmarks ------------------------------------------------------------------------------------

    def matches_seen(self, E: FloatArray, x0: FloatArray, x1: FloatArray) -> FloatArray:
        """(6, M) of matches (3, M) under E (3, 3): distances, one over the gradients, four rows of lines."""
        seen = np.empty((6, x0.shape[1]))
        self._matches_seen(x0.shape[1], _at(x0), _at(x1), _at(np.ascontiguousarray(E)), _at(seen))
        return seen

    def matches_system(
        self, x0: FloatArray, x1: FloatArray, steps: FloatArray, seen: FloatArray, scale: float, cutoff: float
    ) -> FloatArray:
        """(34,) by steps (5, 9) of E: H (5, 5), gradient (5,), sums of weights, curvatures, squares and influences."""
        system = np.empty(34)
        self._matches_system(x0.shape[1], _at(x0), _at(x1), _at(steps), _at(seen), scale, cutoff, _at(system))
        return system

    def matches_refine(
        self, T: FloatArray, x0: FloatArray, x1: FloatArray, threshold: float, limits: FloatArray
    ) -> tuple[FloatArray, float] | None:
        """The refined pose (4, 4) and the noise, 0 with too few matches; None where NumPy has to decide."""
        refined, work = np.array(T, np.float64, order="C"), np.empty((7, x0.shape[1]))
        given = _at(x0), _at(x1), threshold, _at(limits)
        sigma = float(self._matches_refine(x0.shape[1], *given, _at(refined), _at(work)))
        return None if sigma < 0 else (refined, sigma)

    def matches_in_front(
        self, rotations: FloatArray, t: FloatArray, x0: FloatArray, x1: FloatArray
    ) -> NDArray[np.int64]:
        """(2, 2) points before both cameras with each of two rotations (2, 3, 3), with t (3,) and with -t."""
        counts = np.empty((2, 2), np.int64)
        x0, x1, t = (np.ascontiguousarray(array) for array in (x0, x1, t))
        self._matches_in_front(x0.shape[1], _at(x0), _at(x1), _at(rotations), _at(t), _at(counts))
        return counts

    def landmarks_refine(
        self,
        T: FloatArray,
        points: FloatArray,
        rays: FloatArray,
        focal_px: float,
        kernel_px: float,
        num_iterations: int,
    ) -> FloatArray | None:
        """The pose (4, 4) refined on landmarks (3, N) and their rays (2, N); None where NumPy has to decide."""
        refined = np.array(T, np.float64, order="C")
        given = _at(points), _at(rays), focal_px, kernel_px, num_iterations
        return refined if self._landmarks_refine(points.shape[1], *given, _at(refined)) else None

    # --- bundle adjustment ------------------------------------------------------------------------------------------

    def window_cost(self, window: Window) -> float:
        return float(self._window_cost(ctypes.byref(window)))

    def window_errors(self, window: Window) -> FloatArray:
        errors = np.empty(int(window.num_observations))
        self._window_errors(ctypes.byref(window), _at(errors))
        return errors

    def window_linearize(self, window: Window, *sums: FloatArray) -> None:
        self._window_linearize(ctypes.byref(window), *map(_at, sums))

    def window_reduce(
        self, counts: tuple[int, int, int], given: tuple[NDArray[np.generic], ...], damping: float, *made: FloatArray
    ) -> None:
        self._window_reduce(*counts, *map(_at, given), damping, *map(_at, made))

    def window_points(self, counts: tuple[int, int, int], *arrays: NDArray[np.generic]) -> None:
        self._window_points(*counts, *map(_at, arrays))


def window(
    poses: FloatArray,
    points: FloatArray,
    observations: tuple[NDArray[np.generic], ...],
    inverse_depths: FloatArray | None,
    num_fixed: int,
    refines: tuple[bool, bool],
    numbers: tuple[float, float, float, float, float],
) -> Window:
    """The structure of contiguous arrays, which the caller keeps alive.

    observations  rays, index of the pose, index of the point; refines: radial, focal; numbers: focal length px, kappa,
                  logarithm of the ratio of focal lengths, gain of depths px, width of the kernel px.
    """
    rays, pose_index, point_index = observations
    depths = None if inverse_depths is None else _address(inverse_depths)
    counts = (len(poses), num_fixed, len(points), len(rays), int(refines[0]), int(refines[1]))
    return Window(*counts, *map(_address, (poses, points, rays, pose_index, point_index)), depths, *map(float, numbers))


def kernels() -> Kernels | None:
    """The compiled functions; None where NumPy has to do."""
    return _loaded()[0]


def status() -> str:
    """How the geometry is computed, for the summary of a run: "compiled", or "numpy" and why."""
    return _loaded()[1]


@cache
def _loaded() -> tuple[Kernels | None, str]:
    if os.environ.get(_SWITCH, "").lower() in ("off", "0", "no"):
        return None, f"numpy: {_SWITCH} is off"
    if not LIBRARY.is_file():
        return None, "numpy: installed without a C compiler"
    try:
        found = _load(LIBRARY)
    except (OSError, AttributeError) as error:
        found, reason = None, f"numpy: {LIBRARY.name} cannot be loaded: {error}"
    else:
        reason = f"numpy: {LIBRARY.name} is of another version of the source; install again"
    if found is None:
        _log.warning(reason)
        return None, reason
    return found, "compiled"


def _load(path: Path) -> Kernels | None:
    """None where the library was not made of the source beside it. Raises OSError, AttributeError."""
    library = ctypes.CDLL(os.fspath(path))
    library.lightvo_source.restype = ctypes.c_char_p
    expected = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:16]
    return Kernels(library) if library.lightvo_source() == expected.encode() else None


def _function(
    library: ctypes.CDLL, name: str, *arguments: type, result: type | None = None
) -> ctypes._NamedFuncPointer:
    function = getattr(library, f"lightvo_{name}")
    function.argtypes, function.restype = arguments, result
    return function  # type: ignore[no-any-return]


def _at(array: NDArray[np.generic]) -> ctypes.Array[c_char] | int:
    """Where the numbers of an array lie, as an argument. ValueError unless they lie one after the other."""
    try:
        # A tenth of the time that NumPy's own way takes, which would be most of what a call costs.
        return _Byte.from_buffer(array)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return _address(array)


def _address(array: NDArray[np.generic]) -> int:
    if not array.flags.c_contiguous:
        raise ValueError(f"array: expected a contiguous one, got strides {array.strides} of {array.shape}")
    return array.ctypes.data
