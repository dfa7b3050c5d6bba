"""The controller: starts a deployment's expert hosts and routers, keeps them going, and changes them while requests run.

A plain class. The `Spawner` alone knows how a process comes to be: as Ray actors in a cluster, as threads in the tests. The
`Ledger` keeps what another controller needs to take over: the processes outlive the controller, and serve on without it.
"""

from __future__ import annotations

import secrets
import threading
import time

from ..actors.messages import ClusterStatus
from ..actors.placement_table import PlacementTable
from ..actors.router import RouterSettings
from ..configs.deployment import Deployment
from ..configs.errors import ClusterError, MorayError
from ..configs.model_url import is_model_url
from ..model.config import ModelConfig
from .assembly import router_name, router_settings, served_model
from .change_planner import ChangePlanner
from .changes import Change, Wanted
from .directory import Directory
from .handles import ExpertHostHandle, RouterHandle
from .in_touch import InTouch
from .launching import Launcher, side_by_side
from .ledger import Ledger, MemoryLedger, Record
from .load_monitor import LoadMonitor
from .load_progress import FetchedBytes
from .model_check import check_model
from .observer import Observer
from .placement import first_placement
from .registry import Host, Registry, Router, pairs_held
from .spawning import Spawner
from .supervisor import Supervisor
from .transition import Transition

_WORDS_A_LEASE = 4
"""How often processes that are still loading hear from the controller in the length of their lease."""


