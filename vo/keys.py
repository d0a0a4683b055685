"""Keys of publishers and consumers in files: who may listen beyond this machine. Pure; libzmq does the encryption.

`vo keys DIR` makes the directory:

    server.key_secret        stays with the publisher (`vo run --keys DIR`)
    server.key               public; every consumer needs a copy (`--server-key`)
    clients/NAME.key         public; the publisher lets in exactly those that lie here
    NAME.key_secret          goes to that consumer (`--key`)

The files have the form of ZeroMQ certificates (ZPL), as libzmq's own tools write them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from vo.types import ConfigError

SECRET_SUFFIX, PUBLIC_SUFFIX = ".key_secret", ".key"
SERVER = "server"
CLIENTS = "clients"
KEY_LENGTH = 40
Z85_KEY = rb"[0-9A-Za-z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
MAX_KEY_FILE_BYTES = 4096
ZAP_VERSION = b"1.0"
ZAP_DOMAIN = b"lightvo"


@dataclass(frozen=True, slots=True, repr=False)
class KeyPair:
    """A public key and its secret, each 40 characters of Z85. Its repr shows neither."""

    public: bytes
    secret: bytes


@dataclass(frozen=True, slots=True, repr=False)
class ServerKeys:
    """What a publisher needs: its own keys, and the public keys of those whom it lets in."""

    own: KeyPair
    allowed: frozenset[bytes]


@dataclass(frozen=True, slots=True, repr=False)
class ClientKeys:
    """What a consumer needs: its own keys, and the public key of the publisher."""

    own: KeyPair
    server: bytes


def load_server_keys(directory: Path) -> ServerKeys:
    """The keys of a directory that `vo keys` made. Raises ConfigError naming the file and the remedy."""
    own = read_key_pair(directory / (SERVER + SECRET_SUFFIX))
    folder = directory / CLIENTS
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such directory; `vo keys {directory}` makes it")
    allowed = frozenset(read_public_key(path) for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}")))
    return ServerKeys(own, allowed)


def load_client_keys(key: Path | None, server_key: Path | None) -> ClientKeys | None:
    """The keys of a consumer; None where neither file is given. Raises ConfigError naming the file and the remedy."""
    if key is None and server_key is None:
        return None
    if key is None or server_key is None:
        missing = "--key NAME.key_secret" if key is None else "--server-key server.key"
        raise ConfigError(f"{missing} is missing: a publisher with keys needs both (vo keys makes them)")
    return ClientKeys(read_key_pair(key), read_public_key(server_key))


def read_key_pair(path: Path) -> KeyPair:
    """A secret certificate. Raises ConfigError where it cannot be used, or where others could read it."""
    values = _read_values(path)
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{path}: others may read this secret; chmod 600 {path}")
    if "secret-key" not in values:
        raise ConfigError(f"{path}: holds no secret key; give the file that ends in {SECRET_SUFFIX}")
    return KeyPair(_key(path, values, "public-key"), _key(path, values, "secret-key"))


def read_public_key(path: Path) -> bytes:
    """The public key of a certificate. Raises ConfigError where it holds none."""
    return _key(path, _read_values(path), "public-key")


def write_server_keys(directory: Path, pair: KeyPair) -> tuple[Path, ...]:
    """Writes the server's certificates. Raises ConfigError where there are some already: nothing is overwritten."""
    _make_folder(directory / CLIENTS)
    paths = (directory / (SERVER + SECRET_SUFFIX), directory / (SERVER + PUBLIC_SUFFIX))
    return _write_pair(paths, pair)


def write_client_keys(directory: Path, name: str, pair: KeyPair) -> tuple[Path, ...]:
    """Writes a client's certificates and lets it in. Raises ConfigError like `write_server_keys`."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", name) or name == SERVER:
        raise ConfigError(f"--client {name}: expected letters, digits, - and _, and not {SERVER}")
    _make_folder(directory / CLIENTS)
    return _write_pair((directory / (name + SECRET_SUFFIX), directory / CLIENTS / (name + PUBLIC_SUFFIX)), pair)


def zap_reply(request: Sequence[bytes], allowed: Collection[bytes], z85_key: bytes) -> list[bytes]:
    """The answer to a question of libzmq whether a client may come in (ZAP, ZeroMQ RFC 27).

    `z85_key` is the client's public key as text. Only CURVE with a key that is listed is let in.
    """
    version, request_id, domain, _address, _identity, mechanism = request[:6]
    is_allowed = (version, domain, mechanism) == (ZAP_VERSION, ZAP_DOMAIN, b"CURVE") and z85_key in allowed
    status = (b"200", b"OK") if is_allowed else (b"400", b"this key is not let in")
    return [ZAP_VERSION, request_id, *status, b"", b""]


def _write_pair(paths: tuple[Path, Path], pair: KeyPair) -> tuple[Path, ...]:
    for path in paths:
        if path.exists():
            raise ConfigError(f"{path}: exists already and is not overwritten; delete it or choose another name")
    public = f'curve\n    public-key = "{pair.public.decode()}"\n'
    secret = f'{public}    secret-key = "{pair.secret.decode()}"\n'
    comments = ("# SECRET: keep it from everybody else.\n", "# Public: give it away.\n")
    for path, text in zip(paths, (comments[0] + secret, comments[1] + public), strict=True):
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(f"# ZeroMQ CURVE certificate of lightvo.\n{text}")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be written ({error.strerror})") from error
    return paths


def _make_folder(folder: Path) -> None:
    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error.strerror})") from error


def _read_values(path: Path) -> dict[str, str]:
    try:
        with path.open(encoding="ascii") as file:
            text = file.read(MAX_KEY_FILE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no text"
        raise ConfigError(f"{path}: cannot be read ({reason}); `vo keys DIR` makes keys") from error
    return dict(re.findall(r'^\s*([a-z-]+)\s*=\s*"([^"\n]*)"\s*$', text, re.MULTILINE))


def _key(path: Path, values: dict[str, str], name: str) -> bytes:
    key = values.get(name, "").encode()
    if not re.fullmatch(Z85_KEY, key):
        raise ConfigError(f"{path}: {name}: expected {KEY_LENGTH} characters of Z85; `vo keys DIR` makes keys")
    return key
