"""Addresses of publishers: which ports one uses, and which addresses other machines can reach."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address

from vo.types import ConfigError

DEFAULT_ENDPOINT = "tcp://127.0.0.1:5570"


def parse_endpoint(endpoint: str) -> tuple[str, int | None]:
    """Host and port of an address; None for any free port. Raises ConfigError for what is none."""
    match = re.fullmatch(r"tcp://([A-Za-z0-9._*-]+):(\d{1,5}|\*)", endpoint)
    if match is None:
        raise ConfigError(f"{endpoint}: no address of a publisher; give tcp://127.0.0.1:PORT")
    port = None if match[2] == "*" else int(match[2])
    if port is not None and not 1 <= port <= 65534:
        raise ConfigError(f"{endpoint}: the port must be in 1..65534, since the next one is used too")
    return ("127.0.0.1" if match[1] == "localhost" else match[1]), port


def request_endpoint(endpoint: str) -> str:
    """Where the publisher of `endpoint` answers requests: the next port. Raises ConfigError for a bad address."""
    host, port = parse_endpoint(endpoint)
    if port is None:
        raise ConfigError(f"{endpoint}: a port is needed to connect to, as in {DEFAULT_ENDPOINT}")
    return f"tcp://{host}:{port + 1}"


def check_bindable(endpoint: str, *, has_keys: bool) -> tuple[str, int | None]:
    """Host and port to bind. Raises ConfigError for what other machines could reach, unless clients need keys."""
    host, port = parse_endpoint(endpoint)
    try:
        is_loopback = IPv4Address(host).is_loopback
    except AddressValueError:
        is_loopback = False
    if not is_loopback and not has_keys:
        raise ConfigError(
            f"{endpoint}: refused, for other machines could read and steer the run without encryption; "
            "make keys with `vo keys DIR` and give --keys DIR, or bind tcp://127.0.0.1:PORT, or use --publish off"
        )
    return host, port
