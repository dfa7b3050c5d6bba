"""Addresses to listen on: checked, chosen and shown before anything is started."""

from __future__ import annotations

import ipaddress
import os
import socket

from ..configs.deployment import Deployment
from ..configs.errors import ConfigError


def check_port(host: str, port: int) -> int:
    """Refuse an address that cannot be listened on; returns the port, a free one for port 0.

    Raises:
        ConfigError: it is taken, or not this machine's.
    """
    with bound(host, port) as probe:
        chosen: int = probe.getsockname()[1]
        return chosen


def bound(host: str, port: int) -> socket.socket:
    """A socket that has this address, and does not listen yet.

    Raises:
        ConfigError: it is taken, or not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another with --host or --port (0: any free port)"
        ) from error
    return sock


def url_of(host: str, port: int) -> str:
    """The base URL for clients on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def open_doors(deployment: Deployment, address: str | None) -> list[str]:
    """What anybody may do who reaches this server, and how to stop it; nothing where that is as it should be.

    Args:
        address: of the Ray cluster that is joined; None if none is.
    """
    found = []
    front = deployment.front
    if front.api_key_file is None and not _is_loopback(front.host):
        found.append(f"whoever reaches {front.host}:{front.port} may use the model: give keys with --api-key-file")
    if address is not None and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        found.append(
            "the Ray cluster asks for no token: whoever reaches its ports may run programs on its nodes; set "
            "RAY_AUTH_MODE=token on every node, or close the ports to all others (docs/security.md)"
        )
    return found


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
