"""The router's side of the expert layers: out over the links and back, layer by layer or all layers of a step at once.

What is asked of a host is a *share*: some of the (token, expert) pairs of one layer. Who does what:

    DispatchHosts     which hosts there are, who is lost and why
    Asker             who is asked for what, also once a host is lost, late or refuses
    NativeClaims      one layer asked for and collected without the interpreter, where everything is ordinary
    Receiver          what comes back, and when it is late
    LayerRunDriver    all layers without the interpreter, and back in Python those where something is not ordinary

Each knows of those above it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch

from ..kernels.cpu.attention import BatchTables
from ..model.cpu_block import CpuLayer
from .asking import Asker
from .dispatch_counts import DispatchCounts
from .dispatch_hosts import DispatchHosts
from .layer_run import layer_run
from .layer_run_driver import LayerRunDriver
from .links.base import Link
from .native_claims import NativeClaims
from .native_exchange import NativeExchange
from .pending_experts import PendingExperts
from .placement_table import PlacementTable
from .receiving import Receiver
from .reports import HostView
from .routes import IntArray


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
        self._native: NativeClaims | None = None
        self._driver: LayerRunDriver | None = None
        self._asker = Asker(self._hosts, self._counts)
        if exchange is not None:
            self._native = NativeClaims(exchange, self._hosts, self._counts)
            self._driver = LayerRunDriver(layer_run(exchange), self._hosts, self._native, self._asker, self._counts)
        self._receiver = Receiver(self._hosts, self._native)

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
        self._receiver.attend()
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
    def elsewhere(self) -> bool:
        """Whether some host is linked to that may be on another machine."""
        return self._hosts.elsewhere

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
        self._receiver.attend()
        if self._hosts.unreachable:
            raise self._hosts.unavailable()
        if not topk_ids.is_cpu:
            topk_ids = topk_ids.cpu()
        claim = PendingExperts(self._hosts.table, layer, hidden_states, topk_ids, topk_weights)
        if self._native is None or not self._native.ask(claim):
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
                result = None if self._native is None else self._native.collect(pending)
                if result is not None:
                    return result
                while pending.left:
                    if not self._receiver.collect(pending):
                        self._receiver.attend()
                        self._asker.cover(pending)
            finally:
                self._counts.wait_s += time.perf_counter() - started
            self._counts.expert_tokens[pending.layer - self._counts.first_layer] += pending.load
            return pending.result()
        finally:
            pending.close()

    def run_layers(
        self, layers: Sequence[CpuLayer], numbers: range, hidden_states: torch.Tensor, batch: BatchTables
    ) -> bool:
        """Take a batch through these layers natively, each as `start` and `finish` would; see `LayerRunner`.

        Raises:
            ExpertsUnavailableError: as they do.
        """
        self._receiver.attend()
        return self._driver is not None and self._driver.drive(layers, numbers, hidden_states, batch, self)

    def _settle(self) -> None:
        if self._native is not None:
            self._native.settle()
