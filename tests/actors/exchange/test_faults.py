"""Hosts that are lost, stuck or refuse while a layer is done natively: results and errors are those of Python alone.

Each test runs with an exchange and without, and expects the same.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moray.actors import native_exchange
from moray.actors.expert_dispatch import ExpertDispatch
from moray.actors.expert_host import ExpertHost
from moray.actors.links.wire import MessageType, encode
from moray.actors.moe_frames import Kind
from moray.actors.testing import EngineParts
from moray.configs.errors import ExpertsUnavailableError

from .played_hosts import PlayedCluster, lent, patience, wait_until
from .real_hosts import Served, host_end, router_ends, run, warm

Play = Callable[..., PlayedCluster]
Make = Callable[..., "Served"]


@pytest.fixture(params=["native", "python"])
def native(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "native")


@pytest.fixture
def serve(parts: EngineParts, native: bool) -> Iterator[Make]:
    made: list[Served] = []

    def serve(*, replicas: int) -> Served:
        made.append(Served(parts, replicas=replicas, native=native))
        return made[-1]

    yield serve
    for served in made:
        served.dispatch.close()


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def finishing(dispatch: ExpertDispatch, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a wait for replies is about to begin."""
    collector: Any = dispatch._native or dispatch._receiver
    began, collect = threading.Event(), collector.collect

    def tell(*arguments: Any) -> Any:
        began.set()
        return collect(*arguments)

    monkeypatch.setattr(collector, "collect", tell)
    return began


# ---- a host that dies ----------------------------------------------------------------------------------------------------


