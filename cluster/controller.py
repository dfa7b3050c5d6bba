"""The controller: starts a deployment's expert hosts and routers, keeps them going, and knows the state of all of it.

A plain class whose collaborator, the `Spawner`, is the only one that knows how a process comes to be: Ray actors in a
cluster, threads in the tests. It alone makes placement tables.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import secrets
import threading
import time
from dataclasses import dataclass, field, replace
from typing import Literal

from ..actors.messages import ClusterStatus, ProcessStatus
from ..actors.placement_table import PlacementTable
from ..actors.router_process import HostAddresses
from ..configs.deployment import Deployment
from ..configs.errors import ClusterError, ConfigError, MorayError
from ..model.checkpoint import total_bytes
from ..model.loading import open_model
from ..model.reader import BytesRead
from ..model.tensor_names import TensorNames
from .assembly import checkpoint_path, host_name, router_name, router_settings, served_model
from .placement import next_placement
from .spawning import ExpertHostHandle, RouterHandle, Spawner

logger = logging.getLogger("moray.controller")

_POLL_S = 0.5
"""How long the supervisor sleeps where nothing wakes it; deaths do."""

_RESTART_WINDOW_S = 60.0
_RESTARTS_IN_WINDOW = 5
"""A process that dies more often than this in a window is left dead: something is wrong that starting again won't mend."""

State = Literal["starting", "ready", "dead"]


@dataclass(slots=True)
class _Supervised:
    """What the controller knows of one process."""

    state: State = "starting"
    pid: int = 0
    node: str = ""
    detail: str = ""
    bytes_read: BytesRead = field(default_factory=lambda: BytesRead(0, 0))
    restarts: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Directory:
    """What a front needs to reach the routers: their addresses by id, and the cluster's secret (not shown in a repr)."""

    routers: dict[str, str]
    secret: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Change:
    """From one placement to the next.

    Attributes:
        epoch: of the new table.
        added, removed: expert hosts.
        moved: (layer, expert) pairs that a host gets which did not hold them before.
        total: (layer, expert) pairs in all.
        seconds: how long it took; 0 for a plan.
    """

    epoch: int
    added: tuple[str, ...]
    removed: tuple[str, ...]
    moved: int
    total: int
    seconds: float = 0.0

    @classmethod
    def between(cls, old: PlacementTable, new: PlacementTable) -> Change:
        """What `new` changes."""
        moved = 0
        for host, layers in new.slots.items():
            before = old.slots.get(host, ((),) * new.layers)
            moved += sum(len(set(now) - set(held)) for now, held in zip(layers, before, strict=True))
        return cls(
            epoch=new.epoch,
            added=tuple(host for host in new.slots if host not in old.slots),
            removed=tuple(host for host in old.slots if host not in new.slots),
            moved=moved,
            total=new.layers * new.experts,
        )


