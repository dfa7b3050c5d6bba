"""Every GPU router and expert host at once, all in lockstep: what systems do that are not Moray, to compare with them.

A layer is over for all when it is over for the slowest: the attention of the rank with most to do, the exchange of the rank or
the host with most to send, and the experts of the busiest host follow each other. With two micro-batches the computing of one
hides the exchange of the other, in four phases a layer:

    attention of A (and its shared experts) | combine of B,   attention of B | dispatch of A,
    experts of A | dispatch of B,                             experts of B (and its shared experts) | combine of A

When one rank ends, all do: the group starts anew, and computes again what its KV pages held.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...actors.router import RouterSettings
from ...configs.errors import QueueFullError
from .batches import Batches, Request, StepWork
from .events import Timer
from .routers import Engine


class Rank:
    """One GPU's share of the requests, under the name of a router."""

    def __init__(self, name: str, settings: RouterSettings, wake: Callable[[], None]) -> None:
        self.name = name
        self.batches = Batches(settings)
        self.leaving = self.ended = False
        self._wake = wake

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            QueueFullError: too many are waiting.
        """
        if self.batches.full:
            raise QueueFullError(f"{self.name} is full", retry_after_s=1.0)
        self.batches.add(request)
        self._wake()


class Lockstep:
    """The ranks of one group.

    Args:
        names: of the ranks that are modelled.
        hosts: GPUs.
        twins: ranks that each modelled one stands for.
        settings: of each rank.
        engine: what is shared; `machines` is not used.

    Attributes:
        ranks: by name.
        busy: [hosts] seconds that each GPU has computed.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        hosts: int,
        twins: int,
        settings: RouterSettings,
        engine: Engine,
    ) -> None:
        self.ranks = {name: Rank(name, settings, self._wake) for name in names}
        self.busy = np.zeros(hosts)
        self._twins = twins
        self._engine = engine
        self._step: Timer | None = None
        self._down = False

    def lose_all(self, back_after_s: float) -> list[Request]:
        """Have the whole group end and start anew; the requests that it had, which nobody holds now."""
        if self._step is not None:
            self._step.cancel()
            self._step = None
        self._down = True
        self._engine.clock.after(back_after_s, self._back)
        return [request for rank in self.ranks.values() for request in rank.batches.drop_all()]

    def _back(self) -> None:
        self._down = False
        self._wake()

    def _wake(self) -> None:
        # After what else happens at this moment: requests that come together are taken together.
        if self._step is None and not self._down:
            self._step = self._engine.clock.after(0.0, self._begin)

    def _begin(self) -> None:
        now = self._engine.clock.now
        for rank in self.ranks.values():
            if late := rank.batches.turned_away():
                self._engine.audience.turned_away(late)
        works = [work for rank in self.ranks.values() if (work := rank.batches.next_step(now)) is not None]
        if not works:
            self._step = None
            return
        self._step = self._engine.clock.after(self._seconds([work for work in works if work.tokens]), self._finish)

    def _finish(self) -> None:
        engine = self._engine
        outputs = [output for rank in self.ranks.values() for output in rank.batches.finish_step(engine.clock.now)]
        self._step = engine.clock.after(engine.costs.front(len(outputs)), self._begin)
        if outputs:
            engine.audience.answered(outputs)

    def _seconds(self, works: list[StepWork]) -> float:
        """Of a step in which the ranks compute this."""
        if not works:
            return 0.0
        engine, costs = self._engine, self._engine.costs
        outside = max(costs.router_step(w.tokens, w.decoding, w.sampled, w.kv_positions) for w in works)
        tokens = self._twins * sum(work.tokens for work in works)
        halved = costs.overlap and tokens > 1
        parts = [work.halves()[0] for work in works] if halved else works
        attention = max(costs.router_layer(w.tokens, w.kv_positions, w.kv_rows, w.longest) for w in parts)
        shared = max(costs.shared_experts(w.tokens) for w in parts)
        layers, times = engine.moe_layers / engine.blocks, 2 if halved else 1
        seconds = outside + engine.dense_layers * times * attention
        self.busy += seconds
        for _ in range(engine.blocks):
            draw = engine.draws.draw(-(-tokens // 2) if halved else tokens, engine.clock.now)
            engine.audience.drew(draw, layers)
            host, there, back = float(draw.seconds.max()), draw.dispatch_s, draw.combine_s
            if halved:
                layer = (
                    max(attention + shared, back) + max(attention, there) + max(host, there) + max(host + shared, back)
                )
            else:
                layer = attention + shared + there + host + back
            seconds += layers * layer
            self.busy += layers * times * (attention + shared)
            self.busy[draw.hosts] += layers * times * draw.seconds
        return seconds