def lose(served: Served, when: str, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A layer with which the first host is lost, that has not answered it."""
    host = served.hosts[0]
    end = host_end(host)
    if when == "before it is asked":
        end.abort()
        return run(served.dispatch, served.steps[0])
    with host._one_at_a_time:
        claim = served.dispatch.start(1, *served.steps[0])
        if when == "before it is waited for":
            end.abort()
            return served.dispatch.finish(claim)
        began = finishing(served.dispatch, monkeypatch)
        result = pool.submit(served.dispatch.finish, claim)
        assert began.wait(20)
        end.abort()
        return result.result(20)


WHEN = ["before it is asked", "before it is waited for", "while it is waited for"]


@pytest.mark.parametrize("when", WHEN)
def test_a_host_that_dies_is_replaced_within_the_layer(
    serve: Make, when: str, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(replicas=2)
    assert torch.equal(lose(served, when, aside, monkeypatch), served.wanted[0])
    assert served.counts() == (1, 0, 0)
    assert served.dispatch.unlinked == ["expert-host-0"]
    assert "link to expert-host-0: " in served.dispatch.broken["expert-host-0"]
    served.assert_usable()
    served.relink()


@pytest.mark.parametrize("when", WHEN)
def test_a_host_that_dies_with_the_only_replicas(
    serve: Make, when: str, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(replicas=1)
    why = "closed the connection" if "waited" in when else r"connection lost \(Broken pipe\)"
    with pytest.raises(ExpertsUnavailableError, match=f"^8 .* no reachable replica: link to expert-host-0: {why}$"):
        lose(served, when, aside, monkeypatch)
    assert served.counts() == (0, 0, 0)
    for _ in range(2):
        with pytest.raises(ExpertsUnavailableError, match=why):
            run(served.dispatch, served.steps[0])
    served.relink()


@pytest.mark.parametrize("full", [(0,), (1,), (0, 1)], ids=str)
def test_a_socket_that_takes_no_packet_at_once(
    play: Play, native: bool, full: tuple[int, ...], aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python waits until it does; nothing is asked twice."""
    cluster = play((0, 1, 2, 3), (0, 1, 2, 3), native=native)
    cluster.warm()
    waits = threading.Event()
    for number in full:
        end = cluster[number].router_end

        def send(*arguments: Any, send: Callable[..., None] = end._packets.send, **options: Any) -> None:
            waits.set()
            send(*arguments, **options)

        monkeypatch.setattr(end._packets, "send", send)
        sock = end._sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(encode(MessageType.SPACE, 0))
    one = cluster.step()
    claim = aside.submit(cluster.dispatch.start, 3, *one)
    assert waits.wait(20)
    for host in cluster.hosts.values():
        assert host.link.wait(deadline=patience())
        host.answer()
    assert torch.equal(cluster.dispatch.finish(claim.result(20)), cluster.expected(one))
    assert cluster.dispatch.resent_shares == 0
    cluster.run()


def test_both_hosts_die(serve: Make) -> None:
    served = serve(replicas=2)
    for host in served.hosts:
        host.stop()
    with pytest.raises(ExpertsUnavailableError, match=r"expert-host-0: .*; link to expert-host-1: "):
        run(served.dispatch, served.steps[0])
    assert served.dispatch.unlinked == ["expert-host-0", "expert-host-1"]


def test_a_reply_of_a_host_that_has_died_since_still_counts(play: Play, native: bool) -> None:
    cluster = play((0, 1), (2, 3), native=native)
    cluster.warm()
    one = cluster.step()
    claim = cluster.dispatch.start(3, *one)
    cluster.answer_all()
    cluster[0].link.close()
    assert torch.equal(cluster.dispatch.finish(claim), cluster.expected(one))
    assert cluster.dispatch.unlinked == []
    cluster.dispatch.check()
    assert cluster.dispatch.broken == {"h0": "link to h0: closed the connection"}


# ---- a host that is stuck ------------------------------------------------------------------------------------------------


def shorten_native_waits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """For what has begun already; call what is returned to have them last as in the other tests."""
    lasted = native_exchange._WAIT_US
    monkeypatch.setattr(native_exchange, "_WAIT_US", 1000)
    return lambda: monkeypatch.setattr(native_exchange, "_WAIT_US", lasted)


def waits_for(served: Served, host: int) -> bool:
    """Whether Python waits for this host alone."""
    lines = [served.dispatch._hosts.lines[h.host_id] for h in served.hosts]
    return bool(lines[host].owed) and all(line.idle for line in lines if line is not lines[host])


def test_a_host_that_takes_longer_than_a_native_wait(
    serve: Make, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = serve(replicas=1)
    be_patient = shorten_native_waits(monkeypatch)
    with served.hosts[0]._one_at_a_time:
        result = aside.submit(run, served.dispatch, served.steps[0])
        wait_until(lambda: waits_for(served, 0))
        assert not result.done()
    assert torch.equal(result.result(20), served.wanted[0])
    assert served.counts() == (0, 0, 0)
    be_patient()
    served.assert_usable()


def pass_time(served: Served, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at all hosts, once Python waits for the first alone."""
    attend, left = served.dispatch._receiver.attend, [seconds]

    def attend_later() -> None:
        if left and waits_for(served, 0):
            served.clock.now += left.pop()
        attend()

    monkeypatch.setattr(served.dispatch._receiver, "attend", attend_later)


def test_a_stuck_host_is_hedged(serve: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(replicas=2)
    be_patient = shorten_native_waits(monkeypatch)
    pass_time(served, 0.5, monkeypatch)
    with served.hosts[0]._one_at_a_time:
        for number in (0, 1):
            assert torch.equal(run(served.dispatch, served.steps[number]), served.wanted[number])
            assert served.counts() == (0, 1, 0)
            assert served.dispatch.late_hosts == ["expert-host-0"]
    line = served.dispatch._hosts.lines["expert-host-0"]

    def answered() -> bool:
        served.dispatch.check()
        return line.idle

    wait_until(answered)
    be_patient()
    served.assert_usable()


def test_a_stuck_host_is_given_up(serve: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(replicas=1)
    be_patient = shorten_native_waits(monkeypatch)
    pass_time(served, 25.0, monkeypatch)
    with (
        served.hosts[0]._one_at_a_time,
        pytest.raises(ExpertsUnavailableError, match=r"expert-host-0: was silent for 25\.00 s with work in hand$"),
    ):
        run(served.dispatch, served.steps[0])
    assert served.counts() == (0, 0, 1)
    be_patient()
    served.relink()


def test_time_in_which_the_router_was_held_up_does_not_count(
    play: Play, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped in its wait, and the hosts with it: none of them is late."""
    cluster = play((0, 1, 2, 3), (0, 1, 2, 3), native=native)
    cluster.warm()
    shorten_native_waits(monkeypatch)
    one = cluster.step()
    claim = cluster.dispatch.start(3, *one)
    pauses, attend = [300.0], cluster.dispatch._receiver.attend

    def held_up(wait: Callable[..., object], *arguments: Any, **options: Any) -> object:
        cluster.clock.now += pauses.pop() if pauses else 0.0
        return wait(*arguments, **options)

    if cluster.exchange:
        library = SimpleNamespace(collect_experts=partial(held_up, cluster.exchange._library.collect_experts))
        monkeypatch.setattr(cluster.exchange, "_library", library)
    else:
        end = cluster[0].router_end
        monkeypatch.setattr(end, "wait", partial(held_up, end.wait))

    def go_on() -> None:
        attend()
        cluster.answer_all()

    monkeypatch.setattr(cluster.dispatch._receiver, "attend", go_on)
    assert torch.equal(cluster.dispatch.finish(claim), cluster.expected(one))
    assert not pauses
    dispatch = cluster.dispatch
    assert (dispatch.resent_shares, dispatch.hedged_shares, dispatch.fenced_hosts, dispatch.broken) == (0, 0, 0, {})


# ---- a host that refuses -------------------------------------------------------------------------------------------------

REFUSAL = "expert-host-0 refused its work: expert-host-0: layer 1: ValueError: placement epoch 1 is not served here; .*"


def change_over(served: Served, host: ExpertHost, checkpoint: Path) -> None:
    """Serve the next epoch alone."""
    host.load(checkpoint, served.table.slots[host.host_id], epoch=2)
    host.retire(2)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_host_that_refuses(serve: Make, checkpoint: Path, replicas: int) -> None:
    served = serve(replicas=replicas)
    change_over(served, served.hosts[0], checkpoint)
    if replicas == 2:
        assert torch.equal(run(served.dispatch, served.steps[0]), served.wanted[0])
        assert served.counts() == (1, 0, 0)
        served.assert_usable()  # the other is asked
    else:
        with pytest.raises(ExpertsUnavailableError, match=f"^{REFUSAL}$"):
            run(served.dispatch, served.steps[0])
        assert served.counts() == (0, 0, 0)
    assert list(served.dispatch.broken) == ["expert-host-0"]
    assert lent(served.dispatch) == []
    change_over(served, served.hosts[1], checkpoint)
    served.dispatch.adopt(served.parts.table(2, replicas=replicas, epoch=2), {})
    served.dispatch.check()
    warm(served.dispatch)
    served.assert_usable()


def test_a_host_that_refused_and_does_its_work_again_is_not_broken(play: Play, native: bool) -> None:
    cluster = play((0, 1, 2, 3), (3,), native=native)
    cluster.warm()
    claim = cluster.dispatch.start(3, *cluster.step())
    cluster[0].send(cluster[0].take(), kind=Kind.FAILED, more=b"out of memory")
    cluster.answer_all()
    with pytest.raises(ExpertsUnavailableError, match="h0 refused its work: out of memory"):
        cluster.dispatch.finish(claim)
    assert cluster.dispatch.broken == {"h0": "h0 refused its work: out of memory"}
    before = cluster.layers
    cluster.run()
    assert cluster.layers - before == native
    assert (cluster.dispatch.broken, cluster.dispatch.missing) == ({}, 0)


# ---- a router that closes ------------------------------------------------------------------------------------------------


def test_closing_ends_a_wait(serve: Make, aside: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(replicas=1)
    ends = router_ends(served.dispatch)
    began = finishing(served.dispatch, monkeypatch)
    with served.hosts[0]._one_at_a_time:
        result = aside.submit(served.dispatch.finish, served.dispatch.start(1, *served.steps[0]))
        assert began.wait(20)
        served.dispatch.close()
        with pytest.raises(ExpertsUnavailableError, match="link to expert-host-0: was closed on this side"):
            result.result(20)
    with pytest.raises(ExpertsUnavailableError, match="was closed on this side"):
        run(served.dispatch, served.steps[0])
    assert [end._sock.fileno() for end in ends] == [-1, -1], "nothing holds them any more"


def test_closing_between_start_and_finish(play: Play, native: bool) -> None:
    cluster = play((0, 1), (2, 3), native=native)
    cluster.warm()
    claim = cluster.dispatch.start(3, *cluster.step())
    cluster.answer_all()
    cluster.dispatch.close()
    with pytest.raises(ExpertsUnavailableError, match=r"link to h0: was closed on this side"):
        cluster.dispatch.finish(claim)
