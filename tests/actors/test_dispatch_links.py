"""How a router dials expert hosts: side by side, without waiting for those that are away, and again when they are back."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from moray.actors import host_links
from moray.actors.dialling import HostAddresses, dial_host
from moray.actors.host_links import HostLinks
from moray.actors.links import Link, LinkAddress, Listener, listen
from moray.actors.messages import GenerateRequest
from moray.actors.router_process import RouterProcess
from moray.actors.testing import SECRET, SETTINGS, EngineParts, Recorder, random_prompt
from moray.configs.errors import HandshakeError, LinkError, PeerDiedError, PeerTimeoutError
from moray.model.sampling import SamplingParams
from moray.model.testing import write_random_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def listeners() -> Iterator[Callable[[str], Listener]]:
    with contextlib.ExitStack() as stack:

        def make(host: str, secret: bytes = SECRET) -> Listener:
            return stack.enter_context(
                contextlib.closing(listen("shm", bind_host="127.0.0.1", secret=secret, identity=host))
            )

        yield make


@pytest.fixture
def frozen() -> Iterator[LinkAddress]:
    """What a stopped process leaves: the kernel takes connections in, nobody shakes hands."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        name = f"moray-frozen-{time.monotonic_ns()}"
        sock.bind(f"\0{name}")
        sock.listen(8)
        here = listen("shm", bind_host="127.0.0.1", secret=SECRET, identity="here")
        here.close()
        yield LinkAddress("shm", name, here.address.machine)


def of(**addresses: LinkAddress) -> HostLinks:
    return HostLinks("router-0", {h: [a] for h, a in addresses.items()}, link="shm", secret=SECRET, device=CPU)


def close(links: dict[str, Link]) -> list[str]:
    for link in links.values():
        link.close()
    return sorted(links)


def test_hosts_are_dialled_side_by_side(listeners: Callable[..., Listener], monkeypatch: pytest.MonkeyPatch) -> None:
    together, dial = threading.Barrier(3), dial_host

    def all_at_once(*arguments: object, **options: object) -> Link:
        together.wait(10)
        return dial(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(host_links, "dial_host", all_at_once)
    links = of(**{host: listeners(host).address for host in ("a", "b", "c")})
    assert close(links.dial_all(["a", "b", "c"])) == ["a", "b", "c"]
    assert links.dial_all([]) == {}


def test_all_or_none_where_all_are_needed(
    listeners: Callable[..., Listener], frozen: LinkAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_links, "_DIAL_TIMEOUT_S", 0.2)
    made: list[Link] = []
    dial = dial_host

    def remember(*arguments: object, **options: object) -> Link:
        made.append(dial(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(host_links, "dial_host", remember)
    links = of(a=listeners("a").address, b=frozen)
    with pytest.raises(LinkError, match="before the deadline"):
        links.dial_all(["a", "b"])
    assert len(made) == 1
    with pytest.raises(LinkError, match="closed on this side"):
        made[0].check()


def test_a_router_begins_with_the_hosts_that_are_there(
    listeners: Callable[..., Listener], frozen: LinkAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_links, "_DIAL_TIMEOUT_S", 0.2)
    gone = listeners("gone")
    gone.close()
    there = listeners("there").address
    assert close(of(there=there, gone=gone.address, frozen=frozen).dial_those_there()) == ["there"]
    with pytest.raises(PeerDiedError):
        of(gone=gone.address).dial_those_there()
    with pytest.raises(HandshakeError, match="secrets differ"):
        of(there=there, other=listeners("other", b"quite another secret").address).dial_those_there()


def test_another_host_at_the_address_is_not_taken_for_the_one_that_was_there(
    listeners: Callable[..., Listener],
) -> None:
    """It would compute what it is asked for, with other experts in the same slots."""
    with pytest.raises(HandshakeError, match="link to there: is gone: another listens at"):
        of(there=listeners("another").address).dial_all(["there"])


def test_a_frozen_host_does_not_delay_that_another_is_linked_again(
    listeners: Callable[..., Listener], frozen: LinkAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_links, "_MEND_PAUSE_S", 0.01)
    stopped, linked = threading.Event(), {"a": threading.Event(), "b": threading.Event()}
    used: dict[str, Link] = {}
    links, dial = of(a=frozen, b=listeners("b").address), dial_host

    def dial_slowly(addresses: HostAddresses, *arguments: object, **options: object) -> Link:
        if frozen in addresses:
            assert linked["b"].wait(20), "a dial that has not ended keeps the other host from being linked"
            raise PeerTimeoutError("a", "did not shake hands")
        return dial(addresses, *arguments, **options)  # type: ignore[arg-type]

    def use(host: str, link: Link) -> None:
        used[host] = link
        linked[host].set()

    monkeypatch.setattr(host_links, "dial_host", dial_slowly)
    mending = threading.Thread(
        target=links.mend, args=(lambda: [h for h in ("a", "b", "unknown") if h not in used], use, stopped)
    )
    mending.start()
    assert linked["b"].wait(20)
    assert "a" not in used
    links.know({"a": [listeners("a").address]})  # it was restored elsewhere
    assert linked["a"].wait(20)
    stopped.set()
    mending.join(5)
    assert close(used) == ["a", "b"]


def test_a_routers_report(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path, seed=5)
    with contextlib.closing(EngineParts(checkpoint)) as parts, contextlib.ExitStack() as stack:
        table = parts.table(2, replicas=2)
        hosts = {name: parts.host(name, table) for name in table.slots}
        router = RouterProcess(
            "router-0",
            checkpoint=checkpoint,
            compute=parts.compute,
            settings=SETTINGS,
            table=table,
            hosts={n: [host.listen("shm", bind_host="127.0.0.1", secret=SECRET)] for n, host in hosts.items()},
            link="shm",
            reply_timeout_s=5.0,
            bind_host="127.0.0.1",
            secret=SECRET,
            threads=1,
        )
        stack.callback(router.stop)
        recorder = Recorder()
        prompt = random_prompt(parts.config, 0, 9)
        router._router.submit(GenerateRequest("r", prompt, SamplingParams(4, temperature=0.0)), recorder)
        recorder.wait("r")
        report = router.report()
        tokens = len(prompt) + 4 - 1
        assert report.expert_tokens.shape == (2, 8)
        assert report.expert_tokens.sum(axis=1).tolist() == [2 * tokens] * 2
        assert report.expert_tokens is not router._router.dispatch.expert_tokens
        assert (report.epoch, report.silent_fronts) == (1, ())
        assert (report.stats.steps, report.stats.late_hosts) == (4, [])
        assert sum(view.pairs for view in report.hosts.values()) == np.sum(report.expert_tokens)
        assert all(view.linked and view.latency_s > 0 for view in report.hosts.values())
