"""What other threads want of a router, until the router's own thread takes it in between two steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ..configs.errors import RequestError, RouterLostError
from .links.base import Link
from .messages import GenerateRequest, TokenOutput
from .placement_table import PlacementTable

Sink = Callable[[list[TokenOutput]], None]
"""Where a front's outputs go: called once a step with everything the step produced for that front."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What has come since the last time, each in order.

    Attributes:
        requests: with their sinks; and ids of requests that are to be cancelled.
        links: host -> link to use from now on.
        tables: placements to adopt, with links to their new hosts; the event is to be set once it is done.
    """

    requests: list[tuple[GenerateRequest, Sink] | str]
    links: list[tuple[str, Link]]
    tables: list[tuple[PlacementTable, dict[str, Link], threading.Event]]


class RouterInbox:
    """Holds what has come, wakes the router's thread for it, and knows which requests have not ended. For any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # what follows changes under it alone
        self._requests: deque[tuple[GenerateRequest, Sink] | str] = deque()
        self._links: deque[tuple[str, Link]] = deque()
        self._tables: deque[tuple[PlacementTable, dict[str, Link], threading.Event]] = deque()
        self._in_flight: set[str] = set()
        self._taken_and_waiting = 0
        self._stopping = False
        self._closed: str | None = None

    # ---- what others put in -----------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, sink: Sink, check_room: Callable[[int], None]) -> None:
        """Put in a request.

        Args:
            check_room: given how many requests wait, raises what is to be raised if these are too many.

        Raises:
            RouterLostError: the inbox is closed.
            RequestError: there is another request of this id.
        """
        with self._changed:
            if self._closed is not None:
                raise RouterLostError(self._closed)
            if request.request_id in self._in_flight:
                raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
            check_room(self._waiting())
            self._in_flight.add(request.request_id)
            self._requests.append((request, sink))
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Put in that a request is to end, whether there is one or not."""
        with self._changed:
            self._requests.append(request_id)
            self._changed.notify()

    def put_link(self, host: str, link: Link) -> None:
        """Put in a link; where nothing is taken any more, it is closed."""
        with self._changed:
            if not self._stopping:
                self._links.append((host, link))
                self._changed.notify()
                return
        link.close()

    def put_table(self, table: PlacementTable, links: dict[str, Link]) -> threading.Event:
        """Put in a placement and links to its new hosts; where nothing is taken any more, they are closed."""
        adopted = threading.Event()
        with self._changed:
            if not self._stopping:
                self._tables.append((table, links, adopted))
                self._changed.notify()
                return adopted
        for link in links.values():
            link.close()
        return adopted

    def stop(self) -> None:
        """Take no more links and tables, and have the router's thread end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def close(self, reason: str) -> None:
        """Take no more requests; the first reason is what they hear."""
        with self._changed:
            self._closed = self._closed or reason

    def close_links(self) -> None:
        """Close the links that nobody takes any more."""
        with self._changed:
            unused = [link for _, link in self._links]
            unused += [link for _, links, _ in self._tables for link in links.values()]
            self._links.clear()
            self._tables.clear()
        for link in unused:
            link.close()

    # ---- what there is to know --------------------------------------------------------------------------------------

    @property
    def closed(self) -> str | None:
        """Why no request is taken; None while they are."""
        return self._closed

    @property
    def stopping(self) -> bool:
        """Whether the router's thread is to end."""
        return self._stopping

    @property
    def in_flight(self) -> int:
        """Requests that have been put in and have not ended."""
        with self._changed:
            return len(self._in_flight)

    @property
    def waiting(self) -> int:
        """Requests that have been put in and do not run yet, in here and in the scheduler's queue."""
        with self._changed:
            return self._waiting()

    @property
    def untaken(self) -> int:
        """Requests that have not been taken."""
        return sum(not isinstance(item, str) for item in list(self._requests))

    @property
    def linked_hosts(self) -> set[str]:
        """Hosts whose links have not been taken."""
        with self._changed:
            return {host for host, _ in self._links}

    # ---- for the router's thread ------------------------------------------------------------------------------------

    def take(self) -> Arrivals:
        """Everything that has come; what requests there are among it wait until `now_waiting` says otherwise."""
        with self._changed:
            arrivals = Arrivals(list(self._requests), list(self._links), list(self._tables))
            self._taken_and_waiting += self.untaken
            self._requests.clear()
            self._links.clear()
            self._tables.clear()
        return arrivals

    def now_waiting(self, taken: int) -> None:
        """So many of the requests that were taken do not run yet."""
        with self._changed:
            self._taken_and_waiting = taken

    def has_ended(self, request_id: str) -> None:
        """A request has ended: its id is free."""
        with self._changed:
            self._in_flight.discard(request_id)

    def wait(self, timeout_s: float) -> None:
        """Wait until something comes, or is here."""
        with self._changed:
            if not (self._requests or self._links or self._tables or self._stopping):
                self._changed.wait(timeout_s)

    def wait_for_link(self, timeout_s: float) -> None:
        """Wait until a link is here, or something else comes."""
        with self._changed:
            if not self._links:
                self._changed.wait(timeout_s)

    def _waiting(self) -> int:
        return self._taken_and_waiting + self.untaken
