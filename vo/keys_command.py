"""`vo keys`: makes the keys with which a run may be reached from other machines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import zmq

from vo.keys import SECRET_SUFFIX, SERVER, KeyPair, write_client_keys, write_server_keys
from vo.types import ConfigError

FIRST_CLIENT = "client"


def keys_command(directory: Path, clients: Sequence[str] = ()) -> int:
    """Makes what is missing: keys of the server, and of every client named; prints the files.

    A first call without names makes one client. Raises ConfigError; no file is ever overwritten.
    """
    if not zmq.has("curve"):
        raise ConfigError("this libzmq was built without CURVE; install a pyzmq wheel (pip install pyzmq)")
    is_first = not (directory / (SERVER + SECRET_SUFFIX)).exists()
    if not is_first and not clients:
        raise ConfigError(f"{directory}: has keys already; --client NAME adds one more client")
    written: list[Path] = []
    if is_first:
        written += write_server_keys(directory, _new_pair())
    for name in clients or (FIRST_CLIENT,):
        written += write_client_keys(directory, name, _new_pair())
    for path in written:
        print(path)
    return 0


def _new_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public, secret)