class Controller:
    """Runs one deployment. `start` returns when everything serves; `stop` ends all of it, `leave` lets it serve on.

    Args:
        deployment: what to serve.
        spawner: makes the processes.
        ledger: where the cluster is recorded; by default in this object.
    """

    def __init__(self, deployment: Deployment, spawner: Spawner, ledger: Ledger | None = None) -> None:
        self.deployment = deployment
        self._spawner = spawner
        self._ledger = ledger or MemoryLedger()
        self._fetched = FetchedBytes()
        self._found: Record | None = None
        self._generation = 1
        self._loaded_before = 0
        self._supervisor: Supervisor | None = None
        self._checked = False
        self._ending = threading.Lock()
        self._ended = False

    # ---- beginning and end --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what cannot be served, and plan the rest; starts nothing. `start` does it if it was not done.

        Raises:
            ConfigError, CheckpointError: it cannot be served.
        """
        deployment, experts = self.deployment, self.deployment.experts
        config, weights = check_model(deployment, gpus=self._spawner.gpus(deployment))
        found = self._ledger.read()
        if found is not None:
            self._generation = found.generation + 1
            if found.deployment == deployment.model_dump():  # else this one replaces it
                self._found = found
                # Whatever would be decided now that, say, there are GPUs.
                config = config.with_moe_layers(found.table.layers)
        served_model(deployment, config)
        settings = router_settings(deployment, config)
        table = first_placement(config, experts)
        self._expert_bytes = weights.routed // max(1, table.layers * table.experts)
        held = sum(len(pairs_held(table, host)) for host in table.slots)
        self._bytes_to_load = deployment.routers.replicas * weights.dense + held * self._expert_bytes
        self._assemble(config, settings, table)
        self._checked = True

    def _assemble(self, config: ModelConfig, settings: RouterSettings, table: PlacementTable) -> None:
        secret = secrets.token_bytes(32) if self._found is None else self._found.secret
        self._registry = Registry(self.deployment, self._ledger, secret, self._generation)
        self._registry.table = table
        self._launcher = Launcher(self._registry, self._spawner, settings)
        monitor = LoadMonitor(table.layers, table.experts)
        planner = ChangePlanner(self._registry, config, monitor)
        self._transition = Transition(self._registry, self._spawner, self._launcher, planner)
        self._observer = Observer(self._registry, self._transition, planner, monitor)

    @property
    def takes_over(self) -> bool:
        """Whether processes of this very deployment run already. Known once `check` was called."""
        return self._found is not None

    def prepare(self) -> None:
        """Have the processes of a fresh start come up at once, before anything else is done. Optional."""
        if not self.takes_over:
            self._spawner.sweep(set())
            self._spawner.prepare(self.deployment)

    def start(self) -> None:
        """Check the checkpoint, then start expert hosts and routers, or take over those that run.

        Raises:
            ConfigError, CheckpointError: refused before any process was started.
            ClusterError: processes did not come up.
        """
        if not self._checked:
            self.check()
        if self._found is not None:
            self._take_over(self._found)
        else:
            try:
                with InTouch(self._handles, self.deployment.supervision.lease_s / _WORDS_A_LEASE):
                    self._start_processes()
            except BaseException:
                self.stop()
                raise
        observer = self._observer
        self._supervisor = Supervisor(
            self._registry,
            self._spawner,
            self._launcher,
            self._transition,
            heard_router=observer.heard_router,
            heard_host=observer.heard_host,
            tick=observer.tick,
            superseded=self._superseded,
        )
        self._supervisor.start()

    def _start_processes(self) -> None:
        registry, launcher, table = self._registry, self._launcher, self._registry.table
        self._spawner.sweep(set())
        routers = [router_name(i) for i in range(self.deployment.routers.replicas)]
        registry.hosts = {name: Host(name) for name in table.slots}
        registry.routers = {name: Router(name) for name in routers}
        for name in table.slots:
            launcher.new_host(name, gently=False)
        launcher.await_processes(list(registry.hosts.values()))
        for host in registry.hosts.values():
            launcher.open_host(host, table, gently=False)
        for name in routers:
            launcher.new_router(name, gently=False)
        launcher.await_processes(list(registry.routers.values()))
        for host in registry.hosts.values():
            launcher.finish_load(host)
            launcher.host_ready(host)
        for router in registry.routers.values():
            launcher.finish_router(router)
        for member in registry.members():
            pid = 0 if member.handle is None else member.handle.pid
            read = member.bytes_read
            registry.happened(
                "ready", member.name, detail=f"pid {pid}, {read.data} bytes read, {read.headers} of headers"
            )
        launcher.fill_standby()

    def _take_over(self, found: Record) -> None:
        """Go on where another controller was when it died: what it had begun is undone, what was in force goes on."""
        registry, launcher, begun = self._registry, self._launcher, time.monotonic()
        registry.table, registry.replicas = found.table, dict(found.replicas)
        registry.wanted_hosts, registry.wanted_cold = found.wanted_hosts, found.wanted_cold
        side_by_side(launcher.attach, found.processes)
        side_by_side(launcher.attach_standby, found.standby)
        registry.save()
        missing = [name for name in found.table.slots if name not in registry.hosts]
        for name in missing:
            registry.hosts[name] = Host(name, state="dead", detail="the last controller had not started it")
        for name in [name for name in registry.hosts if name not in found.table.slots]:
            launcher.remove_host(name)  # half added, or half removed
        side_by_side(self._check_host, [host for host in registry.hosts.values() if host.state == "ready"])
        self._transition.bring_routers_up_to_date()
        self._spawner.sweep(
            {m.handle.actor_name for m in [*registry.members(), *registry.standby.values()] if m.handle is not None}
        )
        lost = [member.name for member in registry.members() if member.state != "ready"]
        registry.happened(
            "took_over",
            f"generation-{self._generation}",
            seconds=time.monotonic() - begun,
            detail=f"{len(registry.members()) - len(lost)} processes serve"
            + (f"; lost: {', '.join(lost)}" if lost else ""),
            bad=True,
        )

    def _check_host(self, host: Host) -> None:
        """A host that was found serves the table in force and nothing else, or is restored."""
        assert host.handle is not None, f"{host.name} has no process"
        epoch = self._registry.table.epoch
        try:
            host.handle.abandon(epoch + 1)
            if epoch not in host.handle.call("report").epochs:
                raise ClusterError(f"it does not serve epoch {epoch}")
            host.handle.retire(epoch)
        except MorayError as error:
            self._registry.set_state(host, "dead", str(error))

    def _superseded(self) -> bool:
        """Whether another controller has taken over, while this one stood still."""
        found = self._ledger.read()
        return found is not None and found.generation > self._generation

    def leave(self) -> None:
        """Look after nothing any more; the processes serve on, and another controller can take them over. Idempotent."""
        if self._checked:
            self._transition.stop()
        if self._supervisor is not None:
            self._supervisor.stop()

    def stop(self) -> None:
        """Stop routers, then hosts: asked first, killed if they do not. Idempotent."""
        self.leave()
        with self._ending:
            if self._ended or not self._checked or self._superseded():
                return
            self._ended = True
            registry = self._registry
            for members in (registry.routers, registry.hosts, registry.standby):
                handles = [member.handle for member in members.values() if member.handle is not None]
                side_by_side(lambda handle: handle.stop(), handles)
            self._spawner.close()
            self._ledger.forget()

    @property
    def table(self) -> PlacementTable:
        """The placement in force."""
        return self._registry.table

    # ---- questions ----------------------------------------------------------------------------------------------------

    def directory(self) -> Directory:
        """Where the routers are now."""
        return self._registry.directory()

    def status(self) -> ClusterStatus:
        """Every process, the cluster's health and what happened lately; the routers' own counters are not asked here."""
        return self._registry.status()

    def load_progress(self) -> tuple[int, int]:
        """Bytes that all processes have read of their slices, and will have read in all. For the start alone.

        With those that nodes fetch, as far as it is known yet that they do.
        """
        fetched, to_fetch = 0, 0
        if is_model_url(self.deployment.model):
            states = [handle.fetching() for handle in self._handles()]
            fetched, to_fetch = self._fetched.add(state for state in states if state is not None)
        return self._bytes_loaded() + fetched, self._bytes_to_load + to_fetch

    def change_progress(self) -> tuple[int, int] | None:
        """Bytes that hosts have read or copied for the change that is going on, and will have; None without one."""
        moving = self._transition.moving
        if moving is None:
            return None
        total = moving * self._expert_bytes
        return min(total, max(0, self._bytes_loaded() - self._loaded_before)), total

    def _bytes_loaded(self) -> int:
        return sum(handle.bytes_loaded() for handle in self._handles())

    def _handles(self) -> list[ExpertHostHandle | RouterHandle]:
        with self._registry.lock:
            return [member.handle for member in self._registry.members() if member.handle is not None]

    # ---- changes ------------------------------------------------------------------------------------------------------

    def change(self, wanted: Wanted, *, dry_run: bool = False) -> Change:
        """See `Transition.change`."""
        if not dry_run:
            self._loaded_before = self._bytes_loaded()
        return self._transition.change(wanted, dry_run=dry_run)