class Controller:
    """Runs one deployment. `start` returns when everything serves; `stop` leaves nothing behind."""

    def __init__(self, deployment: Deployment, spawner: Spawner) -> None:
        self.deployment = deployment
        self._spawner = spawner
        self._path = checkpoint_path(deployment.model)
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._changing = threading.Lock()  # held while a process is restored or the placement changes: one at a time
        self._stopping = threading.Event()
        self._hosts: dict[str, ExpertHostHandle] = {}
        self._host_addresses: dict[str, HostAddresses] = {}
        self._routers: dict[str, RouterHandle] = {}
        self._router_addresses: dict[str, str] = {}
        self._processes: dict[str, _Supervised] = {}
        self._supervisor: threading.Thread | None = None
        self._checked = False
        self._bytes_to_load = 0
        self._expert_bytes = 0
        self._change_to_load: tuple[int, int] | None = (
            None  # bytes hosts had read before the change, and will read for it
        )
        self.table: PlacementTable

    def check(self) -> None:
        """Refuse what cannot be served, and plan the rest; starts nothing. `start` does it if it was not done.

        Raises:
            ConfigError, CheckpointError: it cannot be served.
        """
        deployment = self.deployment
        config, checkpoint = open_model(self._path, verify=deployment.verify)
        self._config = config
        served_model(deployment, config)
        self._settings = router_settings(deployment, config)
        hosts = [host_name(i) for i in range(deployment.experts.hosts)]
        self.table = next_placement(config, hosts, min_replicas=deployment.experts.min_replicas)
        names = TensorNames(config)
        dense, experts = (
            total_bytes(e for t in tensors for e in checkpoint.locate(t, config).entries)
            for tensors in (names.dense(), names.routed_experts())
        )
        self._bytes_to_load = deployment.routers.replicas * dense + experts
        self._expert_bytes = experts // max(1, self.table.layers * self.table.experts)
        self._checked = True

    def start(self) -> None:
        """Check the checkpoint, then start expert hosts and routers.

        Raises:
            ConfigError, CheckpointError: refused before any process was started.
            ClusterError: processes did not come up.
        """
        if not self._checked:
            self.check()
        deployment = self.deployment
        router_ids = [router_name(i) for i in range(deployment.routers.replicas)]
        for name in [*self.table.slots, *router_ids]:
            self._processes[name] = _Supervised()
        try:
            for host_id in self.table.slots:
                self._hosts[host_id] = self._spawner.expert_host(host_id, deployment)
            for host_id in self.table.slots:
                self._open_host(host_id, self.table)
            for router_id in router_ids:
                self._routers[router_id] = self._spawn_router(router_id)
            for host_id in self.table.slots:
                self._finish_host(host_id)
            for router_id in router_ids:
                self._finish_router(router_id)
        except BaseException:
            self.stop()
            raise
        self._supervisor = threading.Thread(target=self._supervise, name="moray-supervisor", daemon=True)
        self._supervisor.start()

    def directory(self) -> Directory:
        """Where the routers are now."""
        with self._lock:
            return Directory(dict(self._router_addresses), self._secret)

    def load_progress(self) -> tuple[int, int]:
        """Bytes that all processes have read of their slices, and will have read in all. For the start alone."""
        handles = [*self._hosts.values(), *self._routers.values()]
        return sum(handle.bytes_loaded() for handle in handles), self._bytes_to_load

    def change_progress(self) -> tuple[int, int] | None:
        """Bytes that hosts have read for the change of placement that is going on, and will read for it; None without one."""
        if self._change_to_load is None:
            return None
        before, total = self._change_to_load
        return min(total, max(0, self._bytes_loaded() - before)), total

    def _bytes_loaded(self) -> int:
        with self._lock:
            hosts = [self._hosts[name] for name, p in self._processes.items() if name in self._hosts and p.pid]
        return sum(host.bytes_loaded() for host in hosts)

    def status(self) -> ClusterStatus:
        """The table's epoch and every process; the routers' own counters are not asked here."""
        with self._lock:
            processes = [
                ProcessStatus(
                    id=name,
                    role="router" if name in self._routers else "expert_host",
                    pid=p.pid,
                    node=p.node,
                    state=p.state,
                    detail=p.detail,
                    data_bytes_read=p.bytes_read.data,
                    header_bytes_read=p.bytes_read.headers,
                )
                for name, p in self._processes.items()
            ]
            table = self.table
        # A host that is being added is not missed before routers send it work.
        down = [p for p in processes if p.state != "ready" and (p.role == "router" or p.id in table.slots)]
        unreachable = table.missing(set(table.slots) - {p.id for p in down})
        routers_up = [p for p in processes if p.role == "router" and p.state == "ready"]
        return ClusterStatus(
            model=self.deployment.served_name,
            epoch=table.epoch,
            health="ok" if not down else "degraded" if routers_up and not unreachable else "unavailable",
            reason="; ".join(f"{p.id} is {p.state}{': ' if p.detail else ''}{p.detail}" for p in down),
            processes=processes,
            routers=[],
        )

    def stop(self) -> None:
        """Stop routers, then hosts: asked first, killed if they do not. Idempotent."""
        self._stopping.set()
        if self._supervisor is not None and self._supervisor is not threading.current_thread():
            self._supervisor.join(timeout=30.0)
        for handle in [*self._routers.values(), *self._hosts.values()]:
            handle.stop()

    # ---- scaling ----------------------------------------------------------------------------------------------------

    def plan_hosts(self, hosts: int) -> PlacementTable:
        """The table for another number of expert hosts. Those with the highest numbers leave first.

        Raises:
            ConfigError: so many cannot be used.
        """
        if hosts < 1:
            raise ConfigError(f"{hosts} expert hosts: at least one must hold the experts")
        stay = sorted(self.table.slots, key=lambda name: int(name.rsplit("-", 1)[1]))[:hosts]
        unused = (name for index in itertools.count() if (name := host_name(index)) not in self.table.slots)
        return next_placement(
            self._config,
            [*stay, *itertools.islice(unused, hosts - len(stay))],
            min_replicas=self.deployment.experts.min_replicas,
            current=self.table,
        )

    def scale_experts(self, hosts: int, *, dry_run: bool = False) -> Change:
        """Go to another number of expert hosts while requests run; returns what changed (or would).

        Raises:
            ConfigError: so many cannot be used.
            ClusterError: there is no room for them, or a process failed; the placement is what it was.
        """
        with self._changing:
            if self._stopping.is_set():
                raise ClusterError("the cluster is stopping")
            table = self.plan_hosts(hosts)
            change = Change.between(self.table, table)
            if dry_run or not (change.added or change.removed):
                return change
            self._spawner.check_room(self.deployment, hosts=len(change.added))
            started = time.monotonic()
            self._change_to_load = self._bytes_loaded(), change.moved * self._expert_bytes
            try:
                self._change_to(table, change)
            finally:
                self._change_to_load = None
            return replace(change, seconds=time.monotonic() - started)

    def _change_to(self, table: PlacementTable, change: Change) -> None:
        """Load what the new table wants beside the old, have every router change over between two steps, then let go."""
        logger.info("event=change epoch=%d added=%s removed=%s", table.epoch, change.added, change.removed)
        before = self.table
        try:
            for name in change.added:
                with self._lock:
                    self._processes[name] = _Supervised()
                    self._hosts[name] = self._spawner.expert_host(name, self.deployment)
            for name in table.slots:
                if name in change.added:
                    self._open_host(name, table)
                    self._processes[name].pid = self._hosts[name].pid
                else:
                    self._begin_load(name, table)
            for name in table.slots:
                self._finish_host(name)
        except MorayError as error:
            logger.error("event=change_failed epoch=%d reason=%s", table.epoch, error)
            for name in change.added:
                self._remove_host(name)
            for name in set(table.slots) & set(before.slots):
                # What still loads would be held on to if it were done only after the others have let go.
                with contextlib.suppress(MorayError):
                    self._hosts[name].finish_load()
            self._retire(before)
            raise
        with self._lock:
            self.table = table
        for router_id, router in self._routers.items():
            try:
                router.adopt(table, {name: self._host_addresses[name] for name in table.slots})
            except MorayError as error:
                # Ended, it is restored with the new table; its requests go on elsewhere or there.
                logger.error("event=adopt_failed router=%s reason=%s", router_id, error)
                router.stop()
        for name in change.removed:
            self._remove_host(name)
        self._retire(table)
        logger.info("event=changed epoch=%d", table.epoch)

    def _remove_host(self, name: str) -> None:
        with self._lock:
            handle = self._hosts.pop(name, None)
            self._host_addresses.pop(name, None)
            self._processes.pop(name, None)
        if handle is not None:
            handle.stop()

    def _retire(self, table: PlacementTable) -> None:
        """Have the hosts of `table` let go of every other epoch."""
        for name in table.slots:
            try:
                self._hosts[name].retire(table.epoch)
            except MorayError as error:  # it died: restored, it holds this epoch alone
                logger.warning("event=retire_failed host=%s reason=%s", name, error)

    # ---- one process at a time --------------------------------------------------------------------------------------

    def _open_host(self, host_id: str, table: PlacementTable) -> None:
        """Have a spawned host listen and begin to load; routers may link to it meanwhile."""
        addresses = self._hosts[host_id].listen(self.deployment.link, self._secret)
        self._begin_load(host_id, table)
        with self._lock:
            self._host_addresses[host_id] = addresses

    def _begin_load(self, host_id: str, table: PlacementTable) -> None:
        self._hosts[host_id].begin_load(self._path, table.slots[host_id], table.epoch)

    def _finish_host(self, host_id: str) -> None:
        handle = self._hosts[host_id]
        now, before = handle.finish_load(), self._processes[host_id].bytes_read
        self._ready(host_id, handle.pid, handle.node, BytesRead(before.data + now.data, before.headers + now.headers))

    def _spawn_router(self, router_id: str) -> RouterHandle:
        return self._spawner.router(
            router_id,
            self.deployment,
            checkpoint=self._path,
            settings=self._settings,
            table=self.table,
            hosts=dict(self._host_addresses),
            secret=self._secret,
        )

    def _finish_router(self, router_id: str) -> None:
        handle = self._routers[router_id]
        address = handle.finish_start()
        with self._lock:
            self._router_addresses[router_id] = address
        self._ready(router_id, handle.pid, handle.node, handle.bytes_read)

    def _ready(self, name: str, pid: int, node: str, bytes_read: BytesRead) -> None:
        with self._lock:
            process = self._processes[name]
            process.state, process.detail = "ready", ""
            process.pid, process.node, process.bytes_read = pid, node, bytes_read
        logger.info(
            "event=ready process=%s pid=%d data_bytes=%d header_bytes=%d",
            name,
            pid,
            bytes_read.data,
            bytes_read.headers,
        )

    # ---- supervision ------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        again: set[str] = set()
        while not self._stopping.is_set():
            with self._lock:
                handles: dict[str, ExpertHostHandle | RouterHandle] = {**self._hosts, **self._routers}
                watched = {n: handles[n] for n, p in self._processes.items() if p.state == "ready" and n in handles}
            again.update(self._spawner.wait_for_deaths(watched, timeout_s=_POLL_S))
            # Hosts before routers: a router that starts links to every host.
            for name in sorted(again, key=lambda name: name in self._routers):
                with self._changing:
                    gone = name not in self._processes  # removed on purpose meanwhile
                    if gone or (not self._stopping.is_set() and self._restore(name)):
                        again.discard(name)

    def _restore(self, name: str) -> bool:
        """Start a dead process again, unless it dies all the time; False if that failed and is to be tried again."""
        process, now = self._processes[name], time.monotonic()
        process.restarts = [t for t in process.restarts if now - t < _RESTART_WINDOW_S] + [now]
        before = process.detail
        with self._lock:
            process.state = "starting"
            process.detail = "died; being restored"
        logger.warning("event=died process=%s pid=%d", name, process.pid)
        last = len(process.restarts) > _RESTARTS_IN_WINDOW
        try:
            if last:
                often = f"died {len(process.restarts)} times in {_RESTART_WINDOW_S:.0f} s"
                raise ClusterError(f"{often}; before that: {before}" if before else often)
            if name in self._hosts:
                self._hosts[name].stop()
                self._hosts[name] = self._spawner.expert_host(name, self.deployment)
                process.bytes_read = BytesRead(0, 0)
                self._open_host(name, self.table)
                self._finish_host(name)
                self._relink(name)
            else:
                self._routers[name].stop()
                self._routers[name] = self._spawn_router(name)
                self._finish_router(name)
        except MorayError as error:
            logger.error("event=%s process=%s reason=%s", "lost" if last else "not_restored", name, error)
            with self._lock:
                process.state = "dead"
                process.detail = str(error)
            return last
        logger.warning("event=restored process=%s after_s=%.2f", name, time.monotonic() - now)
        return True

    def _relink(self, host_id: str) -> None:
        for router_id, router in self._routers.items():
            try:
                router.relink(host_id, self._host_addresses[host_id])
            except MorayError as error:
                # A router that died as well is restored in its own turn, with the host's new addresses.
                logger.warning("event=relink_failed router=%s host=%s reason=%s", router_id, host_id, error)
