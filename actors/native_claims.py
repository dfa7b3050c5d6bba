"""Claims that are asked for and collected without the interpreter: which can be, and how the rest of one goes on here."""

from __future__ import annotations

import torch

from .dispatch_counts import DispatchCounts
from .dispatch_hosts import DispatchHosts
from .native_exchange import NativeExchange
from .pending_experts import PendingExperts
from .routes import IF_NEED_BE


class NativeClaims:
    """Asks for claims through `exchange` and collects them, one at a time. For the router's thread.

    Attributes:
        exchange: as given.
    """

    def __init__(self, exchange: NativeExchange, hosts: DispatchHosts, counts: DispatchCounts) -> None:
        self.exchange = exchange
        self._hosts = hosts
        self._counts = counts

    def ask(self, claim: PendingExperts) -> bool:
        """Ask for all pairs of a claim, where that is all there is to do; whether it was done."""
        hosts, counts, states = self._hosts, self._counts, claim.hidden_states
        if not states.is_cpu or states.dtype != torch.bfloat16 or claim.topk_ids.dtype != torch.int64:
            return False
        if not hosts.idle:
            return False  # replies come in order, and those to others are taken in Python
        routes = hosts.routes_of(claim, IF_NEED_BE)
        if not routes.complete or routes.native is None:
            return False
        counts.sequence = self.exchange.ask(
            claim, hosts.in_order, routes.native, sequence=counts.sequence, now=hosts.clock()
        )
        if not self.exchange.all_asked:
            self.settle()
        return self.exchange.claim is claim

    def collect(self, claim: PendingExperts) -> torch.Tensor | None:
        """The sum [T, H] in fp32 of what was asked for natively.

        Returns:
            None if there is nothing of it, or it is for Python to go on with: then the hosts' lines wait for it.
        """
        hosts, exchange = self._hosts, self.exchange
        if exchange.claim is not claim:
            return None
        began = hosts.clock()
        out = exchange.collect(self._counts.address(claim.layer))
        if out is None:
            held_up_s = hosts.clock() - began - exchange.patience_s
            self.settle()
            hosts.excuse(held_up_s)
            return None
        for line, pairs, seconds in exchange.answers():
            line.answered(pairs, seconds)
            hosts.has_done(line, pairs)
        return out

    def settle(self) -> None:
        """Have the hosts' lines go on with what was asked for natively, if there is anything."""
        for line, share in self.exchange.hand_over():
            self._hosts.post(line, share)
