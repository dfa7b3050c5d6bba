"""How two process groups find each other: a torch `Store` over the authenticated control channel.

torch's own `TCPStore` would be one more port, open to anybody. A pair needs only `set`, `get` and `wait`, and both ends
set up their groups at the same time, so messages on the channel that is there anyway do: no port, no thread.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from torch._C._distributed_c10d import Store  # torch.distributed has it too, but does not declare it

from ...configs.errors import LinkError
from ..deadline import Deadline
from .control import ControlChannel
from .wire import MessageType

_SEPARATOR: Final = b"\0"

_MAX_KEYS: Final = 256
"""A pair sets a handful. A peer that sets more than this is not well, and must not fill this end's memory."""


class Rendezvous:
    """The time in which the control channel carries keys and values; used by one thread. `finish` ends it."""

    def __init__(self, control: ControlChannel, deadline: Deadline) -> None:
        self.deadline = deadline
        self.error: LinkError | None = None
        """What went wrong in a store call. torch hides it: an exception that passed through C++ is a RuntimeError."""
        self._control = control
        self._values: dict[str, bytes] = {}
        self._peer_ready = False
        self._finished = False

    def store(self, prefix: str) -> ChannelStore:
        """A store for one process group; both ends name the group alike."""
        return ChannelStore(self, prefix)

    def set(self, key: str, value: bytes) -> None:
        """Make `value` known to both ends."""
        if self._finished:
            raise LinkError(self._control.peer, f"torch set {key!r} after the rendezvous was over")
        self._keep(key, value)
        self._control.send(MessageType.STORE, 0, key.encode() + _SEPARATOR + value, deadline=self.deadline)

    def get(self, key: str) -> bytes:
        """The value of `key`, waiting for the peer to set it if need be."""
        while key not in self._values:
            self._take_message(f"torch waits for {key!r}")
        return self._values[key]

    def has(self, key: str) -> bool:
        """Whether `key` is known already."""
        return key in self._values

    def finish(self) -> None:
        """Wait until both ends have all they need; from then on the channel carries frames."""
        self._control.send(MessageType.READY, 0, deadline=self.deadline)
        self._finished = True
        while not self._peer_ready:
            self._take_message("this side waits for the peer's groups")

    def _take_message(self, purpose: str) -> None:
        peer = self._control.peer
        if self._peer_ready:
            raise LinkError(peer, f"finished its rendezvous while {purpose}")
        message = self._control.receive(self.deadline)
        if message.type is MessageType.READY:
            self._peer_ready = True
            return
        key, separator, value = message.header.partition(_SEPARATOR)
        if message.type is not MessageType.STORE or not separator:
            raise LinkError(peer, f"sent a {message.type.name} message during the rendezvous")
        self._keep(key.decode("utf-8", errors="replace"), value)

    def _keep(self, key: str, value: bytes) -> None:
        if len(self._values) >= _MAX_KEYS:
            raise LinkError(self._control.peer, f"set more than {_MAX_KEYS} keys during the rendezvous")
        self._values[key] = value


class ChannelStore(Store):
    """The part of torch's store interface that a group of two uses.

    Attributes:
        published: every value that this end has set.
    """

    def __init__(self, rendezvous: Rendezvous, prefix: str) -> None:
        super().__init__()
        self.published: list[bytes] = []
        self._rendezvous = rendezvous
        self._prefix = prefix

    def set(self, key: str, value: str | bytes) -> None:
        """See `Rendezvous.set`."""
        data = value.encode() if isinstance(value, str) else bytes(value)
        self.published.append(data)
        try:
            self._rendezvous.set(self._prefix + key, data)
        except LinkError as error:
            self._rendezvous.error = error
            raise

    def get(self, key: str) -> bytes:
        """See `Rendezvous.get`."""
        try:
            return self._rendezvous.get(self._prefix + key)
        except LinkError as error:
            self._rendezvous.error = error
            raise

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:  # noqa: ARG002
        """Wait until every key is known."""
        # The timeout is the group's default; the rendezvous has a deadline of its own, which is the one that counts.
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        """Whether every key is known already."""
        return all(self._rendezvous.has(self._prefix + key) for key in keys)
