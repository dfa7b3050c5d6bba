"""A dispatch with an exchange and one without, over links of their own to the same expert hosts with packed experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Link
from moray.actors.placement_table import PlacementTable
from moray.actors.testing import EngineParts

from .played_hosts import Clock, Step, new_exchange, random_step

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
    """`native` has an exchange, `python` does without."""

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


def router_ends(dispatch: ExpertDispatch) -> list[Any]:
    return [line.link for line in dispatch._lines.values()]


def host_end(host: ExpertHost) -> Any:
    """The host's end of its only link."""
    (link,) = host._links
    return link
