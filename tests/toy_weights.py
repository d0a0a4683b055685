"""A file of weights with two tensors, its entry in the registry, and a cache that is not the user's."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
import torch

from frontends import weights
from frontends.base import WeightsError
from frontends.weights_registry import KnownFile, WeightsEntry


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    return buffer.getvalue()


CONTENT = saved({"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.tensor([1.0, -2.0])})


def git_blob(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def known_file(content: bytes = CONTENT, url: str | None = None, name: str = "toy.pth") -> KnownFile:
    return KnownFile(name, hashlib.sha256(content).hexdigest(), len(content), git_blob(content), url)


def register(monkeypatch: pytest.MonkeyPatch, *files: KnownFile) -> WeightsEntry:
    entry = WeightsEntry("toy", "two tensors", "extractor", ("toy",), "Apache-2.0", files)
    monkeypatch.setattr(weights, "REGISTRY", (entry,))
    return entry


def cached(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "lightvo" / "toy.pth"


def isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sees_weights: bool = False) -> None:
    """Nothing is found in the user's cache, nor in the directory of real weights unless they are to be seen."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    if not sees_weights:
        monkeypatch.delenv("LIGHTVO_WEIGHTS", raising=False)


def one_line(error: pytest.ExceptionInfo[WeightsError], *parts: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
