"""Whether a plan says yes and no where it should, and whether what it suggests then helps."""

from __future__ import annotations

from typing import Any

import pytest

from moray.cluster.planning.footprint import BUFFERS, CONTEXT, KV_PAGES, SCALES, WEIGHTS
from moray.cluster.planning.layout import lay_out
from moray.cluster.planning.nodes import parse_nodes, with_figures
from moray.cluster.planning.plan import Plan, make_plan
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.model.config import ModelConfig
from moray.model.testing import SMALL_CONFIG

from .plan_models import R1_CONFIG, SHORT_CONFIG

SMALL = ModelConfig.from_dict(dict(SMALL_CONFIG))


def planned(
    nodes: str, settings: dict[str, Any] | None = None, *, config: ModelConfig = R1_CONFIG, **options: Any
) -> Plan:
    deployment = Deployment.from_dict(settings or {})
    return make_plan("DeepSeek-R1", config, parse_nodes(nodes), deployment, batches=(1,), **options)


@pytest.mark.parametrize(
    "nodes", ["17x1xL40S", "2x8xL40S,1x1xL40S", "3x8xL40S", "3x8xA6000", "4x8xRTX4090", "2x8xH100", "1x8xH200"]
)
def test_r1_fits(nodes: str) -> None:
    plan = planned(nodes)
    assert plan.fits
    assert not plan.changes
    assert plan.requests_at_once >= 1
    assert plan.placement is not None
    assert plan.placement.replicas == (1, 1)
    assert all(device.left >= 0 for device in plan.layout.devices)


def test_r1_does_not_fit_on_eight_of_80_gb() -> None:
    plan = planned("1x8xH100")
    assert not plan.fits
    assert plan.problems == (
        "all together: 680.1 GB needed, 650.0 GB usable of 684.2 GB",
        "7 devices with an expert host each: up to 94.1 GB needed, 81.2 GB usable of 85.5 GB",
    )
    assert [change.what for change in plan.changes] == [
        "8 H20 in place of the 8 GPUs there are",
        "2 more H100: 10 in all",
    ]
    assert plan.changes[0].extra_bytes < plan.changes[1].extra_bytes
    assert planned("1x8xH20").fits
    assert planned("1x8xH100,1x2xH100").fits
    assert not planned("1x8xH100,1x1xH100").fits
    assert not plan.steps


def test_r1_needs_the_published_800_gb() -> None:
    """As 80 GB cards: ten of them, not nine."""
    assert [planned(f"{count}x1xH100").fits for count in (9, 10)] == [False, True]


def test_memory_adds_up() -> None:
    plan = planned("3x8xL40S")
    sizes, layout = plan.sizes, plan.layout
    assert layout.table is not None
    placed = {(index, e) for layers in layout.table.slots.values() for index, held in enumerate(layers) for e in held}
    assert len(placed) == 58 * 256
    hosts = [layout.process(host) for host in layout.hosts]
    assert sum(host.slots for host in hosts) == 58 * 256
    assert sum(host.disk_bytes for host in hosts) == 58 * 256 * 44_050_944
    for host in hosts:
        assert host.memory[WEIGHTS] + host.memory[SCALES] == host.slots * sizes.expert.total
        assert KV_PAGES not in host.memory
        assert host.memory[CONTEXT] > 0
    router = layout.process("router-0")
    assert router.memory[KV_PAGES] == layout.cache_tokens * sizes.kv_token_bytes
    device = layout.routers["router-0"]
    page = plan.deployment.routers.page_size * sizes.kv_token_bytes
    assert 0 <= device.left < page, "all that is left holds pages"
    on_its_node = [host for host in layout.hosts.values() if host.node.name == device.node.name]
    assert len(on_its_node) == 7
    assert router.memory[BUFFERS] > 0, "for the links to other nodes"
    assert router.node_memory[BUFFERS] > 0, "for those to its own"


