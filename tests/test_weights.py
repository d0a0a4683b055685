"""The registry of weights: what it holds, resolution order, checks, damaged files."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_weights import CONTENT, cached, isolate, known_file, one_line, register, saved

from frontends import weights
from frontends.base import WeightsError
from frontends.weights import Origin, list_weights, load_checkpoint, load_file, load_state_dict, verify
from frontends.weights_registry import REGISTRY

needs_weights = pytest.mark.skipif("LIGHTVO_WEIGHTS" not in os.environ, reason="LIGHTVO_WEIGHTS is not set")
OURS = ("lightglue-light-aliked-t16", "lightglue-light-xfeat")


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No test sees the user's cache, and only marked ones see the directory of real weights."""
    isolate(tmp_path, monkeypatch, sees_weights="real_weights" in request.fixturenames)


@pytest.fixture
def real_weights() -> Path:
    return Path(os.environ["LIGHTVO_WEIGHTS"])


# ---------------------------------------------------------------- the registry itself


def test_every_entry_is_complete_and_every_address_is_pinned() -> None:
    assert len({entry.name for entry in REGISTRY}) == len(REGISTRY)
    file_names = [known.file_name for entry in REGISTRY for known in entry.files]
    assert len(set(file_names)) == len(file_names)
    for entry in REGISTRY:
        assert entry.architecture and entry.fits
        if not entry.files:
            # Their hash is not recorded: nothing is downloaded, and the user is sent to the page.
            assert entry.page is not None and entry.page.startswith("https://") and not entry.is_ours
            assert entry.page in entry.remedy and entry.licence in entry.remedy
            continue
        assert entry.licence in {"Apache-2.0", "BSD-3-Clause"}
        assert entry.is_ours == (entry.source_url is None)
        if entry.source_url is not None:
            assert entry.source_url.startswith("https://") and entry.source_url.endswith("/" + entry.file_name)
            assert re.search(r"/[0-9a-f]{40}/|/releases/download/v0\.1_arxiv/", entry.source_url)
        for known in entry.files:
            assert re.fullmatch(r"[0-9a-f]{64}", known.sha256)
            assert known.git_blob is None or re.fullmatch(r"[0-9a-f]{40}", known.git_blob)


@pytest.mark.parametrize("name", OURS)
def test_our_weights_come_with_the_package(name: str) -> None:
    state_dict, file = load_state_dict(name, allow_download=False)
    assert (file.origin, file.licence, file.is_verified) == (Origin.PACKAGE, "Apache-2.0", True)
    assert file.path.suffix == ".safetensors"
    assert state_dict["input_proj.weight"].shape == (128, 64)
    assert state_dict["transformers.5.self_attn.Wqkv.weight"].shape == (384, 128)
    with safetensors.safe_open(file.path, framework="pt") as archive:
        metadata = archive.metadata()
    assert metadata["name"] == name and metadata["licence"] == "Apache-2.0"
    assert metadata["fits"] == name.removeprefix("lightglue-light-")
    assert {"architecture", "data", "recipe"} <= metadata.keys()


@pytest.mark.parametrize(("name", "kind"), [("xfeat-star-fine", "xfeat-star"), ("r2d2-small", "r2d2")])
def test_our_small_weights_come_with_the_package_and_say_what_they_are(name: str, kind: str) -> None:
    state_dict, file = load_state_dict(name, allow_download=False)
    assert (file.origin, file.licence, file.is_verified) == (Origin.PACKAGE, "Apache-2.0", True)
    assert file.path.stat().st_size < 2_000_000 and all(torch.isfinite(tensor).all() for tensor in state_dict.values())
    with safetensors.safe_open(file.path, framework="pt") as archive:
        metadata = archive.metadata()
    assert metadata["name"] == name and metadata["licence"] == "Apache-2.0" and metadata["fits"] == kind
    assert {"architecture", "data", "recipe"} <= metadata.keys()


def test_what_safetensors_say_of_their_network_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    safetensors.torch.save_file({"a": torch.ones(2)}, path, {"net": "Quad_L2Net_ConfCFS()"})
    loaded, file = load_checkpoint("r2d2", path)
    assert loaded.constructor == "Quad_L2Net_ConfCFS()" and not file.is_verified
    assert torch.equal(loaded.state_dict["a"], torch.ones(2))
    safetensors.torch.save_file({"a": torch.ones(2)}, path)
    assert load_checkpoint("r2d2", path)[0].constructor is None


