"""Processes that compute with different instructions of their CPUs: that is said once, and those told to compute alike do."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moray.actors.messages import Event
from moray.actors.reports import HostReport
from moray.cluster.controller import Controller
from moray.cluster.mixed_cpus import KNOWN, lowest, mixtures
from moray.cluster.workers import ExpertHostWorker, _compute, described_compute
from moray.configs.deployment import EMBEDDED_MODEL
from moray.configs.errors import ConfigError
from moray.kernels.cpu.library import Instructions, NativeLibrary, native
from moray.model.compute import Compute

from .thread_cluster import ThreadHost, ThreadSpawner, deployment, eventually


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    """The library; it then uses the best instructions again."""
    found = native()
    assert found is not None
    yield found
    found.use(found.best)


# ---- the rule


def test_deployments_may_name_what_the_kernels_have() -> None:
    kernels = [one.name.lower() for one in sorted(Instructions)]
    assert [one for one in KNOWN if one in kernels] == kernels, "the lowest first in both"


def test_those_that_compute_alike_are_not_told_of() -> None:
    assert mixtures({}) == []
    assert mixtures({"a": "avx2", "b": "avx2", "c": ""}) == []
    assert mixtures({"expert-host-0": "avx2", "cold-host-0": "torch avx2"}) == [], "who deploys both has asked for it"


def test_who_computes_with_what_is_told_with_the_way_out() -> None:
    used = {"expert-host-0": "avx512_bf16", "expert-host-1": "avx2", "router-0": "avx512_bf16", "cold-host-0": ""}
    (told,) = mixtures(used)
    assert told.startswith("avx512_bf16 on 2 processes, avx2 on expert-host-1: ")
    assert told.endswith("; cpu_instructions: avx2 has all compute alike")
    assert lowest({"amx", "generic", "avx2"}) == "generic"
    (told,) = mixtures({"a": "torch avx512", "b": "torch avx2"})
    assert told.startswith("torch avx512 on a, torch avx2 on b: ")


# ---- the controller


def has_other_cpu(host: ThreadHost, instructions: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it report as a process on another machine would."""
    report = host.host.report

    def other() -> HostReport:
        return replace(report(), instructions=instructions)

    monkeypatch.setattr(host.host, "report", other)


def told(controller: Controller) -> list[Event]:
    return [event for event in controller.status().events if event.what == "mixed_cpus"]


@pytest.fixture
def controller(checkpoint: Path, spawner: ThreadSpawner) -> Iterator[Controller]:
    controller = Controller(deployment(checkpoint), spawner)
    yield controller
    controller.stop()


def all_have_said(controller: Controller) -> bool:
    return all(process.instructions for process in controller.status().processes)


def test_a_cluster_of_one_kind_says_nothing(controller: Controller, library: NativeLibrary) -> None:
    controller.start()
    eventually(lambda: all_have_said(controller))
    processes = controller.status().processes
    assert {process.instructions for process in processes} == {library.best.name.lower()}
    eventually(lambda: bool(controller._observer._instructions))
    assert told(controller) == []


def test_a_mixed_cluster_says_so_once(
    controller: Controller, spawner: ThreadSpawner, library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = "generic" if library.best > Instructions.GENERIC else "avx2"

    def one_differs(host: ThreadHost) -> None:
        if host.host.host_id == "expert-host-1":
            has_other_cpu(host, other, monkeypatch)

    spawner.after_host = one_differs
    controller.start()
    eventually(lambda: bool(told(controller)))
    (event,) = told(controller)
    assert f"{library.best.name.lower()} on 2 processes, {other} on expert-host-1" in event.detail
    assert "cpu_instructions: generic has all compute alike" in event.detail
    assert controller.status().health == "ok", "nothing is lost"

    spawner.hosts["expert-host-1"].kill()
    eventually(lambda: spawner.made.count("expert-host-1") == 2 and controller.status().health == "ok")
    eventually(lambda: all_have_said(controller))
    controller._observer.tick()
    assert len(told(controller)) == 1, "it came back as it was"

    spawner.after_host = lambda host: None
    spawner.hosts["expert-host-1"].kill()
    eventually(lambda: spawner.made.count("expert-host-1") == 3 and controller.status().health == "ok")
    eventually(lambda: len(controller._observer._instructions) == 1)
    has_other_cpu(spawner.hosts["expert-host-0"], other, monkeypatch)
    eventually(lambda: len(told(controller)) == 2)


# ---- processes


def worker(compute: Compute, **settings: Any) -> ExpertHostWorker:
    described = described_compute(compute)
    assert _compute(described) == compute
    return ExpertHostWorker(
        described, threads=1, lease_s=600.0, gently=True, model=EMBEDDED_MODEL, weights_dir=None, **settings
    )


@pytest.fixture(autouse=True)
def _switches_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)


def test_a_process_computes_with_what_the_deployment_names(library: NativeLibrary) -> None:
    host = worker(replace(Compute.native(), instructions="generic"))
    try:
        assert library.used is Instructions.GENERIC
        assert host.report().instructions == "generic"
    finally:
        host.stop()


def test_a_process_that_cannot_says_so_when_it_is_to_be_a_host(
    library: NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "_best", lambda: Instructions.GENERIC)
    host = worker(replace(Compute.native(), instructions="avx2"))
    try:
        with pytest.raises(ConfigError, match=r"cpu_instructions = 'avx2': the best that .* has are generic"):
            host.listen("expert-host-0", "shm", b"secret")
    finally:
        host.stop()
