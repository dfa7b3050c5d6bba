"""The native loop of an expert host: ordinary requests over shm links for packed experts, served without the interpreter.

In Python a request of one token costs about 100 us of CPU beside its arithmetic, which takes 250 to 300 (hidden size 1024, four
experts of 1.6 MB); here it costs about 10.
"""

from __future__ import annotations

import logging
import threading
import weakref
from ctypes import byref
from types import TracebackType

from .expert_table import ExpertTable
from .links.base import Link
from .native_library import ActorsLibrary, LinkState, Outcome

logger = logging.getLogger("moray.expert_host")

_CALL_MS = 1000
"""A call ends after so long even if nothing has come up, for its caller to see whether the host stops."""

_TURN_ROUND_MS = 10_000
"""A wait for the turn says so, and goes on, as often: no computation takes so long."""


class ComputeTurn:
    """The turn to compute on a host: one computation at a time, whichever thread it is for. A context manager for Python's own.

    Args:
        library: has native loops take the same turn; without, it is a plain lock.

    Attributes:
        native: its address for native code; None without a library.
    """

    def __init__(self, library: ActorsLibrary | None) -> None:
        self._library = library
        self._lock = threading.Lock()
        self.native: int | None = None
        if library is not None:
            self.native = library.new_turn()
            if self.native is None:
                raise MemoryError("no memory for a lock")
            # Not when the interpreter ends: threads of a host that was never stopped may be computing then.
            weakref.finalize(self, library.free_turn, self.native).atexit = False

    def __enter__(self) -> None:
        if self._library is None:
            self._lock.acquire()
            return
        while not self._library.take_turn(self.native, _TURN_ROUND_MS):
            logger.warning("event=waits_for_turn another computation has it for more than %d s", _TURN_ROUND_MS // 1000)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._library is None:
            self._lock.release()
        else:
            self._library.give_turn_back(self.native)

    @property
    def native_busy_s(self) -> float:
        """Seconds that native loops have computed. For any thread; never waits."""
        return 0.0 if self._library is None else self._library.busy_ns(self.native) / 1e9

    @property
    def native_pairs(self) -> int:
        """(token, expert) pairs that native loops have computed. For any thread; never waits."""
        return 0 if self._library is None else int(self._library.pairs(self.native))

    @property
    def native_frames(self) -> int:
        """Requests that native loops have answered. For any thread; never waits."""
        return 0 if self._library is None else int(self._library.frames(self.native))


class HostLoop:
    """Serves links natively, one call after the other, each in the thread of its link.

    Args:
        turn: taken for each computation; made with the library.
        reply_timeout_s: how long a router may take to make room for a reply.
    """

    def __init__(self, library: ActorsLibrary, turn: ComputeTurn, *, reply_timeout_s: float) -> None:
        assert turn.native is not None, "a turn that native code can take"
        self._library = library
        self._turn = turn
        self._reply_timeout_s = reply_timeout_s

    def serve(self, link: Link, table: ExpertTable) -> bool:
        """Answer what is ordinary for a second, or until something else arrives or the table is superseded.

        Returns:
            Whether it is for Python to wait, receive and answer: there is something else, or the link has no native form.

        Raises:
            LinkError: see `Link.operate`.
        """

        def serve(state: LinkState) -> Outcome:
            return Outcome(
                self._library.serve_experts(byref(state), byref(table.structure), self._turn.native, _CALL_MS)
            )

        return link.operate(serve, send_timeout_s=self._reply_timeout_s) is Outcome.LEFT
