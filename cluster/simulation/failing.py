"""What fails, and what follows: who notices when, who takes over, and when it is restored, as in `cluster/supervisor.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...configs.errors import ConfigError
from .cluster import Site, slots_of
from .events import VirtualTime
from .front import Front
from .machines import Ask, Machines
from .measure import Recorder
from .placing import Placing, some
from .routers import SimulatedRouter


@dataclass(frozen=True, slots=True)
class Failure:
    """Something that ends.

    Attributes:
        at: when.
        target: an expert host, a router, or a node with all that is on it.
        gone: its device is gone as well. A node's are in any case.
    """

    at: float
    target: str
    gone: bool = False


class Failures:
    """Has processes of a cluster of routers apart from hosts fail, and looks after what follows.

    Args:
        site: as it was in the beginning.
        routers: by name; `new_router` adds to them.
        numbers: of hosts, as the machines know them.

    Attributes:
        lost_routers: names of those that are being restored.
    """

    def __init__(
        self,
        site: Site,
        clock: VirtualTime,
        machines: Machines,
        placing: Placing,
        recorder: Recorder,
        front: Front,
        routers: dict[str, SimulatedRouter],
        numbers: Mapping[str, int],
        new_router: Callable[[str], None],
    ) -> None:
        self._site, self._clock, self._machines, self._placing = site, clock, machines, placing
        self._recorder, self._front, self._routers, self._numbers = recorder, front, routers, numbers
        self._new_router = new_router
        self.lost_routers: dict[str, None] = {}
        self._dead: set[str] = set()  # hosts, from their end on until they are back
        self._homeless: set[str] = set()  # of these, those that the others are to do without

    def targets(self, failure: Failure) -> list[str]:
        """The processes that a failure ends.

        Raises:
            ConfigError: there is no such process or node.
        """
        nodes = self._placing.nodes
        there = [*self._placing.table.slots, *self._routers]
        if failure.target in there:
            return [failure.target]
        on_node = [name for name in there if nodes.get(name) == failure.target]
        if not on_node:
            known = sorted({nodes[name] for name in there if name in nodes})
            raise ConfigError(
                f"--fail {failure.target}: no such process or node; there are {some(there)} and the nodes {some(known)}"
            )
        return on_node

    def fail(self, failure: Failure) -> None:
        """Have it happen now."""
        try:
            names = self.targets(failure)
        except ConfigError:
            self._recorder.happened("not_there", failure.target, "it had left before it was to fail")
            return
        placing, recovery = self._placing, self._site.recovery
        is_node = failure.target not in names
        gone = failure.gone or is_node
        self._recorder.failed_now(failure.target)
        if is_node:
            placing.lose_node(failure.target)
        noticed_s = recovery.node_noticed_s if is_node else recovery.process_noticed_s
        restore_after_s = max(0.0, recovery.node_given_up_s - noticed_s) if is_node else 0.0
        placing.give_way()
        hosts = [name for name in names if name in placing.table.slots and name not in self._dead]
        self._dead.update(hosts)
        asks = [ask for host in hosts for ask in self._machines.lose(self._numbers[host])]
        if hosts:
            self._clock.after(noticed_s, lambda: self._hosts_lost(hosts, asks, gone, restore_after_s))
        for name in [name for name in names if name in self._routers]:
            silent_s = recovery.router_silent_s if is_node else recovery.process_noticed_s
            restored_from_s = recovery.node_given_up_s if is_node else silent_s
            self._router_ends(name, gone, silent_s, restored_from_s)

    # ---- expert hosts -------------------------------------------------------------------------------------------------

    def _hosts_lost(self, hosts: list[str], asks: list[Ask], gone: bool, restore_after_s: float) -> None:
        """Routers know: what is open is asked of others; and the hosts are to be restored."""
        self._placing.lost(hosts)
        asks += [ask for host in hosts for ask in self._machines.give_up(self._numbers[host])]
        for ask in asks:
            ask.lost(ask.left)
        self._clock.after(restore_after_s, lambda: self._restore_hosts(hosts, gone))

    def _restore_hosts(self, hosts: list[str], gone: bool) -> None:
        placing = self._placing
        hosts = [host for host in hosts if host in self._dead]
        homeless = [host for host in hosts if gone and not placing.seat([host])]
        back = [host for host in hosts if host not in homeless]
        if back:
            load = {host: slots_of(placing.table, host) for host in back}
            seconds = placing.start_s(len(back)) + placing.load_s(load, copies=self._site.min_replicas > 1)
            self._recorder.happened("restoring", some(back), f"will take {seconds:.1f} s")
            self._clock.after(seconds, lambda: self._hosts_back(back))
        if homeless:
            self._go_on_without(homeless)

    def _hosts_back(self, hosts: list[str]) -> None:
        self._recorder.happened("restored", some(hosts))
        self._dead.difference_update(hosts)
        self._placing.back(hosts)

    def _go_on_without(self, lost: list[str]) -> None:
        """The others take over what hosts held for which there is no device."""
        placing, homeless = self._placing, self._homeless
        homeless.update(lost)
        try:
            plan = placing.plan([host for host in placing.table.slots if host not in homeless], dead=homeless)
        except ConfigError as error:
            self._recorder.happened("not_restored", some(sorted(homeless)), str(error))
            return
        seconds = placing.moves_s(plan)
        told = f"{len(plan.moves)} experts move, which will take {seconds:.1f} s"
        self._recorder.happened("going_on_without", some(sorted(homeless)), told)

        def adopt() -> None:
            self._dead -= homeless
            homeless.clear()
            placing.adopt(plan.table)

        placing.begin_change(seconds, adopt, undo=self._try_again_soon)

    def _try_again_soon(self) -> None:
        """Another failure came between: plan anew once it is known."""

        def again() -> None:
            if self._homeless and not self._placing.changing:
                self._go_on_without([])

        self._clock.after(self._site.recovery.node_noticed_s, again)

    # ---- routers ------------------------------------------------------------------------------------------------------

    def _router_ends(self, name: str, gone: bool, noticed_s: float, restored_from_s: float) -> None:
        """Fronts know after `noticed_s`; its restoring begins after `restored_from_s`."""
        recovery = self._site.recovery
        requests = self._routers.pop(name).end()
        self._clock.after(noticed_s, lambda: self._front.move(requests))
        if gone and not self._placing.seat([name]):
            self._recorder.happened("not_restored", name, "no device is free")
            return
        self.lost_routers[name] = None
        seconds = restored_from_s + recovery.start_s + recovery.router_bytes / recovery.disk

        def back() -> None:
            del self.lost_routers[name]
            self._new_router(name)
            self._recorder.happened("restored", name)
            self._front.router_came()

        self._clock.after(seconds, back)
