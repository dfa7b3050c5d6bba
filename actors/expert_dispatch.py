"""The router's side of the expert layers: who computes which (token, expert) pair, out over the links and back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..configs.errors import ExpertsUnavailableError, LinkError
from ..kernels.experts import combine
from .deadline import Deadline
from .links.base import Link
from .moe_frames import Kind, MoeHeader
from .placement_table import PlacementTable


@dataclass(frozen=True, slots=True)
class _HostShare:
    """What one host was asked: positions [P] of its pairs in the flattened [T * K], in the order they were sent."""

    host: str
    pairs: torch.Tensor
    sequence: int


@dataclass(frozen=True, slots=True)
class PendingExperts:
    """Expert outputs on their way: made by `ExpertDispatch.start`, redeemed once by `finish`."""

    layer: int
    topk_weights: torch.Tensor
    hidden_size: int
    dtype: torch.dtype
    shares: list[_HostShare]


class ExpertDispatch:
    """Sends each layer's tokens to the hosts that hold their experts and sums what comes back.

    One request and one reply for each host with work; exact sizes. Replicas share tokens by row number, which balances them
    without talking to anyone and changes no bit of the result. Used by the router's thread alone, but for `set_link`.

    Args:
        table: the placement to start with.
        links: host id -> link; hosts of the table without one count as unreachable.
        reply_timeout_s: a host silent for this long with work in hand is taken for dead.
    """

    def __init__(self, table: PlacementTable, links: Mapping[str, Link], *, reply_timeout_s: float = 10.0) -> None:
        self.table = table
        self._links = dict(links)
        self._reply_timeout_s = reply_timeout_s
        self._sequence = 0
        self.broken: dict[str, str] = {}
        self.wait_s = 0.0
        self._build_routes()

    def _build_routes(self) -> None:
        """Routing tensors: for each layer, replica number and expert the host's index and the slot; see `_route`."""
        self._hosts = list(self.table.slots)
        self._routes: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        unreachable = []
        for layer in range(self.table.first_layer, self.table.first_layer + self.table.layers):
            replicas = []
            for expert in range(self.table.experts):
                found = [(host, slot) for host, slot in self.table.replicas(layer, expert) if host in self._links]
                if not found:
                    unreachable.append((layer, expert))
                replicas.append(found)
            width = max(1, max(len(found) for found in replicas))
            host_index = torch.zeros((width, self.table.experts), dtype=torch.int64)
            slot_index = torch.zeros((width, self.table.experts), dtype=torch.int64)
            count = torch.ones(self.table.experts, dtype=torch.int64)
            for expert, found in enumerate(replicas):
                for i, (host, slot) in enumerate(found):
                    host_index[i, expert] = self._hosts.index(host)
                    slot_index[i, expert] = slot
                count[expert] = max(1, len(found))
            self._routes[layer] = (host_index, slot_index, count)
        self.unreachable = unreachable

    def set_link(self, host: str, link: Link) -> None:
        """Use `link` for `host` from now on; the old one, if any, is closed. Call between steps only."""
        old = self._links.pop(host, None)
        if old is not None:
            old.close()
        self._links[host] = link
        self.broken.pop(host, None)
        self._build_routes()

    def check(self) -> None:
        """Notice peers that died while nothing was sent: drops their links. Never blocks."""
        for host, link in list(self._links.items()):
            try:
                link.check()
            except LinkError as error:
                self._drop(host, error)

    def start(
        self, layer: int, hidden_states: torch.Tensor, topk_ids: torch.Tensor, topk_weights: torch.Tensor
    ) -> PendingExperts:
        """Send hidden_states [T, H] to the hosts of topk_ids [T, K]; returns at once with the claim on the results.

        Raises:
            ExpertsUnavailableError: an expert has no reachable replica, or a host was lost while sending.
        """
        if self.unreachable:
            raise self._unavailable()
        host_index, slot_index, count = self._routes[layer]
        tokens, top_k = topk_ids.shape
        replica = torch.arange(tokens).unsqueeze(1) % count[topk_ids]
        hosts = host_index[replica, topk_ids].flatten()
        slots = slot_index[replica, topk_ids].flatten()
        # One stable sort groups the pairs by host and, within a host, by slot with tokens ascending.
        order = torch.argsort(hosts * (int(slots.max()) + 1) + slots, stable=True)
        present, counts = torch.unique_consecutive(hosts[order], return_counts=True)
        shares = []
        for index, pairs in zip(present.tolist(), order.split(counts.tolist()), strict=True):
            host = self._hosts[index]
            rows, inverse = torch.unique(pairs // top_k, return_inverse=True)
            self._sequence += 1
            header = MoeHeader(Kind.WORK, layer, self.table.epoch, self._sequence).pack()
            frame = (hidden_states[rows], torch.stack((inverse, slots[pairs])).to(torch.int32))
            try:
                self._links[host].send(header, frame, deadline=Deadline.after(self._reply_timeout_s))
            except LinkError as error:
                self._lose(host, error)
            shares.append(_HostShare(host, pairs, self._sequence))
        return PendingExperts(layer, topk_weights, hidden_states.shape[1], hidden_states.dtype, shares)

    def finish(self, pending: PendingExperts) -> torch.Tensor:
        """Wait for the replies and sum them in top-k order: [T, H] in fp32.

        Raises:
            ExpertsUnavailableError: a host died, stayed silent past the deadline, or failed.
        """
        started = time.perf_counter()
        tokens, top_k = pending.topk_weights.shape
        outputs = torch.empty((tokens * top_k, pending.hidden_size), dtype=pending.dtype)
        deadline = Deadline.after(self._reply_timeout_s)
        for share in pending.shares:
            try:
                frame = self._links[share.host].recv(deadline=deadline)
                header = MoeHeader.unpack(frame.header)
                while header.sequence < share.sequence:  # left over from a step that was given up
                    frame = self._links[share.host].recv(deadline=deadline)
                    header = MoeHeader.unpack(frame.header)
            except LinkError as error:
                self._lose(share.host, error)
            if header.kind is not Kind.DONE:
                raise ExpertsUnavailableError(f"an expert host refused its work: {header.reason}")
            outputs[share.pairs] = frame.tensors[0]
        self.wait_s += time.perf_counter() - started
        return combine(outputs.view(tokens, top_k, -1), pending.topk_weights)

    def close(self) -> None:
        """Close every link."""
        for link in self._links.values():
            link.close()
        self._links.clear()

    def _drop(self, host: str, error: LinkError) -> None:
        self._links.pop(host).close()
        self.broken[host] = str(error)
        self._build_routes()

    def _lose(self, host: str, error: LinkError) -> None:
        self._drop(host, error)
        raise self._unavailable() from error

    def _unavailable(self) -> ExpertsUnavailableError:
        lost = "; ".join(self.broken.values()) or "no link to " + ", ".join(
            h for h in self._hosts if h not in self._links
        )
        return ExpertsUnavailableError(
            f"{len(self.unreachable)} (layer, expert) pairs have no reachable replica: {lost}"
        )
