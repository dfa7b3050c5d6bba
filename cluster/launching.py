"""Brings processes up and takes them down: fresh ones, warm ones, and those that another controller left."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..actors.placement_table import PlacementTable, is_cold
from ..actors.router import RouterSettings
from ..actors.weight_copy import Sources, WeightSource
from ..configs.errors import ClusterError, MorayError
from ..model.reader import BytesRead
from .directory import LOAD_TIMEOUT_S
from .handles import SPAWN_TIMEOUT_S, Patience
from .ledger import KeptProcess
from .registry import Host, Member, Registry, Router, by_kind, pairs_held
from .spawning import NoRoomError, Processes, Spawner

logger = logging.getLogger("moray.controller")

T = TypeVar("T")

_LOAD_POLL_S = 0.2
_ROOM_AFTER_S = 10.0
"""How long a process may take to come up before it is asked whether there is room for it at all: Ray needs a moment to see
that a dead process's resources are free."""


_SOURCES = 4
_SOURCES_BESIDE_SERVING = 1
"""Hosts that one host copies from at once; each is a thread at either end, which those that serve have little time for."""


_LOOK_S = 10.0
_ASK_AFTER_S = 60.0
"""What processes that come up on a busy machine take: until they are there, it looks as if there were no room for them."""

_NODES_S = 1200.0
"""For the processes of a start to come up: nodes that Ray's autoscaler adds for them boot for minutes, and install more."""


class GaveWayError(ClusterError):
    """A change was given up for the sake of something more urgent."""


