"""Which host holds which expert: pure functions from plain data to a placement table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..actors.placement_table import EMPTY, PlacementTable, is_cold
from ..configs.deployment import ExpertHosts
from ..configs.errors import ConfigError
from ..model.config import ModelConfig
from .assembly import host_names
from .placement_plan import HostSpec, Move, PlacementPlan, plan_placement
from .replica_counts import Floats


def even_placement(config: ModelConfig, hosts: Sequence[str], *, epoch: int = 1) -> PlacementTable:
    """Spread the experts of every layer evenly: host i of n holds every n-th expert.

    Neighbouring experts, which form a group, so land on different hosts. Where n does not divide the experts, each layer
    gives its larger shares to the hosts that are next in turn: no two hosts differ by more than one expert in all.

    Raises:
        ConfigError: there are more hosts than experts, so that some would hold nothing.
    """
    if len(hosts) > config.n_routed_experts:
        raise ConfigError(
            f"experts.hosts = {len(hosts)}: the model has {config.n_routed_experts} experts a layer, "
            f"so at most {config.n_routed_experts} hosts can hold one"
        )
    larger_shares = config.n_routed_experts % len(hosts)
    return PlacementTable(
        epoch=epoch,
        first_layer=config.first_k_dense_replace,
        experts=config.n_routed_experts,
        slots={
            host: tuple(
                tuple(range((index + layer * larger_shares) % len(hosts), config.n_routed_experts, len(hosts)))
                for layer in range(len(config.moe_layers))
            )
            for index, host in enumerate(hosts)
        },
    )


def next_placement(
    config: ModelConfig,
    hosts: Sequence[str],
    *,
    min_replicas: int = 1,
    spare_slots: int = 0,
    current: PlacementTable | None = None,
) -> PlacementTable:
    """The table of `plan_next` for equal loads.

    Raises:
        ConfigError: so many hosts, or so few, cannot be used.
    """
    return plan_next(config, hosts, min_replicas=min_replicas, spare_slots=spare_slots, current=current).table


def first_placement(config: ModelConfig, experts: ExpertHosts) -> PlacementTable:
    """The table that a deployment starts with.

    Raises:
        ConfigError: so many hosts cannot be used.
    """
    return plan_next(
        config,
        host_names(experts),
        min_replicas=experts.min_replicas,
        spare_slots=experts.spare_slots,
        cold_slots=experts.cold.slots,
    ).table


def plan_next(
    config: ModelConfig,
    hosts: Sequence[str],
    *,
    min_replicas: int = 1,
    spare_slots: int = 0,
    cold_slots: int | None = None,
    load: Floats | None = None,
    replicas: Mapping[tuple[int, int], int] | None = None,
    nodes: Mapping[str, str] | None = None,
    current: PlacementTable | None = None,
    dead: Collection[str] = (),
) -> PlacementPlan:
    """The next placement on these hosts, and the way there: as little is moved as can be.

    Every host gets an even share of slots in each layer, and `spare_slots` more, which are filled with copies of the experts
    that most is asked of. Where these are too few for `replicas`, the shares of that layer grow by what is missing. Cold hosts
    have slots for the experts that least is asked of, and the others share out the rest.

    Args:
        config: of the model.
        hosts: those there will be, in an order that does not change from plan to plan; cold ones are known by their ids.
            Hosts of `current` that are not among them hold nothing afterwards, but are sources of what they hold now.
        min_replicas: copies of each expert, on distinct hosts, and on distinct nodes as far as there are any.
        spare_slots: slots of each host and layer beyond its share; cold hosts have none.
        cold_slots: of each cold host and layer; None for an even share.
        load: [L, E] measured load, in any unit; None for equal loads.
        replicas: (model layer, expert) -> copies this one should have at least.
        nodes: host -> its machine. With it, a group's experts are kept on one node where that costs nothing. A host that is
            yet to be started is not named: it is taken to come to the one node there is, or, where there are several or
            none is known, to one of its own. The first plan that knows better puts right what this got wrong.
        current: the table to start from, if any; the new one has the epoch after it.
        dead: hosts that nothing can be copied from. One that is among `hosts` as well is to come back: until then the others
            make do with the slots that they have beside it.

    Raises:
        NotEnoughSlotsError: without the dead hosts, not every expert finds a slot.
        ConfigError: so many hosts, or so few, cannot be used, or an entry of `replicas` cannot be.
    """
    if len(hosts) < min_replicas:
        raise ConfigError(
            f"experts.min_replicas = {min_replicas}: copies of an expert are on distinct hosts, and there are {len(hosts)}; "
            "use as many hosts or fewer replicas"
        )
    even = even_placement(config, hosts)  # refuses what cannot be
    nodes, replicas = nodes or {}, replicas or {}
    known = set(nodes.values())
    elsewhere = known.pop() if len(known) == 1 else ""
    slots = host_slots(config, hosts, min_replicas, spare_slots, cold_slots, replicas)
    specs = [
        HostSpec(host, slots[host], node=nodes.get(host, elsewhere), cold=is_cold(host), alive=host not in dead)
        for host in hosts
    ]
    equal = np.ones((len(config.moe_layers), config.n_routed_experts))
    first_layer = config.first_k_dense_replace
    plain = (
        load is None and min_replicas == 1 and spare_slots == 0 and not (replicas or dead or any(map(is_cold, hosts)))
    )
    if current is None and plain:
        kept = plan_placement(
            equal, specs, first_layer=first_layer, current=replace(even, epoch=even.epoch - 1), min_gain=1.0
        )
        nowhere = (0.0,) * even.layers
        return replace(kept, moves=_all_moves(kept.table), changed=True, balancedness_before=nowhere)
    plan = plan_placement(
        equal if load is None else load,
        specs,
        first_layer=first_layer,
        current=current,
        min_replicas=min_replicas,
        replicas=replicas,
        groups=config.n_group if nodes else 1,
    )
    leaving = [] if current is None else [host for host in current.slots if host not in hosts and host not in dead]
    if not leaving:
        return plan
    assert current is not None
    return replace(plan, moves=tuple(_with_sources(move, leaving, current, nodes) for move in plan.moves))


def host_slots(
    config: ModelConfig,
    hosts: Sequence[str],
    min_replicas: int,
    spare_slots: int,
    cold_slots: int | None,
    replicas: Mapping[tuple[int, int], int],
) -> dict[str, tuple[int, ...]]:
    """For each host its slots in each layer; see `plan_next`. Like `even_placement`, a layer gives larger shares to those next
    in turn.

    Raises:
        ConfigError: cold hosts hold so much that others would hold nothing.
    """
    experts, copies = config.n_routed_experts, config.n_routed_experts * min_replicas
    others = [host for host in hosts if not is_cold(host)]
    cold = len(hosts) - len(others)
    each = min(experts, max(1, copies // len(hosts)) if cold_slots is None else cold_slots)
    spare = spare_slots * len(others)
    if copies - cold * each + spare < len(others):
        raise ConfigError(
            f"experts.cold.slots = {each}: {cold} cold hosts hold {cold * each} of {copies} experts and copies of a layer, "
            f"which leaves nothing for some of {len(others)} others; use at most {(copies + spare - len(others)) // cold} "
            "slots, or fewer hosts"
        )
    asked = dict.fromkeys(config.moe_layers, 0)
    for (layer, _), count in replicas.items():
        if layer in asked:  # what is not is refused with the rest
            asked[layer] += max(0, min(count, len(hosts)) - min_replicas)
    shares = [divmod(copies - cold * each + max(0, more - spare), max(1, len(others))) for more in asked.values()]
    found = {
        host: tuple(
            min(experts, share + ((index + layer * larger) % len(others) < larger) + spare_slots)
            for layer, (share, larger) in enumerate(shares)
        )
        for index, host in enumerate(others)
    }
    return {host: found.get(host, (each,) * len(shares)) for host in hosts}


def _all_moves(table: PlacementTable) -> tuple[Move, ...]:
    """Every slot of `table`, from the disk."""
    return tuple(
        Move(table.first_layer + index, expert, (), host, slot)
        for index in range(table.layers)
        for host, layers in table.slots.items()
        for slot, expert in enumerate(layers[index])
        if expert != EMPTY
    )


def _with_sources(move: Move, leaving: Sequence[str], current: PlacementTable, nodes: Mapping[str, str]) -> Move:
    """`move` with those of the `leaving` hosts that hold the expert among its sources."""
    index = move.layer - current.first_layer
    more = [host for host in leaving if move.expert in current.slots[host][index]]
    if not more:
        return move
    node = nodes.get(move.host)
    far_last = sorted((*move.sources, *more), key=lambda host: node is None or nodes.get(host) != node)
    return replace(move, sources=tuple(far_last))
