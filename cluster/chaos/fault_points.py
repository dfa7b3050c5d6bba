"""Faults that a process must be asked for: what signals cannot do to an expert host.

The Ray actor class of expert hosts is an `ExpertHost` with `FaultPoints`; nothing in the host itself knows of them, and
until `inject` is called they cost one method call a frame, or one a second where it is native code that serves. Whoever can
reach the cluster's Ray can call it, and could as well kill the process. Every fault heals by itself when its seconds are over,
whatever became of whoever asked for it.

    cut-host        the sockets of its links are closed, and those of links that are made meanwhile
    slow-host       each piece of work waits `delay_s` before it is computed
    corrupt-reply   one bit of each reply's control message is flipped on its way into the socket, after its checksum was made
    full-memory     shared memory cannot be had for replies: ENOSPC, as from a full /dev/shm, and ENOMEM in turn
    disk-error      reads of checkpoint data fail with EIO, in the whole process

A network that is cut with the processes left alone needs namespaces, thus root, and more than one machine to mean anything:
between two processes of one machine a closed socket is all there is to cut.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeAlias, cast, get_args

import torch

from ...actors.deadline import Deadline
from ...actors.expert_host import ExpertHost
from ...actors.links.base import Frame, Link, TensorForm
from ...actors.links.control import ControlChannel
from ...actors.links.process_group import ProcessGroupLink
from ...actors.links.shm import ShmLink
from ...actors.links.shm_memory import Arena
from ...actors.links.wire import HEAD_BYTES, decode_head
from ...actors.native_library import LinkState, Outcome
from ...configs.errors import ConfigError

PointFault: TypeAlias = Literal["cut-host", "slow-host", "corrupt-reply", "full-memory", "disk-error"]
POINT_FAULTS: Final[tuple[str, ...]] = get_args(PointFault)

MAX_SECONDS: Final = 120.0
"""Nothing that a test asked for may stay broken for longer."""


class FaultPoints(ExpertHost):
    """An `ExpertHost` that can be made to fail from outside."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._faults = _ActiveFaults()
        super().__init__(*args, **kwargs)

    def inject(self, fault: str, seconds: float, *, delay_s: float = 0.2, seed: int = 0) -> int:
        """Have `fault` for so many seconds from now on; a second one of its kind replaces the first.

        Args:
            fault: one of `POINT_FAULTS`.
            seconds: 0 heals it now.
            delay_s: for `slow-host`.
            seed: which bits `corrupt-reply` flips.

        Returns:
            How many links there are that it can show on; all of them for faults of other things than links.

        Raises:
            ConfigError: no such fault, or a time out of bounds.
        """
        if fault not in POINT_FAULTS:
            raise ConfigError(f"no fault {fault!r} can be injected: use one of {', '.join(POINT_FAULTS)}")
        if not 0 <= seconds <= MAX_SECONDS or delay_s < 0:
            raise ConfigError(
                f"a fault lasts 0 to {MAX_SECONDS:.0f} s and delays by 0 or more, not {seconds}, {delay_s}"
            )
        links = self._faults.begin(cast(PointFault, fault), seconds, delay_s=delay_s, seed=seed)
        self._held.renew_table()  # links that are served natively come back to where faults show
        return links

    def attach(self, link: Link) -> None:
        """See `ExpertHost.attach`."""
        super().attach(self._faults.wrapped(link))


class _ActiveFaults:
    """Which faults are active until when, and the links they show on."""

    def __init__(self) -> None:
        self._until: dict[PointFault, float] = {}
        self._links: weakref.WeakSet[_FaultyLink] = weakref.WeakSet()
        self._lock = threading.Lock()  # guards the set
        self.delay_s = 0.0
        self.random = random.Random(0)

    def begin(self, fault: PointFault, seconds: float, *, delay_s: float, seed: int) -> int:
        self.delay_s = delay_s
        self.random = random.Random(seed)
        self._until[fault] = time.monotonic() + seconds
        with self._lock:
            links = [link for link in self._links if link.open and (fault != "full-memory" or link.kind == "shm")]
        if fault == "disk-error":
            _FAILING_READS.fail_for(seconds)
        if fault == "cut-host" and seconds > 0:
            for link in links:
                link.abort()
        return len(links)

    def left(self, fault: PointFault) -> float:
        """Seconds that it goes on; 0 if it is not active."""
        return max(0.0, self._until.get(fault, 0.0) - time.monotonic())

    @property
    def any(self) -> bool:
        """Whether any fault is active."""
        now = time.monotonic()
        return any(until > now for until in list(self._until.values()))

    def delay(self) -> None:
        """What a piece of work waits for before it is computed."""
        if left := self.left("slow-host"):
            time.sleep(min(left, self.delay_s))

    def wrapped(self, link: Link) -> Link:
        faulty = _FaultyLink(link, self)
        with self._lock:
            self._links.add(faulty)
        if self.left("cut-host"):
            faulty.abort()
        return faulty