class Launcher:
    """Knows how each kind of process starts. What it changes in the registry it also saves.

    Args:
        settings: of every router.
    """

    def __init__(self, registry: Registry, spawner: Spawner, settings: RouterSettings) -> None:
        self._registry = registry
        self._spawner = spawner
        self._deployment = registry.deployment
        self._settings = settings
        self._standby_numbers = itertools.count()

    # ---- coming up ----------------------------------------------------------------------------------------------------

    def await_processes(self, members: Sequence[Member]) -> None:
        """Wait until all of these have come up. What there is no room for is asked of Ray, and its nodes waited for.

        Raises:
            ClusterError: one has ended, or has not come up for long.
        """
        registry, begun = self._registry, time.monotonic()
        said = ""
        while True:
            errors = side_by_side(_locate, members)  # those that are up already hear by it that somebody is there
            missing = [member for member in members if not _has_come_up(member)]
            if not missing:
                return
            handles = {member.name: member.handle for member in members if member.handle is not None}
            names = ",".join(member.name for member in missing)
            if self._spawner.wait_for_deaths(handles, timeout_s=0):
                raise errors[0]
            waited = time.monotonic() - begun
            if waited > _NODES_S:
                raise ClusterError(f"{names}: not come up within {_NODES_S:.0f} s{said and ': '}{said}") from errors[0]
            if waited < _ASK_AFTER_S:
                continue
            try:
                self._check_room(missing)
            except NoRoomError as error:
                if str(error) != said:
                    said = str(error)
                    registry.happened("waits_for_room", names, seconds=waited, detail=said, bad=True)

    def _check_room(self, missing: Sequence[Member]) -> None:
        """Raise `NoRoomError` if there is none for these, which have not come up."""
        hosts, cold = by_kind(member.name for member in missing if isinstance(member, Host))
        there = self.running()
        more = Processes(len(hosts), len(cold), len(missing) - len(hosts) - len(cold))
        up = Processes(there.hosts - more.hosts, there.cold - more.cold, there.routers - more.routers)
        self._spawner.check_room(self._deployment, more, running=up)

    # ---- expert hosts -------------------------------------------------------------------------------------------------

    def new_host(self, name: str, *, gently: bool) -> Host:
        """Have a process become this host: a warm one if there is any, else a fresh one. None is warm for the cold tier."""
        registry = self._registry
        with registry.lock:
            warm = None if is_cold(name) else self._take_standby()
            host = registry.hosts.get(name)
            if host is None:
                host = registry.hosts[name] = Host(name)
            host.addresses, host.bytes_read, host.report = (), BytesRead(0, 0), None
        if warm is not None and warm.handle is not None:
            host.handle = warm.handle
        else:
            host.handle = self._spawner.expert_host(name, self._deployment, gently=gently)
        registry.save()
        return host

    def _take_standby(self) -> Host | None:
        standby = self._registry.standby
        warmest = sorted(standby, key=lambda name: standby[name].state != "standby")
        return standby.pop(warmest[0]) if warmest else None

    def fill_standby(self) -> None:
        """Start warm processes until there are as many as were asked for."""
        registry = self._registry
        while len(registry.standby) < self._deployment.experts.standby:
            name = f"standby-{next(self._standby_numbers)}"
            handle = self._spawner.standby(self._deployment)
            with registry.lock:
                registry.standby[name] = Host(name, handle, heard=time.monotonic())
            registry.save()

    def open_host(self, host: Host, table: PlacementTable, *, gently: bool, urgent: bool = False) -> None:
        """Have it listen and begin to load; routers may link to it meanwhile.

        Args:
            host: spawned.
            table: that it is to serve.
            gently: leave the cores to processes that serve.
            urgent: do not wait long for a process that there is no room for.

        Raises:
            MorayError: it did not come up.
        """
        handle = host.handle
        assert handle is not None, f"{host.name} has no process"
        if not handle.pid:
            try:
                handle.locate(_ROOM_AFTER_S if urgent else SPAWN_TIMEOUT_S)
            except ClusterError:
                if not urgent:
                    raise
                self._check_room([host])
                handle.locate(SPAWN_TIMEOUT_S - _ROOM_AFTER_S)
        addresses = handle.listen(host.name, self._deployment.link, self._registry.secret)
        with self._registry.lock:
            host.addresses = addresses
        self._registry.save()
        self.begin_load(host, table, gently=gently)

    def begin_load(self, host: Host, table: PlacementTable, *, gently: bool) -> None:
        """Have it read and copy what it does not hold of its slots in `table`; `gently` beside others that serve."""
        assert host.handle is not None, f"{host.name} has no process"
        host.handle.begin_load(
            table.slots[host.name],
            table.epoch,
            sources=self._sources(host, table),
            link=self._deployment.link,
            secret=self._registry.secret,
            gently=gently,
        )

    def _sources(self, host: Host, table: PlacementTable) -> Sources:
        """Which hosts give `host` what it needs: few that serve, and hold as much of it as possible between them."""
        if not self._deployment.experts.copy_weights:
            return {}
        registry = self._registry
        with registry.lock:
            current, serving = registry.table, registry.serving_hosts()
        serves = host.name in current.slots and host.state == "ready"
        needed = pairs_held(table, host.name)
        if serves:
            needed -= pairs_held(current, host.name)
        # Beside GPUs the cold tier holds its experts in another form, which cannot be copied: hosts read what changes tiers.
        alike = [name for name in serving if name in current.slots and is_cold(name) == is_cold(host.name)]
        held = {name: pairs_held(current, name) & needed for name in alike if name != host.name}
        sources: dict[str, WeightSource] = {}
        missing = set(needed)
        while missing and held and len(sources) < (_SOURCES_BESIDE_SERVING if serves else _SOURCES):
            best = max(held, key=lambda name: len(held[name] & missing))
            if not held[best] & missing:
                break
            missing -= held[best]
            sources[best] = WeightSource(serving[best].addresses, held.pop(best))
        return sources

    def finish_load(self, host: Host, *, give_way: threading.Event | None = None) -> None:
        """Wait until it has all of its slots.

        Raises:
            GaveWayError: `give_way` was set first.
            MorayError: it could not load.
        """
        handle = host.handle
        assert handle is not None, f"{host.name} has no process"
        patience = Patience(handle.how_far, LOAD_TIMEOUT_S)
        while (read := handle.loaded(_LOAD_POLL_S)) is None:
            if give_way is not None and give_way.is_set():
                raise GaveWayError(f"{host.name} was still loading when a host had to be restored")
            patience.check(host.name)
        with self._registry.lock:
            host.bytes_read += read

    def host_ready(self, host: Host) -> None:
        """It serves from now on."""
        with self._registry.lock:
            host.heard = time.monotonic()
            self._registry.set_state(host, "ready")

    def remove_host(self, name: str) -> None:
        """End a host and forget it."""
        with self._registry.lock:
            host = self._registry.hosts.pop(name, None)
        if host is not None and host.handle is not None:
            host.handle.stop()
        self._registry.save()

    # ---- routers ------------------------------------------------------------------------------------------------------

    def new_router(self, name: str, *, gently: bool) -> Router:
        """Start a router on the table that is in force."""
        registry = self._registry
        with registry.lock:
            router = registry.routers.get(name)
            if router is None:
                router = registry.routers[name] = Router(name)
            table = registry.table
            router.address, router.report, router.epoch = "", None, table.epoch
            serving = registry.serving_hosts()
            hosts = {host: h.addresses for host, h in registry.hosts.items() if host in table.slots and h.addresses}
        # One that is away now, and is known to be, is linked to when it is back.
        away = set(hosts) - set(serving) if serving else set()
        router.handle = self._spawner.router(
            name,
            self._deployment,
            settings=self._settings,
            table=table,
            hosts={host: addresses for host, addresses in hosts.items() if host not in away},
            secret=registry.secret,
            gently=gently,
        )
        registry.save()
        return router

    def finish_router(self, router: Router) -> None:
        """Wait until it serves, on the table that is in force by then.

        Raises:
            MorayError: it did not start.
        """
        registry = self._registry
        handle = router.handle
        assert handle is not None, f"{router.name} has no process"
        address = handle.finish_start()
        with registry.lock:
            table = registry.table
        if table.epoch != router.epoch:
            handle.adopt(table, registry.host_addresses(table))
            router.epoch = table.epoch
        with registry.lock:
            router.address, router.bytes_read, router.heard = address, handle.bytes_read, time.monotonic()
            registry.set_state(router, "ready")
        registry.save()

    def remove_router(self, name: str) -> None:
        """End a router and forget it."""
        with self._registry.lock:
            router = self._registry.routers.pop(name, None)
        if router is not None and router.handle is not None:
            router.handle.stop()
        self._registry.save()

    # ---- taking over --------------------------------------------------------------------------------------------------

    def attach(self, kept: KeptProcess) -> None:
        """Take a process over that another controller started; one that is gone, or had not come up, shows as dead."""
        registry, now = self._registry, time.monotonic()
        try:
            if kept.role == "expert_host":
                host = Host(kept.name, addresses=kept.addresses, heard=now)
                registry.hosts[kept.name] = host
                host.handle = self._spawner.attach_host(kept.actor)
                read = host.handle.call("bytes_read")
                if not kept.addresses or read is None:
                    raise ClusterError("it had not come up")
                host.bytes_read = read
            else:
                router = Router(kept.name, address=kept.address, heard=now)
                registry.routers[kept.name] = router
                router.handle = self._spawner.attach_router(kept.actor)
                router.report = router.handle.call("report")
                if router.report is None or not kept.address:
                    raise ClusterError("it had not come up")
                router.epoch, router.bytes_read = router.report.epoch, router.handle.call("bytes_read")
        except MorayError as error:
            registry.set_state(registry.hosts.get(kept.name) or registry.routers[kept.name], "dead", str(error))
        else:
            registry.set_state(registry.hosts.get(kept.name) or registry.routers[kept.name], "ready")

    def attach_standby(self, actor: str) -> None:
        """Take a warm process over."""
        name = f"standby-{next(self._standby_numbers)}"
        try:
            handle = self._spawner.attach_host(actor)
        except MorayError as error:
            logger.info("event=standby_lost process=%s reason=%s", actor, error)
        else:
            with self._registry.lock:
                self._registry.standby[name] = Host(name, handle, state="standby", heard=time.monotonic())

    def running(self) -> Processes:
        """How many processes of each kind there are, warm ones among the hosts."""
        with self._registry.lock:
            hosts, cold = by_kind(self._registry.hosts)
            warm, routers = len(self._registry.standby), len(self._registry.routers)
        return Processes(hosts=len(hosts) + warm, cold=len(cold), routers=routers)


def _has_come_up(member: Member) -> bool:
    return member.handle is not None and bool(member.handle.pid)


def _locate(member: Member) -> None:
    assert member.handle is not None, f"{member.name} has no process"
    member.handle.locate(_LOOK_S)


def side_by_side(function: Callable[[T], None], items: Iterable[T]) -> list[MorayError]:
    """Call `function` with each item, all at once, and wait; the errors of ours that were raised."""
    waiting: Sequence[T] = list(items)
    if not waiting:
        return []

    def call(item: T) -> MorayError | None:
        try:
            function(item)
        except MorayError as error:
            return error
        return None

    with ThreadPoolExecutor(len(waiting), thread_name_prefix="moray-calls") as pool:
        return [error for error in pool.map(call, waiting) if error is not None]
