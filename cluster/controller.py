"""The controller: starts a deployment's expert hosts and routers, keeps them going, and knows the state of all of it.

A plain class whose collaborator, the `Spawner`, is the only one that knows how a process comes to be: Ray actors in a
cluster, threads in the tests. It alone makes placement tables.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

from ..actors.messages import ClusterStatus, ProcessStatus
from ..actors.placement_table import PlacementTable
from ..actors.router_process import HostAddresses
from ..configs.deployment import Deployment
from ..configs.errors import ClusterError, MorayError
from ..model.checkpoint import total_bytes
from ..model.loading import open_model
from ..model.reader import BytesRead
from ..model.tensor_names import TensorNames
from .assembly import checkpoint_path, host_name, router_name, router_settings, served_model
from .placement import even_placement
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


class Controller:
    """Runs one deployment. `start` returns when everything serves; `stop` leaves nothing behind."""

    def __init__(self, deployment: Deployment, spawner: Spawner) -> None:
        self.deployment = deployment
        self._spawner = spawner
        self._path = checkpoint_path(deployment.model)
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._hosts: dict[str, ExpertHostHandle] = {}
        self._host_addresses: dict[str, HostAddresses] = {}
        self._routers: dict[str, RouterHandle] = {}
        self._router_addresses: dict[str, str] = {}
        self._processes: dict[str, _Supervised] = {}
        self._supervisor: threading.Thread | None = None
        self._checked = False
        self._bytes_to_load = 0
        self.table: PlacementTable

    def check(self) -> None:
        """Refuse what cannot be served, and plan the rest; starts nothing. `start` does it if it was not done.

        Raises:
            ConfigError, CheckpointError: it cannot be served.
        """
        deployment = self.deployment
        config, checkpoint = open_model(self._path, verify=deployment.verify)
        served_model(deployment, config)
        self._settings = router_settings(deployment, config)
        self.table = even_placement(config, [host_name(i) for i in range(deployment.experts.hosts)])
        names = TensorNames(config)
        dense, experts = (
            total_bytes(e for t in tensors for e in checkpoint.locate(t, config).entries)
            for tensors in (names.dense(), names.routed_experts())
        )
        self._bytes_to_load = deployment.routers.replicas * dense + experts
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
                self._open_host(host_id)
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
        down = [p for p in processes if p.state != "ready"]
        hosts_up, routers_up = (
            [p for p in processes if p.role == role and p.state == "ready"] for role in ("expert_host", "router")
        )
        return ClusterStatus(
            model=self.deployment.served_name,
            epoch=self.table.epoch,
            # Each expert has one replica: with any host away some expert is.
            health="ok"
            if not down
            else "degraded"
            if len(hosts_up) == len(self.table.slots) and routers_up
            else "unavailable",
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

    # ---- one process at a time --------------------------------------------------------------------------------------

    def _open_host(self, host_id: str) -> None:
        """Have a spawned host listen and begin to load; routers may link to it meanwhile."""
        handle = self._hosts[host_id]
        addresses = handle.listen(self.deployment.link, self._secret)
        handle.begin_load(self._path, self.table.slots[host_id], self.table.epoch)
        with self._lock:
            self._host_addresses[host_id] = addresses

    def _finish_host(self, host_id: str) -> None:
        handle = self._hosts[host_id]
        bytes_read = handle.finish_load()
        self._ready(host_id, handle.pid, handle.node, bytes_read)

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
            handles: dict[str, ExpertHostHandle | RouterHandle] = {**self._hosts, **self._routers}
            watched = {name: handles[name] for name, p in self._processes.items() if p.state == "ready"}
            again.update(self._spawner.wait_for_deaths(watched, timeout_s=_POLL_S))
            # Hosts before routers: a router that starts links to every host.
            for name in sorted(again, key=lambda name: name in self._routers):
                if not self._stopping.is_set() and self._restore(name):
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
                self._open_host(name)
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