class _FaultyLink(Link):
    """A host's end of a link, through which its active faults show."""

    def __init__(self, link: Link, faults: _ActiveFaults) -> None:
        self.peer = link.peer
        self.kind = link.kind
        self.open = True
        self._link = link
        self._faults = faults
        self._errors = itertools.cycle((errno.ENOSPC, errno.ENOMEM))

    def __repr__(self) -> str:
        return repr(self._link)

    def prepare(self, forms: tuple[TensorForm, ...], *, deadline: Deadline) -> tuple[torch.Tensor, ...] | None:
        return None if self._faults.left("full-memory") else self._link.prepare(forms, deadline=deadline)

    def send(self, header: bytes, tensors: Sequence[torch.Tensor], *, deadline: Deadline) -> None:
        if self._faults.left("full-memory") and isinstance(self._link, ShmLink):
            with _without_memory(self._link, next(self._errors)):
                self._link.send(header, tensors, deadline=deadline)
        elif self._faults.left("corrupt-reply"):
            with _corrupting(self._link, self._faults.random):
                self._link.send(header, tensors, deadline=deadline)
        else:
            self._link.send(header, tensors, deadline=deadline)

    def recv(self, *, deadline: Deadline) -> Frame:
        frame = self._link.recv(deadline=deadline)
        self._faults.delay()
        return frame

    def wait(self, *, deadline: Deadline) -> bool:
        return self._link.wait(deadline=deadline)

    def operate(self, native: Callable[[LinkState], Outcome], *, send_timeout_s: float) -> Outcome:
        if self._faults.any:
            return Outcome.LEFT  # no fault shows in native code
        return self._link.operate(native, send_timeout_s=send_timeout_s)

    def check(self) -> None:
        self._link.check()

    def close(self) -> None:
        self.open = False
        self._link.close()

    def abort(self) -> None:
        self.open = False
        self._link.abort()


@contextmanager
def _without_memory(link: ShmLink, error: int) -> Iterator[None]:
    """Have the frames sent within need a new arena, and get none. For the thread that uses the link."""

    def none_left(slot_bytes: int, _deadline: Deadline) -> Arena:
        raise OSError(error, f"{os.strerror(error)} (injected, for an arena of {slot_bytes} bytes a slot)")

    link._send_through(None)
    vars(link)["_offer_arena"] = none_left
    try:
        yield
    finally:
        del vars(link)["_offer_arena"]


@contextmanager
def _corrupting(link: Link, choice: random.Random) -> Iterator[None]:
    """Flip one bit of each control message sent within. For the thread that uses the link."""
    if isinstance(link, ShmLink):
        holder: Any = link._packets
    elif isinstance(link, ProcessGroupLink):
        holder = link._control
        assert isinstance(holder, ControlChannel)
    else:
        raise ConfigError(f"a link of kind {link.kind} has no socket on which a message could be corrupted")
    sock = holder._sock
    holder._sock = _CorruptingSocket(sock, choice)
    try:
        yield
    finally:
        holder._sock = sock


class _CorruptingSocket:
    """A socket that flips one bit of the control message at the beginning of what is sent first."""

    def __init__(self, sock: socket.socket, choice: random.Random) -> None:
        self._sock = sock
        self._random = choice
        self._done = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)

    def send(self, data: bytes | memoryview) -> int:
        if self._done:
            return self._sock.send(data)
        sent = self._sock.send(self._flipped(bytes(data)))
        self._done = True
        return sent

    def sendmsg(self, buffers: Sequence[bytes], ancillary: Sequence[Any] = ()) -> int:
        if self._done:
            return self._sock.sendmsg(buffers, ancillary)
        sent = self._sock.sendmsg([self._flipped(b"".join(buffers))], ancillary)
        self._done = True
        return sent

    def _flipped(self, data: bytes) -> bytes:
        """The message, not the tensors that may follow it: those carry no checksum, the transport is trusted with them."""
        message = HEAD_BYTES + decode_head(data, "this side").body_bytes
        bit = self._random.randrange(8 * message)
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        return bytes(flipped)


class _FailingReads:
    """Positional reads, with which checkpoint data is read and nothing else is, fail for a while; then all is as before."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0
        self._original: Callable[..., int] | None = None

    def fail_for(self, seconds: float) -> None:
        with self._lock:
            self._until = time.monotonic() + seconds
            if seconds > 0 and self._original is None:
                self._original = os.preadv
                os.preadv = self._read
                threading.Thread(target=self._restore, name="moray-failing-reads", daemon=True).start()

    def _read(self, *args: Any) -> int:
        with self._lock:
            original = self._original or os.preadv
            failing = time.monotonic() < self._until
        if failing:
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} (injected)")
        return original(*args)

    def _restore(self) -> None:
        while True:
            with self._lock:
                left = self._until - time.monotonic()
                if left <= 0:
                    assert self._original is not None, "set before this thread was started"
                    os.preadv = cast(Any, self._original)
                    self._original = None
                    return
            time.sleep(min(left, 0.1))


_FAILING_READS: Final = _FailingReads()
