"""Write weights of our own as they are packaged: safetensors in float16, with what a reader has to know beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Writes tensors by name, and beside `metadata` (architecture, data, recipe) their name, origin and licence."""
    packed = {name: _packed(name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}
    common = {"name": path.stem, "origin": "trained by the lightvo project", "licence": "Apache-2.0", "format": "pt"}
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(packed, path, {**common, "dtype": "float16, statistics float32", **metadata})


def _packed(name: str, tensor: Tensor) -> Tensor:
    # Variances of small activations lie below what float16 resolves; integers (counters of batches) are left out above.
    is_statistic = name.endswith(("running_mean", "running_var"))
    return tensor.detach().cpu().to(torch.float32 if is_statistic else torch.float16).contiguous()
