"""Who is asked for what: every pair that nobody has answered is asked of a host that will probably answer.

Everything that can go wrong with a host comes down to that one rule, `Asker.cover`; only where there is no such host, one is
asked that perhaps will answer. So a lost host's pairs go to other replicas at once, a late host's are *hedged* (asked of
others too, whoever answers first), and a refusal is taken elsewhere, all within the same layer of the same step.
"""

from __future__ import annotations

import numpy as np

from .dispatch_counts import DispatchCounts
from .dispatch_hosts import DispatchHosts
from .pending_experts import PendingExperts, Share
from .replica_choice import choose_replicas
from .routes import IF_NEED_BE, NO, IntArray, LayerRoutes


class Asker:
    """Asks hosts for the pairs of claims. For the router's thread."""

    def __init__(self, hosts: DispatchHosts, counts: DispatchCounts) -> None:
        self._hosts = hosts
        self._counts = counts

    def cover(self, claim: PendingExperts) -> None:
        """See to it that every open pair is asked of a host that is neither late nor refusing, where there is one.

        Raises:
            ExpertsUnavailableError: a pair can be asked of nobody any more; the claim is closed then.
        """
        hosts = self._hosts
        if not claim.asked:
            lines = len(hosts.lines)
            routes = hosts.routes_of(claim, IF_NEED_BE)
            if routes.complete:  # else perhaps none of the others is asked for
                self._ask(claim, None, routes)
                claim.asked = True
                if len(hosts.lines) == lines:
                    return
        while claim.left:
            lines = len(hosts.lines)
            asked, perhaps = self._asked(claim)
            lost = np.flatnonzero(claim.is_open & ~asked & ~perhaps)
            if len(lost):
                routes = hosts.routes_of(claim, IF_NEED_BE)
                if not routes.count[claim.experts[lost]].all():
                    claim.close()
                    raise hosts.unavailable(claim)
                shares = self._ask(claim, lost, routes)
                self._counts.resent_shares += shares if claim.asked else 0
                claim.asked = True
            hedged = np.flatnonzero(claim.is_open & ~asked & perhaps)
            if len(hedged):
                routes = hosts.routes_of(claim, NO)
                hedged = hedged[routes.count[claim.experts[hedged]] > 0]
                claim.hedged = claim.hedged or len(hedged) > 0
                self._counts.hedged_shares += self._ask(claim, hedged, routes)
            if len(hosts.lines) == lines:
                return  # else a host was lost while it was being asked

    def _asked(self, claim: PendingExperts) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs [T * K] are asked of hosts that will probably answer, and which of others."""
        probably, perhaps = np.zeros((2, len(claim.experts)), dtype=np.bool_)
        if claim.asked:
            for line in self._hosts.lines.values():
                for share in line.shares_of(claim):
                    (perhaps if line.late else probably)[share.pairs] = True
        return probably, perhaps

    def _ask(self, claim: PendingExperts, pairs: IntArray | None, routes: LayerRoutes) -> int:
        """Ask for pairs [P], or for all, all of which have a route, one share for each host; how many shares.

        Hosts that are lost meanwhile are dropped, and their shares with them.
        """
        experts = claim.experts if pairs is None else claim.experts[pairs]
        if routes.single:
            keys = routes.keys[0].take(experts)
        else:
            load = claim.load if pairs is None else None
            keys = routes.keys[choose_replicas(experts, routes.hosts, routes.count, load=load), experts]
        # One stable sort groups the pairs by host and, within a host, by slot with tokens ascending.
        order = keys.argsort(kind="stable")
        keys = keys.take(order)
        ends = keys.searchsorted(routes.first_keys).tolist()
        slots = keys % routes.width
        sorted_pairs = order if pairs is None else pairs[order]
        counts, shares = self._counts, 0
        for line, begin, end in zip(self._hosts.in_order, ends, ends[1:], strict=False):
            if begin == end:
                continue
            assert line is not None, "routes lead to hosts with a link"
            shares += 1
            counts.sequence += 1
            share = Share(line.host, claim, sorted_pairs[begin:end], slots[begin:end], counts.sequence)
            self._hosts.post(line, share)
        return shares
