from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moray.actors.deadline import Deadline
from moray.actors.links import Link, LinkAddress, LinkKind, dial, listen

SECRET = b"the secret of the link tests"
Connect = Callable[[LinkKind], tuple[Link, Link]]


@pytest.fixture(params=["inline", "shm", "gloo"])
def kind(request: pytest.FixtureRequest) -> LinkKind:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def nothing_leaks(peers: Peers) -> Iterator[None]:
    """Every test gives back its file descriptors and threads, and never has a name in /dev/shm."""
    fds, threads, names = open_fds(), set(threading.enumerate()), os.listdir("/dev/shm")
    yield
    if not open_fds() <= fds:
        gc.collect()  # an exception's traceback may hold a socket in a cycle; collecting every time would cost seconds
    assert set(threading.enumerate()) <= threads
    assert open_fds() <= fds, {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in open_fds() - fds}
    assert [name for name in os.listdir("/dev/shm") if "moray" in name and name not in names] == []


def open_fds() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")}


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes both ends of a link in this process, the dialler's first; closes them after the test."""
    with contextlib.ExitStack() as stack:

        def connect(kind: LinkKind) -> tuple[Link, Link]:
            listener = listen(kind, bind_host="127.0.0.1", secret=SECRET, identity="expert-host-0")
            with contextlib.closing(listener):
                here = dial(listener.address, secret=SECRET, identity="router-0", deadline=Deadline.after(20))
                stack.callback(here.close)
                there = listener.accept(deadline=Deadline.after(20))
                assert there is not None
                stack.callback(there.close)
            return here, there

        yield connect


@dataclass
class Peer:
    """Another process, and this process's link to it."""

    pid: int
    link: Link

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Peers:
    """Starts peers; see `peer_processes.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @contextlib.contextmanager
    def start(self, kind: LinkKind, behaviour: str) -> Iterator[Peer]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"kind": kind, "behaviour": behaviour}) + "\n")
        self._process.stdin.flush()
        started = json.loads(self._process.stdout.readline())
        try:
            address = LinkAddress(*started["address"])
            link = dial(address, secret=SECRET, identity="router-0", deadline=Deadline.after(20))
            with contextlib.closing(link):
                yield Peer(started["pid"], link)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(started["pid"], signal.SIGKILL)


@pytest.fixture(scope="session")
def peers() -> Iterator[Peers]:
    command = [sys.executable, str(Path(__file__).with_name("peer_processes.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Peers(process)
        assert process.stdin is not None
        process.stdin.close()
        process.wait(20)
