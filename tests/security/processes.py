"""What the processes of a server have open, read from /proc as any process of the same user could."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_LISTENING = "0A"
_ACCEPTS = 0x10000  # the kernel's __SO_ACCEPTCON in the flags of /proc/net/unix
_TCP = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6}


@dataclass(frozen=True, order=True)
class Place:
    """A listening socket: `host` and `port` over TCP; or a Unix socket's name as `host`, with `@` for the abstract ones."""

    host: str
    port: int = 0

    @property
    def is_unix(self) -> bool:
        return self.port == 0


@dataclass(frozen=True)
class Held:
    """How much of the machine a process holds."""

    descriptors: int
    threads: int
    resident_mb: int


def command(pid: int) -> str:
    """What a process list shows of it."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def listening(pids: Iterable[int]) -> dict[int, list[Place]]:
    """Where each process listens, over TCP or a Unix socket."""
    by_inode = {**_tcp(), **_unix()}
    return {pid: sorted({by_inode[inode] for inode in _sockets(pid) if inode in by_inode}) for pid in pids}


def held(pid: int) -> Held:
    status = dict(
        line.split(":", 1)
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        if ":" in line
    )
    resident_kb = int(status["VmRSS"].split()[0])
    return Held(len(os.listdir(f"/proc/{pid}/fd")), int(status["Threads"]), resident_kb >> 10)


def _sockets(pid: int) -> set[str]:
    found = set()
    with contextlib.suppress(OSError):  # it has ended
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                kind, _, rest = os.readlink(entry.path).partition(":[")
                if kind == "socket":
                    found.add(rest.removesuffix("]"))
    return found


def _tcp() -> dict[str, Place]:
    found = {}
    for name, family in _TCP.items():
        for line in Path(f"/proc/net/{name}").read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            host, port = fields[1].split(":")
            if fields[3] == _LISTENING:
                words = struct.pack(f"={len(host) // 8}I", *(int(host[i : i + 8], 16) for i in range(0, len(host), 8)))
                found[fields[9]] = Place(socket.inet_ntop(family, words), int(port, 16))
    return found


def _unix() -> dict[str, Place]:
    found = {}
    for line in Path("/proc/net/unix").read_text(encoding="utf-8").splitlines()[1:]:
        fields = line.split()
        if int(fields[3], 16) & _ACCEPTS and len(fields) > 7:
            found[fields[6]] = Place(fields[7])
    return found
