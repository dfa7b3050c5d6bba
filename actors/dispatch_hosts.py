"""The expert hosts that a router's dispatch knows of: where the table has experts, who can be asked, who is lost and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Mapping

from ..configs.errors import ExpertsUnavailableError, LinkError, PeerTimeoutError
from .dispatch_counts import DispatchCounts
from .host_line import HostLine
from .links.base import Link
from .pending_experts import PendingExperts, Share
from .placement_table import PlacementTable, is_cold
from .reports import HostView
from .routes import IF_NEED_BE, IF_NOT_ELSEWHERE, NO, YES, LayerRoutes, Routes

logger = logging.getLogger("moray.router")

_HELD_UP_S = 0.02
"""A wait that ends so much later than asked for tells that this process got no CPU, or computed (behind an inline link):
it could have heard nobody, so the time does not count against the hosts."""


class DispatchHosts:
    """A placement and a line to each of its hosts, but for those that are lost.

    For the router's thread, but for what says that it is for any.

    Args:
        table: the placement to start with.
        links: host id -> link; hosts of the table without one count as unreachable.
        reply_timeout_s: a host silent for this long with work in hand is given up, also where no other has its experts.
        clock: in seconds; lateness is measured on it.

    Attributes:
        table: the placement.
        clock: as given.
        lines: host -> the work of the host; without those that there is no link to.
        in_order: the same for each host of the routes, in their order; None where there is no link. Another list after
            every change.
        unreachable: (layer, expert) pairs that no host with a link has.
        broken: host -> what is wrong with it: its link was lost, or it refused the last work it was given. For any thread.
    """

    def __init__(
        self,
        table: PlacementTable,
        links: Mapping[str, Link],
        counts: DispatchCounts,
        *,
        reply_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self._reply_timeout_s = reply_timeout_s
        self._counts = counts
        self.lines = {host: self._line(host, link) for host, link in links.items()}
        self.broken: dict[str, str] = {}
        self._pairs = dict.fromkeys(table.slots, 0)
        self._use(table)
        self._lines_have_changed()

    # ---- hosts and tables: between steps ----------------------------------------------------------------------------

    def set_link(self, host: str, link: Link) -> None:
        """Use `link` for `host` from now on; see `ExpertDispatch`."""
        self._set_link(host, link)
        self._lines_have_changed()

    def adopt(self, table: PlacementTable, links: Mapping[str, Link]) -> None:
        """Use `table` from now on, and `links` to the hosts that are new in it; hosts that left it are dropped."""
        assert table.epoch > self.table.epoch, (table.epoch, self.table.epoch)
        self._use(table)
        for host in [host for host in self.lines if host not in table.slots]:
            self.lines.pop(host).link.close()
        self.broken = {host: why for host, why in self.broken.items() if host in table.slots}
        self._pairs = {host: self._pairs.get(host, 0) for host in table.slots}
        for host, link in links.items():
            self._set_link(host, link)
        self._lines_have_changed()

    def check(self) -> None:
        """Notice those that died."""
        for line in list(self.lines.values()):
            try:
                line.link.check()
            except LinkError as error:
                self.drop(line, error)

    def close(self) -> None:
        """Close every link. Idempotent. For any thread."""
        for line in list(self.lines.values()):
            line.link.close()

    # ---- what there is to know: for any thread ----------------------------------------------------------------------

    @property
    def unlinked(self) -> list[str]:
        """Hosts of the table that there is no link to."""
        return [host for host in self.table.slots if host not in self.lines]

    @property
    def missing(self) -> int:
        """(layer, expert) pairs that no host can compute now; those that refuse their work are no better than lost ones."""
        return self._routes.unreachable(set(self.lines) - set(self.broken))

    @property
    def elsewhere(self) -> bool:
        """Whether some host is linked to that may be on another machine."""
        return any(line.link.kind not in ("inline", "shm") for line in list(self.lines.values()))

    @property
    def late(self) -> list[str]:
        """Hosts that owe an answer for longer than is usual for them."""
        return [line.host for line in list(self.lines.values()) if line.late]

    def views(self) -> dict[str, HostView]:
        """Every host of the table as it is now."""
        now, lines, answered = self.clock(), dict(self.lines), self._pairs
        views = {}
        for host in self.table.slots:
            line, pairs = lines.get(host), answered.get(host, 0)
            views[host] = (
                HostView(linked=False, pairs=pairs)
                if line is None
                else HostView(True, max(0.0, now - line.due), line.latency.median_s, pairs)
            )
        return views

    # ---- within a step ----------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether no host owes anything, and nothing is to be sent to any."""
        return all(line.idle for line in self.lines.values())

    def routes_of(self, claim: PendingExperts, avoided: int) -> LayerRoutes:
        """Where the experts of a claim's layer can be asked for; not of hosts that have refused it.

        Args:
            avoided: `NO` to `YES` for hosts that are late or refuse their work.
        """
        return self._routes.of_layer(claim.layer, self._askable(claim.refused, avoided))

    def routes_of_layers(self, layers: Collection[int]) -> Mapping[int, LayerRoutes]:
        """Where each of these layers' experts can be asked for: the same object for as long as nothing has changed."""
        return self._routes.of_layers(layers, self._askable((), IF_NEED_BE))

    def post(self, line: HostLine, share: Share) -> None:
        """Send a share, or queue it; the host is dropped if it turns out to be lost."""
        try:
            line.post(share)
        except LinkError as error:
            self.drop(line, error)

    def has_done(self, line: HostLine, pairs: int) -> None:
        """A host has answered so many pairs."""
        self._pairs[line.host] += pairs
        self.broken.pop(line.host, None)

    def has_refused(self, line: HostLine, claim: PendingExperts, reason: str) -> None:
        """A host has answered that it does not do its work."""
        claim.refused[line.host] = self.broken[line.host] = f"{line.host} refused its work: {reason}"
        line.refused()

    def excuse(self, held_up_s: float) -> None:
        """A wait has ended so much later than asked for."""
        if held_up_s > _HELD_UP_S:
            for line in self.lines.values():
                line.excuse(held_up_s)

    def drop(self, line: HostLine, error: LinkError) -> None:
        """A host is lost, or given up."""
        if isinstance(error, PeerTimeoutError):
            self._counts.fenced_hosts += 1
            logger.warning("event=fenced host=%s silent_s=%.3f reason=%r", line.host, line.silent_s, str(error))
        else:
            logger.warning("event=lost host=%s reason=%r", line.host, str(error))
        self.broken[line.host] = str(error)  # first: whoever counts what is missing should find the reason
        del self.lines[line.host]
        line.link.close()
        self._lines_have_changed()

    def unavailable(self, claim: PendingExperts | None = None) -> ExpertsUnavailableError:
        """What is missing and why; given a claim, also what was refused."""
        if not self.unreachable and claim is not None and claim.refused:
            return ExpertsUnavailableError("; ".join(claim.refused.values()))
        lost = "; ".join(self.broken.values()) or "no link to " + ", ".join(self.unlinked)
        return ExpertsUnavailableError(f"{self.unreachable} (layer, expert) pairs have no reachable replica: {lost}")

    def _askable(self, refused: Container[str], avoided: int) -> tuple[int, ...]:
        """For each host of the routes whether it can be asked; `avoided` for those that are late or refuse."""
        now, lines = self.clock(), self.lines
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

    def _use(self, table: PlacementTable) -> None:
        self.table = table
        self._routes = Routes(table)
        self._at_best = [(host, IF_NOT_ELSEWHERE if is_cold(host) else YES) for host in self._routes.hosts]

    def _line(self, host: str, link: Link) -> HostLine:
        return HostLine(host, link, reply_timeout_s=self._reply_timeout_s, clock=self.clock)

    def _set_link(self, host: str, link: Link) -> None:
        if host not in self.table.slots:
            link.close()
            return
        old = self.lines.pop(host, None)
        if old is not None:
            old.link.close()
        self.lines[host] = self._line(host, link)
        self.broken.pop(host, None)

    def _lines_have_changed(self) -> None:
        self.in_order = [self.lines.get(host) for host in self._routes.hosts]
        self.unreachable = self._routes.unreachable(self.lines)
