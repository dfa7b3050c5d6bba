"""What a link is: the one interface behind which hidden states travel between a router and an expert host.

A link joins exactly two ends. There is one per (router, expert host) pair and no communicator spans more, so a dead
peer breaks one link and nothing else. A frame is a small opaque header and any number of tensors of exact size: nothing
is padded to a capacity. Three kinds stand behind the interface: `inline`, `shm` and `process_group` (gloo or NCCL).

    router                               expert host
    dial(address, ...) ---- handshake --- Listener.accept()
    link.send(header, tensors, deadline)  link.recv(deadline) -> Frame
    link.recv(deadline) -> Frame          link.send(header, tensors, deadline)

Ends are used by one thread at a time, `abort` and `close` excepted, which any thread may call at any time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from ..deadline import Deadline
from ..native_library import LinkState, Outcome

LinkKind = Literal["inline", "shm", "gloo", "nccl"]

TensorForm: TypeAlias = tuple[torch.dtype, tuple[int, ...]]
"""A tensor's dtype and shape."""

MAX_HEADER_BYTES = 4096
"""Headers carry counts and ids, never payload; a larger one is a bug, and a `ValueError` before anything is sent."""

FRAMES_IN_FLIGHT = 2
"""Frames a link takes from the sender before the receiver has asked for the first; a further `send` waits for room."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.

    Attributes:
        header: the bytes the sender gave, at most `MAX_HEADER_BYTES`.
        tensors: contiguous tensors with the sender's shapes and dtypes. They may alias the link's own buffers and stay
            valid until the next `recv` on the same link; copy what must live longer.
    """

    header: bytes
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Where a listener can be dialled.

    Attributes:
        kind: which link the listener makes.
        endpoint: `host:port` for gloo and nccl, the abstract Unix socket's name for shm, a process-wide key for inline.
        machine: identity of the machine (boot id) on which a shm endpoint is reachable; empty for the other kinds.
    """

    kind: LinkKind
    endpoint: str
    machine: str = ""


class Link(ABC):
    """One end of a link. After any `LinkError` the link is broken for good: every further call raises one again."""

    peer: str
    """Identity the peer gave in the handshake, e.g. `expert-host-2`; named in every error."""

    kind: LinkKind

    def prepare(self, forms: tuple[TensorForm, ...], *, deadline: Deadline) -> tuple[torch.Tensor, ...] | None:
        """Memory that the next frame's tensors can be written into, so that `send` need not copy them.

        To be filled and given to `send` as they are, in this very tuple, before anything else is sent; or else forgotten.
        What they hold before is undefined. They are on the CPU.

        Args:
            forms: dtype and shape of each tensor.
            deadline: as that of `send`, which may have to wait for the memory of earlier frames.

        Returns:
            The tensors, or None where the link has no such memory: then any tensors are as good.

        Raises:
            ValueError, PeerDiedError, PeerTimeoutError: as `send`.
        """
        del forms, deadline
        return None

    @abstractmethod
    def send(self, header: bytes, tensors: Sequence[torch.Tensor], *, deadline: Deadline) -> None:
        """Send one frame; returns once the tensors may be overwritten by the caller.

        Tensors may be on any device and need not be contiguous. Returning does not mean that the peer has the frame: at
        least `FRAMES_IN_FLIGHT` frames are taken before it reads one.

        Raises:
            ValueError: the frame exceeds the limits in `wire.py`; nothing was sent and the link is as before.
            PeerDiedError: the peer is gone.
            PeerTimeoutError: the peer did not take the frame before the deadline.
        """

    @abstractmethod
    def recv(self, *, deadline: Deadline) -> Frame:
        """Wait for the next frame.

        Raises:
            PeerDiedError: the peer is gone (also while waiting: within milliseconds on one machine).
            PeerTimeoutError: no frame arrived before the deadline.
        """

    @abstractmethod
    def wait(self, *, deadline: Deadline) -> bool:
        """Wait until a frame has begun to arrive: True then, False if the deadline passes first, which breaks nothing.

        For ends that are idle by nature, such as a host between two steps: `recv` treats silence as a fault.

        Raises:
            PeerDiedError: the peer is gone.
        """

    def lend(self) -> LinkState | None:
        """The state of this end, for native code to receive and send whole frames with as `recv` and `send` would.

        A frame that it has taken counts as one of `recv`: its tensors are valid until the next one. What it leaves is left as a
        whole. Until `take_back`, this end is in use: `abort` ends native code's waits for the socket, and frees nothing before.

        Returns:
            None if the link has no native form, or what comes next is for `wait` and `recv`; then it is not lent.

        Raises:
            LinkError: the link is broken or closed.
        """
        return None

    def take_back(self) -> None:
        """End what `lend` has begun."""
        raise RuntimeError(f"link to {self.peer}: nothing of it is lent")

    def operate(self, native: Callable[[LinkState], Outcome], *, send_timeout_s: float) -> Outcome:
        """Have native code use this end alone: `lend`, with what is to be done about how it has ended.

        Args:
            native: is given the state of this end, brings it forward, and says how it has ended.
            send_timeout_s: for a reply that it could not send at once.

        Returns:
            LEFT if it is for `wait` and `recv` to go on, as always where the link has no native form; else QUIET.

        Raises:
            PeerDiedError, PeerTimeoutError: as `recv` and `send`.
        """
        del native, send_timeout_s
        return Outcome.LEFT

    @abstractmethod
    def check(self) -> None:
        """Raise `PeerDiedError` if the peer is known to be gone; never blocks. For idle links."""

    @abstractmethod
    def close(self) -> None:
        """Close this end and free its buffers; the peer sees `PeerDiedError`. Idempotent, never blocks or raises."""

    def abort(self) -> None:
        """Break the link from another thread: a wait in progress on this end raises `LinkError` within milliseconds.

        One wait is the exception: a process group's, in the middle of a payload, with the peer stopped. gloo offers no
        way to interrupt it, so it lasts until the operation's own deadline.
        """
        self.close()


class Listener(ABC):
    """The expert host's side: makes one link per router that dials."""

    address: LinkAddress

    @abstractmethod
    def accept(self, *, deadline: Deadline) -> Link | None:
        """The next link whose handshake succeeded, or None when the deadline passed with no router dialling.

        Peers that fail the handshake are logged and dropped; they never disturb those that do not.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop listening; links already made live on. Idempotent; an `accept` in progress returns None."""
