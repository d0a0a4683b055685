"""What PyTorch raises where a GPU fails, as one line that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from frontends.base import DeviceError

# Older versions raise a bare RuntimeError for these, and libraries under PyTorch still do.
_FAULTS = ("CUDA error", "CUDA driver error", "cuDNN error", "CUBLAS_STATUS", "CUFFT", "NVRTC")


@contextmanager
def device_faults() -> Iterator[None]:
    """Inside, the failure of a device is a DeviceError; every other error stays what it is."""
    try:
        yield
    except RuntimeError as error:
        failure = device_error(error)
        if failure is None:
            raise
        raise failure from error


def device_error(error: BaseException) -> DeviceError | None:
    """The error of one line for what PyTorch raises where the device fails; None for any other.

    What CUDA refuses in the middle of a capture is none: the device is sound, the function cannot be a graph.
    """
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    if isinstance(error, torch.OutOfMemoryError):
        remedy = "lower frontend.extractor.max_keypoints or max_side, free the GPU, or use --device cpu"
        return DeviceError(f"frontend.device: the GPU is out of memory ({reason}); {remedy}")
    if "captur" in str(error).lower():
        return None
    is_fault = isinstance(error, torch.AcceleratorError) or any(fault in reason for fault in _FAULTS)
    if isinstance(error, RuntimeError) and is_fault:
        return DeviceError(f"frontend.device: the GPU failed ({reason}); check nvidia-smi, or use --device cpu")
    return None
