"""From one state of the cluster to the next while requests run: plan, load beside what is served, change over, let go.

A change is all or nothing. Until the new table is in force, whatever fails leaves the old one as it was; from then on it is
never gone back upon, and a process that cannot follow is ended and restored with the new table.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from ..actors.placement_table import PlacementTable
from ..configs.errors import CheckpointError, ClusterError, MorayError
from .change_planner import ChangePlanner, merged
from .changes import Change, Wanted, moved_experts
from .launching import GaveWayError, Launcher, side_by_side
from .placement_plan import PlacementPlan
from .registry import Host, Registry, Router, by_kind
from .spawning import Processes, Spawner

_ATTEMPTS = 5
"""At a change that deaths of hosts interrupt."""

_WHOLE_POLL_S = 0.1

_TURN_TIMEOUT_S = 4000.0
"""How long a change waits for its turn: longer than any other one lasts."""

_RESTORE_TIMEOUT_S = 600.0
"""How long one that gave way waits for the lost hosts."""

_DIRECTORY_SEEN_S = 2.5
"""Until every front has seen that a router leaves: they ask about once a second."""

_DRAIN_POLL_S = 0.1


class Transition:
    """Makes changes, one at a time."""

    def __init__(self, registry: Registry, spawner: Spawner, launcher: Launcher, planner: ChangePlanner) -> None:
        self._registry = registry
        self._spawner = spawner
        self._launcher = launcher
        self._planner = planner
        self._turn = threading.Lock()
        self._urgent = 0  # restorations that run or wait for their turn
        self._calm = threading.Condition()
        self._give_way = threading.Event()
        self._stopping = threading.Event()
        self.moving: int | None = None
        """How many experts the change moves that is going on; None without one."""

    @property
    def busy(self) -> bool:
        """Whether something is being changed or restored."""
        return self._turn.locked()

    def stop(self) -> None:
        """Begin nothing more; a change that runs gives up."""
        self._stopping.set()
        self._give_way.set()

    @contextlib.contextmanager
    def urgent(self) -> Iterator[None]:
        """Have the turn before any change; one that runs gives up, and begins anew afterwards."""
        with self._calm:
            self._urgent += 1
            self._give_way.set()
        try:
            if not self._turn.acquire(timeout=_RESTORE_TIMEOUT_S):
                raise ClusterError(f"the change that runs did not give way within {_RESTORE_TIMEOUT_S:.0f} s")
            try:
                yield
            finally:
                self._turn.release()
        finally:
            with self._calm:
                self._urgent -= 1
                if not self._urgent and not self._stopping.is_set():
                    self._give_way.clear()
                self._calm.notify_all()

    # ---- changing -----------------------------------------------------------------------------------------------------

    def change(self, wanted: Wanted | None, *, dry_run: bool = False) -> Change:
        """Do it while requests run; returns what changed (or would).

        Args:
            wanted: what is asked for; None for as many expert hosts as were asked for before, some of which may have had to
                be given up meanwhile.
            dry_run: only plan.

        Raises:
            ConfigError: it cannot be.
            ClusterError: there is no room, or a process failed; the cluster is as it was, but for routers that were added.
        """
        started = time.monotonic()
        if dry_run:
            return self._planner.plan(wanted or self._wanted_before())[0]
        for attempt in range(_ATTEMPTS):
            with self._own_turn():
                asked = wanted or self._wanted_before()
                change, plan = self._planner.plan(asked)
                try:
                    with self._wishes(asked, plan):
                        if change.empty:
                            return change
                        self._apply(change, plan)
                except GaveWayError as error:
                    self._registry.happened("gave_way", f"epoch-{plan.table.epoch}", detail=str(error))
                    last = error
                else:
                    seconds = time.monotonic() - started
                    self._registry.happened("changed", f"epoch-{change.epoch}", seconds=seconds, detail=str(change))
                    return replace(change, seconds=seconds)
            self._await_whole(attempt)
        raise ClusterError(f"hosts died {_ATTEMPTS} times while this went on; nothing was changed: {last}")

    def _wanted_before(self) -> Wanted:
        with self._registry.lock:
            return Wanted(experts=self._registry.wanted_hosts, cold=self._registry.wanted_cold)

    def _await_whole(self, attempt: int) -> None:
        """Let what is lost be restored, before the change is tried again."""
        give_up = time.monotonic() + _RESTORE_TIMEOUT_S
        # A death shows in a load before the supervisor hears of it.
        self._stopping.wait(_WHOLE_POLL_S * 2**attempt)
        while not self._stopping.is_set():
            with self._registry.lock:
                away = [n for n in self._registry.table.slots if self._registry.hosts[n].state != "ready"]
            if not away:
                return
            if time.monotonic() > give_up:
                raise ClusterError(
                    f"{', '.join(away)} were not restored within {_RESTORE_TIMEOUT_S:.0f} s; nothing was changed"
                )
            self._stopping.wait(_WHOLE_POLL_S)

    def without(self, names: set[str]) -> Change:
        """Go on without hosts that cannot be restored: others take their experts over. For those who have the turn.

        Raises:
            ConfigError, ClusterError: the others cannot.
        """
        started = time.monotonic()
        change, plan = self._planner.plan(Wanted(drain=tuple(sorted(names))))
        self._change_placement(plan, heed=False)
        seconds = time.monotonic() - started
        self._registry.happened("went_on_without", ",".join(sorted(names)), seconds=seconds, bad=True)
        return replace(change, seconds=seconds)

    @contextlib.contextmanager
    def _own_turn(self) -> Iterator[None]:
        """The turn, once nothing urgent waits for it."""
        with self._calm:
            if not self._calm.wait_for(lambda: not self._urgent or self._stopping.is_set(), _RESTORE_TIMEOUT_S):
                raise ClusterError(
                    f"lost hosts were not restored within {_RESTORE_TIMEOUT_S:.0f} s; nothing was changed"
                )
        if not self._turn.acquire(timeout=_TURN_TIMEOUT_S):
            raise ClusterError(f"another change still runs after {_TURN_TIMEOUT_S:.0f} s; nothing was changed")
        try:
            if self._stopping.is_set():
                raise ClusterError("the cluster is stopping")
            yield
        finally:
            self._turn.release()

    @contextlib.contextmanager
    def _wishes(self, wanted: Wanted, plan: PlacementPlan) -> Iterator[None]:
        """Note what is asked for, for as long as it lasts; forget it again if it cannot be done."""
        registry = self._registry
        with registry.lock:
            before = registry.replicas, registry.wanted_hosts, registry.wanted_cold
            registry.replicas = merged(registry.replicas, wanted)
            hosts, cold = by_kind(plan.table.slots)
            drained, cold_drained = by_kind(wanted.drain)
            if wanted.experts is not None or drained:
                registry.wanted_hosts = len(hosts)
            if wanted.cold is not None or cold_drained:
                registry.wanted_cold = len(cold)
        try:
            yield
        except BaseException:
            with registry.lock:
                registry.replicas, registry.wanted_hosts, registry.wanted_cold = before
            raise
        finally:
            registry.save()

    def _apply(self, change: Change, plan: PlacementPlan) -> None:
        registry = self._registry
        new_hosts = [name for name in change.added if name in plan.table.slots]
        new_routers = [name for name in change.added if name not in plan.table.slots]
        with registry.lock:
            warm = len(registry.standby)
        hosts, cold = by_kind(new_hosts)
        more = Processes(hosts=max(0, len(hosts) - warm), cold=len(cold), routers=len(new_routers))
        self._spawner.check_room(registry.deployment, more, running=self._launcher.running())
        self._add_routers(new_routers)
        if change.epoch != registry.table.epoch:
            self._change_placement(plan, heed=True)
        leaving = [name for name in change.removed if name in registry.routers]
        self._remove_routers(leaving)

    # ---- the placement ------------------------------------------------------------------------------------------------

    def _change_placement(self, plan: PlacementPlan, *, heed: bool) -> None:
        """Load what the new table wants beside the old, have every router change over between two steps, then let go.

        Args:
            plan: to the new table.
            heed: give way to what is urgent.
        """
        registry, launcher, table = self._registry, self._launcher, plan.table
        before = registry.table
        added = [name for name in table.slots if name not in before.slots]
        self.moving = moved_experts(before, table)
        try:
            self._load(table, added, heed=heed)
        except BaseException as error:
            registry.happened("change_failed", f"epoch-{table.epoch}", detail=str(error), bad=True)
            self._undo(before, table, added)
            raise
        finally:
            self.moving = None
        with registry.lock:
            registry.table = table
            for name in added:
                launcher.host_ready(registry.hosts[name])
        registry.save()
        self.bring_routers_up_to_date()
        side_by_side(launcher.remove_host, [name for name in before.slots if name not in table.slots])
        self._retire(table)

    def _load(self, table: PlacementTable, added: list[str], *, heed: bool) -> None:
        """Have every host of `table` hold its slots.

        Raises:
            GaveWayError: a host that serves has died, or another one must be restored first.
            MorayError: a new host did not come up, or what is to be loaded cannot be read.
        """
        registry, launcher = self._registry, self._launcher
        give_way = self._give_way if heed else None
        new = [launcher.new_host(name, gently=True) for name in added]
        with registry.lock:
            staying = [registry.hosts[name] for name in table.slots if name not in added]
        away = [host.name for host in staying if host.state != "ready"]
        if away and heed:
            raise GaveWayError(f"{', '.join(away)} must be restored first")

        def load(host: Host) -> None:
            if host.name in added:
                launcher.open_host(host, table, gently=True)
                launcher.finish_load(host, give_way=give_way)
                return
            try:
                launcher.begin_load(host, table, gently=True)
                launcher.finish_load(host, give_way=give_way)
            except CheckpointError:
                raise
            except MorayError as error:
                raise GaveWayError(str(error)) from error

        # Those that are away, and cannot be waited for, load when they are restored.
        errors = side_by_side(load, [*new, *(host for host in staying if host.name not in away)])
        if errors:
            # A failure of a new host's own says more than what it made others do.
            raise min(errors, key=lambda error: isinstance(error, GaveWayError))

    def _undo(self, before: PlacementTable, table: PlacementTable, added: list[str]) -> None:
        """Have every host forget the epoch that does not come to be."""
        side_by_side(self._launcher.remove_host, added)

        def abandon(host: Host) -> None:
            if host.handle is not None and host.name in before.slots:
                host.handle.abandon(table.epoch)

        for error in side_by_side(abandon, self._registry.serving_hosts().values()):
            self._registry.happened("abandon_failed", f"epoch-{table.epoch}", detail=str(error), bad=True)

    def bring_routers_up_to_date(self) -> None:
        """Have every router that serves use the table in force; one that cannot is ended, and restored with it."""
        registry = self._registry
        table = registry.table
        addresses = registry.host_addresses(table)

        def adopt(router: Router) -> None:
            if router.handle is None or router.epoch >= table.epoch:
                return
            try:
                router.handle.adopt(table, addresses)
                router.epoch = table.epoch
            except MorayError as error:
                # Its requests go on elsewhere, or there once it is restored.
                registry.happened("adopt_failed", router.name, detail=str(error), bad=True)
                router.handle.kill()

        side_by_side(adopt, registry.serving_routers().values())

    def _retire(self, table: PlacementTable) -> None:
        """Have the hosts of `table` let go of every other epoch."""

        def retire(host: Host) -> None:
            if host.handle is not None:
                host.handle.retire(table.epoch)

        for error in side_by_side(retire, self._registry.serving_hosts().values()):
            # It died: restored, it holds this epoch alone.
            self._registry.happened("retire_failed", f"epoch-{table.epoch}", detail=str(error), bad=True)

    # ---- routers ------------------------------------------------------------------------------------------------------

    def _add_routers(self, names: list[str]) -> None:
        launcher = self._launcher

        def add(name: str) -> None:
            launcher.finish_router(launcher.new_router(name, gently=True))

        errors = side_by_side(add, names)
        if errors:
            side_by_side(launcher.remove_router, names)
            raise errors[0]

    def _remove_routers(self, names: list[str]) -> None:
        """Have fronts send them nothing new, wait for their requests, end them: what is left then goes on elsewhere."""
        registry = self._registry
        with registry.lock:
            leaving = [registry.routers[name] for name in names]
            for router in leaving:
                registry.set_state(router, "leaving")
        if not leaving:
            return
        begun = time.monotonic()
        drained = begun + max(_DIRECTORY_SEEN_S, registry.deployment.routers.drain_timeout_s)
        while time.monotonic() < drained and not self._stopping.is_set():
            if time.monotonic() - begun > _DIRECTORY_SEEN_S and not any(map(_busy, leaving)):
                break
            time.sleep(_DRAIN_POLL_S)
        side_by_side(self._launcher.remove_router, names)


def _busy(router: Router) -> bool:
    report = router.report
    return report is None or report.stats.running + report.stats.waiting > 0
