"""`moray doctor`: links measured over loopback, and examinations of nodes that are threads, some of which misbehave."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from typing import Any

import pytest

from moray.cluster.diagnosis.cluster_checks import RayNode
from moray.cluster.diagnosis.collect import Wish
from moray.cluster.diagnosis.examination import Examination, Patience, examine_cluster
from moray.cluster.diagnosis.link_meter import LinkServer, LinkSpeed, measure_link
from moray.cluster.diagnosis.node_probe import NodeProbe
from moray.cluster.diagnosis.ray_probes import named
from moray.configs.errors import ClusterError, HandshakeError, LinkError

from .doctor_facts import cpu_node

SECRET = b"a secret of thirty-two bytes ..."
OTHER = b"another one of thirty-two bytes."
SECONDS = 0.1


@pytest.fixture
def server() -> Iterator[LinkServer]:
    with closing(LinkServer("127.0.0.1", secret=SECRET, node="b")) as server:
        yield server


def test_figures_of_a_link(server: LinkServer) -> None:
    found = measure_link(server.endpoint, source="a", target="b", secret=SECRET, seconds=SECONDS)
    assert (found.source, found.target) == ("a", "b")
    assert 0 < found.least_round_trip_s <= found.round_trip_s
    assert found.bytes_per_s is not None
    assert found.bytes_per_s > 0
    # One clock has no offset, as far as half of the quickest round trip can tell; clocks of whole microseconds may round.
    assert abs(found.clock_ahead_s) <= found.least_round_trip_s / 2 + 1e-3


def test_round_trips_alone(server: LinkServer) -> None:
    found = measure_link(server.endpoint, source="a", target="b", secret=SECRET, seconds=0)
    assert found.round_trip_s > 0
    assert found.bytes_per_s is None


def test_two_who_measure_at_once(server: LinkServer) -> None:
    def measure(source: str) -> str:
        return measure_link(server.endpoint, source=source, target="b", secret=SECRET, seconds=SECONDS).source

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(measure, "ac")) == ["a", "c"]


def test_another_secret_is_refused(server: LinkServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(HandshakeError):
        measure_link(server.endpoint, source="a", target="b", secret=OTHER, seconds=SECONDS)
    assert SECRET.decode() not in caplog.text
    assert measure_link(server.endpoint, source="a", target="b", secret=SECRET, seconds=0).round_trip_s > 0


def test_a_stranger_gets_nothing(server: LinkServer) -> None:
    host, _, port = server.endpoint.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=10) as stranger:
        stranger.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = stranger.recv(4096)
    assert SECRET not in answer
    assert b"HTTP" not in answer


def test_a_closed_server_is_no_more(server: LinkServer) -> None:
    server.close()
    server.close()
    with pytest.raises(LinkError):
        measure_link(server.endpoint, source="a", target="b", secret=SECRET, seconds=0)
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("moray-doctor")]


# ---- nodes that are threads -----------------------------------------------------------------------------------------


class ThreadNode:
    """A probe in this process; `answers` are given instead of its own, by method."""

    def __init__(self, name: str, threads: ThreadPoolExecutor, **answers: Callable[..., Any]) -> None:
        self.node, self.ray = name, RayNode("127.0.0.1", {"CPU": 64.0})
        self.probe = NodeProbe()
        self._threads = threads
        self._answers = {"collect": lambda wish: cpu_node(wish["node"]).to_dict(), **answers}

    def ask(self, method: str, *arguments: Any) -> Future[Any]:
        return self._threads.submit(self._answers.get(method) or getattr(self.probe, method), *arguments)


@pytest.fixture
def silence() -> Iterator[Callable[..., Any]]:
    """An answer that comes after the test."""
    over = threading.Event()

    def wait(*_: object) -> None:
        over.wait(60)

    yield wait
    over.set()


Cluster = Callable[..., Examination]

SOON = Patience(collect_s=1.0, listen_s=1.0, link_s=10.0)


@pytest.fixture
def examine() -> Iterator[Cluster]:
    """Examines nodes a, b and c; keywords say what each answers instead."""
    probes: list[NodeProbe] = []
    threads = ThreadPoolExecutor(12)

    def examine(patience: Patience = SOON, **answers: dict[str, Callable[..., Any]]) -> Examination:
        nodes = [ThreadNode(name, threads, **answers.get(name, {})) for name in "abc"]
        probes.extend(node.probe for node in nodes)
        return examine_cluster(nodes, Wish(""), link_seconds=SECONDS, patience=patience)

    yield examine
    for probe in probes:
        probe.close()
    threads.shutdown(wait=False)


def said(examination: Examination, node: str) -> list[str]:
    return [f.what for f in examination.findings if f.node == node and f.level == "fail"]


def test_three_nodes_are_examined_together(examine: Cluster) -> None:
    found = examine()
    assert [facts.node for facts in found.nodes] == ["a", "b", "c"]
    assert {(link.source, link.target) for link in found.links} == {(x, y) for x in "abc" for y in "abc" if x != y}
    assert not found.failures
    assert {"links", "clock"} <= {finding.check for finding in found.findings}
    assert all(not said(found, name) for name in "abc")


def test_a_node_that_hangs_is_reported_by_its_deadline(examine: Cluster, silence: Callable[..., Any]) -> None:
    found = examine(b={"collect": silence})
    assert said(found, "b") == ["did not answer within 1 s when asked for its facts"]
    assert found.failed
    assert [facts.node for facts in found.nodes] == ["a", "c"]
    assert {(link.source, link.target) for link in found.links} == {("a", "c"), ("c", "a")}


def test_a_node_that_fails_is_reported_with_its_reason(examine: Cluster) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("The actor died\n  ModuleNotFoundError: No module named 'moray'\n")

    found = examine(c={"collect": fail})
    assert said(found, "c") == ["failed when asked for its facts: ModuleNotFoundError: No module named 'moray'"]


def test_a_node_with_facts_of_another_form(examine: Cluster) -> None:
    found = examine(c={"collect": lambda wish: {"node": "c"}})
    assert "another version of Moray" in said(found, "c")[0]


def test_a_node_that_hangs_while_links_are_measured_is_asked_no_more(
    examine: Cluster, silence: Callable[..., Any]
) -> None:
    asked: list[str] = []

    def hang(endpoint: str, source: str, *_: object) -> None:
        asked.append(source)
        silence()

    def answer(endpoint: str, source: str, target: str, *_: object) -> dict[str, Any]:
        return asdict(LinkSpeed(source, target, 1e-4, 1e-4, 0.0, 1e10))

    others = {name: {"measure": answer} for name in "bc"}
    found = examine(Patience(collect_s=10.0, listen_s=10.0, link_s=0.7), a={"measure": hang}, **others)
    assert asked == ["a"]
    assert said(found, "a") == ["did not answer within 1 s when asked for a measured link"]
    assert {("b", "c"), ("c", "b")} <= {(link.source, link.target) for link in found.links}


def test_a_node_with_figures_of_another_form(examine: Cluster) -> None:
    found = examine(c={"measure": lambda *_: {"furlongs_per_fortnight": 1}})
    assert any("another version of Moray" in what for what in said(found, "c"))


def test_a_way_that_is_closed_is_named(examine: Cluster) -> None:
    def nowhere(address: str, node: str, secret: bytes) -> str:
        with socket.create_server((address, 0)) as gone:
            port: int = gone.getsockname()[1]
            return f"{address}:{port}"

    found = examine(b={"listen": nowhere})
    assert {(failure.source, failure.target) for failure in found.failures} == {("a", "b"), ("c", "b")}
    assert sum("Connection refused" in finding.what for finding in found.findings) == 2


def test_nodes_by_their_addresses_the_head_first() -> None:
    def node(address: str, *, alive: bool = True) -> dict[str, Any]:
        return {"NodeManagerAddress": address, "Alive": alive, "Resources": {"CPU": 1.0}, "NodeID": "0"}

    head = node("10.0.0.9") | {"Resources": {"node:__internal_head__": 1.0}}
    found = named([node("10.0.0.2"), node("10.0.0.1"), head, node("10.0.0.3", alive=False), node("10.0.0.2")])
    assert list(found) == ["10.0.0.9", "10.0.0.1", "10.0.0.2", "10.0.0.2/2"]
    with pytest.raises(ClusterError, match="no node that is alive"):
        named([node("10.0.0.1", alive=False)])