@pytest.mark.parametrize("name", ["own-aliked-t16", "own-xfeat"])
def test_our_extractors_come_with_the_package(name: str) -> None:
    state_dict, file = load_state_dict(name, allow_download=False)
    assert (file.origin, file.licence, file.is_verified) == (Origin.PACKAGE, "Apache-2.0", True)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state_dict.values())
    with safetensors.safe_open(file.path, framework="pt") as archive:
        metadata = archive.metadata()
    assert metadata["name"] == name and metadata["licence"] == "Apache-2.0"
    assert metadata["fits"] == name.removeprefix("own-")
    assert {"architecture", "data", "recipe", "revision", "metrics", "trainer"} <= metadata.keys()


@needs_weights
@pytest.mark.parametrize("kind", ["aliked-t16", "xfeat"])
def test_our_extractors_are_no_copies(kind: str, real_weights: Path) -> None:
    """Trained from random parameters: no convolution inside a block resembles its published counterpart."""
    published, own = (load_state_dict(name)[0] for name in (kind, f"own-{kind}"))
    inside = "block1.0.layer.0.weight" if kind == "xfeat" else "block1.conv1.weight"
    ours, theirs = (tensors[inside].flatten(1) for tensors in (own, published))
    alike = torch.nn.functional.cosine_similarity(ours, theirs, dim=1)
    assert float(alike.abs().median()) < 0.8


@needs_weights
@pytest.mark.parametrize("name", OURS)
def test_our_packaged_weights_equal_the_trained_ones(
    name: str, real_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, file = load_state_dict(name)
    assert file.origin is Origin.ENVIRONMENT and file.path == real_weights / f"{name}.pth"
    monkeypatch.delenv("LIGHTVO_WEIGHTS")
    packaged, _ = load_state_dict(name)
    assert packaged.keys() == trained.keys()
    assert all(torch.equal(packaged[key], trained[key]) for key in trained)


@needs_weights
@pytest.mark.parametrize("name", ["aliked-t16", "aliked-n16", "aliked-n16rot", "aliked-n32", "xfeat"])
def test_published_weights_at_hand_are_verified(name: str, real_weights: Path) -> None:
    assert verify(name).path.parent == real_weights
    state_dict, file = load_state_dict(name, allow_download=False)
    assert file.is_verified and file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
    assert state_dict


# ---------------------------------------------------------------- where a name is looked for


def test_resolution_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = register(monkeypatch, known_file())
    package, environment, cache = tmp_path / "package", tmp_path / "environment", cached(tmp_path).parent
    monkeypatch.setattr(weights, "PACKAGE_DATA", package)
    explicit = tmp_path / "mine.pth"
    for path in (explicit, package / "toy.pth", environment / "toy.pth", cache / "toy.pth"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT)
    monkeypatch.setenv("LIGHTVO_WEIGHTS", str(environment))
    assert load_state_dict("toy", path=explicit)[1].origin is Origin.EXPLICIT
    for expected, path in (
        (Origin.ENVIRONMENT, environment / "toy.pth"),
        (Origin.PACKAGE, package / "toy.pth"),
        (Origin.CACHE, cache / "toy.pth"),
    ):
        file = load_state_dict("toy")[1]
        assert (file.origin, file.path) == (expected, path)
        (status,) = list_weights()
        assert (status.entry, status.path, status.origin) == (entry, path, expected)
        path.unlink()
    (status,) = list_weights()
    assert status.path is None and status.origin is None


def test_a_second_known_form_of_the_same_weights_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = safetensors.torch.save({"a": torch.ones(3)})
    register(monkeypatch, known_file(), known_file(content, name="toy.safetensors"))
    (tmp_path / "toy.safetensors").write_bytes(content)
    monkeypatch.setenv("LIGHTVO_WEIGHTS", str(tmp_path))
    state_dict, file = load_state_dict("toy")
    assert file.path.name == "toy.safetensors" and torch.equal(state_dict["a"], torch.ones(3))


def test_an_explicit_path_with_an_unknown_hash_is_loaded_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file())
    path, content = tmp_path / "retrained.pth", saved({"a": torch.zeros(1)})
    path.write_bytes(content)
    state_dict, file = load_state_dict("toy", path=str(path))
    assert list(state_dict) == ["a"]
    assert not file.is_verified and file.licence == "unknown"
    assert file.sha256 == hashlib.sha256(content).hexdigest()
    path.write_bytes(CONTENT)
    assert load_state_dict("toy", path=path)[1].is_verified


