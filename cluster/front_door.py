"""The socket that clients connect to: `moray serve` holds it for as long as it runs, and fronts borrow it.

Ray Serve's proxy, a process between clients and fronts, takes several times the CPU time of the front itself for every token,
and milliseconds for the first one (`tests/bench/front.py`). Where all fronts are on this machine they take their clients
themselves, from one socket: one that stands still takes none, and who connects while a front is replaced waits for the next.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading

from ..configs.errors import ClusterError
from .listening import bound

_BORROW_TIMEOUT_S = 10.0
_CREDENTIALS = struct.Struct("3i")  # of the peer of a Unix socket: process, user, group


class FrontDoor:
    """Binds `host`:`port`, and lends the socket to processes of this user that know `name`. Nobody is taken in before one
    of them listens.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, host: str, port: int) -> None:
        self._door = bound(host, port)
        self.name = f"moray-front-door-{secrets.token_hex(16)}"
        self._lender = socket.socket(socket.AF_UNIX)
        self._lender.bind(f"\0{self.name}")
        self._lender.listen()
        self._thread = threading.Thread(target=self._lend, name="moray-front-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Let go of the socket, and lend it no more. Idempotent."""
        with contextlib.suppress(OSError):
            self._lender.shutdown(socket.SHUT_RDWR)  # ends the wait of the thread
        self._thread.join()
        self._lender.close()
        self._door.close()

    def _lend(self) -> None:
        while True:
            try:
                borrower, _ = self._lender.accept()
            except OSError:
                return
            with borrower, contextlib.suppress(OSError):
                credentials = borrower.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
                if _CREDENTIALS.unpack(credentials)[1] == os.getuid():
                    socket.send_fds(borrower, [b"\0"], [self._door.fileno()])


def borrowed(name: str) -> socket.socket:
    """The socket of the door with this name.

    Raises:
        ClusterError: there is no such door, or it is not this user's.
    """
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_BORROW_TIMEOUT_S)
        try:
            asking.connect(f"\0{name}")
            _, (descriptor,), _, _ = socket.recv_fds(asking, 1, 1)
        except (OSError, ValueError) as error:
            raise ClusterError(f"the socket for clients cannot be had from `moray serve` ({error!r})") from error
    return socket.socket(fileno=descriptor)
