"""Where processes are and where experts go: seats, plans of placements, and how long it takes to carry them out.

Tables change for all routers at one moment, where real ones change between two of their own steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from ...actors.placement_table import PlacementTable
from ...configs.errors import ConfigError
from ..load_monitor import LoadMonitor
from ..placement import plan_next
from ..placement_plan import PlacementPlan
from ..replica_counts import Floats
from .cluster import Site, slots_of
from .draws import ExpertDraws
from .events import VirtualTime
from .machines import Machines
from .measure import Recorder

_ENOUGH_TOKENS = 100.0
"""Tokens an expert must have seen on average for a plan to heed them: as in `cluster/change_planner.py`."""


class Placing:
    """Who is where.

    Args:
        site: as it was in the beginning.
        numbers: of hosts, as `draws` keeps them.
        experts_back: called when experts may be reachable again.

    Attributes:
        nodes: process -> node.
        down: hosts of the table that routers know are lost.
        changing: a change is under way.
        monitor: the measured load.
    """

    def __init__(
        self,
        site: Site,
        clock: VirtualTime,
        machines: Machines,
        draws: ExpertDraws,
        recorder: Recorder,
        numbers: Mapping[str, int],
        experts_back: Callable[[], None],
    ) -> None:
        self._site, self._clock, self._machines, self._draws = site, clock, machines, draws
        self._recorder, self._numbers, self._experts_back = recorder, numbers, experts_back
        self.nodes = dict(site.nodes)
        self.down: set[str] = set()
        self.changing = False
        self.monitor = LoadMonitor(len(site.config.moe_layers), site.config.n_routed_experts)
        self._free = None if site.free_seats is None else list(site.free_seats)
        self._standby = site.recovery.standby
        self._change = 0  # number of the one that is under way
        self._undo: Callable[[], None] = _nothing

    @property
    def table(self) -> PlacementTable:
        """The placement in force."""
        return self._draws.table

    @property
    def hosts_up(self) -> int:
        """Hosts that serve."""
        return len(self.table.slots) - len(self.down)

    # ---- seats --------------------------------------------------------------------------------------------------------

    def seat(self, names: Collection[str]) -> bool:
        """Give each process a device that is free; False, and nothing is given, if there are too few."""
        if self._free is None:
            return True
        if len(self._free) < len(names):
            return False
        for name in names:
            self.nodes[name] = self._free.pop(0)
        return True

    def vacate(self, names: Iterable[str]) -> None:
        """These have left their devices."""
        for name in names:
            node = self.nodes.pop(name, None)
            if self._free is not None and node is not None:
                self._free.append(node)

    def lose_node(self, node: str) -> None:
        """No device of it can be used any more."""
        if self._free is not None:
            self._free = [free for free in self._free if free != node]

    # ---- how long things take -----------------------------------------------------------------------------------------

    def start_s(self, processes: int) -> float:
        """Until the last of so many new hosts begins to load."""
        recovery = self._site.recovery
        warm = min(self._standby, processes)
        self._standby -= warm

        def refill() -> None:
            self._standby += warm

        if warm:
            self._clock.after(recovery.start_s, refill)
        return recovery.standby_start_s if warm == processes else recovery.start_s

    def load_s(self, experts: Mapping[str, int], *, copies: bool) -> float:
        """Until every host has loaded so many experts: each node at its disk's speed, and copies beside that."""
        recovery = self._site.recovery
        by_node: dict[str, int] = {}
        for host, count in experts.items():
            node = self.nodes.get(host, host)
            by_node[node] = by_node.get(node, 0) + count * recovery.expert_bytes
        return max(by_node.values(), default=0) / (recovery.disk + (recovery.copies if copies else 0.0))

    def moves_s(self, plan: PlacementPlan) -> float:
        """Until every host has what a plan moves."""
        moves: dict[str, int] = {}
        for move in plan.moves:
            moves[move.host] = moves.get(move.host, 0) + 1
        return self.load_s(moves, copies=all(move.sources for move in plan.moves))

    # ---- the placement ------------------------------------------------------------------------------------------------

    @property
    def load(self) -> Floats | None:
        """[L, E] the load to plan for; None where too little was measured."""
        enough = _ENOUGH_TOKENS * self.table.layers * self.table.experts
        return self.monitor.load if self.monitor.tokens >= enough else None

    def plan(self, hosts: list[str], *, dead: Collection[str] = ()) -> PlacementPlan:
        """The next placement on these hosts.

        Raises:
            ConfigError: it cannot be, or a host has no memory for it.
        """
        site = self._site
        plan = plan_next(
            site.config,
            hosts,
            min_replicas=site.min_replicas,
            spare_slots=site.spare_slots,
            load=self.load,
            nodes={name: node for name, node in self.nodes.items() if name in hosts},
            current=self.table,
            dead=dead,
        )
        fullest = max(plan.table.slots, key=lambda host: slots_of(plan.table, host))
        wanted, most = slots_of(plan.table, fullest), site.slots_per_host
        if most is not None and wanted > most:
            raise ConfigError(f"{fullest} would have to hold {wanted} experts and has memory for {most}; add hosts")
        return plan

    def begin_change(self, seconds: float, done: Callable[[], None], undo: Callable[[], None] | None = None) -> None:
        """Have `done` come to pass after so long, unless a failure comes between: then `undo`."""
        self._change += 1
        self.changing = True
        self._undo = undo or _nothing
        number = self._change

        def end() -> None:
            if number == self._change:
                self.changing = False
                done()

        self._clock.after(seconds, end)

    def give_way(self) -> None:
        """A failure ends the change that is under way."""
        if self.changing:
            self._change += 1
            self.changing = False
            self._undo()
            self._recorder.happened("gave_way", "the change that was under way")

    def adopt(self, table: PlacementTable) -> None:
        """Every host has what it is to have: use the table from now on."""
        before = self.table
        self._draws.adopt(replace(table, epoch=before.epoch + 1))
        for host in table.slots:
            if host not in before.slots:
                self._machines.revive(self._numbers[host])
        self.down &= set(table.slots)
        self._draws.exclude(self.down)
        self._recorder.happened("placed", f"epoch {before.epoch + 1}", f"{len(table.slots)} hosts")
        self._experts_back()

    def lost(self, hosts: Iterable[str]) -> None:
        """Nobody asks these any more."""
        self.down.update(hosts)
        self._draws.exclude(self.down)

    def back(self, hosts: Iterable[str]) -> None:
        """These hold what the table says again."""
        for host in hosts:
            if host in self.table.slots:
                self._machines.revive(self._numbers[host])
        self.down.difference_update(hosts)
        self._draws.exclude(self.down)
        self._experts_back()


def _nothing() -> None:
    """No change leaves anything behind."""


def some(names: Iterable[str]) -> str:
    """The first few names, and how many more."""
    listed = list(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "")
