"""torch process groups of two, one per direction of a link; all that differs between gloo and NCCL is in this file.

One group per direction, because NCCL runs the operations of a communicator in order: with a single one, two ends that
both send before they receive would wait for each other for ever.
"""

from __future__ import annotations

import math
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import ClassVar, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store  # torch.distributed has it too, but does not declare it

from ...configs.errors import ConfigError, LinkError, PeerDiedError, PeerTimeoutError
from ..deadline import Deadline
from .open_ports import close_ports
from .rendezvous import ChannelStore

GroupKind = Literal["gloo", "nccl"]

_SOURCE_LOCATION = re.compile(r"^\[\S+:\d+\] ")


class _Backend(Protocol):
    """What a link uses of torch's backend classes; their stubs leave it out."""

    def send(self, tensors: list[torch.Tensor], dst: int, tag: int) -> dist.Work: ...
    def recv(self, tensors: list[torch.Tensor], src: int, tag: int) -> dist.Work: ...
    def abort(self) -> None: ...


class PairGroup(ABC):
    """A process group of two, of which rank 0 is the end that dialled.

    Attributes:
        device: where its buffers must be.
        beside_bytes: payloads of up to this size go over the control channel instead; part of the protocol.
    """

    beside_bytes: ClassVar[int]

    def __init__(self, group: _Backend, rank: int, peer: str, device: torch.device) -> None:
        self.device = device
        self._group = group
        self._peer_rank = 1 - rank
        self._peer = peer
        self._abandoned = False

    def start_send(self, buffer: torch.Tensor, tag: int) -> dist.Work:
        """Begin to send all of `buffer`, as the work given to the device so far leaves it.

        It stays untouched until `wait` on the result returns.
        """
        return self._started(lambda: self._group.send([buffer], self._peer_rank, tag))

    def start_recv(self, buffer: torch.Tensor, tag: int) -> dist.Work:
        """Begin to fill all of `buffer`, after the work given to the device so far, which may read what was in it."""
        return self._started(lambda: self._group.recv([buffer], self._peer_rank, tag))

    @abstractmethod
    def wait(self, work: dist.Work, *, deadline: Deadline, check: Callable[[], None]) -> None:
        """Wait for a transfer. A wait that fails leaves the group unusable.

        Args:
            check: raises if the peer is known to be gone; called while waiting, where the backend allows it.

        Raises:
            PeerDiedError: the connection broke.
            PeerTimeoutError: the transfer was not finished before the deadline.
        """

    def abandon(self) -> None:
        """Drop the group without the peer's help; transfers in progress are lost. Never waits for the peer. Idempotent."""
        if not self._abandoned:
            self._abandoned = True
            self._drop()

    @abstractmethod
    def _drop(self) -> None:
        """`abandon`, called once."""

    def _started(self, start: Callable[[], dist.Work]) -> dist.Work:
        try:
            return start()
        except RuntimeError as error:  # torch's only error type here; raised when the connection is known to be broken
            raise PeerDiedError(self._peer, f"lost its process group ({_brief(error)})") from error


class GlooPair(PairGroup):
    """Between CPUs, over TCP."""

    # A gloo transfer costs several messages and thread switches of its own. Up to here (9 tokens x 7168 in bf16) the
    # plain socket was ahead (tests/bench/links.py), and the socket buffers hold all frames in flight.
    beside_bytes = 128 * 1024

    @classmethod
    def create(
        cls, store: Store, rank: int, peer: str, device: torch.device, *, host: str, deadline: Deadline
    ) -> GlooPair:
        """Set up this end, listening on the address `host` alone, and no longer than until the peer has connected."""
        assert isinstance(store, ChannelStore), "gloo's port is found by what it tells the peer through the store"
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = _whole_milliseconds(deadline)
        options._threads = 1  # for collectives, which a link has none of
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        group = dist.ProcessGroupGloo(store, rank, 2, options)
        try:
            listening = close_ports(store.published)
        except OSError as error:
            raise LinkError(peer, f"gloo's listening socket could not be closed ({error.strerror})") from error
        if not listening:
            raise LinkError(peer, "gloo's listening socket could not be found, and would stay open to anybody")
        return cls(cast(_Backend, group), rank, peer, device)

    def wait(self, work: dist.Work, *, deadline: Deadline, check: Callable[[], None]) -> None:  # noqa: ARG002
        """See `PairGroup.wait`. gloo cannot be interrupted, nor polled: the wait is one call."""
        try:
            work.wait(_whole_milliseconds(deadline))
        except RuntimeError as error:
            if deadline.passed:
                raise PeerTimeoutError(self._peer, "did not finish a transfer before the deadline") from error
            raise PeerDiedError(self._peer, f"connection lost during a transfer ({_brief(error)})") from error

    def _drop(self) -> None:
        """See `PairGroup.abandon`. gloo's destructor closes its sockets and ends its threads."""
        del self._group


