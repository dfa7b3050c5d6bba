"""Dispatches with an exchange and without, over shm links to expert hosts with packed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Link
from moray.actors.native_exchange import NativeExchange
from moray.actors.placement_table import PlacementTable
from moray.actors.testing import EngineParts

from .played_hosts import Clock, Step, lent, new_exchange, random_step, wait_until

EXPERTS, HIDDEN = 8, 192


def step(tokens: int, seed: int = 0, *, top_k: int = 2) -> Step:
    return random_step(tokens, seed=seed, experts=EXPERTS, top_k=top_k, hidden=HIDDEN)


def run(dispatch: ExpertDispatch, step: Step, layer: int = 1) -> torch.Tensor:
    return dispatch.finish(dispatch.start(layer, *step))


def warm(dispatch: ExpertDispatch, layers: int = 2) -> None:
    """Have both ends of all links make their arenas: from here on what is ordinary needs no Python."""
    hidden_states, _, weights = step(4)
    for _ in range(layers):
        run(dispatch, (hidden_states, torch.arange(EXPERTS).view(4, 2), weights))


class Pair:
    """Two dispatches with links of their own to the same hosts: `native` has an exchange, `python` does without."""

    def __init__(self, parts: EngineParts, hosts: int, *, replicas: int = 1) -> None:
        self.parts = parts
        self.table = parts.table(hosts, replicas=replicas)
        self.hosts = {host: parts.host(host, self.table) for host in self.table.slots}
        self.exchange = new_exchange()
        self.native = self.dispatch(self.table, native=True)
        self.python = self.dispatch(self.table, native=False)

    def dispatch(self, table: PlacementTable, *, native: bool) -> ExpertDispatch:
        links: Mapping[str, Link] = {h: self.parts.link(host, "shm") for h, host in self.hosts.items()}
        exchange = self.exchange if native else None
        return ExpertDispatch(table, links, reply_timeout_s=20.0, exchange=exchange, clock=Clock())

    @property
    def layers(self) -> int:
        """How many were done natively."""
        return self.exchange.layers

    def warm(self) -> None:
        """See above."""
        warm(self.native)
        warm(self.python)
        assert self.layers == 1, "the first layer makes the arenas, which is Python's"

    def assert_same(self, step: Step, layer: int = 1, *, native: bool | None = True) -> None:
        """A layer's bits are those of Python alone; and whether it was done natively, if that is told."""
        before = self.layers
        found = run(self.native, step, layer)
        assert native is None or self.layers - before == native
        assert torch.equal(found, run(self.python, step, layer))

    def assert_same_accounts(self) -> None:
        """Nothing was asked twice, and everything was counted once."""
        native, python = self.native, self.python
        assert native.expert_tokens.tolist() == python.expert_tokens.tolist()
        pairs = [{h: view.pairs for h, view in d.host_views().items()} for d in (native, python)]
        assert pairs[0] == pairs[1]
        for dispatch in (native, python):
            assert (dispatch.resent_shares, dispatch.hedged_shares, dispatch.fenced_hosts) == (0, 0, 0)
            assert (dispatch.broken, dispatch.late_hosts) == ({}, [])

    def close(self) -> None:
        self.native.close()
        self.python.close()


class Served:
    """A dispatch to two real hosts, and what the layers of `steps` should give."""

    def __init__(self, parts: EngineParts, *, replicas: int, native: bool) -> None:
        self.parts = parts
        self.clock = Clock()
        self.table = parts.table(2, replicas=replicas)
        self.hosts = [parts.host(host, self.table) for host in self.table.slots]
        self.exchange: NativeExchange | None = new_exchange() if native else None
        self.dispatch = ExpertDispatch(
            self.table,
            {host.host_id: parts.link(host, "shm") for host in self.hosts},
            reply_timeout_s=20.0,
            exchange=self.exchange,
            clock=self.clock,
        )
        warm(self.dispatch, 10)  # of which enough is known of each host to tell when it is late
        self.steps = [step(8, seed) for seed in range(3)]
        self.wanted = [run(self.dispatch, one) for one in self.steps]
        assert self.layers == (12 if native else 0)

    @property
    def layers(self) -> int:
        return self.exchange.layers if self.exchange else 0

    def assert_usable(self) -> None:
        """Layers are right, and native where they can be."""
        before = self.layers
        for one, wanted in zip(self.steps, self.wanted, strict=True):
            assert torch.equal(run(self.dispatch, one), wanted)
        assert self.layers - before == (3 if self.exchange else 0)
        assert lent(self.dispatch) == []

    def relink(self) -> None:
        """A new link to the first host."""
        host = self.hosts[0]
        wait_until(lambda: not host._links)
        self.dispatch.set_link(host.host_id, self.parts.link(host, "shm"))
        warm(self.dispatch)
        self.assert_usable()

    def counts(self) -> tuple[int, int, int]:
        return self.dispatch.resent_shares, self.dispatch.hedged_shares, self.dispatch.fenced_hosts


def router_ends(dispatch: ExpertDispatch) -> list[Any]:
    return [line.link for line in dispatch._hosts.lines.values()]


def host_end(host: ExpertHost) -> Any:
    """The host's end of its only link."""
    (link,) = host._links
    return link
