"""Many machines for real: `ray up` on hosts with addresses of their own, and what happens to them, from the first to the last.

One test, because a cluster takes a minute to come up, and every step stands on the one before. What it did is in the log
`build/tests/ray_up.log`, and printed (`pytest -s`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moray import LLM

from . import hosts as fake_hosts
from .hosts import Host, Hosts
from .ray_cluster import Group, RayCluster, eventually, left_on, placed
from .traffic import Question, Streams, Traffic, questions

_MISSING = fake_hosts.missing()

pytestmark = [
    pytest.mark.machines,
    pytest.mark.ray,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(_MISSING), reason=_MISSING or "nothing is missing"),
]

_LOG = Path(__file__).resolve().parents[2] / "build" / "tests" / "ray_up.log"
_NAMES = ("operator", "head", "worker-1", "worker-2", "worker-3", "worker-4")
_START_S = 300.0
"""For what takes tens of seconds on two free cores; tests of a loaded machine must not fail for that."""

_CLIENTS, _TOKENS = 2, 60
_STREAMS, _LONG = 3, 400
_RAY_S = 10
"""How long Ray's daemon on a worker outlives the loss of its head here; by default a minute. Its agents take that minute."""


class Story:
    """What happened when, for people to read."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._file = file
        self._began = time.monotonic()
        file.write_text("")

    def tell(self, text: str) -> None:
        """Add a line, or several."""
        for line in text.splitlines():
            stamped = f"[{time.monotonic() - self._began:6.1f} s] {line}"
            print(stamped, flush=True)
            with self._file.open("a") as log:
                log.write(f"{stamped}\n")


@pytest.fixture
def story() -> Story:
    return Story(_LOG)


@pytest.fixture
def cluster(story: Story, request: pytest.FixtureRequest) -> Iterator[RayCluster]:
    """Machines, and a cluster file for them; Ray does not run yet."""
    groups = {
        "routers": Group(("worker-1",), {"CPU": 2, "moray_router": 1, "moray_expert": 1}),
        "experts": Group(("worker-2", "worker-3"), {"CPU": 1, "moray_expert": 1}),
    }
    environment = {"RAY_gcs_rpc_server_reconnect_timeout_s": str(_RAY_S)}
    with Hosts(_NAMES, environment=environment) as hosts:
        for host in hosts:
            story.tell(f"host {host.name}: {host.address}")
        cluster = RayCluster(hosts, operator="operator", head="head", groups=groups)
        failed = request.session.testsfailed
        yield cluster
        if request.session.testsfailed > failed:
            story.tell(cluster.diagnosis())


def test_a_cluster_from_ray_up_to_ray_down(cluster: RayCluster, story: Story) -> None:
    _up(cluster, story)
    asked = questions(_CLIENTS, _TOKENS)
    long_ones = questions(_STREAMS, _LONG)
    with LLM("tiny-r1") as llm:  # local mode: one process, no Ray
        expected, long_expected = ([question.expected(llm) for question in some] for some in (asked, long_ones))
    _wait_for_workers(cluster, story)
    _deploy(cluster, story)
    with Traffic(cluster.url, cluster.operator, asked, expected) as traffic:
        eventually(lambda: traffic.right >= _CLIENTS or traffic.wrong, "each client has an answer", within_s=_START_S)
        assert traffic.wrong == []
        for question, tokens in zip(asked, expected, strict=True):
            how = "greedy" if question.seed is None else f"seed {question.seed}"
            story.tell(f"tokens ({how}): {' '.join(map(str, tokens[:16]))} ...: all {len(tokens)} as in local mode")
        _add_worker(cluster, story)
        _remove_worker(cluster, story)
        _cut_and_heal(cluster, story, long_ones, long_expected)
    assert traffic.wrong == []
    story.tell(f"{traffic.right} more streams ran all the while, every token as in local mode")
    _take_down(cluster, story)
    story.tell(f"done: nothing is left on {', '.join(host.name for host in cluster.hosts)}")


def _up(cluster: RayCluster, story: Story) -> None:
    begin = time.monotonic()
    cluster.make_token()
    said = cluster.up()
    (running,) = [line for line in said.splitlines() if line.startswith("moray: running:")]
    story.tell(running)
    story.tell(f"moray up: the head is up after {time.monotonic() - begin:.1f} s")


def _wait_for_workers(cluster: RayCluster, story: Story) -> None:
    begin = time.monotonic()
    cluster.wait_for_nodes(["worker-1", "worker-2", "worker-3"], within_s=_START_S)
    story.tell(f"ray nodes: {', '.join(cluster.alive())}, {time.monotonic() - begin:.1f} s later")


def _deploy(cluster: RayCluster, story: Story) -> None:
    begin = time.monotonic()
    cluster.deploy(
        {
            "link": "gloo",
            "experts": {"hosts": 3, "min_replicas": 2, "resources": {"moray_expert": 1}},
            "routers": {"resources": {"moray_router": 1}},
        }
    )
    status = cluster.wait_healthy(experts=3, within_s=_START_S)
    assert set(placed(status).values()) == {cluster.hosts[f"worker-{i}"].address for i in (1, 2, 3)}
    nodes = {p["id"]: p["node"] for p in status["processes"]}
    assert nodes["controller"] == cluster.head.address, "no worker that is lost takes it along"
    story.tell(f"serve deploy: health ok after {time.monotonic() - begin:.1f} s\n{_where(cluster, status)}")


def _add_worker(cluster: RayCluster, story: Story) -> None:
    begin = time.monotonic()
    cluster.regroup("experts", ["worker-2", "worker-3", "worker-4"])
    cluster.up("--no-restart")
    cluster.wait_for_nodes(["worker-1", "worker-2", "worker-3", "worker-4"], within_s=_START_S)
    story.tell(f"added worker-4: Ray runs there {time.monotonic() - begin:.1f} s after `moray up --no-restart` began")
    said = cluster.moray("scale --experts 4")
    status = cluster.wait_healthy(experts=4, within_s=_START_S)
    assert cluster.hosts["worker-4"].address in placed(status).values()
    story.tell(f"moray scale --experts 4: {_last_line(said)}\n{_where(cluster, status)}")


def _remove_worker(cluster: RayCluster, story: Story) -> None:
    leaving = cluster.hosts["worker-2"]
    status = cluster.status()
    assert status is not None, "the cluster answers"
    (expert_host,) = [name for name, node in placed(status).items() if node == leaving.address]
    said = cluster.moray(f"drain {expert_host}")
    story.tell(f"moray drain {expert_host}: {_last_line(said)}")
    cluster.regroup("experts", ["worker-3", "worker-4"])
    cluster.up("--no-restart")
    leaving.run("ray stop")
    cluster.wait_for_nodes(["worker-1", "worker-3", "worker-4"], within_s=_START_S)
    status = cluster.wait_healthy(experts=3, within_s=_START_S)
    _wait_until_gone("what there is on worker-2", partial(left_on, leaving))
    story.tell(f"removed worker-2: nothing is left there\n{_where(cluster, status)}")


def _cut_and_heal(cluster: RayCluster, story: Story, asked: list[Question], expected: list[list[int]]) -> None:
    cut = cluster.hosts["worker-3"]
    with Streams(cluster.url, cluster.operator, asked) as streams:
        eventually(lambda: min(streams.tokens()) >= 5, "every stream has begun", within_s=_START_S)
        moment = time.monotonic()
        cluster.hosts.cut(cut)
        at = ", ".join(f"{tokens} of {_LONG}" for tokens in streams.tokens())
        story.tell(f"cut: the network of worker-3 ({cut.address}) is down; streams are at token {at}")
        _wait_recovered(cluster, story, cut.address, moment)
        assert streams.answers(within_s=_START_S) == expected
    story.tell(f"every stream that was running at the cut has ended with all {_LONG} tokens as in local mode")
    healed = time.monotonic()
    cluster.hosts.heal(cut)
    story.tell("healed: the network of worker-3 is up")
    cluster.wait_for_nodes(["worker-1", "worker-3", "worker-4"], within_s=_START_S)
    story.tell(f"Ray runs on worker-3 again {time.monotonic() - healed:.1f} s after it was healed")
    status = cluster.wait_healthy(experts=3, within_s=_START_S)
    assert cut.address in placed(status).values()
    story.tell(f"an expert host is there again after {time.monotonic() - healed:.1f} s\n{_where(cluster, status)}")


def _wait_recovered(cluster: RayCluster, story: Story, cut: str, moment: float) -> None:
    """Until health is ok without the machine that was cut off, having said meanwhile that it was not."""
    healths: list[tuple[str, str]] = []

    def recovered() -> dict[str, Any] | None:
        now = cluster.status()
        if now is None:
            return None
        if healths[-1:] != [(now["health"], now["reason"])]:
            healths.append((now["health"], now["reason"]))
            story.tell(f"  {time.monotonic() - moment:.1f} s after the cut: {now['health']} {now['reason']}".rstrip())
        return now if now["health"] == "ok" and cut not in placed(now).values() else None

    status = eventually(recovered, "health is ok without the machine that was cut off", within_s=_START_S)
    assert status is not None, "it was waited for"
    assert any(health != "ok" for health, _ in healths), "it said fine when it was not"
    story.tell(f"recovered {time.monotonic() - moment:.1f} s after the cut\n{_where(cluster, status)}")


def _take_down(cluster: RayCluster, story: Story) -> None:
    begin = time.monotonic()
    cluster.on_head("serve shutdown --yes")
    for host in cluster.hosts:
        _wait_until_gone(f"Moray's processes on {host.name}", partial(_ours, host))
    story.tell(f"serve shutdown: no process of Moray's runs any more after {time.monotonic() - begin:.1f} s")
    begin = time.monotonic()
    cluster.down()
    for host in cluster.hosts:
        _wait_until_gone(f"what there is on {host.name}", partial(left_on, host))
    story.tell(f"ray down: no process, socket or shared memory on any host after {time.monotonic() - begin:.1f} s")


def _ours(host: Host) -> list[str]:
    kinds = ("ExpertHostWorker", "RouterWorker", "ServeReplica")
    return [process for process in host.processes() if any(kind in process for kind in kinds)]


def _wait_until_gone(what: str, look: Callable[[], list[str]]) -> None:
    eventually(lambda: not look(), lambda: f"{what} has gone: {look()}", within_s=_START_S)


def _where(cluster: RayCluster, status: dict[str, Any]) -> str:
    names = {host.address: host.name for host in cluster.hosts}
    return "\n".join(f"  {p['id']} on {names.get(p['node'], p['node'])} ({p['node']})" for p in status["processes"])


def _last_line(said: str) -> str:
    return said.strip().splitlines()[-1]
