"""Networks on a CUDA device that is not there: PyTorch then knows shapes, types and devices of everything, no values.

What runs over such tensors has been through the very branches that a GPU takes. A tensor left on the CPU, a value read
on the host, a shape that depends on values: each raises.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from frontends.graphs import NoHostAccess

CUDA = torch.device("cuda:0")


class OnDeviceOnly(TorchDispatchMode):
    """Raises where an operation takes or makes a tensor on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and value.device.type != "cuda":
                raise AssertionError(f"{func} has a tensor on {value.device}")
        return result


def lend_device_guard() -> None:
    """Lets a PyTorch built without CUDA slice tensors that claim to be on a GPU.

    PyTorch does this itself where it is built with CUDA and finds no GPU; without, it has no guard to replace, and the
    one of the CPU, which does nothing, takes its place. Raises OSError or ValueError where the library has changed.
    """
    if torch.version.cuda is not None:
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    if guards[1] is None:
        guards[1] = guards[0]


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    try:
        lend_device_guard()
    except (OSError, ValueError) as error:
        pytest.skip(f"no device guard for a GPU that is not there: {error}")
    with FakeTensorMode() as mode:
        yield mode


@contextmanager
def capturing(name: str = "fake") -> Iterator[None]:
    """What a CUDA graph could hold, and nothing else."""
    with torch.no_grad(), OnDeviceOnly(), NoHostAccess(name):
        yield


def move(thing: Any, mode: FakeTensorMode) -> Any:
    """A module (made on the device "meta"), a tensor or a dataclass of them, as if it were on the GPU."""
    if isinstance(thing, Tensor):
        with unset_fake_temporarily():
            meta = thing.detach().to("meta")
        return mode.fake_tensor_converter.from_meta_and_device(mode, meta, CUDA)
    if isinstance(thing, nn.Module):
        for module in thing.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(move(parameter, mode), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = move(buffer, mode)
        return thing
    if isinstance(thing, tuple):
        return tuple(move(item, mode) for item in thing)
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{item.name: move(getattr(thing, item.name), mode) for item in fields(thing)})
    return thing
