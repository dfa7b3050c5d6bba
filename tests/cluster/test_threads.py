"""How many threads each process computes with: a decision without any process."""

from __future__ import annotations

import os

import pytest
import torch

from moray.cluster import threads
from moray.cluster.threads import (
    cores_here,
    given_threads,
    host_threads_here,
    most_on_a_node,
    share_of_cores,
    threads_here,
)
from moray.configs.deployment import Deployment
from moray.configs.errors import ConfigError
from moray.model.compute import Compute

CUDA = Compute(torch.device("cuda"), torch.bfloat16)


@pytest.mark.parametrize(
    ("cores", "alike", "each"), [(2, 1, 2), (2, 2, 1), (2, 3, 1), (64, 4, 16), (64, 5, 12), (1, 0, 1), (8, 0, 8)]
)
def test_processes_of_one_kind_share_the_cores(cores: int, alike: int, each: int) -> None:
    assert share_of_cores(cores, alike) == each


def test_what_a_deployment_says_counts() -> None:
    for computing in (Compute.native(), Compute.on_cpu(), CUDA):
        assert given_threads(3, 1, computing) == 3
        assert given_threads(None, 4, computing) == 4


def test_the_native_kernels_alone_take_what_there_is() -> None:
    """torch's sums depend on the number of threads, and a GPU has little use for any."""
    assert given_threads(None, 1, Compute.native()) is None
    assert given_threads(None, 1, Compute.on_cpu()) == 1
    assert given_threads(None, 1, CUDA) == 1


def test_processes_are_spread_over_the_nodes_they_can_be_on() -> None:
    head, plain, labelled = {"memory": 1e9}, {"CPU": 8.0}, {"CPU": 8.0, "moray_expert": 4.0}
    assert most_on_a_node(2, {}, [plain]) == 2
    assert most_on_a_node(5, {}, [head, plain, plain]) == 3
    assert most_on_a_node(4, {"moray_expert": 1}, [plain, labelled, labelled]) == 2
    assert most_on_a_node(3, {"moray_expert": 1}, [plain]) == 3, "the nodes are still to come"
    assert most_on_a_node(0, {}, []) == 0


def test_two_hosts_and_a_router_on_two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr(threads, "cpu_limit", lambda: None)
    assert (threads_here(None, most_on_a_node(2, {}, [{"CPU": 3.0}])), threads_here(None, 1)) == (1, 2)
    assert threads_here(5, 2) == 5


@pytest.mark.parametrize(
    ("cores", "alike", "each"), [(2, 2, 2), (2, 1, 2), (2, 3, 1), (1, 1, 1), (3, 2, 2), (4, 2, 2), (64, 4, 16)]
)
def test_a_host_uses_the_core_of_one_that_is_done(
    cores: int, alike: int, each: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than two threads on a core."""
    monkeypatch.setattr(threads, "cores_here", lambda: cores)
    assert host_threads_here(None, alike) == each
    assert host_threads_here(5, alike) == 5


@pytest.mark.parametrize(("limit", "cores"), [(None, 4), (8.0, 4), (2.5, 2), (0.3, 1)])
def test_a_container_has_the_cores_that_it_may_use(
    limit: float | None, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(threads, "cpu_limit", lambda: limit)
    assert cores_here() == cores


def test_threads_are_a_setting_of_each_kind() -> None:
    deployment = Deployment.from_dict({"experts": {"threads": 2, "cold": {"threads": 3}}, "routers": {"threads": 4}})
    assert (deployment.experts.threads, deployment.experts.cold.threads, deployment.routers.threads) == (2, 3, 4)
    assert Deployment().routers.threads is None
    with pytest.raises(ConfigError, match=r"routers\.threads = 0"):
        Deployment.from_dict({"routers": {"threads": 0}})
