"""Goes on where native code cannot, in the middle of a step: layers that Python asks for or collects, between native ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..kernels.cpu.attention import BatchTables
from ..model.cpu_block import CpuLayer
from ..model.moe import RoutedExperts
from .asking import Asker
from .dispatch_counts import DispatchCounts
from .dispatch_hosts import DispatchHosts
from .layer_run import LayerRun
from .native_claims import NativeClaims
from .native_library import Stage
from .pending_experts import PendingExperts


class LayerRunDriver:
    """Takes batches through layers, one at a time. For the router's thread.

    Args:
        native: over the same exchange as `run`; asker: for what native code asked for in part.

    Attributes:
        run: what does it natively.
    """

    def __init__(
        self, run: LayerRun, hosts: DispatchHosts, native: NativeClaims, asker: Asker, counts: DispatchCounts
    ) -> None:
        assert run.exchange is native.exchange, "what one has asked for, the other goes on with"
        self.run = run
        self._hosts = hosts
        self._native = native
        self._asker = asker
        self._counts = counts

    def drive(
        self,
        layers: Sequence[CpuLayer],
        numbers: range,
        hidden_states: torch.Tensor,
        batch: BatchTables,
        one_by_one: RoutedExperts[PendingExperts],
    ) -> bool:
        """Take a batch through the layers with these numbers; see `LayerRunner`.

        Args:
            one_by_one: does a layer that native code does not.

        Raises:
            ExpertsUnavailableError: as it does.
        """
        hosts, run = self._hosts, self.run
        if hosts.unreachable or not hosts.idle or not self._describe(layers):
            return False
        for line in hosts.lines.values():
            line.keep_what_is_lent()
        run.begin(numbers, hidden_states, batch, hosts=len(hosts.in_order), epoch=hosts.table.epoch)
        claim: PendingExperts | None = None
        try:
            while not self._go():
                if run.stage is Stage.ASK:
                    claim = self._ask(one_by_one)
                else:
                    claim = claim or self._take_over()
                    self._finish(claim, layers, one_by_one)
                    claim = None
        except BaseException:
            if run.asked_natively:
                claim = self._take_over()  # it is owed, whoever wants it
            if claim is not None:
                claim.close()  # nobody does
            raise
        return True

    def _describe(self, layers: Sequence[CpuLayer]) -> bool:
        """Say where the layers' experts are to be asked for; False if native code could not ask for all of them."""
        routes = self._hosts.routes_of_layers([layer.number for layer in layers if layer.top_k])
        if not routes or not all(where.complete and where.native is not None for where in routes.values()):
            return False
        self.run.describe(layers, routes, self._counts.address)
        return True

    def _go(self) -> bool:
        """Go on natively; what hosts have answered is accounted for before anything else is known of them."""
        run, counts = self.run, self._counts
        try:
            return run.go(self._hosts.in_order, counts.sequence)
        finally:
            counts.sequence = max(counts.sequence, run.exchange.sequence)
            counts.wait_s += run.waited_s
            run.exchange.layers += run.collected
            for line, pairs, seconds in run.answers():
                line.answered(pairs, seconds)
                self._hosts.has_done(line, pairs)

    def _ask(self, one_by_one: RoutedExperts[PendingExperts]) -> PendingExperts:
        """Ask for the layer that the run has come to, and could not ask for, at least not everybody."""
        if self.run.asked_natively:
            claim = self._take_over()
            self._asker.cover(claim)
        else:
            claim = one_by_one.start(*self.run.work())
        self.run.has_asked()
        return claim

    def _take_over(self) -> PendingExperts:
        """What the run has asked for of a layer, and could not ask of everybody or collect: the hosts' lines wait for it."""
        run, hosts = self.run, self._hosts
        claim = PendingExperts(hosts.table, *run.work())
        run.exchange.outstanding(claim, hosts.clock() - run.last_wait_s)
        run.hand_over()
        self._native.settle()
        hosts.excuse(run.last_wait_s - run.patience_s)
        return claim

    def _finish(
        self, claim: PendingExperts, layers: Sequence[CpuLayer], one_by_one: RoutedExperts[PendingExperts]
    ) -> None:
        """Collect the layer that the run has come to. Who is lost, late or refuses since is not asked for those after it."""
        run = self.run
        before = run.exchange.layers
        run.has_collected(one_by_one.finish(claim))
        if run.leaves_asking or run.exchange.layers == before:
            run.leaves_asking = not (self._hosts.idle and self._describe(layers))
