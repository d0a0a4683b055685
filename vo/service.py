"""Tells systemd how the run is doing: its notification protocol (sd_notify(3)), a datagram on a UNIX socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


class ServiceManager:
    """Whoever started us and wants to hear of it; does nothing where nobody does."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte that begins a name outside the file system.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._is_ready = False

    @property
    def is_there(self) -> bool:
        return bool(self._address)

    def alive(self, status: str) -> None:
        """The run goes on; the first time, that it has begun."""
        ready = () if self._is_ready else ("READY=1",)
        self._tell("\n".join((*ready, "WATCHDOG=1", f"STATUS={status}")))
        self._is_ready = True

    def stopping(self) -> None:
        self._tell("STOPPING=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
                manager.settimeout(0.5)
                manager.sendto(text.encode(), self._address)
        except OSError:
            return  # a manager that does not listen will draw its own conclusions
