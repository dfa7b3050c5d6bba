"""The router's side of the expert layers: who computes which (token, expert) pair, out over the links and back.

What is asked of a host is a *share*: some pairs of one layer. Who is asked, also once a host is lost, late or refuses, says
`Asker`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..configs.errors import LinkError, PeerTimeoutError
from ..kernels.cpu.attention import BatchTables
from ..model.cpu_block import CpuLayer
from .asking import Asker
from .dispatch_counts import DispatchCounts
from .dispatch_hosts import DispatchHosts
from .host_line import HostLine
from .layer_run import LayerRun, layer_run
from .links.base import Link
from .moe_frames import Kind
from .native_exchange import NativeExchange
from .native_library import Stage
from .pending_experts import PendingExperts
from .placement_table import PlacementTable
from .replica_choice import choose_replicas
from .reports import HostView
from .routes import IF_NEED_BE, IntArray

logger = logging.getLogger("moray.router")

_LOOK_ROUND_S = 0.005
"""A wait for one host is broken off so often, to look at all of them: a lost or late one must not hide behind another."""

_SLOW_S = 0.05
_SLOW = 5.0
"""A reply that takes longer than both, the second times what is usual for the fastest host, has others asked first."""


class ExpertDispatch:
    """Sends each layer's tokens to the hosts that hold their experts and sums what comes back.

    One request and one reply for each host with work; exact sizes. Replicas share an expert's tokens so that the hosts'
    shares of the step come out even; which of them computes a token changes no bit of the result. Used by the router's thread
    alone, but for what says that it is for any.

    Args:
        table: the placement to start with.
        links: host id -> link; hosts of the table without one count as unreachable.
        reply_timeout_s: a host silent for this long with work in hand is given up, also where no other has its experts.
        exchange: does the ordinary layers of a step natively, where hidden states are bf16 in this machine's memory.
        clock: in seconds; lateness is measured on it.
    """

    def __init__(
        self,
        table: PlacementTable,
        links: Mapping[str, Link],
        *,
        reply_timeout_s: float = 10.0,
        exchange: NativeExchange | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counts = DispatchCounts(table)
        self._hosts = DispatchHosts(table, links, self._counts, reply_timeout_s=reply_timeout_s, clock=clock)
        self._asker = Asker(self._hosts, self._counts)
        self._clock = clock
        self._exchange = exchange
        self._run = None if exchange is None else layer_run(exchange)

    # ---- hosts and tables: between steps ----------------------------------------------------------------------------

    def set_link(self, host: str, link: Link) -> None:
        """Use `link` for `host` from now on; the old one, if any, is closed. Call between steps only.

        A link to a host that has left the table meanwhile is closed at once.
        """
        self._settle()
        self._hosts.set_link(host, link)

    def adopt(self, table: PlacementTable, links: Mapping[str, Link]) -> None:
        """Use `table` from now on, and `links` to the hosts that are new in it; hosts that left it are dropped.

        Call between steps only: a layer's work and its replies belong to one epoch.
        """
        self._settle()
        assert (table.layers, table.experts) == self.expert_tokens.shape, "of the same model"
        self._hosts.adopt(table, links)

    def check(self) -> None:
        """Between steps: take late replies, give up hosts that stay silent, notice those that died. Never blocks."""
        self._attend()
        self._hosts.check()

    def close(self) -> None:
        """Close every link; work in progress in another thread ends with an error. Idempotent. For any thread."""
        self._hosts.close()

    # ---- what there is to know: for any thread ----------------------------------------------------------------------

    @property
    def table(self) -> PlacementTable:
        """The placement that is used."""
        return self._hosts.table

    @property
    def unlinked(self) -> list[str]:
        """Hosts of the table that there is no link to."""
        return self._hosts.unlinked

    @property
    def missing(self) -> int:
        """(layer, expert) pairs that no host can compute now; those that refuse their work are no better than lost ones."""
        return self._hosts.missing

    @property
    def broken(self) -> dict[str, str]:
        """Host -> what is wrong with it: its link was lost, or it refused the last work it was given."""
        return self._hosts.broken

    @property
    def late_hosts(self) -> list[str]:
        """Hosts that owe an answer for longer than is usual for them."""
        return self._hosts.late

    def host_views(self) -> dict[str, HostView]:
        """Every host of the table as it is now."""
        return self._hosts.views()

    @property
    def expert_tokens(self) -> IntArray:
        """[L, E] tokens routed to each expert; see `DispatchCounts`."""
        return self._counts.expert_tokens

    @property
    def wait_s(self) -> float:
        """Time spent waiting for replies, in seconds."""
        return self._counts.wait_s

    @property
    def resent_shares(self) -> int:
        """See `RouterStats`."""
        return self._counts.resent_shares

    @property
    def hedged_shares(self) -> int:
        """See `RouterStats`."""
        return self._counts.hedged_shares

    @property
    def fenced_hosts(self) -> int:
        """See `RouterStats`."""
        return self._counts.fenced_hosts

    # ---- one layer of a step ----------------------------------------------------------------------------------------

    def start(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingExperts:
        """Send hidden_states [T, H] to the hosts of topk_ids [T, K]; returns at once with the claim on the results.

        Where they are on a GPU, waits for topk_ids: message sizes are exact, so the host must know them.

        Raises:
            ExpertsUnavailableError: an expert, of whatever layer, has no reachable replica.
        """
        self._attend()
        if self._hosts.unreachable:
            raise self._hosts.unavailable()
        claim = self._claim(layer, hidden_states, topk_ids.cpu(), topk_weights)
        if not self._ask_natively(claim):
            self._asker.cover(claim)
        return claim

    def finish(self, pending: PendingExperts) -> torch.Tensor:
        """Wait for the replies and sum them in top-k order: [T, H] in fp32.

        Raises:
            ExpertsUnavailableError: hosts died, stayed silent, refused or answered something else, and some pair has no
                other replica.
        """
        started = time.perf_counter()
        try:
            try:
                result = self._collect_natively(pending)
                if result is not None:
                    return result
                while pending.left:
                    if not self._collect(pending):
                        self._attend()
                        self._asker.cover(pending)
            finally:
                self._counts.wait_s += time.perf_counter() - started
            self._counts.expert_tokens[pending.layer - self._counts.first_layer] += pending.load
            return pending.result()
        finally:
            pending.close()

    def run_layers(self, layers: Sequence[CpuLayer], hidden_states: torch.Tensor, batch: BatchTables) -> bool:
        """Take a batch through all layers natively, each as `start` and `finish` would; see `LayerRunner`.

        Raises:
            ExpertsUnavailableError: as they do.
        """
        self._attend()
        run = self._run
        if run is None or self._hosts.unreachable or not self._hosts.idle:
            return False
        if not self._describe(run, layers):
            return False
        for line in self._hosts.lines.values():
            line.keep_what_is_lent()
        run.begin(hidden_states, batch, hosts=len(self._hosts.in_order), epoch=self._hosts.table.epoch)
        claim: PendingExperts | None = None
        try:
            while not self._go(run):
                if run.stage is Stage.ASK:
                    claim = self._ask_for(run)
                else:
                    claim = claim or self._asked_for(run)
                    self._finish_for(run, claim, layers)
                    claim = None
        except BaseException:
            if run.asked_natively:
                claim = self._asked_for(run)  # it is owed, whoever wants it
            if claim is not None:
                claim.close()  # nobody does
            raise
        return True

    def _go(self, run: LayerRun) -> bool:
        """Go on natively; what hosts have answered is accounted for before anything else is known of them."""
        try:
            return run.go(self._hosts.in_order, self._counts.sequence)
        finally:
            self._counts.sequence = max(self._counts.sequence, run.exchange.sequence)
            self._counts.wait_s += run.waited_s
            run.exchange.layers += run.collected
            for line, pairs, seconds in run.answers():
                line.answered(pairs, seconds)
                self._hosts.has_done(line, pairs)

    def _describe(self, run: LayerRun, layers: Sequence[CpuLayer]) -> bool:
        """Say where the layers' experts are to be asked for; False if native code could not ask for all of them."""
        routed = [layer.number for layer in layers if layer.top_k]
        routes = self._hosts.routes_of_layers(routed)
        if not routes or not all(where.complete and where.first_address for where in routes.values()):
            return False
        run.describe(layers, routes, self._counts.address)
        return True

    def _claim(
        self, layer: int, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> PendingExperts:
        table = self._hosts.table
        return PendingExperts(layer, table.epoch, hidden_states, ids, weights, all_experts=table.experts)

    def _ask_for(self, run: LayerRun) -> PendingExperts:
        """Ask for the layer that a run has come to, and could not ask for, at least not everybody."""
        if run.asked_natively:
            claim = self._asked_for(run)
            self._asker.cover(claim)
        else:
            claim = self.start(*run.work())
        run.has_asked()
        return claim

    def _asked_for(self, run: LayerRun) -> PendingExperts:
        """Take over what a run has asked for of a layer, and could not ask of everybody or collect."""
        claim = self._claim(*run.work())
        run.exchange.outstanding(claim, self._clock() - run.last_wait_s)
        run.hand_over()
        self._settle()
        self._hosts.excuse(run.last_wait_s - run.patience_s)
        return claim

    def _finish_for(self, run: LayerRun, claim: PendingExperts, layers: Sequence[CpuLayer]) -> None:
        """Collect the layer that a run has come to. Who is lost, late or refuses since is not asked for the next as before."""
        before = run.exchange.layers
        run.has_collected(self.finish(claim))
        if run.leaves_asking or run.exchange.layers == before:
            idle = self._hosts.idle
            run.leaves_asking = not (idle and self._describe(run, layers))

    def _ask_natively(self, claim: PendingExperts) -> bool:
        """Ask for all pairs of a claim without the interpreter, where that is all there is to do; whether it was done."""
        states, exchange = claim.hidden_states, self._exchange
        if exchange is None or states.device.type != "cpu":
            return False
        if states.dtype != torch.bfloat16 or claim.topk_ids.dtype != torch.int64:
            return False
        if not self._hosts.idle:
            return False  # replies come in order, and those to others are taken below
        routes = self._hosts.routes_of(claim, IF_NEED_BE)
        if not (routes.complete and routes.first_address):
            return False
        keys = None
        if not routes.single:
            keys = routes.keys[
                choose_replicas(claim.experts, routes.hosts, routes.count, load=claim.load), claim.experts
            ]
        lines = self._hosts.in_order
        self._counts.sequence = exchange.ask(
            claim, lines, routes, keys, sequence=self._counts.sequence, now=self._clock()
        )
        if not exchange.all_asked:
            self._settle()
        return exchange.claim is claim

    def _collect_natively(self, claim: PendingExperts) -> torch.Tensor | None:
        """What was asked for natively, summed; None if there is nothing of it, or it is for `_collect` to go on with."""
        exchange = self._exchange
        if exchange is None or exchange.claim is not claim:
            return None
        began = self._clock()
        out = exchange.collect(self._counts.address(claim.layer))
        if out is None:
            held_up_s = self._clock() - began - exchange.patience_s
            self._settle()
            self._hosts.excuse(held_up_s)
            return None
        for line, pairs, seconds in exchange.answers():
            line.answered(pairs, seconds)
            self._hosts.has_done(line, pairs)
        return out

    def _settle(self) -> None:
        """Go on here with what was asked for natively."""
        if self._exchange is not None:
            for line, share in self._exchange.hand_over():
                self._hosts.post(line, share)

    def _collect(self, claim: PendingExperts) -> bool:
        """Take a reply of each host that is asked for open pairs; False as soon as one is not what it should be.

        In the order in which they are due: then each one's time is its own, and none is held to be late for another.
        """
        lines = [line for line in self._hosts.lines.values() if line.is_wanted_by(claim)]
        lines.sort(key=_late_and_due)
        return bool(lines) and all(self._receive(line, _LOOK_ROUND_S) for line in lines)

    def _attend(self) -> None:
        """Take what has arrived from hosts that owe something, and judge those that go on to owe it. Never waits."""
        self._settle()
        for line in list(self._hosts.lines.values()):
            while line.owed and self._receive(line, 0.0):
                pass
            if line.owed and self._clock() > line.due and self._hosts.lines.get(line.host) is line:
                self._overdue(line)

    def _overdue(self, line: HostLine) -> None:
        if not line.late:
            line.late = True
            logger.info("event=late host=%s silent_s=%.3f", line.host, line.silent_s)
        if line.silent_s > line.silence_limit_s:
            self._hosts.drop(
                line, PeerTimeoutError(line.host, f"was silent for {line.silent_s:.2f} s with work in hand")
            )

    def _receive(self, line: HostLine, wait_s: float) -> bool:
        """Wait for a host's next reply and take it; False if there was none, or it was not what the host was asked for."""
        began = self._clock()
        try:
            reply = line.receive(wait_s)
            self._hosts.excuse(self._clock() - began - wait_s)
            if reply is None:
                return False
            share, header, tensors = reply
            if header.kind is Kind.FAILED:
                self._hosts.has_refused(line, share.claim, header.reason)
            else:
                share.claim.take(share, tensors)
                line.lent_to = share.claim
                self._hosts.has_done(line, len(share.pairs))
            if line.last_s > _SLOW_S:
                self._compare(line)
            line.send_queued()
        except LinkError as error:
            self._hosts.drop(line, error)
            return False
        return header.kind is not Kind.FAILED

    def _compare(self, line: HostLine) -> None:
        """Have a host spared whose replies take far longer than those of the others: no deadline of its own tells."""
        others = [other.latency.median_s for other in self._hosts.lines.values() if other is not line]
        known = [seconds for seconds in others if seconds > 0]
        if known and line.last_s > _SLOW * min(known):
            line.spare()


def _late_and_due(line: HostLine) -> tuple[bool, float]:
    return line.late, line.due
