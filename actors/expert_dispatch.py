"""The router's side of the expert layers: who computes which (token, expert) pair, out over the links and back.

What is asked of a host is a *share*: some pairs of one layer. Everything that can go wrong with a host comes down to one
rule, `_cover`: every pair that nobody has answered is asked of a host that will probably answer, and only where there is
none, of one that perhaps will. So a lost host's pairs go to other replicas at once, a late host's are *hedged* (asked of
others too, whoever answers first), and a refusal is taken elsewhere, all within the same layer of the same step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence

import numpy as np
import torch

from ..configs.errors import ExpertsUnavailableError, LinkError, PeerTimeoutError
from ..kernels.cpu.attention import BatchTables
from ..model.cpu_block import CpuLayer
from .host_line import HostLine
from .layer_run import LayerRun, layer_run
from .links.base import Link
from .moe_frames import Kind, MoeHeader
from .native_exchange import NativeExchange
from .native_library import Stage
from .pending_experts import PendingExperts, Share
from .placement_table import PlacementTable, is_cold
from .replica_choice import choose_replicas
from .reports import HostView
from .routes import IF_NEED_BE, IF_NOT_ELSEWHERE, NO, YES, IntArray, LayerRoutes, Routes

logger = logging.getLogger("moray.router")

_LOOK_ROUND_S = 0.005
"""A wait for one host is broken off so often, to look at all of them: a lost or late one must not hide behind another."""

_HELD_UP_S = 0.02
"""A wait that ends so much later than asked for tells that this process got no CPU, or computed (behind an inline link):
it could have heard nobody, so the time does not count against the hosts."""

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

    Attributes:
        broken: host -> what is wrong with it: its link was lost, or it refused the last work it was given.
        expert_tokens: [L, E] tokens routed to each expert, counted once however often they were sent. For any thread: each
            number is whole, though a step may be counted in some layers only.
        wait_s: time spent waiting for replies, in seconds.
        resent_shares, hedged_shares, fenced_hosts: see `RouterStats`.
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
        self.table = table
        self._reply_timeout_s = reply_timeout_s
        self._exchange = exchange
        self._run = None if exchange is None else layer_run(exchange)
        self._clock = clock
        self._lines = {host: self._line(host, link) for host, link in links.items()}
        self._answered = dict.fromkeys(table.slots, 0)
        self._sequence = 0
        self.broken: dict[str, str] = {}
        self.expert_tokens: IntArray = np.zeros((table.layers, table.experts), dtype=np.int64)
        self.wait_s = 0.0
        self.resent_shares = self.hedged_shares = self.fenced_hosts = 0
        self._use_routes(table)
        self._look_for_unreachable()

    # ---- hosts and tables: between steps ----------------------------------------------------------------------------

    def set_link(self, host: str, link: Link) -> None:
        """Use `link` for `host` from now on; the old one, if any, is closed. Call between steps only.

        A link to a host that has left the table meanwhile is closed at once.
        """
        self._settle()
        self._set_link(host, link)
        self._look_for_unreachable()

    def adopt(self, table: PlacementTable, links: Mapping[str, Link]) -> None:
        """Use `table` from now on, and `links` to the hosts that are new in it; hosts that left it are dropped.

        Call between steps only: a layer's work and its replies belong to one epoch.
        """
        self._settle()
        assert table.epoch > self.table.epoch, (table.epoch, self.table.epoch)
        assert (table.layers, table.experts) == self.expert_tokens.shape, "of the same model"
        self.table = table
        self._use_routes(table)
        for host in [host for host in self._lines if host not in table.slots]:
            self._lines.pop(host).link.close()
        self.broken = {host: why for host, why in self.broken.items() if host in table.slots}
        self._answered = {host: self._answered.get(host, 0) for host in table.slots}
        for host, link in links.items():
            self._set_link(host, link)
        self._look_for_unreachable()

    def check(self) -> None:
        """Between steps: take late replies, give up hosts that stay silent, notice those that died. Never blocks."""
        self._attend()
        for line in list(self._lines.values()):
            try:
                line.link.check()
            except LinkError as error:
                self._drop(line, error)

    def close(self) -> None:
        """Close every link; work in progress in another thread ends with an error. Idempotent. For any thread."""
        for line in list(self._lines.values()):
            line.link.close()

    # ---- what there is to know: for any thread ----------------------------------------------------------------------

    @property
    def unlinked(self) -> list[str]:
        """Hosts of the table that there is no link to."""
        return [host for host in self.table.slots if host not in self._lines]

    @property
    def missing(self) -> int:
        """(layer, expert) pairs that no host can compute now; those that refuse their work are no better than lost ones."""
        return self._routes.unreachable(set(self._lines) - set(self.broken))

    @property
    def late_hosts(self) -> list[str]:
        """Hosts that owe an answer for longer than is usual for them."""
        return [line.host for line in list(self._lines.values()) if line.late]

    def host_views(self) -> dict[str, HostView]:
        """Every host of the table as it is now."""
        now, lines, answered = self._clock(), dict(self._lines), self._answered
        views = {}
        for host in self.table.slots:
            line, pairs = lines.get(host), answered.get(host, 0)
            views[host] = (
                HostView(linked=False, pairs=pairs)
                if line is None
                else HostView(True, max(0.0, now - line.due), line.latency.median_s, pairs)
            )
        return views

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
        if self._unreachable:
            raise self._unavailable()
        claim = self._claim(layer, hidden_states, topk_ids.cpu(), topk_weights)
        if not self._ask_natively(claim):
            self._cover(claim)
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
                        self._cover(pending)
            finally:
                self.wait_s += time.perf_counter() - started
            self.expert_tokens[pending.layer - self.table.first_layer] += pending.load
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
        if run is None or self._unreachable or not all(line.idle for line in self._lines.values()):
            return False
        if not self._describe(run, layers):
            return False
        for line in self._lines.values():
            line.keep_what_is_lent()
        run.begin(hidden_states, batch, hosts=len(self._routes.hosts), epoch=self.table.epoch)
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
            return run.go([self._lines.get(host) for host in self._routes.hosts], self._sequence)
        finally:
            self._sequence = max(self._sequence, run.exchange.sequence)
            self.wait_s += run.waited_s
            run.exchange.layers += run.collected
            for line, pairs, seconds in run.answers():
                self._has_answered(line, pairs, seconds)

    def _describe(self, run: LayerRun, layers: Sequence[CpuLayer]) -> bool:
        """Say where the layers' experts are to be asked for; False if native code could not ask for all of them."""
        routed = [layer.number for layer in layers if layer.top_k]
        routes = self._routes.of_layers(routed, self._askable((), IF_NEED_BE))
        if not routes or not all(where.complete and where.first_address for where in routes.values()):
            return False
        run.describe(layers, routes, self._counted)
        return True

    def _counted(self, layer: int) -> int:
        """Address of a layer's line of `expert_tokens`."""
        return self.expert_tokens.ctypes.data + (layer - self.table.first_layer) * self.expert_tokens.strides[0]

    def _claim(
        self, layer: int, hidden_states: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> PendingExperts:
        return PendingExperts(layer, self.table.epoch, hidden_states, ids, weights, all_experts=self.table.experts)

    def _ask_for(self, run: LayerRun) -> PendingExperts:
        """Ask for the layer that a run has come to, and could not ask for, at least not everybody."""
        if run.asked_natively:
            claim = self._asked_for(run)
            self._cover(claim)
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
        self._excuse(run.last_wait_s - run.patience_s)
        return claim

    def _finish_for(self, run: LayerRun, claim: PendingExperts, layers: Sequence[CpuLayer]) -> None:
        """Collect the layer that a run has come to. Who is lost, late or refuses since is not asked for the next as before."""
        before = run.exchange.layers
        run.has_collected(self.finish(claim))
        if run.leaves_asking or run.exchange.layers == before:
            idle = all(line.idle for line in self._lines.values())
            run.leaves_asking = not (idle and self._describe(run, layers))

    def _ask_natively(self, claim: PendingExperts) -> bool:
        """Ask for all pairs of a claim without the interpreter, where that is all there is to do; whether it was done."""
        states, exchange = claim.hidden_states, self._exchange
        if exchange is None or states.device.type != "cpu":
            return False
        if states.dtype != torch.bfloat16 or claim.topk_ids.dtype != torch.int64:
            return False
        if not all(line.idle for line in self._lines.values()):
            return False  # replies come in order, and those to others are taken below
        routes = self._routes.of_layer(claim.layer, self._askable(claim.refused, IF_NEED_BE))
        if not (routes.complete and routes.first_address):
            return False
        keys = None
        if not routes.single:
            keys = routes.keys[
                choose_replicas(claim.experts, routes.hosts, routes.count, load=claim.load), claim.experts
            ]
        lines = [self._lines.get(host) for host in self._routes.hosts]
        self._sequence = exchange.ask(claim, lines, routes, keys, sequence=self._sequence, now=self._clock())
        if not exchange.all_asked:
            self._settle()
        return exchange.claim is claim

    def _collect_natively(self, claim: PendingExperts) -> torch.Tensor | None:
        """What was asked for natively, summed; None if there is nothing of it, or it is for `_collect` to go on with."""
        exchange = self._exchange
        if exchange is None or exchange.claim is not claim:
            return None
        began = self._clock()
        out = exchange.collect(self._counted(claim.layer))
        if out is None:
            held_up_s = self._clock() - began - exchange.patience_s
            self._settle()
            self._excuse(held_up_s)
            return None
        for line, pairs, seconds in exchange.answers():
            self._has_answered(line, pairs, seconds)
        return out

    def _has_answered(self, line: HostLine, pairs: int, seconds: float) -> None:
        line.answered(pairs, seconds)
        self._answered[line.host] += pairs
        self.broken.pop(line.host, None)

    def _settle(self) -> None:
        """Go on here with what was asked for natively."""
        if self._exchange is not None:
            for line, share in self._exchange.hand_over():
                self._post(line, share)

    def _collect(self, claim: PendingExperts) -> bool:
        """Take a reply of each host that is asked for open pairs; False as soon as one is not what it should be.

        In the order in which they are due: then each one's time is its own, and none is held to be late for another.
        """
        lines = [line for line in self._lines.values() if line.is_wanted_by(claim)]
        lines.sort(key=_late_and_due)
        return bool(lines) and all(self._receive(line, _LOOK_ROUND_S) for line in lines)

    def _attend(self) -> None:
        """Take what has arrived from hosts that owe something, and judge those that go on to owe it. Never waits."""
        self._settle()
        for line in list(self._lines.values()):
            while line.owed and self._receive(line, 0.0):
                pass
            if line.owed and self._clock() > line.due and self._lines.get(line.host) is line:
                self._overdue(line)

    def _overdue(self, line: HostLine) -> None:
        if not line.late:
            line.late = True
            logger.info("event=late host=%s silent_s=%.3f", line.host, line.silent_s)
        if line.silent_s > line.silence_limit_s:
            self._drop(line, PeerTimeoutError(line.host, f"was silent for {line.silent_s:.2f} s with work in hand"))

    def _receive(self, line: HostLine, wait_s: float) -> bool:
        """Wait for a host's next reply and take it; False if there was none, or it was not what the host was asked for."""
        began = self._clock()
        try:
            reply = line.receive(wait_s)
            self._excuse(self._clock() - began - wait_s)
            if reply is None:
                return False
            done = self._take(line, *reply)
            if line.last_s > _SLOW_S:
                self._compare(line)
            line.send_queued()
        except LinkError as error:
            self._drop(line, error)
            return False
        return done

    def _excuse(self, held_up_s: float) -> None:
        """A wait has ended so much later than asked for."""
        if held_up_s > _HELD_UP_S:
            for line in self._lines.values():
                line.excuse(held_up_s)

    def _compare(self, line: HostLine) -> None:
        """Have a host spared whose replies take far longer than those of the others: no deadline of its own tells."""
        others = [other.latency.median_s for other in self._lines.values() if other is not line]
        known = [seconds for seconds in others if seconds > 0]
        if known and line.last_s > _SLOW * min(known):
            line.spare()

    def _take(self, line: HostLine, share: Share, header: MoeHeader, tensors: tuple[torch.Tensor, ...]) -> bool:
        if header.kind is Kind.FAILED:
            share.claim.refused[line.host] = self.broken[line.host] = f"{line.host} refused its work: {header.reason}"
            line.refused()
            return False
        share.claim.take(share, tensors)
        line.lent_to = share.claim
        self._answered[line.host] += len(share.pairs)
        self.broken.pop(line.host, None)
        return True

    # ---- who is asked for what --------------------------------------------------------------------------------------

    def _cover(self, claim: PendingExperts) -> None:
        """See to it that every open pair is asked of a host that is neither late nor refusing, where there is one.

        Raises:
            ExpertsUnavailableError: a pair can be asked of nobody any more; the claim is closed then.
        """
        if not claim.asked:
            lines = len(self._lines)
            routes = self._routes.of_layer(claim.layer, self._askable(claim.refused, IF_NEED_BE))
            if routes.complete:  # else perhaps none of the others is asked for
                self._ask(claim, None, routes)
                claim.asked = True
                if len(self._lines) == lines:
                    return
        while claim.left:
            lines = len(self._lines)
            asked, perhaps = self._asked(claim)
            lost = np.flatnonzero(claim.is_open & ~asked & ~perhaps)
            if len(lost):
                routes = self._routes.of_layer(claim.layer, self._askable(claim.refused, IF_NEED_BE))
                if not routes.count[claim.experts[lost]].all():
                    claim.close()
                    raise self._unavailable(claim)
                shares = self._ask(claim, lost, routes)
                self.resent_shares += shares if claim.asked else 0
                claim.asked = True
            hedged = np.flatnonzero(claim.is_open & ~asked & perhaps)
            if len(hedged):
                routes = self._routes.of_layer(claim.layer, self._askable(claim.refused, NO))
                hedged = hedged[routes.count[claim.experts[hedged]] > 0]
                claim.hedged = claim.hedged or len(hedged) > 0
                self.hedged_shares += self._ask(claim, hedged, routes)
            if len(self._lines) == lines:
                return  # else a host was lost while it was being asked

    def _asked(self, claim: PendingExperts) -> tuple[np.ndarray, np.ndarray]:
        """Which pairs [T * K] are asked of hosts that will probably answer, and which of others."""
        probably, perhaps = np.zeros((2, len(claim.experts)), dtype=np.bool_)
        if claim.asked:
            for line in self._lines.values():
                for share in line.shares_of(claim):
                    (perhaps if line.late else probably)[share.pairs] = True
        return probably, perhaps

    def _askable(self, refused: Container[str], avoided: int) -> tuple[int, ...]:
        """For each host of the routes whether it can be asked; `avoided` for those that are late or refuse."""
        now, lines = self._clock(), self._lines
        levels = []
        for host, at_best in self._at_best:
            line = lines.get(host)
            if line is None or host in refused:
                levels.append(NO)
            elif line.late or now < line.refused_until:
                levels.append(avoided)
            else:
                levels.append(IF_NEED_BE if now < line.slow_until else at_best)
        return tuple(levels)

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
        shares = 0
        for host, begin, end in zip(self._routes.hosts, ends, ends[1:], strict=False):
            if begin == end:
                continue
            shares += 1
            self._sequence += 1
            share = Share(host, claim, sorted_pairs[begin:end], slots[begin:end], self._sequence)
            self._post(self._lines[host], share)
        return shares

    def _post(self, line: HostLine, share: Share) -> None:
        try:
            line.post(share)
        except LinkError as error:
            self._drop(line, error)

    # ---- links ------------------------------------------------------------------------------------------------------

    def _use_routes(self, table: PlacementTable) -> None:
        self._routes = Routes(table)
        self._at_best = [(host, IF_NOT_ELSEWHERE if is_cold(host) else YES) for host in self._routes.hosts]

    def _line(self, host: str, link: Link) -> HostLine:
        return HostLine(host, link, reply_timeout_s=self._reply_timeout_s, clock=self._clock)

    def _set_link(self, host: str, link: Link) -> None:
        if host not in self.table.slots:
            link.close()
            return
        old = self._lines.pop(host, None)
        if old is not None:
            old.link.close()
        self._lines[host] = self._line(host, link)
        self.broken.pop(host, None)

    def _drop(self, line: HostLine, error: LinkError) -> None:
        if isinstance(error, PeerTimeoutError):
            self.fenced_hosts += 1
            logger.warning("event=fenced host=%s silent_s=%.3f reason=%r", line.host, line.silent_s, str(error))
        else:
            logger.warning("event=lost host=%s reason=%r", line.host, str(error))
        self.broken[line.host] = str(error)  # first: whoever counts what is missing should find the reason
        del self._lines[line.host]
        line.link.close()
        self._look_for_unreachable()

    def _look_for_unreachable(self) -> None:
        self._unreachable = self._routes.unreachable(self._lines)

    def _unavailable(self, claim: PendingExperts | None = None) -> ExpertsUnavailableError:
        """What is missing and why; given a claim, also what was refused."""
        if not self._unreachable and claim is not None and claim.refused:
            return ExpertsUnavailableError("; ".join(claim.refused.values()))
        lost = "; ".join(self.broken.values()) or "no link to " + ", ".join(self.unlinked)
        return ExpertsUnavailableError(f"{self._unreachable} (layer, expert) pairs have no reachable replica: {lost}")


def _late_and_due(line: HostLine) -> tuple[bool, float]:
    return line.late, line.due
