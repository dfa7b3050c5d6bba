"""The link within one process: no sockets, no threads of its own, the same behaviour as the others.

Tensors are cloned on send: that is the price of the contract, by which the sender may overwrite its buffers at once.

An end may be *driven*: `host_end.drive(handler)` registers a function that takes one frame off that end and answers it.
When the other end waits and has nothing queued, it runs the handler in its own thread: local mode needs no second one.
"""

from __future__ import annotations

import hmac
import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import torch

from ...configs.errors import HandshakeError, LinkError, PeerDiedError, PeerTimeoutError
from ..deadline import Deadline
from .base import FRAMES_IN_FLIGHT, Frame, Link, LinkAddress, Listener
from .handshake import check_identity, check_secret
from .lifecycle import GuardedLink
from .wire import Payload

logger = logging.getLogger("moray.links")


class InlineLink(GuardedLink):
    """One end of a link between two parts of one process."""

    def __init__(self, peer: str, changed: threading.Condition) -> None:
        super().__init__("inline", peer)
        self._changed = changed  # one condition for both ends guards everything below
        self._inbox: deque[Frame] = deque()
        self._gone = False
        self._handler: Callable[[], None] | None = None
        self._handling = False
        self._other: InlineLink

    @classmethod
    def pair(cls, first: str, second: str) -> tuple[InlineLink, InlineLink]:
        """The two ends of a new link: the one that `first` holds (its peer is `second`), and the one of `second`."""
        changed = threading.Condition()
        ends = cls(second, changed), cls(first, changed)
        ends[0]._other, ends[1]._other = ends[1], ends[0]
        return ends

    def drive(self, handler: Callable[[], None] | None) -> None:
        """Have the other end run `handler` in its own thread whenever it waits and this end has frames to take.

        `handler` receives one frame from this end and sends the answer, if any. If it raises, this end counts as dead:
        the other end gets `PeerDiedError` with the exception as its cause. None stops driving.
        """
        with self._changed:
            self._handler = handler
            self._changed.notify_all()

    def _prepare(self, payload: Payload, _: Deadline) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode(False):
            return tuple([torch.empty(spec.shape, dtype=spec.dtype) for spec in payload.specs])

    def _send(self, header: bytes, tensors: Sequence[torch.Tensor], _: Payload, deadline: Deadline) -> None:
        if tensors is self._prepared:
            copies = self._prepared  # the sender's no more
        else:
            # Normal tensors whatever the sender's mode: the receiver may use them outside of inference mode.
            with torch.inference_mode(False), torch.no_grad():
                copies = tuple(t.detach().clone(memory_format=torch.contiguous_format) for t in tensors)
        other = self._other
        with self._changed:
            if not self._await(lambda: other._gone or len(other._inbox) < FRAMES_IN_FLIGHT, deadline):
                raise PeerTimeoutError(self.peer, f"has left {FRAMES_IN_FLIGHT} frames unread until the deadline")
            if other._gone:
                raise PeerDiedError(self.peer, "closed its end")
            other._inbox.append(Frame(bytes(header), copies))
            self._changed.notify_all()

    def _recv(self, deadline: Deadline) -> Frame:
        with self._changed:
            if not self._arrived(deadline):
                raise PeerTimeoutError(self.peer, "sent nothing before the deadline")
            self._changed.notify_all()
            return self._inbox.popleft()

    def _wait(self, deadline: Deadline) -> bool:
        with self._changed:
            return self._arrived(deadline)

    def _check(self) -> None:
        if self._other._gone:
            raise PeerDiedError(self.peer, "closed its end")

    def _shut(self) -> None:
        with self._changed:
            self._gone = True
            self._changed.notify_all()

    def _release(self) -> None:
        self._inbox.clear()
        self._handler = None

    def _arrived(self, deadline: Deadline) -> bool:
        if not self._await(lambda: bool(self._inbox) or self._other._gone, deadline):
            return False
        if not self._inbox:
            raise PeerDiedError(self.peer, "closed its end")
        return True

    def _await(self, done: Callable[[], bool], deadline: Deadline) -> bool:
        """Wait for `done`, the condition held, driving the other end where that can help; False at the deadline."""
        other = self._other
        while not done():
            if self._gone:
                raise self._closed_error()
            if other._handler is not None and other._inbox and not other._handling:
                self._run_handler(other, other._handler)
            elif not self._changed.wait(deadline.remaining()) and deadline.passed and not done():
                return False
        return True

    def _run_handler(self, other: InlineLink, handler: Callable[[], None]) -> None:
        other._handling = True
        self._changed.release()
        try:
            handler()
        except Exception as error:
            # What would be a crash of the peer's process must look like one from here, and keep its cause.
            if not isinstance(error, LinkError):
                logger.exception("the handler of %s failed", self.peer)
            other.close()
            raise PeerDiedError(self.peer, f"its handler failed: {type(error).__name__}: {error}") from error
        finally:
            self._changed.acquire()
            other._handling = False
            self._changed.notify_all()


_listeners: dict[str, InlineListener] = {}
_listeners_lock = threading.Lock()
_keys = itertools.count(1)


class InlineListener(Listener):
    """Makes inline links for `dial` calls in the same process."""

    def __init__(self, *, secret: bytes, identity: str) -> None:
        check_secret(secret)
        check_identity(identity)
        self._secret = secret
        self.identity: Final = identity
        self._changed = threading.Condition()
        self._ready: deque[InlineLink] = deque()
        self._closed = False
        self.address = LinkAddress("inline", f"{identity}#{next(_keys)}")
        with _listeners_lock:
            _listeners[self.address.endpoint] = self

    def accept(self, *, deadline: Deadline) -> Link | None:
        """See `Listener.accept`."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready or self._closed, timeout=deadline.remaining())
            return self._ready.popleft() if self._ready and not self._closed else None

    def close(self) -> None:
        """See `Listener.close`."""
        with _listeners_lock:
            _listeners.pop(self.address.endpoint, None)
        with self._changed:
            self._closed = True
            ready, self._ready = self._ready, deque()
            self._changed.notify_all()
        for link in ready:
            link.close()

    def connect(self, secret: bytes, identity: str) -> InlineLink:
        """The dialler's end of a new link."""
        if not hmac.compare_digest(self._secret, secret):
            logger.warning("%s refused a connection from %s: it does not know the secret", self.identity, identity)
            raise HandshakeError(self.identity, "handshake failed: the secrets differ")
        here, there = InlineLink.pair(identity, self.identity)
        with self._changed:
            if self._closed:
                raise PeerDiedError(self.identity, "stopped listening")
            self._ready.append(there)
            self._changed.notify()
        return here


def dial_inline(endpoint: str, *, secret: bytes, identity: str) -> Link:
    """Dial a listener of this process.

    Raises:
        PeerDiedError: no such listener (any more).
        HandshakeError: it has another secret.
    """
    check_secret(secret)
    check_identity(identity)
    with _listeners_lock:
        listener = _listeners.get(endpoint)
    if listener is None:
        raise PeerDiedError(endpoint, "nobody listens there in this process")
    return listener.connect(secret, identity)