def test_routers_share_no_network_card_while_there_are_others() -> None:
    plan = planned("3x8xL40S", {"routers": {"replicas": 3}})
    assert [device.node.name for device in plan.layout.routers.values()] == ["node0-0", "node0-1", "node0-2"]
    assert len(plan.layout.hosts) == 21
    assert plan.requests_at_once == 3 * (plan.layout.cache_tokens // 8192)


@pytest.mark.parametrize(("nodes", "routers", "on_nodes"), [("2x8xH200", 1, (1, 2)), ("2x9xH200", 2, (2, 2))])
def test_two_copies_are_on_two_nodes_where_these_have_the_slots(
    nodes: str, routers: int, on_nodes: tuple[int, int]
) -> None:
    """With one router there are 7 hosts on its node and 8 on the other: 239 slots a layer for 256 experts there."""
    settings = {"experts": {"min_replicas": 2}, "routers": {"replicas": routers}}
    plan = planned(nodes, settings, config=SHORT_CONFIG)
    assert plan.fits
    assert plan.placement is not None
    assert plan.placement.replicas == (2, 2)
    assert plan.placement.nodes_per_expert == on_nodes
    assert bool(plan.layout.shortages) == (on_nodes[0] < 2)


@pytest.mark.parametrize(
    ("nodes", "settings", "options", "change"),
    [
        ("3x1xH100", {"experts": {"min_replicas": 2}}, {"config": SHORT_CONFIG}, "experts.min_replicas: 1"),
        ("1x8xH200", {"experts": {"spare_slots": 20}}, {}, "experts.spare_slots: 0"),
        ("17x1xL40S", {"routers": {"replicas": 4}}, {}, "routers.replicas: 1"),
        ("4x8xRTX4090", {}, {"context": 40000}, "routers.kv_cache: fp8"),
        (
            "4x8xRTX4090",
            {"routers": {"kv_cache": "fp8"}},
            {"context": 80000},
            "a max_context of 40000 instead of 80000",
        ),
    ],
)
def test_settings_come_before_hardware(
    nodes: str, settings: dict[str, Any], options: dict[str, Any], change: str
) -> None:
    plan = planned(nodes, settings, **options)
    assert not plan.fits
    assert plan.changes[0].what == change
    assert plan.changes[0].extra_bytes == 0


@pytest.mark.parametrize(
    ("nodes", "settings", "options", "problem"),
    [
        ("1x1xB200", {}, {}, "no GPU is left for experts: 1 GPUs, 1 routers of 1 each"),
        (
            "1x2xB200",
            {"routers": {"replicas": 3}},
            {},
            "3 routers of 1 GPUs each are asked for, and 2 GPUs hold 2 of them",
        ),
        ("1x8xH200", {"experts": {"min_replicas": 8}}, {}, "8 replicas on distinct hosts are asked for"),
        ("1x8xH200", {}, {"hosts": 8}, "8 expert hosts are asked for, and there is room for 7"),
        ("1x8xH200", {}, {"cache_tokens": 10_000_000}, "GB of KV pages for 10000000 tokens are asked for"),
        (
            "1x8xH200",
            {},
            {"cache_tokens": 4096},
            "a router has room for 4096 tokens of KV, and one request may have 8192",
        ),
        ("2xcpu:200", {"dtype": "float32"}, {}, "GB needed"),
    ],
)
def test_every_reason_is_told(nodes: str, settings: dict[str, Any], options: dict[str, Any], problem: str) -> None:
    plan = planned(nodes, settings, config=SHORT_CONFIG, **options)
    assert not plan.fits
    assert any(problem in told for told in plan.problems), plan.problems


def test_a_nodes_own_memory_counts() -> None:
    groups = with_figures(parse_nodes("1x8xH200"), memory_gib=16)
    plan = make_plan("DeepSeek-R1", SHORT_CONFIG, groups, Deployment.from_dict({}))
    (problem,) = plan.problems
    assert problem.startswith("node0-0: its processes need ")
    assert problem.endswith("GiB of its own memory, which has 16.0")


def test_processes_may_share_a_gpu() -> None:
    halves = {"experts": {"gpus": 0.5}, "routers": {"gpus": 0.5}}
    plan = make_plan("small", SMALL, parse_nodes("1x1xL4"), Deployment.from_dict(halves))
    assert plan.fits
    (device,) = plan.layout.devices
    assert {process.id for process in device.processes} == {"expert-host-0", "router-0"}


def test_hosts_beyond_the_experts_are_not_planned() -> None:
    plan = make_plan("small", SMALL, parse_nodes("4x8xL4"), Deployment.from_dict({}))
    assert plan.fits
    assert len(plan.layout.hosts) == SMALL.n_routed_experts
    assert sum(not device.processes for device in plan.layout.devices) == 32 - 1 - SMALL.n_routed_experts


def test_nodes_without_gpus_hold_fp8_unless_they_compute_by_torch() -> None:
    fp8 = planned("8xcpu:768")
    assert fp8.sizes.expert.weights == 3 * 7168 * 2048
    plan = planned("8xcpu:768", {"dtype": "float32"})
    assert plan.fits
    assert len(plan.layout.hosts) == 8
    assert plan.layout.process("expert-host-0").memory[SCALES] == 0
    assert plan.sizes.expert.total == 4 * 3 * 7168 * 2048
    assert CONTEXT not in plan.layout.process("router-0").memory


@pytest.mark.parametrize(
    ("nodes", "experts"),
    [("3x8xL40S", {}), ("8xcpu:768", {}), ("2x8xH200", {"spare_slots": 3}), ("2x8xH200", {"min_replicas": 2})],
)
def test_the_search_counts_slots_as_the_placement_does(nodes: str, experts: dict[str, int]) -> None:
    plan = planned(nodes, {"experts": experts}, config=SHORT_CONFIG)
    quick = lay_out(
        plan.sizes, plan.groups, plan.deployment, hosts=None, max_context=8192, cache_tokens=None, table=False
    )
    assert {h: quick.process(h).slots for h in quick.hosts} == {h: plan.layout.process(h).slots for h in quick.hosts}


def test_more_memory_is_suggested_where_there_is_no_gpu() -> None:
    def fits(nodes: str) -> bool:
        return planned(nodes, {"dtype": "float32"}, config=SHORT_CONFIG).fits

    plan = planned("8xcpu:50", {"dtype": "float32"}, config=SHORT_CONFIG)
    assert not plan.fits
    (grown, more) = sorted((change.what for change in plan.changes), key=lambda what: "more nodes" in what)
    gib = int(grown.split()[0])
    assert fits(f"8xcpu:{50 + gib}")
    assert not fits(f"8xcpu:{50 + gib - 1}")
    nodes = int(more.split()[0])
    assert fits(f"{8 + nodes}xcpu:50")
    assert not fits(f"{8 + nodes - 1}xcpu:50")


def test_unknown_memory_is_not_a_problem() -> None:
    plan = make_plan("small", SMALL, parse_nodes("1xcpu"), Deployment.from_dict({}))
    assert plan.fits


@pytest.mark.parametrize("context", [0, 163841])
def test_a_context_the_model_was_not_made_for(context: int) -> None:
    with pytest.raises(ConfigError, match=f"context = {context}: must be from 1 to 163840"):
        planned("1x8xH200", context=context)


def test_a_model_without_experts() -> None:
    dense = ModelConfig.from_dict(dict(SMALL_CONFIG) | {"first_k_dense_replace": 3})
    with pytest.raises(ConfigError, match="no layer with routed experts"):
        make_plan("dense", dense, parse_nodes("1x8xL4"), Deployment.from_dict({}))
