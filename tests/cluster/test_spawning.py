"""What processes ask of Ray: CPUs, GPUs, resource labels; and what is said where there is too little of it. Without Ray."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moray.cluster.assembly import host_compute, host_names
from moray.cluster.ray_server import logical_resources
from moray.cluster.spawning import Spawner, lacking, needs
from moray.configs.deployment import Deployment
from moray.model.compute import Compute

LABELLED = Deployment.from_dict(
    {
        "experts": {
            "hosts": 3,
            "max_hosts": 3,
            "standby": 1,
            "cpus": 2,
            "gpus": 0.5,
            "resources": {"moray_expert": 1},
            "cold": {"hosts": 1, "max_hosts": 2, "cpus": 8, "resources": {"moray_cold": 0.25, "moray_expert": 1}},
        },
        "routers": {"max_replicas": 2, "resources": {"moray_router": 1}},
    }
)


def test_what_each_process_reserves() -> None:
    experts, cold, routers = LABELLED.experts, LABELLED.experts.cold, LABELLED.routers
    assert needs(experts, on_gpu=True) == {"CPU": 2.0, "GPU": 0.5, "moray_expert": 1.0}
    assert needs(experts, on_gpu=False) == {"CPU": 2.0, "moray_expert": 1.0}
    assert needs(cold, on_gpu=True) == {"CPU": 8.0, "moray_cold": 0.25, "moray_expert": 1.0}
    assert needs(routers, on_gpu=True) == {"CPU": 1.0, "GPU": 1.0, "moray_router": 1.0}


def test_processes_are_spread_and_labelled() -> None:
    spawner = Spawner("test")
    cuda = Compute(torch.device("cuda"), torch.bfloat16)
    name, options = spawner._options("expert-host-0", LABELLED.experts, cuda)
    assert name.startswith("expert-host-0.")
    found = {key: options[key] for key in ("num_cpus", "num_gpus", "resources", "scheduling_strategy", "max_restarts")}
    assert found == {
        "num_cpus": 2.0,
        "num_gpus": 0.5,
        "resources": {"moray_expert": 1.0},
        "scheduling_strategy": "SPREAD",
        "max_restarts": 0,
    }
    _, options = spawner._options("cold-host-0", LABELLED.experts.cold, Compute.on_cpu())
    assert (options["num_cpus"], options["num_gpus"]) == (8.0, 0)


CPU_AND_LABEL = {"CPU": 2.0, "moray_expert": 1.0}


@pytest.mark.parametrize(
    ("more", "free", "expected"),
    [
        ([(CPU_AND_LABEL, 2)], [{"CPU": 4.0, "moray_expert": 2.0}], []),
        ([(CPU_AND_LABEL, 2)], [{"CPU": 2.0, "moray_expert": 1.0, "memory": 9.0}] * 2, []),
        ([(CPU_AND_LABEL, 3)], [{"CPU": 4.0, "moray_expert": 1.0}], ["2 more CPUs", "2 more moray_expert"]),
        ([(CPU_AND_LABEL, 1)], [{"CPU": 8.0}], ["1 more moray_expert"]),
        (
            [(CPU_AND_LABEL, 1)],
            [{"CPU": 8.0}, {"moray_expert": 4.0}],
            ["2 CPU and 1 moray_expert on one node, 1 times more"],
        ),
        ([({"CPU": 2.0}, 2)], [{"CPU": 3.0}, {"CPU": 1.0}], ["2 CPU on one node, 1 times more"]),
        ([({"CPU": 1.0, "GPU": 0.5}, 2), ({"CPU": 1.0, "GPU": 1.0}, 1)], [{"CPU": 9.0, "GPU": 1.0}], ["1 more GPUs"]),
        ([({"CPU": 1.0, "x": 0.1}, 3)], [{"CPU": 3.0, "x": 0.3}], []),
        ([({"CPU": 1.0}, 1)], [], ["1 more CPUs"]),
        ([({"CPU": 1.0, "GPU": 1.0}, 0)], [], []),
    ],
)
def test_what_is_lacking(more: Any, free: Any, expected: list[str]) -> None:
    assert lacking(more, free) == expected


def test_a_cluster_of_its_own_claims_every_label() -> None:
    cpus, labels = logical_resources(LABELLED)
    assert cpus == 4 * 2 + 2 * 8 + 2 * 1
    assert labels == {"moray_expert": 6.0, "moray_cold": 1.0, "moray_router": 2.0}
    assert logical_resources(Deployment.from_dict({"experts": {"hosts": 9}}))[1] == {}


@pytest.mark.parametrize(
    ("settings", "gpus", "usual", "cold"),
    [
        ({}, 0, Compute.native(), Compute.native()),
        ({"dtype": "float32"}, 0, Compute.on_cpu(), Compute.on_cpu()),
        ({"dtype": "float32", "fp8": "keep"}, 0, *[Compute(torch.device("cpu"), torch.float32, keep_fp8=True)] * 2),
        ({"fp8": "decode"}, 0, *[Compute(torch.device("cpu"), torch.bfloat16, packed=True)] * 2),
        ({}, 8, Compute(torch.device("cuda"), torch.bfloat16, keep_fp8=True), Compute.native()),
        (
            {"dtype": "bfloat16", "fp8": "decode"},
            8,
            Compute(torch.device("cuda"), torch.bfloat16),
            Compute.native(),
        ),
        (
            {"experts": {"cold": {"dtype": "float32", "fp8": "keep"}}},
            8,
            Compute(torch.device("cuda"), torch.bfloat16, keep_fp8=True),
            Compute(torch.device("cpu"), torch.float32, keep_fp8=True),
        ),
    ],
)
def test_what_each_kind_computes_with(settings: dict[str, Any], gpus: float, usual: Compute, cold: Compute) -> None:
    deployment = Deployment.from_dict(settings)
    assert host_compute(deployment, "expert-host-0", gpus=gpus) == usual
    assert host_compute(deployment, "standby", gpus=gpus) == usual
    assert host_compute(deployment, "cold-host-0", gpus=gpus) == cold


def test_names_tell_the_kind() -> None:
    assert host_names(LABELLED.experts) == ["expert-host-0", "expert-host-1", "expert-host-2", "cold-host-0"]
