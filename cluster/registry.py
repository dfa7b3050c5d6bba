"""What the controller knows: every process, the table in force, what happened; and how that adds up to the cluster's state."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..actors.links import LinkAddress
from ..actors.messages import ClusterStatus, Event, Health, ProcessState, ProcessStatus
from ..actors.placement_table import EMPTY, PlacementTable, is_cold
from ..actors.reports import HostReport, RouterReport
from ..configs.deployment import Deployment
from ..model.reader import BytesRead
from .directory import Directory
from .handles import ExpertHostHandle, RouterHandle
from .ledger import KeptProcess, Ledger, Record

logger = logging.getLogger("moray.controller")

_EVENTS_KEPT = 50


@dataclass(slots=True)
class Host:
    """An expert host as the controller knows it.

    Attributes:
        handle: of its process; None while it has none.
        addresses: where it listens for links.
        heard: when it last answered, by `time.monotonic`.
        failures: when it died or could not be restored, lately.
    """

    name: str
    handle: ExpertHostHandle | None = None
    state: ProcessState = "starting"
    detail: str = ""
    addresses: tuple[LinkAddress, ...] = ()
    bytes_read: BytesRead = field(default_factory=lambda: BytesRead(0, 0))
    heard: float = 0.0
    report: HostReport | None = None
    failures: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Router:
    """A router as the controller knows it; see `Host`.

    Attributes:
        address: where its front channel is.
        epoch: of the table it was given last.
    """

    name: str
    handle: RouterHandle | None = None
    state: ProcessState = "starting"
    detail: str = ""
    address: str = ""
    epoch: int = 0
    bytes_read: BytesRead = field(default_factory=lambda: BytesRead(0, 0))
    heard: float = 0.0
    report: RouterReport | None = None
    failures: list[float] = field(default_factory=list)


Member = Host | Router


class Registry:
    """The one place where the state of a cluster is kept; every method may be called from any thread.

    Args:
        deployment: what is served.
        ledger: where what outlives the controller is written.
        secret: of the cluster's links and channels.
        generation: of this controller.

    Attributes:
        lock: held while several things are changed together.
        table: the placement in force. Routers may still be on the one before.
        replicas: copies that were asked for, by (model layer, expert).
        standby: warm processes that are no host yet.
        wanted_hosts, wanted_cold: expert hosts there should be, without those of the cold tier, and of it.
        balance: of the measured load; see `ClusterStatus`.
    """

    table: PlacementTable

    def __init__(self, deployment: Deployment, ledger: Ledger, secret: bytes, generation: int) -> None:
        self.deployment = deployment
        self.secret = secret
        self.lock = threading.RLock()
        self.hosts: dict[str, Host] = {}
        self.routers: dict[str, Router] = {}
        self.standby: dict[str, Host] = {}
        self.replicas: dict[tuple[int, int], int] = {}
        self.wanted_hosts = deployment.experts.hosts
        self.wanted_cold = deployment.experts.cold.hosts
        self.balance = 1.0
        self._ledger = ledger
        self._generation = generation
        self._events: deque[Event] = deque(maxlen=_EVENTS_KEPT)
        self._counted: tuple[int, dict[str, npt.NDArray[np.int64]]] = (0, {})

    def save(self) -> None:
        """Write what the next controller must know."""
        with self.lock:
            processes = [
                KeptProcess(host.name, "expert_host", host.handle.actor_name, addresses=host.addresses)
                for host in self.hosts.values()
                if host.handle is not None
            ] + [
                KeptProcess(router.name, "router", router.handle.actor_name, address=router.address)
                for router in self.routers.values()
                if router.handle is not None
            ]
            self._ledger.write(
                Record(
                    generation=self._generation,
                    deployment=self.deployment.model_dump(),
                    secret=self.secret,
                    table=self.table,
                    replicas=dict(self.replicas),
                    wanted_hosts=self.wanted_hosts,
                    wanted_cold=self.wanted_cold,
                    processes=tuple(processes),
                    standby=tuple(h.handle.actor_name for h in self.standby.values() if h.handle is not None),
                )
            )

    def happened(self, what: str, subject: str, *, seconds: float = 0.0, detail: str = "", bad: bool = False) -> None:
        """Log an event as one line and keep it for `status`."""
        logger.log(
            logging.WARNING if bad else logging.INFO,
            "event=%s subject=%s duration_s=%.3f%s",
            what,
            subject,
            seconds,
            f" detail={detail!r}" if detail else "",
        )
        with self.lock:
            self._events.append(Event(time.time(), what, subject, round(seconds, 3), detail))

    # ---- who is there -------------------------------------------------------------------------------------------------

    def member(self, name: str) -> Member | None:
        """The process of this name, if there is one."""
        with self.lock:
            return self.hosts.get(name) or self.routers.get(name)

    def members(self) -> list[Member]:
        """All of them, hosts first."""
        with self.lock:
            return [*self.hosts.values(), *self.routers.values()]

    def serving_hosts(self) -> dict[str, Host]:
        """The hosts that answer."""
        with self.lock:
            return {name: host for name, host in self.hosts.items() if host.state == "ready"}

    def serving_routers(self) -> dict[str, Router]:
        """The routers that answer, those that are leaving included: they still have requests."""
        with self.lock:
            return {n: r for n, r in self.routers.items() if r.state in ("ready", "leaving", "stuck")}

    def host_addresses(self, table: PlacementTable) -> dict[str, tuple[LinkAddress, ...]]:
        """Where the hosts of a table listen."""
        with self.lock:
            return {name: self.hosts[name].addresses for name in table.slots if name in self.hosts}

    def set_state(self, member: Member, state: ProcessState, detail: str = "") -> None:
        """Change what is known of a process."""
        with self.lock:
            member.state, member.detail = state, detail

    def directory(self) -> Directory:
        """Where fronts find the routers; those that leave get nothing new."""
        with self.lock:
            return Directory(
                {n: r.address for n, r in self.routers.items() if r.address and r.state != "leaving"}, self.secret
            )

    # ---- how it adds up -----------------------------------------------------------------------------------------------

    def live_replicas(self) -> npt.NDArray[np.int64]:
        """[L, E] replicas of each expert on hosts that answer."""
        with self.lock:
            table, live = self.table, set(self.serving_hosts())
            if self._counted[0] != table.epoch:
                self._counted = (table.epoch, {host: _held(table, host) for host in table.slots})
            counts = self._counted[1]
        return sum(
            (held for host, held in counts.items() if host in live),
            start=np.zeros((table.layers, table.experts), dtype=np.int64),
        )

    def status(self) -> ClusterStatus:
        """Every process, and the cluster's health; the routers' own counters are not asked here."""
        with self.lock:
            processes = [_described(host, "expert_host") for host in self.hosts.values()]
            processes += [_described(router, "router") for router in self.routers.values()]
            processes += [_described(host, "expert_host") for host in self.standby.values()]
            table, events = self.table, list(self._events)
            # A host that is being added is not missed before routers send it work.
            down = [m for m in self.members() if m.state in ("starting", "stuck", "dead")]
            down = [m for m in down if isinstance(m, Router) or m.name in table.slots]
            routers_up = any(router.state == "ready" for router in self.routers.values())
            reports = [router.report for router in self.routers.values() if router.report is not None]
        replicas = self.live_replicas()
        wanted = self.deployment.experts.min_replicas
        reasons = [f"{m.name} is {m.state}{': ' if m.detail else ''}{m.detail}" for m in down]
        unreachable, missing = int((replicas == 0).sum()), int((replicas < wanted).sum())
        if missing and not unreachable and not down:
            reasons.append(f"{missing} (layer, expert) pairs have fewer than {wanted} replicas")
        silent = sorted({front for report in reports for front in report.silent_fronts})
        reasons += [f"{front} is silent: its routers gave it up" for front in silent]
        health: Health = "ok"
        if unreachable or not routers_up:
            health = "unavailable"
        elif reasons:
            health = "degraded"
        return ClusterStatus(
            model=self.deployment.served_name,
            epoch=table.epoch,
            health=health,
            reason="; ".join(reasons),
            processes=processes,
            routers=[],
            min_replicas=self.deployment.experts.min_replicas,
            missing_replicas=missing,
            balance=round(self.balance, 4),
            events=events,
        )


def _described(member: Member, role: str) -> ProcessStatus:
    handle = member.handle
    return ProcessStatus(
        id=member.name,
        role="router" if role == "router" else "expert_host",
        pid=0 if handle is None else handle.pid,
        node="" if handle is None else handle.node,
        state=member.state,
        detail=member.detail,
        actor="" if handle is None else handle.actor_name,
        data_bytes_read=member.bytes_read.data,
        header_bytes_read=member.bytes_read.headers,
        data_bytes_copied=member.bytes_read.copied,
        instructions="" if member.report is None else member.report.instructions,
    )


def _held(table: PlacementTable, host: str) -> npt.NDArray[np.int64]:
    """[L, E] copies of each expert on the host."""
    held = np.zeros((table.layers, table.experts), dtype=np.int64)
    for layer, experts in enumerate(table.slots[host]):
        held[layer, [expert for expert in experts if expert != EMPTY]] = 1
    return held


def pairs_held(table: PlacementTable, host: str) -> frozenset[tuple[int, int]]:
    """(model layer, expert) pairs in the slots of a host."""
    return frozenset(
        (table.first_layer + layer, expert)
        for layer, experts in enumerate(table.slots[host])
        for expert in experts
        if expert != EMPTY
    )


def by_number(names: Iterable[str]) -> list[str]:
    """Names such as `expert-host-10` in the order of their numbers, cold hosts last."""
    return sorted(names, key=lambda name: (is_cold(name), int(name.rsplit("-", 1)[1])))


def by_kind(hosts: Iterable[str]) -> tuple[list[str], list[str]]:
    """The hosts that are not of the cold tier, and those that are, each in the order of their numbers."""
    ordered = by_number(hosts)
    return [name for name in ordered if not is_cold(name)], [name for name in ordered if is_cold(name)]
