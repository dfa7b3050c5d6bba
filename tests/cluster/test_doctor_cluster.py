"""`moray doctor`: what is said of several nodes together, of links and of a deployment, by facts that are made up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from moray.cluster.diagnosis.cluster_checks import (
    ClockOffset,
    RayNode,
    check_access,
    check_clocks,
    check_cluster,
    check_ray_counts,
)
from moray.cluster.diagnosis.cpu_checks import check_instructions
from moray.cluster.diagnosis.deployment_checks import check_deployment, known_kind
from moray.cluster.diagnosis.facts import CpuFacts, NetworkFacts, NodeFacts, PortFacts
from moray.cluster.diagnosis.findings import Finding, Level, merged, ok, warn
from moray.cluster.diagnosis.link_checks import (
    LINK_SLOW,
    R1_NEEDS,
    LinkFailure,
    check_links,
    clock_offsets,
    token_needs,
)
from moray.cluster.diagnosis.link_meter import LinkSpeed
from moray.cluster.diagnosis.rounds import rounds
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.model.config import ModelConfig

from .doctor_facts import GIB, L40S, MODEL, VERSIONS, cpu_node, node
from .plan_models import R1, R1_CONFIG

TWO_LAYERS = ModelConfig.from_dict(R1 | {"num_hidden_layers": 5})
"""R1 with 2 MoE layers: quicker to place."""

NAMES = ("10.0.0.1", "10.0.0.2", "10.0.0.3")


def nodes(**odd: Any) -> list[NodeFacts]:
    """Three nodes, of which the last has `odd`."""
    return [node(NAMES[0]), node(NAMES[1]), node(NAMES[2], **odd)]


def levels(findings: Iterable[Finding]) -> set[tuple[str, Level]]:
    return {(finding.check, finding.level) for finding in findings}


def test_nodes_that_are_alike() -> None:
    assert levels(check_cluster(nodes())) == {("versions", "ok"), ("model", "ok")}


def test_one_node_is_compared_with_nothing() -> None:
    assert check_cluster([node()]) == []


@pytest.mark.parametrize(
    ("odd", "check", "level", "said"),
    [
        ({"versions": VERSIONS | {"torch": "2.12.0"}}, "versions", "fail", "2.12.0 on 10.0.0.3"),
        ({"versions": VERSIONS | {"python": "3.12.2"}}, "versions", "fail", "3.12.1 on 2 nodes, 3.12.2 on 10.0.0.3"),
        ({"versions": VERSIONS | {"moray's code": "f" * 12}}, "versions", "fail", "moray's code differs"),
        ({"versions": VERSIONS | {"driver": "535.1"}}, "versions", "warn", "535.1 on 10.0.0.3"),
        ({"gpus": (replace(L40S, name="NVIDIA H100"),) * 8}, "gpus", "warn", "NVIDIA H100 on 10.0.0.3"),
        ({"network": NetworkFacts(NAMES[2], "eth0", 1500)}, "network", "warn", "1500 on 10.0.0.3"),
        ({"model": replace(MODEL, config_digest="e" * 64)}, "model", "fail", "config.json differ"),
        ({"model": replace(MODEL, listing_digest="e" * 64)}, "model", "fail", "names or sizes"),
    ],
)
def test_the_node_that_differs_is_named(odd: Mapping[str, Any], check: str, level: Level, said: str) -> None:
    found = [finding for finding in check_cluster(nodes(**odd)) if finding.level != "ok"]
    assert levels(found) == {(check, level)}
    assert said in found[0].what
    assert found[0].what_to_do


def test_nodes_without_gpus_beside_others_differ_in_nothing_that_matters() -> None:
    without = {name: version for name, version in VERSIONS.items() if name not in ("driver", "NCCL")}
    found = check_cluster([*nodes(), cpu_node("10.0.0.4", versions=without)])
    assert {finding.level for finding in found} == {"ok"}


NEWER, OLDER = CpuFacts(8, None, "AVX512", "avx512_bf16"), CpuFacts(8, None, "AVX2", "avx2")


def test_cpus_of_two_kinds_matter_where_they_compute() -> None:
    two = [cpu_node(NAMES[0], cpu=NEWER), cpu_node(NAMES[1], cpu=OLDER)]
    (found,) = check_instructions(two, None)
    assert (found.check, found.level) == ("cpus", "warn")
    assert found.what == "several kinds: avx512_bf16 on 10.0.0.1, avx2 on 10.0.0.2"
    assert found.what_to_do.endswith("set cpu_instructions: avx2")
    assert check_instructions(two[:1] * 2, None) == []
    with_gpus = [replace(facts, gpus=(L40S,)) for facts in two]
    assert check_instructions(with_gpus, None) == []
    assert levels(check_instructions(with_gpus, deployment(device="cpu"))) == {("cpus", "warn")}


def test_cpus_that_differ_for_torch_alone() -> None:
    """One whose AVX512 lacks what the kernels need of it has those of AVX2, and another torch."""
    between = CpuFacts(8, None, "AVX512", "avx2")
    (found,) = check_instructions([cpu_node(NAMES[0], cpu=OLDER), cpu_node(NAMES[1], cpu=between)], None)
    assert "by which torch computes: AVX2 on 10.0.0.1, AVX512 on 10.0.0.2" in found.what
    two = [cpu_node(NAMES[0], cpu=NEWER), cpu_node(NAMES[1], cpu=OLDER)]
    (found,) = check_instructions(two, deployment(dtype="float32"))
    assert "by which torch computes" in found.what


def test_a_deployment_says_what_cpus_compute_with() -> None:
    three = [cpu_node(NAMES[0], cpu=NEWER), cpu_node(NAMES[1], cpu=OLDER), cpu_node(NAMES[2], cpu=CpuFacts(8))]
    (found,) = check_instructions(three[:2], deployment(cpu_instructions="avx2"))
    assert (found.level, found.what) == ("ok", "all have avx2, as cpu_instructions asks for")
    (found,) = check_instructions(three, deployment(cpu_instructions="avx512_bf16"))
    assert found.level == "fail"
    assert "'avx512_bf16', and the best is avx2 on 10.0.0.2, no kernels on 10.0.0.3" in found.what
    assert found.what_to_do.startswith("set cpu_instructions: avx2, or have no processes there")
    assert check_instructions([node()], deployment(cpu_instructions="amx")) == [], "nothing computes on its CPUs"


def test_clocks_count_as_far_as_they_are_beyond_doubt() -> None:
    assert levels(check_clocks("a", [ClockOffset("b", 0.002, 0.001), ClockOffset("c", -0.15, 0.1)])) == {
        ("clock", "ok")
    }
    (finding,) = check_clocks("a", [ClockOffset("b", -2.0, 0.001), ClockOffset("c", 0.0, 0.001)])
    assert finding.level == "warn"
    assert "b is 2.0 s behind a" in finding.what
    (finding,) = check_clocks("a", [ClockOffset("b", 3600.0, 0.001)])
    assert (finding.level, "b is 60 min ahead of a" in finding.what) == ("fail", True)
    assert check_clocks("a", []) == []


def test_what_ray_hands_out_is_what_is_there() -> None:
    facts = [node(NAMES[0]), node(NAMES[1])]
    well = {name: RayNode(name, {"CPU": 64.0, "GPU": 8.0}) for name in NAMES}
    assert check_ray_counts(well, facts) == []
    odd = well | {NAMES[0]: RayNode(NAMES[0], {"CPU": 128.0, "GPU": 4.0})}
    gpus, cpus = check_ray_counts(odd, facts)
    assert "hands out 4 GPUs, the node has 8" in gpus.what
    assert "hands out 128 CPUs, the node has 64" in cpus.what


def test_ray_without_a_token() -> None:
    assert check_access("token").level == "ok"
    assert check_access("disabled").level == "warn"


# ---- links ----------------------------------------------------------------------------------------------------------


def link(
    source: str, target: str, gbit_s: float | None = 95.0, trip_s: float = 50e-6, ahead_s: float = 0.0
) -> LinkSpeed:
    return LinkSpeed(source, target, trip_s, trip_s / 2, ahead_s, None if gbit_s is None else gbit_s * 1e9 / 8)


def mesh(**changes: LinkSpeed) -> list[LinkSpeed]:
    return [changes.get(a + b, link(a, b)) for a in "abc" for b in "abc" if a != b]


def test_links_that_are_fast_enough_are_one_line_with_what_a_token_needs() -> None:
    (finding,) = check_links(mesh(ab=link("a", "b", 90.0)), [])
    assert finding.level == "ok"
    assert "90 Gbit/s to 95 Gbit/s, round trips 50 us, 2.9 ms a token of R1" in finding.what
    assert f"at most {90e9 / 8 / R1_NEEDS.bytes_each_way:.0f} a second" in finding.what


@pytest.mark.parametrize(
    ("odd", "check", "level", "said"),
    [
        (link("a", "b", 0.5), "links", "fail", "a -> b 0.5 Gbit/s"),
        (link("a", "b", 9.4), "links", "warn", "a -> b 9.4 Gbit/s"),
        (link("a", "b", 40.0), "links", "warn", "half of the others reach more than 95 Gbit/s"),
        (link("a", "b", trip_s=0.9e-3), "round trips", "warn", "a -> b 900 us"),
        (link("a", "b", trip_s=30e-3), "round trips", "fail", "a -> b 30.0 ms"),
    ],
)
def test_slow_links_are_named(odd: LinkSpeed, check: str, level: Level, said: str) -> None:
    found = [finding for finding in check_links(mesh(ab=odd), []) if finding.level != "ok"]
    assert levels(found) == {(check, level)}
    assert said in found[0].what


def test_links_that_fail_are_named() -> None:
    (failed,) = check_links([], [LinkFailure("a", "b", "cannot be reached (No route to host)")])
    assert failed.level == "fail"
    assert "a -> b: cannot be reached" in failed.what
    assert "open all TCP ports" in failed.what_to_do


def test_round_trips_alone_are_judged_too() -> None:
    (finding,) = check_links([link("a", "b", None)], [])
    assert finding.what.startswith("round trips 50 us")


def test_where_many_links_are_slow_the_slowest_are_named() -> None:
    slow = [link(f"n{index}", "m", 5.0 + index) for index in range(9)]
    (_, finding) = check_links(slow, [])
    assert finding.what.startswith("n0 -> m 5 Gbit/s, n1 -> m 6 Gbit/s")
    assert "and 4 more" in finding.what
    assert "--network 5.6`" in finding.what_to_do  # of which a plan takes nine tenths for payload


def test_what_r1_needs_is_what_its_architecture_says() -> None:
    assert token_needs("R1", R1_CONFIG) == R1_NEEDS
    assert LINK_SLOW == 25e9 / 8 * 0.9


def test_clock_offsets_are_those_of_the_quickest_way_seen_from_the_reference() -> None:
    links = [
        link("a", "b", trip_s=4e-3, ahead_s=5.0),
        link("b", "a", trip_s=2e-3, ahead_s=-4.0),
        link("c", "a", ahead_s=1.0),
        link("b", "c", ahead_s=9.0),
    ]
    found = {offset.node: offset for offset in clock_offsets("a", links)}
    assert found == {"b": ClockOffset("b", 4.0, 0.5e-3), "c": ClockOffset("c", -1.0, 12.5e-6)}


@pytest.mark.parametrize("count", range(9))
def test_rounds_hold_every_pair_once_and_no_node_twice_at_a_time(count: int) -> None:
    names = [f"n{index}" for index in range(count)]
    plan = rounds(names)
    assert len(plan) <= max(count, 1)
    pairs = [frozenset(pair) for pairs in plan for pair in pairs]
    assert len(pairs) == len(set(pairs)) == count * (count - 1) // 2
    for pairs_at_once in plan:
        busy = [name for pair in pairs_at_once for name in pair]
        assert len(busy) == len(set(busy))


# ---- lines ----------------------------------------------------------------------------------------------------------


def test_lines_that_nodes_share_are_printed_once() -> None:
    def at(name: str, finding: Finding) -> Finding:
        return replace(finding, node=name)

    same, odd = ok("cpus", "64"), warn("memory", "1 GiB", "free some")
    shown = merged([at("a", same), at("a", odd), at("b", same), at("c", same), at("c", odd)], 3)
    assert shown == [at("all 3", same), at("a, c", odd)]


def test_of_many_lines_that_say_all_is_well_a_few_are_printed() -> None:
    well = [replace(ok("memory", f"{index} GiB"), node=f"n{index}") for index in range(20)]
    bad = replace(warn("memory", "0 GiB", "free some"), node="n20")
    shown = merged([*well, bad], 21)
    assert [finding.level for finding in shown] == ["ok"] * 4 + ["warn", "ok"]
    assert "16 more" in shown[-1].what


# ---- deployments ----------------------------------------------------------------------------------------------------


def deployment(**settings: Any) -> Deployment:
    return Deployment.from_dict({"model": "/models/r1", **settings})


def test_a_deployment_that_finds_what_it_asks_for() -> None:
    three = nodes()
    found = check_deployment(deployment(experts={"hosts": 23}, link="nccl"), TWO_LAYERS, three, {})
    assert levels(found) == {("deployment", "ok"), ("plan", "ok")}
    assert "24 of 24 GPUs" in found[0].what


ON_CPUS = {"device": "cpu", "experts": {"hosts": 2, "resources": {"moray_expert": 1}}}
HEAD = {"node:__internal_head__": 1.0}


@pytest.mark.parametrize(
    ("settings", "offered", "said"),
    [
        ({"experts": {"hosts": 24}}, None, "25 GPUs, there are 24"),
        ({"experts": {"hosts": 23}}, {"CPU": 64.0, "GPU": 4.0, **HEAD}, "24 GPUs, there are 12"),
        (ON_CPUS, {"CPU": 64.0, **HEAD}, "2 of the resource 'moray_expert', the nodes offer 0"),
        ({"device": "cpu"}, {"CPU": 64.0}, "0.001 of the resource 'node:__internal_head__'"),
    ],
)
def test_a_deployment_that_asks_for_more_than_there_is(
    settings: dict[str, Any], offered: dict[str, float] | None, said: str
) -> None:
    ray = {} if offered is None else {name: RayNode(name, offered) for name in NAMES}
    (found,) = [f for f in check_deployment(deployment(**settings), None, nodes(), ray) if f.level == "fail"]
    assert said in found.what


def test_a_deployment_on_gpus_where_there_are_none() -> None:
    found = check_deployment(deployment(device="cuda"), None, [cpu_node()], {})
    assert "there is no GPU" in found[0].what


def test_fewer_cpus_than_processes_want_is_no_error_where_moray_starts_ray() -> None:
    wanted = deployment(device="cpu", experts={"hosts": 100})
    assert levels(check_deployment(wanted, None, [cpu_node()], {})) == {("deployment", "warn")}
    offered = {NAMES[0]: RayNode(NAMES[0], {"CPU": 64.0, **HEAD})}
    assert levels(check_deployment(wanted, None, [cpu_node()], offered)) == {("deployment", "fail")}


@pytest.mark.parametrize(
    ("link_kind", "facts", "level", "said"),
    [
        ("nccl", [node(NAMES[0]), node(NAMES[1], nccl=False)], "fail", "no NCCL on 10.0.0.2"),
        ("nccl", [cpu_node()], "fail", "no node has GPUs"),
        ("shm", [node(NAMES[0]), node(NAMES[1])], "warn", "joins processes of one node"),
    ],
)
def test_links_a_deployment_cannot_have(link_kind: str, facts: list[NodeFacts], level: Level, said: str) -> None:
    found = check_deployment(deployment(link=link_kind, device="auto"), None, facts, {})
    assert any(finding.level == level and said in finding.what for finding in found)


def test_the_port_of_its_front_is_taken() -> None:
    taken = cpu_node(ports=(PortFacts(8000, "Serve's HTTP proxy", "nginx (pid 80)", False),))
    ours = cpu_node(ports=(PortFacts(8000, "Serve's HTTP proxy", "ray::ProxyActor (pid 81)", True),))
    (found,) = [f for f in check_deployment(deployment(), None, [taken], {}) if f.level == "fail"]
    assert "front.port = 8000 is taken by nginx (pid 80)" in found.what
    assert {f.level for f in check_deployment(deployment(), None, [ours], {})} == {"ok"}


def test_what_does_not_fit_is_said_with_what_would_make_it_fit() -> None:
    found = check_deployment(deployment(experts={"hosts": 7}), R1_CONFIG, [node()], {})
    plan = [finding for finding in found if finding.check == "plan"]
    assert {finding.level for finding in plan} == {"fail"}
    assert all(finding.what_to_do for finding in plan)


def test_a_cold_tier_goes_to_nodes_without_gpus() -> None:
    wanted = deployment(experts={"hosts": 7, "cold": {"hosts": 1, "cpus": 8}})
    found = check_deployment(wanted, TWO_LAYERS, [node(NAMES[0]), cpu_node(NAMES[1])], {})
    assert levels(found) == {("deployment", "ok"), ("plan", "ok")}
    assert "16 of 128 CPUs, 8 of 8 GPUs" in found[0].what


def test_a_gpu_that_no_plan_knows() -> None:
    strange = node(gpus=(replace(L40S, name="Z9000"),) * 8)
    (found,) = [f for f in check_deployment(deployment(), R1_CONFIG, [strange], {}) if f.check == "plan"]
    assert found.level == "warn"
    assert "Z9000" in found.what


@pytest.mark.parametrize(
    ("name", "gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "H100"),
        ("NVIDIA A100-SXM4-40GB", 40.0, "A100-40G"),
        ("NVIDIA A100-SXM4-80GB", 80.0, "A100-80G"),
        ("NVIDIA GeForce RTX 4090", 24.0, "RTX4090"),
        ("NVIDIA RTX A6000", 48.0, "A6000"),
        ("NVIDIA RTX 6000 Ada Generation", 48.0, "RTX6000Ada"),
        ("NVIDIA L4", 22.5, "L4"),
        ("NVIDIA L40S", 45.0, "L40S"),
        ("NVIDIA H20", 95.6, "H20"),
        ("NVIDIA H200", 140.4, "H200"),
    ],
)
def test_kinds_by_the_names_of_the_driver(name: str, gib: float, kind: str) -> None:
    assert known_kind(replace(L40S, name=name, memory_total=int(gib * GIB))).name == kind


def test_a_kind_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="Voodoo"):
        known_kind(replace(L40S, name="Voodoo"))
