"""Closing ports that a library has opened, and gives no way to close.

gloo opens a listening socket for each process group. It takes whoever connects for the peer if they say a small number, keeps
every other connection for ever, and ends the process when it runs out of descriptors for them. It needs the socket only until
the two ends are connected; from then on nobody has any business there.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

_SO_ATTACH_FILTER: Final = 26  # <asm-generic/socket.h>; Python's socket module leaves it out
_INSTRUCTION = struct.Struct("@HBBI")
_PROGRAM = struct.Struct("@HP")
_DROP: Final = (0x06, 0, 0, 0)  # BPF_RET | BPF_K: keep 0 bytes of the packet


def close_ports(published: Iterable[bytes]) -> int:
    """Let no packet reach a listening TCP socket of this process whose address is in what it has told its peer.

    For its owner the socket stays what it was: open, with nothing to accept; connections that were accepted live on. To the
    world the port is closed: what is sent there is dropped unanswered.

    Args:
        published: what the library gave its peer to be found by, in whatever format: a `sockaddr` lies in it somewhere.

    Returns:
        How many sockets were found.

    Raises:
        OSError: the kernel refuses the filter.
    """
    told = list(published)
    found = 0
    for sock in _listening():
        with sock:
            address = _sockaddr(sock)
            if any(address in value for value in told):
                _drop_all_packets(sock)
                found += 1
    return found


def _listening() -> Iterator[socket.socket]:
    """A duplicate, for the caller to close, of every listening TCP socket of this process."""
    for entry in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{entry}").startswith("socket:"):
                continue
            duplicate = os.dup(int(entry))
        except OSError:
            continue  # its owner has closed it meanwhile
        try:
            sock = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)  # and something else has got its number, which is no socket
            continue
        is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
        if is_tcp and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            yield sock
        else:
            sock.close()


def _sockaddr(sock: socket.socket) -> bytes:
    """Family, port and address in the kernel's layout, without what follows and may be whatever was in memory."""
    host, port = sock.getsockname()[:2]
    start = struct.pack("=H", sock.family) + struct.pack("!H", port)
    if sock.family == socket.AF_INET:
        return start + socket.inet_pton(socket.AF_INET, host)
    return start + bytes(4) + socket.inet_pton(socket.AF_INET6, host.partition("%")[0])


def _drop_all_packets(sock: socket.socket) -> None:
    instructions = ctypes.create_string_buffer(_INSTRUCTION.pack(*_DROP))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(1, ctypes.addressof(instructions)))
