"""Faults that a host is asked for: no token differs while a host has one, and the host is of use again when it is over."""

from __future__ import annotations

import errno
import itertools
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Link, LinkKind, dial, listen
from moray.actors.messages import GenerateRequest, RouterStats, TokenOutput
from moray.actors.placement_table import PlacementTable
from moray.actors.router_process import RouterProcess
from moray.cluster.assembly import compute, router_settings
from moray.cluster.chaos.fault_points import MAX_SECONDS, POINT_FAULTS, FaultPoints
from moray.cluster.local import LLM
from moray.cluster.placement import next_placement
from moray.configs.deployment import Deployment
from moray.configs.errors import CheckpointError, ConfigError, LinkError
from moray.model.config import ModelConfig
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

from .thread_cluster import eventually

PROMPT = [5, 9, 200, 31, 7, 7, 80]
TOKENS = 30
SECRET = b"the secret of these tests"


class Host(FaultPoints, ExpertHost):
    """As the processes of a cluster have it."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("random"), dtype="fp8", seed=8)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[int]:
    with LLM(checkpoint, experts=1) as llm:
        return llm.generate([PROMPT], max_tokens=TOKENS, temperature=0.0, ignore_eos=True)[0].token_ids


class Cluster:
    """Two hosts that each hold every expert, and a router linked to both."""

    def __init__(self, checkpoint: Path, link: LinkKind) -> None:
        config = ModelConfig.load(checkpoint)
        deployment = Deployment.from_dict({"model": str(checkpoint), "routers": {"cache_tokens": 512}, "link": link})
        names = ["expert-host-0", "expert-host-1"]
        self.checkpoint = checkpoint
        self.table: PlacementTable = next_placement(config, names, min_replicas=2)
        self.hosts = [Host(name, compute=compute(deployment, gpus=0)) for name in names]
        self._stack: list[Callable[[], None]] = [host.stop for host in self.hosts]
        addresses = {}
        for host in self.hosts:
            host.load(checkpoint, self.table.slots[host.host_id], epoch=self.table.epoch)
            addresses[host.host_id] = [host.listen(link, bind_host="127.0.0.1", secret=SECRET)]
        self.process = RouterProcess(
            "router-0",
            checkpoint=checkpoint,
            compute=compute(deployment, gpus=0),
            settings=router_settings(deployment, config),
            table=self.table,
            hosts=addresses,
            link=link,
            reply_timeout_s=5.0,
            bind_host="127.0.0.1",
            secret=SECRET,
            threads=1,
        )
        self._stack.insert(0, self.process.stop)

    def ask(
        self,
        at: Callable[[int], None] = lambda count: None,
        *,
        between_steps: Callable[[int], None] = lambda count: None,
    ) -> list[int]:
        """One greedy answer.

        Args:
            at: called with every number of tokens that have come, from 1 on; there may be more by then.
            between_steps: the same in the router's thread, which goes on afterwards.
        """
        arrived: queue.Queue[list[TokenOutput]] = queue.Queue()
        sampling = SamplingParams(TOKENS, temperature=0.0)
        counts = itertools.count(1)

        def take(outputs: list[TokenOutput]) -> None:
            for _ in itertools.chain.from_iterable(output.token_ids for output in outputs):
                between_steps(next(counts))
            arrived.put(outputs)

        self.process._router.submit(GenerateRequest("r", PROMPT, sampling), take)
        tokens: list[int] = []
        while True:
            (output,) = arrived.get(timeout=60)
            assert output.error is None, output.error
            for token in output.token_ids:  # several may come at once
                tokens.append(token)
                at(len(tokens))
            if output.finish_reason is not None:
                return tokens

    @property
    def stats(self) -> RouterStats:
        return self.process.stats()

    def close(self) -> None:
        for undo in self._stack:
            undo()


@pytest.fixture
def cluster(checkpoint: Path) -> Iterator[Cluster]:
    cluster = Cluster(checkpoint, "shm")
    yield cluster
    cluster.close()


def linked(cluster: Cluster) -> bool:
    return not cluster.stats.broken_links and not cluster.process._router.dispatch.unlinked


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("cut-host", "closed the connection|connection lost"),
        ("corrupt-reply", "sent"),
        ("full-memory", "closed the connection"),
    ],
)
def test_a_host_that_breaks_its_links(fault: str, said: str, cluster: Cluster, expected: list[int]) -> None:
    """The other replica does its work; the router says what is wrong with it; after that it is linked to again."""
    host = cluster.hosts[1]
    broken: set[str] = set()

    injected: list[int] = []

    def between_steps(count: int) -> None:
        if count == 5:
            injected.append(host.inject(fault, MAX_SECONDS, seed=3))

    assert cluster.ask(lambda _: broken.update(cluster.stats.broken_links), between_steps=between_steps) == expected
    assert injected == [1]
    assert any(host.host_id in reason and re.search(said, reason) for reason in broken), broken
    assert not any("expert-host-0" in reason for reason in broken)
    host.inject(fault, 0)
    eventually(lambda: linked(cluster))
    assert cluster.ask() == expected
    assert linked(cluster)


def test_native_code_serves_unless_a_fault_is_active(cluster: Cluster, expected: list[int]) -> None:
    host = cluster.hosts[1]
    assert host._loop is not None, "the package was installed without its native host loop: is there a compiler?"
    turn = host._one_at_a_time
    assert cluster.ask() == expected
    assert (began := turn.native_frames) > 0
    host.inject("slow-host", MAX_SECONDS, delay_s=0.0)
    assert cluster.ask() == expected
    assert turn.native_frames == began
    host.inject("slow-host", 0)
    assert cluster.ask() == expected
    assert turn.native_frames > began


def test_a_slow_host(cluster: Cluster, expected: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    host = cluster.hosts[1]
    delay = host._faults.delay
    delayed: set[bool] = set()

    def seen() -> None:
        delayed.add(host._faults.left("slow-host") > 0)
        delay()

    monkeypatch.setattr(host._faults, "delay", seen)

    def between_steps(count: int) -> None:
        if count == 5:
            host.inject("slow-host", MAX_SECONDS, delay_s=0.02)
        if count == 20:
            host.inject("slow-host", 0)

    assert cluster.ask(between_steps=between_steps) == expected
    assert delayed == {False, True}
    assert not cluster.stats.broken_links


def test_a_disk_that_fails(cluster: Cluster, expected: list[int]) -> None:
    """A load fails as a whole and leaves what is served as it was; afterwards it succeeds."""
    reads = os.preadv
    host = Host("expert-host-2", compute=cluster.hosts[0].compute)
    slots = cluster.table.slots["expert-host-0"]

    def at(count: int) -> None:
        if count == 5:
            host.inject("disk-error", MAX_SECONDS)
            with pytest.raises(CheckpointError, match="Input/output error"):
                host.load(cluster.checkpoint, slots, epoch=1)
            host.inject("disk-error", 0)

    assert cluster.ask(at) == expected
    eventually(lambda: os.preadv is reads)
    assert host.load(cluster.checkpoint, slots, epoch=1).data > 0
    host.stop()


def test_a_fault_ends_by_itself(cluster: Cluster, expected: list[int]) -> None:
    cluster.hosts[1].inject("cut-host", 0.2)
    eventually(lambda: linked(cluster))
    assert cluster.ask() == expected


@pytest.mark.parametrize("kind", ["shm", "gloo"])
def test_each_damaged_message_is_noticed(kind: LinkKind) -> None:
    """Whichever bit is flipped, the other end gets an error, never a frame."""
    host = Host("expert-host-0", compute=compute(Deployment(), gpus=0))
    for seed in range(12):
        there, here = pair(host, kind)
        host.inject("corrupt-reply", MAX_SECONDS, seed=seed)
        there.send(b"header", [torch.zeros(3)], deadline=Deadline.after(5))
        with pytest.raises(LinkError):
            here.recv(deadline=Deadline.after(0.2))
        here.close()
        there.close()


def test_full_memory_ends_the_link_with_an_error() -> None:
    host = Host("expert-host-0", compute=compute(Deployment(), gpus=0))
    for error in (errno.ENOSPC, errno.ENOMEM):
        there, here = pair(host, "shm")
        there.send(b"", [torch.ones(3)], deadline=Deadline.after(5))
        assert here.recv(deadline=Deadline.after(5)).tensors[0].tolist() == [1, 1, 1]
        host.inject("full-memory", MAX_SECONDS)
        there._errors = iter([error])  # type: ignore[attr-defined]
        with pytest.raises(LinkError, match=os.strerror(error)):
            there.send(b"", [torch.ones(3)], deadline=Deadline.after(5))
        with pytest.raises(LinkError, match="closed the connection"):
            here.recv(deadline=Deadline.after(5))
        here.close()
        there.close()
        host.inject("full-memory", 0)


def pair(host: Host, kind: LinkKind) -> tuple[Link, Link]:
    """The host's end of a new link, with its faults, and the other end."""
    listener = listen(kind, bind_host="127.0.0.1", secret=SECRET, identity=host.host_id)
    dialled: list[Link] = []
    address = listener.address
    dialler = threading.Thread(
        target=lambda: dialled.append(dial(address, secret=SECRET, identity="router-0", deadline=Deadline.after(20)))
    )
    dialler.start()
    accepted = listener.accept(deadline=Deadline.after(20))
    dialler.join(20)
    listener.close()
    assert accepted is not None
    return host._faults.wrapped(accepted), dialled[0]


@pytest.mark.parametrize(
    ("fault", "seconds", "message"),
    [("kill-host", 1.0, ", ".join(POINT_FAULTS)), ("cut-host", -1.0, "0 to 120 s"), ("cut-host", 1e9, "0 to 120 s")],
)
def test_what_cannot_be_injected(fault: str, seconds: float, message: str) -> None:
    host = Host("expert-host-0", compute=compute(Deployment(), gpus=0))
    with pytest.raises(ConfigError, match=message):
        host.inject(fault, seconds)
