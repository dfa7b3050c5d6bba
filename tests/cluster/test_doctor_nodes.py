"""`moray doctor`: what each check says of one node, by facts that are made up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from moray.cluster.diagnosis import node_checks
from moray.cluster.diagnosis.collect import SCRATCH, SHM
from moray.cluster.diagnosis.facts import (
    CpuFacts,
    DiskFacts,
    MemoryFacts,
    ModelFacts,
    NetworkFacts,
    NodeFacts,
    PortFacts,
    SpaceFacts,
)
from moray.cluster.diagnosis.findings import Finding, Level
from moray.cluster.diagnosis.node_checks import check_node
from moray.configs.errors import ClusterError

from .doctor_facts import GIB, L40S, MODEL, VERSIONS, cpu_node, node

MIB = 1 << 20


def disk(bytes_per_s: float) -> ModelFacts:
    return replace(MODEL, disk=DiskFacts(read_bytes=int(bytes_per_s), seconds=1.0, how="direct"))


def space(what: str, free: int, total: int) -> Mapping[str, SpaceFacts]:
    return {**node().spaces, what: SpaceFacts("/there", total, free)}


def of(facts: NodeFacts, check: str) -> list[Finding]:
    return [finding for finding in check_node(facts) if finding.check == check]


def test_where_all_is_well_every_check_says_one_line_with_its_value() -> None:
    findings = check_node(node())
    assert [finding.check for finding in findings] == [
        "versions",
        "gpus",
        "cpus",
        "memory",
        "shared memory",
        "ulimits",
        "scratch space",
        "ports",
        "network",
        "model",
        "disk",
    ]
    assert {finding.level for finding in findings} == {"ok"}
    assert {finding.node for finding in findings} == {"10.0.0.1"}
    assert not any(finding.what_to_do for finding in findings)
    said = {finding.check: finding.what for finding in findings}
    assert "torch 2.13.0+cu130" in said["versions"]
    assert said["gpus"] == "8x NVIDIA L40S (sm_89, 45.0 GiB)"
    assert said["memory"] == "500.0 GiB free of 512.0 GiB"
    assert said["network"] == "10.0.0.1 on eth0, MTU 9000, 100 Gbit/s"
    assert said["disk"] == "3.00 GB/s read of /models/r1"


CASES: list[tuple[str, dict[str, Any], Level, str]] = [
    ("versions", {"versions": VERSIONS | {"ray": ""}}, "fail", "ray: not installed"),
    ("versions", {"versions": VERSIONS | {"triton": ""}}, "fail", "triton: not installed"),
    ("gpus", {"gpus": (replace(L40S, name="Tesla V100", architecture=70),) * 8}, "fail", "Tesla V100 is sm_70"),
    ("gpus", {"torch_gpus": 7}, "fail", "the driver has 8, torch can use 7"),
    ("gpus", {"torch_gpus": 0, "versions": VERSIONS | {"CUDA": ""}}, "fail", "built without CUDA"),
    ("gpus", {"gpu_problem": "nvidia-smi fails: version mismatch"}, "fail", "version mismatch"),
    ("gpus", {"gpu_problem": "nvidia-smi fails: no answer", "gpus": ()}, "fail", "no answer"),
    ("gpus", {"compiler": ""}, "fail", "no C compiler"),
    ("gpus", {"nccl": False}, "warn", "without NCCL"),
    ("gpus", {"gpus": (replace(L40S, memory_free=30 * GIB), *(L40S,) * 7)}, "warn", "GPU 0: 15.0 GiB of 45.0 GiB"),
    ("gpus", {"gpus": (L40S, replace(L40S, uncorrected_errors=3), *(L40S,) * 6)}, "fail", "GPU 1: 3 uncorrected"),
    ("gpus", {"gpus": (replace(L40S, persistent=False),) * 8}, "warn", "persistence mode"),
    ("cpus", {"cpu": CpuFacts(64, 7.5)}, "warn", "7.5 of 64"),
    ("memory", {"memory": MemoryFacts(512 * GIB, GIB)}, "fail", "1.0 GiB free"),
    ("memory", {"memory": MemoryFacts(512 * GIB, 200 * GIB)}, "warn", "200.0 GiB free"),
    ("memory", {"memory": MemoryFacts(512 * GIB, 500 * GIB, limit=GIB)}, "fail", "limit is 1.0 GiB"),
    ("swap", {"memory": MemoryFacts(8 * GIB, 8 * GIB, None, 4 * GIB, GIB)}, "warn", "1.0 GiB of 4.0 GiB"),
    ("shared memory", {"spaces": space(SHM, 64 * MIB, 64 * MIB)}, "fail", "0.1 GiB free"),
    ("shared memory", {"spaces": space(SHM, 512 * MIB, 512 * MIB)}, "warn", "0.5 GiB free"),
    ("shared memory", {"spaces": {}}, "fail", "missing"),
    ("ulimits", {"limits": {"nofile": 1024}}, "fail", "1024 open files"),
    ("ulimits", {"limits": {"nofile": 20000}}, "warn", "20000 open files"),
    ("ulimits", {"limits": {"nproc": 4096}}, "warn", "4096 processes"),
    ("ulimits", {"limits": {"memlock": 8 * MIB}}, "warn", "8192 KiB of locked memory"),
    ("scratch space", {"spaces": space(SCRATCH, 4 * GIB, 100 * GIB)}, "fail", "4.0 GiB free"),
    ("scratch space", {"spaces": space(SCRATCH, 10 * GIB, 100 * GIB)}, "warn", "10.0 GiB free"),
    ("scratch space", {"spaces": {}}, "fail", "no directory"),
    ("ports", {"ports": (PortFacts(6379, "Ray's head", "redis (pid 7)", False),)}, "warn", "6379 (Ray's head)"),
    ("network", {"network": NetworkFacts("10.9.9.9")}, "fail", "no interface"),
    ("network", {"network": NetworkFacts("10.0.0.1", "eth0", 576)}, "warn", "MTU 576"),
    ("network", {"network": NetworkFacts("10.0.0.1", "eth0", 1500, 10**10)}, "warn", "10 Gbit/s"),
    ("model", {"model": ModelFacts("/m", problem="/m: no such directory")}, "fail", "no such directory"),
    (
        "model",
        {"model": replace(MODEL, missing_bytes=10**12, space=SpaceFacts("/cache", 10**11, 10**11))},
        "fail",
        "1000.00 GB are to be fetched; /cache has 100.00 GB free",
    ),
    ("disk", {"model": disk(0.5e9)}, "warn", "0.50 GB/s"),
    ("disk", {"model": disk(20e6)}, "fail", "0.02 GB/s"),
]


@pytest.mark.parametrize(("check", "changes", "level", "said"), CASES)
def test_what_is_wrong_is_said_with_its_value_and_what_to_do(
    check: str, changes: dict[str, Any], level: Level, said: str
) -> None:
    facts = node(**changes)
    found = [finding for finding in of(facts, check) if said in finding.what]
    assert [finding.level for finding in found] == [level]
    assert found[0].what_to_do
    others = [
        finding for finding in check_node(facts) if finding.check not in (check, "shared memory", "scratch space")
    ]
    assert {finding.level for finding in others} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "said"),
    [
        (
            {"ports": (PortFacts(6379, "Ray's head", "gcs_server (pid 7)", True),)},
            "ports",
            "in use by Ray: 6379",
        ),
        ({"limits": {"nofile": None, "nproc": None, "memlock": None}}, "ulimits", "unlimited open files"),
        ({"model": replace(MODEL, disk=DiskFacts(problem="12 MB are too little to measure"))}, "disk", "not measured"),
        ({"model": replace(MODEL, missing_bytes=10**9)}, "model", "1.00 GB to be fetched"),
        ({"cpu": CpuFacts(8, 8.0)}, "cpus", "8"),
    ],
)
def test_what_is_unusual_and_well(changes: dict[str, Any], check: str, said: str) -> None:
    (finding,) = of(node(**changes), check)
    assert finding.level == "ok"
    assert said in finding.what


def test_a_node_without_gpus_needs_nothing_of_what_they_need() -> None:
    facts = cpu_node(versions=VERSIONS | {"triton": "", "CUDA": "", "driver": ""}, compiler="", limits={"memlock": MIB})
    assert {finding.level for finding in check_node(facts)} == {"ok"}
    (gpus,) = of(facts, "gpus")
    assert gpus.what.startswith("none")


def test_without_a_model_nothing_is_said_of_it() -> None:
    assert not {"model", "disk"} & {finding.check for finding in check_node(node(model=None))}


def test_page_cache_is_owned_up_to() -> None:
    (finding,) = of(node(model=replace(MODEL, disk=replace(MODEL.disk, how="dropped"))), "disk")
    assert "page cache" in finding.what


def test_facts_cross_as_plain_data() -> None:
    facts = node()
    assert NodeFacts.from_dict(facts.to_dict()) == facts
    strange = facts.to_dict()
    del strange["memory"]
    with pytest.raises(ClusterError, match=r"memory.*another version of Moray"):
        NodeFacts.from_dict(strange)


def test_every_check_is_asked() -> None:
    named = {name for name in vars(node_checks) if name.startswith("check_") and name != "check_node"}
    assert named == {check.__name__ for check in node_checks.CHECKS}
