"""The weights lightvo knows: data only. `frontends.weights` finds, checks and loads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class KnownFile:
    """One file whose content is known by its hash.

    size_bytes  None where it was never recorded.
    git_blob    id under which git stores the content, for files pinned by a commit.
    source_url  official address; None for files that come with the package or cannot be downloaded.
    """

    file_name: str
    sha256: str
    size_bytes: int | None = None
    git_blob: str | None = None
    source_url: str | None = None


@dataclass(frozen=True, slots=True)
class WeightsEntry:
    """One set of weights.

    fits   kinds of features it makes (extractor) or was trained to match (matcher).
    files  forms it may take on disk; the first one is what is packaged or downloaded. None of weights whose hash nobody
           has recorded: they are never downloaded, and are used only where their path is given.
    page   where such weights are to be had by hand.
    stands_in_for  the published weights whose place these take where those cannot be had.
    """

    name: str
    architecture: str
    role: Literal["extractor", "matcher", "pair matcher"]
    fits: tuple[str, ...]
    licence: str
    files: tuple[KnownFile, ...]
    is_ours: bool = False
    page: str | None = None
    stands_in_for: str | None = None

    @property
    def file_name(self) -> str | None:
        return self.files[0].file_name if self.files else None

    @property
    def size_bytes(self) -> int | None:
        return self.files[0].size_bytes if self.files else None

    @property
    def sha256(self) -> str | None:
        return self.files[0].sha256 if self.files else None

    @property
    def source_url(self) -> str | None:
        return self.files[0].source_url if self.files else None

    @property
    def remedy(self) -> str:
        """What to do where the weights are not at hand."""
        if self.page is not None:
            return (
                f"get them by hand from {self.page} if their licence ({self.licence}) suits you, "
                "and give the path of the file in the setting `weights`"
            )
        return "reinstall lightvo" if self.source_url is None else f"vo weights fetch {self.name}"


_ALIKED = "https://raw.githubusercontent.com/Shiaoming/ALIKED/683d7c65197395c0b3f01ebe76e1084a27e73a65/models"
_XFEAT = (
    "https://raw.githubusercontent.com/verlab/accelerated_features/e92685f57f8318b18725c5c8c0bd28c7fe188d9a/weights"
)
_LIGHTGLUE = "https://github.com/cvg/LightGlue/releases/download/v0.1_arxiv"


def _aliked(model: str, parameters: str, sha256: str, size_bytes: int, git_blob: str) -> WeightsEntry:
    name = f"aliked-{model}"
    file = KnownFile(f"{name}.pth", sha256, size_bytes, git_blob, f"{_ALIKED}/{name}.pth")
    return WeightsEntry(name, f"ALIKED {model}, {parameters} parameters", "extractor", (name,), "BSD-3-Clause", (file,))


def _lightglue(features: str, fits: tuple[str, ...], shape: str, sha256: str, size_bytes: int | None) -> WeightsEntry:
    file_name = f"{features}_lightglue.pth"
    file = KnownFile(file_name, sha256, size_bytes, source_url=f"{_LIGHTGLUE}/{file_name}")
    architecture = f"LightGlue, {shape}, width 256, 4 heads, 9 layers"
    return WeightsEntry(f"lightglue-{features}", architecture, "matcher", fits, "Apache-2.0", (file,))


def _own(kind: str, architecture: str, sha256: str, size_bytes: int) -> WeightsEntry:
    name = f"own-{kind}"
    files = (KnownFile(f"{name}.safetensors", sha256, size_bytes),)
    return WeightsEntry(name, architecture, "extractor", (kind,), "Apache-2.0", files, is_ours=True, stands_in_for=kind)


def _lightglue_light(kind: str, packaged: KnownFile, trained: KnownFile) -> WeightsEntry:
    name, architecture = (
        f"lightglue-light-{kind}",
        "LightGlue, input 64, width 128, 2 heads, 6 layers, 2.0 M parameters",
    )
    return WeightsEntry(name, architecture, "matcher", (kind,), "Apache-2.0", (packaged, trained), is_ours=True)


# The hashes of ALIKED, of the folded XFeat and of our own files were computed on the files. Those of the LightGlue
# release, of LighterGlue and the SHA-256 of the published XFeat are the ones that independent projects record for the
# same addresses (each found in at least five of them); for XFeat the git blob id of the pinned commit is checked too.
REGISTRY: tuple[WeightsEntry, ...] = (
    _aliked(
        "t16",
        "0.19 M",
        "56782336919db220144a884e710e2b6af13b3b8f8da15b915a239078ab471085",
        794_859,
        "97822f50c8458b5a92a678f6d9ad747c5c1989c7",
    ),
    _aliked(
        "n16",
        "0.68 M",
        "5be8704840ed662d9d8c561bf7279c222092674e7eb05fd0feab94899e9d82f2",
        2_738_091,
        "9449ca16f784aff7fa4c88ea0925b41f6411eef0",
    ),
    _aliked(
        "n16rot",
        "0.68 M",
        "ddf3abbf38e86f6a74540d214e1a9712c54b2d8551abc864542199f2347d7332",
        2_738_325,
        "5aad43f3a944dd9461ecc89e648f15f11dc0c9aa",
    ),
    _aliked(
        "n32",
        "0.98 M",
        "055283fd1624d3ab46a05c3b617b1a79a3f28d1f551737eef2d653e8c8232890",
        3_946_667,
        "4a8323b10023acaed1195b4d9235224a363186cc",
    ),
    WeightsEntry(
        name="xfeat",
        architecture="XFeat, 0.66 M parameters, and the XFeat* fine matcher, 0.89 M",
        role="extractor",
        fits=("xfeat",),
        licence="Apache-2.0",
        files=(
            KnownFile(
                "xfeat.pt",
                "0f5187fd7bedd26c7fe6acc9685444493a165a35ecc087b33c2db3627f3ea10b",
                6_247_949,
                git_blob="9da942e9c7406b8add3746bf98d4b1840233cd92",
                source_url=f"{_XFEAT}/xfeat.pt",
            ),
            # The same network with BatchNorm folded into the convolutions, without the fine matcher.
            KnownFile("xfeat.pth", "e1fcd42766985950e8f64f881ddc9c6af3fcd4e781bc8a90fa8dd208474efa45", 2_673_955),
        ),
    ),
    WeightsEntry(
        name="xfeat-star-fine",
        architecture="fine matcher of XFeat*, 0.89 M parameters, for backbones that come without",
        role="pair matcher",
        fits=("xfeat-star",),
        licence="Apache-2.0",
        files=(
            KnownFile(
                "xfeat-star-fine.safetensors",
                "7744c5901b2de9375b253e4a90c6289218e147903d0ddd3c36125da4db23a197",
                1_792_208,
            ),
        ),
        is_ours=True,
    ),
    _own(
        "aliked-t16",
        "ALIKED t16, 0.19 M parameters",
        "e0089ed1cac47dfcf795b5fec443aeb0838d9e02e84b7413810b9adec9dc1e6a",
        777_152,
    ),
    _own(
        "xfeat",
        "XFeat, 0.66 M parameters",
        "19baa224911a526d26e9fa9bda5b4c5cadd6c56fb0b277b52536c46f7c12ab61",
        2_650_832,
    ),
    _lightglue_light(
        "aliked-t16",
        KnownFile(
            "lightglue-light-aliked-t16.safetensors",
            "858ff21bd3677f8d6ea47bef37b5ca730564d0eac9e053558ae60bea07381807",
            4_003_606,
        ),
        KnownFile(
            "lightglue-light-aliked-t16.pth",
            "beccfbc7083f79c811fc1fc36c714f8ca613323d4c447f4cc9f4ed3421fe08d7",
            4_041_834,
        ),
    ),
    _lightglue_light(
        "xfeat",
        KnownFile(
            "lightglue-light-xfeat.safetensors",
            "0800c86080f1e84d1e18739d95979956808bd5e1fc782b2f1eb3411ab0dfb211",
            4_003_590,
        ),
        KnownFile(
            "lightglue-light-xfeat.pth",
            "d2b8375d1f28b0d8d67603c637c2c140d638c91fbb637ef3721a05ea3015110d",
            4_041_659,
        ),
    ),
    _lightglue(
        "aliked",
        ("aliked-n16",),
        "input 128",
        "d975e965b105311a6143194852297dff4f02aea5cc2e10cecfed966ca0e22503",
        47_632_827,
    ),
    _lightglue(
        "superpoint",
        ("superpoint",),
        "input 256",
        "6ff7040d0a497fc6639337946d7538dae07428c18f77a067a0b5a960e7cc551a",
        None,
    ),
    _lightglue(
        "disk",
        ("disk",),
        "input 128",
        "b5b21d47ea24f2c5e501aec9c91b9716e4c8c3429a4dc1e615c133c4c9378335",
        47_631_405,
    ),
    _lightglue(
        "sift",
        ("sift",),
        "input 128 with scale and orientation",
        "5b52b8d9982d43532dc042606b346bb9594c9f5a4bd6f64362c63866287b4ac0",
        47_632_573,
    ),
    WeightsEntry(
        name="lighterglue-xfeat",
        architecture="LightGlue, input 64, width 96, 1 head, 6 layers",
        role="matcher",
        fits=("xfeat",),
        licence="Apache-2.0",
        files=(
            KnownFile(
                "xfeat-lighterglue.pt",
                "766102df37f11189efe5b0811d1f47c72b22629b79bfabfcfff9d2a2f84654b8",
                source_url=f"{_XFEAT}/xfeat-lighterglue.pt",
            ),
        ),
    ),
    WeightsEntry(
        name="r2d2-small",
        architecture="R2D2, Quad-L2Net of width 1, 64-dimensional, 0.03 M parameters",
        role="extractor",
        fits=("r2d2",),
        licence="Apache-2.0",
        files=(
            KnownFile(
                "r2d2-small.safetensors",
                "78ced1e07da9ee002b3ed09c4d350ab99a1a74db8dee59b11444ab2d8fe72eed",
                74_910,
            ),
        ),
        is_ours=True,
    ),
    WeightsEntry(
        name="r2d2",
        architecture="R2D2, Quad-L2Net, 0.49 M parameters (WAF_N16, WASF_N16), or a variant that the file names",
        role="extractor",
        fits=("r2d2",),
        licence="CC BY-NC-SA 3.0, non-commercial",
        files=(),
        page="https://github.com/naver/r2d2 (models/)",
    ),
    WeightsEntry(
        name="loftr",
        architecture="LoFTR, 11.6 M parameters",
        role="pair matcher",
        fits=("loftr",),
        licence="Apache-2.0",
        files=(),
        page="https://huggingface.co/kornia/loftr (loftr_outdoor.ckpt)",
    ),
)
