"""The router's side of the expert layers: who computes which (token, expert) pair, out over the links and back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..configs.errors import ExpertsUnavailableError, LinkError
from ..kernels.combine import combine
from .deadline import Deadline
from .links.base import Link
from .moe_frames import Kind, MoeHeader
from .placement_table import PlacementTable
from .replica_choice import choose_replicas


@dataclass(frozen=True, slots=True)
class _HostShare:
    """What one host was asked: positions [P] of its pairs in the flattened [T * K], in the order they were sent."""

    host: str
    pairs: torch.Tensor
    sequence: int


@dataclass(frozen=True, slots=True)
class PendingExperts:
    """Expert outputs on their way: made by `ExpertDispatch.start`, redeemed once by `finish`."""

    topk_weights: torch.Tensor
    hidden_size: int
    dtype: torch.dtype
    shares: list[_HostShare]
    lost: LinkError | None


class ExpertDispatch:
    """Sends each layer's tokens to the hosts that hold their experts and sums what comes back.

    One request and one reply for each host with work; exact sizes. Replicas share an expert's tokens so that the hosts'
    shares of the step come out even; which of them computes a token changes no bit of the result. Used by the router's thread
    alone, but for `set_link`.

    Args:
        table: the placement to start with.
        links: host id -> link; hosts of the table without one count as unreachable.
        reply_timeout_s: a host silent for this long with work in hand is taken for dead.

    Attributes:
        broken: host -> what is wrong with it: its link was lost, or it refused the last work it was given.
        wait_s: time spent waiting for replies, in seconds.
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
        """Use `link` for `host` from now on; the old one, if any, is closed. Call between steps only.

        A link to a host that has left the table meanwhile is closed at once.
        """
        if host not in self.table.slots:
            link.close()
            return
        old = self._links.pop(host, None)
        if old is not None:
            old.close()
        self._links[host] = link
        self.broken.pop(host, None)
        self._build_routes()

    def adopt(self, table: PlacementTable, links: Mapping[str, Link]) -> None:
        """Use `table` from now on, and `links` to the hosts that are new in it; hosts that left it are dropped.

        Call between steps only: a layer's work and its replies belong to one epoch.
        """
        assert table.epoch > self.table.epoch, (table.epoch, self.table.epoch)
        self.table = table
        for host in [host for host in self._links if host not in table.slots]:
            self._links.pop(host).close()
        self.broken = {host: why for host, why in self.broken.items() if host in table.slots}
        for host, link in links.items():
            self.set_link(host, link)
        self._build_routes()

    @property
    def unlinked(self) -> list[str]:
        """Hosts of the table that there is no link to."""
        return [host for host in self.table.slots if host not in self._links]

    @property
    def missing(self) -> int:
        """(layer, expert) pairs that no host can compute now; those that refuse their work are no better than lost ones."""
        return len(self.table.missing(set(self._links) - set(self.broken)))

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

        Where they are on a GPU, waits for topk_ids: message sizes are exact, so the host must know them.

        A host that is lost while sending shows in `finish`, which every claim must be given to.

        Raises:
            ExpertsUnavailableError: an expert has no reachable replica; nothing was sent.
        """
        if self.unreachable:
            raise self._unavailable()
        host_index, slot_index, count = self._routes[layer]
        top_k = topk_ids.shape[1]
        experts, device = topk_ids.cpu(), hidden_states.device
        replica = choose_replicas(experts, host_index, count)
        hosts = host_index[replica, experts].flatten()
        slots = slot_index[replica, experts].flatten()
        # One stable sort groups the pairs by host and, within a host, by slot with tokens ascending.
        order = torch.argsort(hosts * (int(slots.max()) + 1) + slots, stable=True)
        present, counts = torch.unique_consecutive(hosts[order], return_counts=True)
        shares: list[_HostShare] = []
        lost: LinkError | None = None
        for index, pairs in zip(present.tolist(), order.split(counts.tolist()), strict=True):
            host = self._hosts[index]
            rows, inverse = torch.unique(pairs // top_k, return_inverse=True)
            self._sequence += 1
            header = MoeHeader(Kind.WORK, layer, self.table.epoch, self._sequence).pack()
            frame = (hidden_states[rows.to(device)], torch.stack((inverse, slots[pairs])).to(torch.int32))
            try:
                self._links[host].send(header, frame, deadline=Deadline.after(self._reply_timeout_s))
            except LinkError as error:
                lost = self._drop(host, error)
                break
            shares.append(_HostShare(host, pairs, self._sequence))
        return PendingExperts(topk_weights, hidden_states.shape[1], hidden_states.dtype, shares, lost)

    def finish(self, pending: PendingExperts) -> torch.Tensor:
        """Wait for the replies and sum them in top-k order: [T, H] in fp32.

        Raises:
            ExpertsUnavailableError: a host died, stayed silent past the deadline, refused or answered something else.
        """
        started = time.perf_counter()
        tokens, top_k = pending.topk_weights.shape
        device = pending.topk_weights.device
        outputs = torch.empty((tokens * top_k, pending.hidden_size), dtype=pending.dtype, device=device)
        deadline = Deadline.after(self._reply_timeout_s)
        lost, refused = pending.lost, ""
        # Also after a failure every reply is taken: a link holds few, and unread ones would block its host.
        for share in pending.shares:
            try:
                header, tensors = self._reply(share, deadline)
                if header.kind is Kind.FAILED:
                    refused = self.broken[share.host] = f"{share.host} refused its work: {header.reason}"
                else:
                    outputs[share.pairs.to(device)] = _checked_outputs(share, tensors, outputs).to(device)
                    self.broken.pop(share.host, None)
            except LinkError as error:
                lost = self._drop(share.host, error)
        self.wait_s += time.perf_counter() - started
        if lost is not None:
            raise self._unavailable() from lost
        if refused:
            raise ExpertsUnavailableError(refused)
        return combine(outputs.view(tokens, top_k, -1), pending.topk_weights)

    def _reply(self, share: _HostShare, deadline: Deadline) -> tuple[MoeHeader, tuple[torch.Tensor, ...]]:
        """The host's reply to this share; those to steps that were given up are skipped."""
        while True:
            frame = self._links[share.host].recv(deadline=deadline)
            try:
                header = MoeHeader.unpack(frame.header)
            except ValueError as error:
                raise LinkError(share.host, f"sent a reply that is none ({error})") from error
            if header.sequence > share.sequence or header.kind is Kind.WORK:
                raise LinkError(share.host, f"sent {header.kind.name} {header.sequence} as reply to {share.sequence}")
            if header.sequence == share.sequence:
                return header, frame.tensors

    def close(self) -> None:
        """Close every link; work in progress in another thread ends with an error. Idempotent."""
        for link in list(self._links.values()):
            link.close()

    def _drop(self, host: str, error: LinkError) -> LinkError:
        self._links.pop(host).close()
        self.broken[host] = str(error)
        self._build_routes()
        return error

    def _unavailable(self) -> ExpertsUnavailableError:
        lost = "; ".join(self.broken.values()) or "no link to " + ", ".join(
            h for h in self._hosts if h not in self._links
        )
        return ExpertsUnavailableError(
            f"{len(self.unreachable)} (layer, expert) pairs have no reachable replica: {lost}"
        )


def _checked_outputs(share: _HostShare, tensors: tuple[torch.Tensor, ...], expected: torch.Tensor) -> torch.Tensor:
    """The one tensor of a reply, if it is what the share's pairs must give."""
    shape = (share.pairs.shape[0], expected.shape[1])
    if len(tensors) != 1 or tensors[0].shape != shape or tensors[0].dtype != expected.dtype:
        found = ", ".join(f"{list(t.shape)} {t.dtype}" for t in tensors) or "nothing"
        raise LinkError(share.host, f"answered {found} instead of {list(shape)} {expected.dtype}")
    return tensors[0]