def test_a_file_goes_by_its_name_in_the_registry_if_its_hash_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file())
    (tmp_path / "renamed.pth").write_bytes(CONTENT)
    (tmp_path / "other.pth").write_bytes(saved({"a": torch.zeros(1)}))
    state_dict, file = load_file(tmp_path / "renamed.pth")
    assert (file.name, file.licence, file.is_verified, file.origin) == ("toy", "Apache-2.0", True, Origin.EXPLICIT)
    assert list(state_dict) == ["layer.weight", "layer.bias"]
    file = load_file(tmp_path / "other.pth")[1]
    assert (file.name, file.licence, file.is_verified) == ("other", "unknown", False)
    with pytest.raises(WeightsError, match="no such file"):
        load_file(tmp_path / "absent.pth")


def test_listing_weights_imports_no_network_library() -> None:
    code = "import sys, frontends.weights as w; w.list_weights(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.cache_directory() == tmp_path / "cache" / "lightvo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.cache_directory() == tmp_path / ".cache" / "lightvo"


def test_missing_weights_name_the_file_the_places_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file(url="http://127.0.0.1:9/toy.pth"))
    with pytest.raises(WeightsError) as error:
        load_state_dict("toy", allow_download=False)
    cache = str(tmp_path / "cache" / "lightvo")
    one_line(error, "toy.pth", "LIGHTVO_WEIGHTS (not set)", cache, "vo weights fetch toy", "set LIGHTVO_WEIGHTS")
    with pytest.raises(WeightsError):
        verify("toy")


def test_wrong_names_paths_and_directories_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError) as error:
        load_state_dict("alike-t16")
    one_line(error, "'alike-t16'", "aliked-t16")
    with pytest.raises(WeightsError) as error:
        load_state_dict("xfeat", path=tmp_path / "absent.pt")
    one_line(error, "absent.pt", "no such file")
    monkeypatch.setenv("LIGHTVO_WEIGHTS", str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError) as error:
        load_state_dict("xfeat")
    one_line(error, "LIGHTVO_WEIGHTS", "nowhere", "unset")


# ---------------------------------------------------------------- damaged files


@given(position=st.integers(0, len(CONTENT) - 1), flip=st.integers(1, 255))
@settings(deadline=None, max_examples=25)
def test_any_changed_byte_is_found(position: int, flip: int) -> None:
    damaged = bytearray(CONTENT)
    damaged[position] ^= flip
    assert weights._mismatch(known_file(), CONTENT) is None
    assert "SHA-256" in (weights._mismatch(known_file(), bytes(damaged)) or "")


def test_the_git_blob_is_checked_too() -> None:
    wrong = replace(known_file(), git_blob="0" * 40)
    assert "git blob" in (weights._mismatch(wrong, CONTENT) or "")


@pytest.mark.parametrize(
    ("place", "remedy"), [("cache/lightvo", "vo weights fetch toy"), ("own", "explicit path"), ("package", "reinstall")]
)
def test_a_damaged_file_is_refused_with_the_remedy(
    place: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, known_file())
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "toy.pth").write_bytes(CONTENT[:-1])
    monkeypatch.setattr(weights, "PACKAGE_DATA", tmp_path / "package")
    if place == "own":
        monkeypatch.setenv("LIGHTVO_WEIGHTS", str(tmp_path / place))
    for call in (load_state_dict, verify):
        with pytest.raises(WeightsError) as error:
            call("toy")
        one_line(error, "toy.pth", f"{len(CONTENT) - 1} bytes instead of {len(CONTENT)}", remedy)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, ("executed",)


def test_a_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("plain.pth", pickle.dumps({"a": Malicious()})), ("zip.pth", saved({"a": Malicious()}))):  # type: ignore[dict-item]
        Path(name).write_bytes(content)
        with pytest.raises(WeightsError) as error:
            load_state_dict("xfeat", path=name)
        one_line(error, name, "not a file of weights")
    assert not Path("executed").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@given(content=st.one_of(st.binary(max_size=300), st.integers(0, len(CONTENT) - 1).map(lambda end: CONTENT[:end])))
@settings(deadline=None, max_examples=60)
def test_garbage_is_one_line_and_never_a_traceback(
    suffix: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / f"garbage{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        load_state_dict("xfeat", path=path)
    one_line(error, str(path))


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"model": {"a": torch.zeros(1)}}, {"a": 3.0}, {1: torch.zeros(1)}])
def test_what_is_no_state_dict_is_refused(value: object, tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save(value, path)
    with pytest.raises(WeightsError, match="no flat state dict"):
        load_state_dict("xfeat", path=path)
