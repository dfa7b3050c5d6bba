"""How well expert placements balance, how much they move when loads change, and how long a plan takes.

python tests/bench/placement.py [--layers 58] [--experts 256] [--hosts 32] [--spare 32]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moray.actors.placement_table import PlacementTable
from moray.cluster.placement_plan import HostSpec, PlacementPlan, plan_placement
from moray.cluster.synthetic_load import lognormal_load, with_noise, zipf_load

FIRST_LAYER = 3
NOISE = 0.05


def duplicates(table: PlacementTable) -> int:
    """Second copies of an expert on a host, over all hosts and layers."""
    rows = [[e for e in row if e >= 0] for layers in table.slots.values() for row in layers]
    return sum(len(row) - len(set(row)) for row in rows)


class Bench:
    """Plans for one cluster, each printed as a row of the table."""

    def __init__(self, hosts: tuple[HostSpec, ...], slots: int) -> None:
        self.hosts = hosts
        self.slots = slots

    def plan(
        self,
        name: str,
        load: np.typing.NDArray[np.float64],
        *,
        current: PlacementTable | None = None,
        hosts: tuple[HostSpec, ...] | None = None,
        replicas: Mapping[tuple[int, int], int] | None = None,
        groups: int = 1,
    ) -> PlacementPlan:
        """Plan, print, return."""
        started, cpu = time.perf_counter(), time.process_time()
        plan = plan_placement(
            load, hosts or self.hosts, first_layer=FIRST_LAYER, current=current, replicas=replicas, groups=groups
        )
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        before = f"{np.mean(plan.balancedness_before):.3f}" if current else "-"
        moved = f"{len(plan.moves) / (self.slots * len(load)):.1%}" if current else "-"
        print(
            f"{name:44} {before:>6} {np.mean(plan.balancedness):6.3f} {min(plan.balancedness):6.3f} "
            f"{np.mean(plan.balancedness_equal):6.3f} {min(plan.balancedness_equal):6.3f} {moved:>6} "
            f"{duplicates(plan.table):4} {len(plan.shortages):5} {seconds:6.2f} {cpu:6.2f}"
        )
        return plan


def main() -> None:
    """Print one block of rows for each load."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=58)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--hosts", type=int, default=32)
    parser.add_argument("--spare", type=int, default=32)
    args = parser.parse_args()
    slots = (args.experts + args.spare) // args.hosts
    # Eight hosts a node, as GPUs are.
    hosts = tuple(HostSpec(f"expert-host-{i}", slots, node=f"node-{i // 8}") for i in range(args.hosts))
    bench = Bench(hosts, slots * args.hosts)
    print(f"{args.layers} layers x {args.experts} experts, {args.hosts} hosts x {slots} slots a layer\n")
    print(f"{'balancedness: expected     split equally':>84}")
    print(
        f"{'':44} {'before':>6} {'mean':>6} {'worst':>6} {'mean':>6} {'worst':>6} {'moved':>6} {'dup':>4} {'short':>5} "
        f"{'s':>6} {'cpu s':>6}"
    )
    size = args.layers, args.experts
    loads = {
        "lognormal sigma 1": lognormal_load(*size),
        "Zipf 0.8": zipf_load(*size, exponent=0.8),
        "Zipf 1.0": zipf_load(*size, exponent=1.0),
    }
    for name, load in loads.items():
        print(f"{name} (max/mean expert {np.mean(load.max(axis=1) / load.mean(axis=1)):.1f})")
        plan = bench.plan("  from nothing", load)
        hottest = np.argsort(-load, axis=1)[:, : args.experts // 10 + 1]
        two = {(FIRST_LAYER + layer, int(e)): 2 for layer, row in enumerate(hottest) for e in row}
        safe = bench.plan("  from nothing, 2 replicas for hottest 10%", load, replicas=two)
        noisy = with_noise(load, NOISE, seed=1)
        bench.plan("    then 5% noise", noisy, current=safe.table, replicas=two)
        grouped = bench.plan("  from nothing, 8 groups", load, groups=8)
        print(
            f"    replicas on their group's node: {at_home(grouped, hosts):.0%}; without groups {at_home(plan, hosts):.0%}"
        )
        bench.plan("  then 5% noise", noisy, current=plan.table)
        table = plan.table
        for seed in range(2, 6):
            table = bench.plan(
                f"  then 5% noise, again ({seed})", with_noise(load, NOISE, seed=seed), current=table
            ).table
        dead = (*hosts[:-1], replace(hosts[-1], alive=False))
        lost = bench.plan("  then a host dies", load, current=plan.table, hosts=dead)
        bench.plan("  then it comes back empty", load, current=lost.table)
        bench.plan("  then other experts are hot", load[::-1], current=plan.table)
        unequal = tuple(
            replace(host, slots=slots + (i % 3 - 1) * 4, speed=(0.5, 1.0, 1.5)[i % 3]) for i, host in enumerate(hosts)
        )
        bench.plan("  unequal hosts: slots +-4, speed x 0.5 to 1.5", load, hosts=unequal)


def at_home(plan: PlacementPlan, hosts: tuple[HostSpec, ...]) -> float:
    """Share of replicas that are on the node where most replicas of their group of the layer are."""
    node = {spec.host: spec.node for spec in hosts}
    found = total = 0
    for index in range(plan.table.layers):
        tally: dict[int, dict[str, int]] = {}
        for host, layers in plan.table.slots.items():
            for expert in layers[index]:
                group = tally.setdefault(expert * 8 // plan.table.experts, {})
                group[node[host]] = group.get(node[host], 0) + 1
        found += sum(max(group.values()) for group in tally.values())
        total += sum(sum(group.values()) for group in tally.values())
    return found / total


if __name__ == "__main__":
    main()
