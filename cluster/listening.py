"""Addresses to listen on: checked, chosen and shown before anything is started."""

from __future__ import annotations

import socket

from ..configs.errors import ConfigError


def check_port(host: str, port: int) -> int:
    """Refuse an address that cannot be listened on; returns the port, a free one for port 0.

    Raises:
        ConfigError: it is taken, or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            chosen: int = probe.getsockname()[1]
            return chosen
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port (0: any free port)"
        ) from error


def url_of(host: str, port: int) -> str:
    """The base URL for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
