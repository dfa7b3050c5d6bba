"""What all links have in common: breaking for good, and being closed by another thread while in use.

Who may touch what: the operating thread holds `_busy` for the length of a send, recv, wait or check. `close` and
`abort` never wait for it: they mark the link and call `_shut`, which wakes the operation; resources are released by
whichever of the two comes last, so that no file descriptor is closed under a wait.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Sequence

import torch

from ...configs.errors import LinkError, PeerDiedError
from ..deadline import Deadline
from .base import Frame, Link, LinkKind, TensorForm
from .wire import Payload, check_header, plan_forms, plan_payload


class GuardedLink(Link):
    """A `Link` whose subclasses only move frames: `_send`, `_recv`, `_wait`, `_check`, `_shut`, `_release`.

    And `_prepare`, where they have memory that a frame can be written into at once.
    """

    def __init__(self, kind: LinkKind, peer: str) -> None:
        self.kind = kind
        self.peer = peer
        self._busy = threading.Lock()
        self._closing = False
        self._released = False
        self._broken: LinkError | None = None
        self._prepared: tuple[torch.Tensor, ...] | None = None
        self._prepared_payload: Payload | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closing else "broken" if self._broken else "open"
        return f"<{type(self).__name__} {self.kind} to {self.peer}, {state}>"

    def prepare(self, forms: tuple[TensorForm, ...], *, deadline: Deadline) -> tuple[torch.Tensor, ...] | None:
        """See `Link.prepare`. Forms outside the format's limits are a `ValueError` and leave the link as it was."""
        payload = plan_forms(forms)
        self._begin()
        try:
            self._prepared = self._prepare(payload, deadline)
            self._prepared_payload = payload
            return self._prepared
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._end()

    def send(self, header: bytes, tensors: Sequence[torch.Tensor], *, deadline: Deadline) -> None:
        """See `Link.send`. A frame outside the format's limits is a `ValueError` and leaves the link as it was."""
        check_header(header)
        payload = self._prepared_payload if tensors is self._prepared else plan_payload(tensors)
        assert payload is not None, "made by `prepare`"
        self._begin()
        try:
            self._send(header, tensors, payload, deadline)
            self._prepared = None
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._end()

    def recv(self, *, deadline: Deadline) -> Frame:
        """See `Link.recv`."""
        self._begin()
        try:
            return self._recv(deadline)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._end()

    def wait(self, *, deadline: Deadline) -> bool:
        """See `Link.wait`."""
        self._begin()
        try:
            return self._wait(deadline)
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._end()

    def check(self) -> None:
        """See `Link.check`."""
        self._begin()
        try:
            self._check()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._end()

    def close(self) -> None:
        """See `Link.close`."""
        self._closing = True
        self._shut()
        self._release_if_idle()

    def _prepare(self, payload: Payload, deadline: Deadline, /) -> tuple[torch.Tensor, ...] | None:
        """Memory for the next frame's tensors; None where there is none. `_send` gets this very tuple if it was used."""
        del payload, deadline
        return None

    @abstractmethod
    def _send(self, header: bytes, tensors: Sequence[torch.Tensor], payload: Payload, deadline: Deadline, /) -> None:
        """Send one checked frame."""

    @abstractmethod
    def _recv(self, deadline: Deadline) -> Frame:
        """Receive one frame."""

    @abstractmethod
    def _wait(self, deadline: Deadline) -> bool:
        """Whether a frame began to arrive before the deadline."""

    @abstractmethod
    def _check(self) -> None:
        """Raise if the peer is known to be gone."""

    @abstractmethod
    def _shut(self) -> None:
        """Make the peer see this end as gone and wake an operation in progress. Any thread, any number of times."""

    @abstractmethod
    def _release(self) -> None:
        """Free what the link holds. Called once, after `_shut`, with no operation in progress."""

    # Each operation is `_begin`, then what it does, with `_fail` for whatever that raises, then `_end`: written out, as a
    # context manager would cost more than all the rest of a check.

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            if self._closing:  # it is `close` in another thread that holds the lock
                raise self._closed_error()
            raise RuntimeError(
                f"link to {self.peer} is in use by another thread: an end belongs to one thread at a time"
            )
        if self._closing or self._broken is not None:
            self._end()
            if self._broken is None or self._closing:
                raise self._closed_error()
            raise type(self._broken)(self.peer, f"is broken; {self._reason(self._broken)}")

    def _fail(self, error: BaseException) -> None:
        """Break the link because of what an operation raised. Raises what stands for it where that is something else."""
        if isinstance(error, LinkError | OSError) and self._closing:
            raise self._closed_error() from error  # the wait ended because of our own close, whatever it looked like
        if isinstance(error, LinkError):
            self._break(error)
        elif isinstance(error, OSError):
            died = PeerDiedError(self.peer, f"connection lost ({error.strerror or error})")
            self._break(died)
            raise died from error
        else:
            # Interrupted half-way (KeyboardInterrupt, out of memory): the two ends no longer agree on where they are.
            self._break(LinkError(self.peer, f"an operation was interrupted by {type(error).__name__}"))

    def _end(self) -> None:
        self._busy.release()
        if self._closing:
            self._release_if_idle()

    def _break(self, error: LinkError) -> None:
        self._broken = error
        self._shut()

    def _closed_error(self) -> LinkError:
        return LinkError(self.peer, "was closed on this side")

    def _reason(self, error: LinkError) -> str:
        return str(error).removeprefix(f"link to {self.peer}: ")

    def _release_if_idle(self) -> None:
        # When the lock is taken, its holder comes through here after letting go: `_closing` is already set.
        if self._busy.acquire(blocking=False):
            try:
                if not self._released:
                    self._released = True
                    self._prepared = None
                    self._release()
            finally:
                self._busy.release()
