"""The front's part: which router gets a request, and what becomes of those of a lost one, as in `actors/router_client.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from ...configs.errors import QueueFullError
from .batches import Batches, Output, Request
from .costs import CostModel
from .draws import LayerDraw
from .events import VirtualTime
from .machines import FRONT, Machines
from .measure import Recorder
from .trace import Arrival, Trace

_FULL_PAUSES_S = (0.05, 1.0)
_FULL_TIMEOUT_S = 600.0
"""Pauses of a request of a lost router between looks for room, and how long it looks: as in `actors/router_client.py`."""

_CLIENT_PAUSE_S = 1.0
"""After so long a client of a closed loop that was turned away sends its next request: what `Retry-After` says at least."""


class Taker(Protocol):
    """A router, or one rank of a group."""

    name: str
    batches: Batches
    leaving: bool
    ended: bool

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFullError: too many are waiting.
        """
        ...


class Front:
    """Hands requests out, hears of their tokens, and sends the trace's next ones.

    Args:
        takers: routers by name; grows and shrinks as they come and go.
        machines: where the front computes; costs: what.
        restore_timeout_s: how long a request of a lost router waits for another one, where there is none.
        until: no request comes after this time.
    """

    def __init__(
        self,
        clock: VirtualTime,
        takers: Mapping[str, Taker],
        machines: Machines,
        costs: CostModel,
        trace: Trace,
        recorder: Recorder,
        *,
        restore_timeout_s: float,
        until: float,
    ) -> None:
        self._clock = clock
        self._takers = takers
        self._machines = machines
        self._costs = costs
        self._trace = trace
        self._recorder = recorder
        self._restore_timeout_s = restore_timeout_s
        self._until = until
        self._arrivals: Iterator[Arrival] = trace.arrivals()
        self._coming: Arrival | None = None
        self._number = 0
        self._homeless: list[tuple[Request, float]] = []
        self._crowded_out = 0
        self._clients_to_come = 0

    def start(self) -> None:
        """Begin with the trace's first request."""
        self._coming = self._following()
        self._await_coming()

    # ---- what routers say: `Audience` ---------------------------------------------------------------------------------

    def answered(self, outputs: list[Output]) -> None:
        """Tokens have reached their clients."""
        for _ in self._recorder.answered(outputs):
            self._client_goes_on(self._clock.now)
        self._stop_if_idle()

    def failed(self, requests: list[Request], why: str) -> None:
        """Requests have ended with an error."""
        self._recorder.ended_badly(requests)
        if requests:
            self._recorder.happened("requests_failed", f"{len(requests) * self._recorder.twins} requests", why)
        for _ in requests:
            self._client_goes_on(self._clock.now + _CLIENT_PAUSE_S)
        self._stop_if_idle()

    def turned_away(self, requests: list[Request]) -> None:
        """Requests have waited for too long in a router's queue."""
        for request in requests:
            del self._recorder.open[request.number]
            self._refuse()

    def drew(self, draw: LayerDraw, layers: float) -> None:
        """See `Recorder`."""
        self._recorder.drew(draw, layers)

    def asked_again(self) -> None:
        """See `Recorder`."""
        self._recorder.asked_again()

    # ---- requests -----------------------------------------------------------------------------------------------------

    def move(self, requests: list[Request]) -> None:
        """Their router is lost: they go on elsewhere, with what they were answered."""
        self._recorder.moved(len(requests))
        for request in requests:
            request.moved += 1
            self._place_again(request, self._clock.now)

    def router_came(self) -> None:
        """There is one more: requests without one go there."""
        waiting, self._homeless = self._homeless, []
        for request, since in waiting:
            self._place_again(request, since)

    def _following(self) -> Arrival | None:
        """The trace's next request, if it comes in time."""
        arrival = next(self._arrivals, None)
        return arrival if arrival is not None and arrival.at <= self._until else None

    def _await_coming(self) -> None:
        if self._coming is None:
            self._stop_if_idle()
        else:
            self._clock.at(self._coming.at, self._arrive)

    def _arrive(self) -> None:
        """Take in what comes at this moment, all of it."""
        while self._coming is not None and self._coming.at <= self._clock.now:
            self._new(self._coming)
            self._coming = self._following()
        self._await_coming()

    def _client_goes_on(self, at: float) -> None:
        arrival = None if at > self._until else self._trace.next_of_client(at)
        if arrival is None:
            return
        request = arrival
        self._clients_to_come += 1

        def come() -> None:
            self._clients_to_come -= 1
            self._new(request)

        if at > self._clock.now:
            self._clock.at(at, come)
        else:
            come()

    def _new(self, arrival: Arrival) -> None:
        request = Request(self._number, arrival, self._clock.now)
        self._number += 1
        takers = self._usable()
        if takers and not takers[0].batches.fits(arrival):
            self._refuse()
            return
        self._recorder.open[request.number] = request
        seconds = self._costs.request(arrival.prompt)
        if seconds:
            self._machines.compute(FRONT, seconds, lambda: self._hand_out(request))
        else:
            self._hand_out(request)

    def _hand_out(self, request: Request) -> None:
        takers = self._usable()
        if not takers:
            self.failed([request], "no router could be reached")
        elif self._crowded_out or not self._place(request, takers):
            del self._recorder.open[request.number]
            self._refuse()

    def _refuse(self) -> None:
        self._recorder.refused()
        self._client_goes_on(self._clock.now + _CLIENT_PAUSE_S)
        self._stop_if_idle()

    def _usable(self) -> list[Taker]:
        """Those that take requests, the one with the fewest in flight first (see `RouterPool.usable`)."""
        there = [taker for taker in self._takers.values() if not (taker.leaving or taker.ended)]
        return sorted(there, key=lambda taker: (taker.batches.outstanding, taker.name))

    def _place(self, request: Request, takers: list[Taker]) -> bool:
        for taker in takers:
            try:
                taker.submit(request)
            except QueueFullError:
                continue
            return True
        return False

    def _place_again(self, request: Request, since: float, pause: float = _FULL_PAUSES_S[0]) -> None:
        """Place a request that was taken before: it is not turned away, but waits for a router, or for room."""
        now, takers = self._clock.now, self._usable()
        if not takers:
            self._homeless.append((request, since))
            self._clock.at(max(now, since + self._restore_timeout_s), self._give_up_homeless)
        elif not self._place(request, takers):
            if now - since > _FULL_TIMEOUT_S:
                self.failed([request], "its router was lost, and no other had room")
                return
            self._crowded_out += 1

            def again() -> None:
                self._crowded_out -= 1
                self._place_again(request, since, min(2 * pause, _FULL_PAUSES_S[1]))

            self._clock.after(pause, again)

    def _give_up_homeless(self) -> None:
        now = self._clock.now
        late = [request for request, since in self._homeless if now >= since + self._restore_timeout_s]
        self._homeless = [one for one in self._homeless if now < one[1] + self._restore_timeout_s]
        if late:
            self.failed(late, f"no router was restored within {self._restore_timeout_s:g} s")

    def _stop_if_idle(self) -> None:
        """End the simulation once nothing will come any more and everything has ended."""
        if self._coming is None and not self._recorder.open and not self._clients_to_come:
            self._clock.stop()