class TransferStream:
    """The CUDA stream of one direction of a link, ordered by events against the stream its caller computes on.

    Neither direction waits for the other, nor the model's next kernels for a transfer they do not need.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def after_caller(self, buffer: torch.Tensor) -> Iterator[None]:
        """What is started inside comes after all that the caller's stream has been given, such as writes to `buffer`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Whoever drops the buffer while the transfer runs, the allocator gives its memory to nobody before the end.
        buffer.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def finish(self, work: dist.Work) -> None:
        """Let what the caller's stream is given from now on come after a transfer; raises what the transfer met."""
        with torch.cuda.stream(self._stream):
            work.wait()
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class NcclPair(PairGroup):
    """Between GPUs. Setting up blocks in NCCL, which has timeouts of its own, once both ends have begun."""

    beside_bytes = 0  # a detour through host memory

    def __init__(self, group: _Backend, rank: int, peer: str, device: torch.device) -> None:
        super().__init__(group, rank, peer, device)
        self._stream = TransferStream(device)

    @classmethod
    def create(cls, store: Store, rank: int, peer: str, device: torch.device) -> NcclPair:
        """Set up this end; NCCL chooses its network interfaces by itself and connects with the first transfer."""
        # torch's watchdog would end the whole process when a peer dies, which on a link is an everyday event: deadlines
        # and dead peers are seen by `wait`. There is no other way to tell torch than these, read in the constructor.
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        os.environ["TORCH_NCCL_ENABLE_MONITORING"] = "0"
        # A failed transfer counts as completed; without this its `wait` would say nothing, and the buffer's garbage be
        # taken for a frame.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=1)
        return cls(cast(_Backend, dist.ProcessGroupNCCL(store, rank, 2, options)), rank, peer, device)

    def start_send(self, buffer: torch.Tensor, tag: int) -> dist.Work:
        """See `PairGroup.start_send`."""
        with self._stream.after_caller(buffer):
            return super().start_send(buffer, tag)

    def start_recv(self, buffer: torch.Tensor, tag: int) -> dist.Work:
        """See `PairGroup.start_recv`."""
        with self._stream.after_caller(buffer):
            return super().start_recv(buffer, tag)

    def wait(self, work: dist.Work, *, deadline: Deadline, check: Callable[[], None]) -> None:
        """See `PairGroup.wait`. Blocks the calling thread, as only the host can see that a peer is gone."""
        try:
            self._wait_until_completed(work, deadline, check)
            self._stream.finish(work)
        except RuntimeError as error:
            self.abandon()
            raise PeerDiedError(self._peer, f"connection lost during a transfer ({_brief(error)})") from error
        except BaseException:
            # Its kernel waits on the GPU for a peer that does not come, and everything behind it.
            self.abandon()
            raise

    def _wait_until_completed(self, work: dist.Work, deadline: Deadline, check: Callable[[], None]) -> None:
        pause = 5e-6
        while not work.is_completed():
            check()
            if deadline.passed:
                raise PeerTimeoutError(self._peer, "did not finish a transfer before the deadline")
            time.sleep(pause)
            pause = min(2 * pause, 2e-4)

    def _drop(self) -> None:
        """See `PairGroup.abandon`. `abort`, not `shutdown`, which waits for the peer."""
        self._group.abort()


def create_pair(
    kind: GroupKind, store: Store, rank: int, peer: str, device: torch.device, *, host: str, deadline: Deadline
) -> PairGroup:
    """One end of a pair of the given kind; the peer must be creating its end at the same time.

    Raises:
        PeerTimeoutError, LinkError: the peer did not take part.
    """
    try:
        if kind == "nccl":
            return NcclPair.create(store, rank, peer, device)
        return GlooPair.create(store, rank, peer, device, host=host, deadline=deadline)
    except RuntimeError as error:
        if deadline.passed:
            raise PeerTimeoutError(peer, f"{kind} was not set up before the deadline") from error
        raise LinkError(peer, f"{kind} could not be set up ({_brief(error)})") from error


def transfer_device(kind: GroupKind) -> torch.device:
    """Where this process's buffers for links of a kind are: for nccl, the calling thread's current CUDA device.

    Raises:
        ConfigError: this process has no GPU, or a torch without NCCL.
    """
    if kind == "gloo":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("an nccl link needs a CUDA device in this process: use gloo or shm")
    if not dist.is_nccl_available():
        raise ConfigError(f"torch {torch.__version__} was built without NCCL: install a CUDA build, or use gloo or shm")
    return torch.device("cuda", torch.cuda.current_device())


def _whole_milliseconds(deadline: Deadline) -> timedelta:
    # Never 0, which torch takes for "no timeout".
    return timedelta(milliseconds=max(1, math.ceil(deadline.remaining() * 1000)))


def _brief(error: BaseException) -> str:
    """torch's message without its source location and its advice."""
    return _SOURCE_LOCATION.sub("", str(error)).partition("\n")[0].partition(". This is typically")[0]
