"""The native loop of an expert host: whatever it does must be what Python alone does, bit for bit."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import logging
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from moray.actors import expert_host as host_module
from moray.actors import native_library
from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links.shm import ShmLink
from moray.actors.links.shm_memory import SLOTS as ARENA_SLOTS
from moray.actors.moe_frames import Kind
from moray.configs.errors import LinkError, PeerDiedError
from moray.model.compute import Compute

from .packed_hosts import (
    EPOCH,
    HIDDEN,
    SLOTS,
    ask,
    assert_same,
    connect,
    expected,
    header,
    native_frames,
    patience,
    receive,
    send,
    type_of_experts,
    wait_for_links,
    wait_until,
    warm,
    work,
)

# ---- ordinary work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 5, 64])
def test_the_bits_are_pythons(host: ExpertHost, python: ExpertHost, tokens: int) -> None:
    with warm(host) as link:
        ask(link, work(tokens))  # makes the arenas large enough
        before = native_frames(host)
        for layer, slots in ((1, 3), (2, 2)):
            for seed in range(4):
                tensors, head = work(tokens, seed=seed, slots=slots), header(layer=layer, sequence=1000 + seed)
                reply = ask(link, tensors, head)
                assert reply[0].kind is Kind.DONE
                assert_same(reply, expected(python, tensors, head))
        assert native_frames(host) - before == 8


def test_only_the_first_frame_of_a_size_is_pythons(host: ExpertHost, python: ExpertHost) -> None:
    """Its arenas have to be made: for requests that grow, and for replies that grow more than requests do."""
    link = connect(host)
    served = []
    for tokens in (1, 1, 500, 1, 500, 2000, 2000):
        before = native_frames(host)
        assert_same(ask(link, work(tokens)), expected(python, work(tokens)))
        served.append(native_frames(host) - before)
    assert served == [0, 1, 0, 1, 1, 0, 1]
    link.close()


def test_a_reply_may_outgrow_its_arena_where_the_request_does_not(host: ExpertHost, python: ExpertHost) -> None:
    one, slots = work(1)[0], torch.arange(3, dtype=torch.int32).repeat_interleave(100)
    many = one, torch.stack([torch.zeros_like(slots), slots])
    with warm(host) as link:
        for native in (0, 1):
            assert_same(ask(link, many), expected(python, many))
            assert native_frames(host) == native


def test_pairs_are_reported_and_time(host: ExpertHost) -> None:
    with warm(host) as link:
        before = host.report()
        for _ in range(3):
            ask(link, work(4))
        assert native_frames(host) == 3
        after = host.report()
        assert after.pairs - before.pairs == 3 * 6
        assert after.busy_s > before.busy_s


def test_two_requests_ahead_and_replies_that_nobody_reads(host: ExpertHost, python: ExpertHost) -> None:
    """The fourth reply has no slot until the first has been released; nothing is lost or out of order meanwhile."""
    with warm(host) as link:
        for number in range(ARENA_SLOTS + 2):
            send(link, work(seed=number), header(sequence=number))
        for number in range(ARENA_SLOTS + 2):
            assert_same(receive(link), expected(python, work(seed=number), header(sequence=number)))


def test_requests_one_after_the_other_lie_in_one_place(host: ExpertHost) -> None:
    """Native code is done with a request when it answers: no other memory takes room in the caches."""
    with warm(host) as link:
        for _ in range(1 + ARENA_SLOTS):
            ask(link, work())
        assert isinstance(link, ShmLink)
        assert list(link._state.slots) == [0] * ARENA_SLOTS


def test_several_routers(host: ExpertHost, python: ExpertHost) -> None:
    routers, rounds = 4, 30
    wanted = [expected(python, work(3, seed=seed)) for seed in range(routers)]

    def run(router: int) -> None:
        with contextlib.closing(connect(host, f"router-{router}")) as link:
            for _ in range(rounds):
                assert_same(ask(link, work(3, seed=router)), wanted[router])

    with ThreadPoolExecutor(routers) as pool:
        list(pool.map(run, range(routers)))
    assert native_frames(host) == routers * (rounds - 1)
    assert host.report().pairs == routers * rounds * 6


def test_native_loops_and_python_take_turns(host: ExpertHost) -> None:
    with warm(host) as link:
        with host._one_at_a_time:
            busy_s = host.report().busy_s
            send(link, work())
            assert not link.wait(deadline=Deadline.after(0.3))
            assert host.report().busy_s == busy_s
        assert receive(link)[0].kind is Kind.DONE
        assert native_frames(host) == 1


def test_what_a_router_changes_afterwards_is_not_followed(host: ExpertHost, python: ExpertHost) -> None:
    """Pairs are checked, and then followed, in memory that the router cannot write to."""
    absurd = 1 << 30
    with warm(host) as link:
        table = host._held.table
        real = type_of_experts()(table.structure.experts)

        def scribbling(*arguments: Any) -> int:
            for slot in range(ARENA_SLOTS):
                link._outgoing.slot(slot).view(torch.int32)[HIDDEN:].fill_(
                    absurd
                )  # behind the hidden states of two tokens
            return int(real(*arguments))

        scribble = type_of_experts()(scribbling)
        table.structure.experts = ctypes.cast(scribble, ctypes.c_void_p).value
        wanted = expected(python, work())
        assert_same(ask(link, work()), wanted)
        assert native_frames(host) == 1


def test_what_a_router_changes_afterwards_python_does_not_follow_either(
    python: ExpertHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    with warm(python) as link:
        wanted, real = expected(python, work()), vars(host_module)["grouped_mlp"]

        def scribbling(*arguments: Any, **keywords: Any) -> torch.Tensor:
            for slot in range(ARENA_SLOTS):
                link._outgoing.slot(slot).view(torch.int32)[HIDDEN:].fill_(1 << 30)
            outputs: torch.Tensor = real(*arguments, **keywords)
            return outputs

        monkeypatch.setattr(host_module, "grouped_mlp", scribbling)
        assert_same(ask(link, work()), wanted)


# ---- ends and changes ----------------------------------------------------------------------------------------------------


def test_stopping_ends_a_native_wait_at_once(host: ExpertHost) -> None:
    with warm(host) as link:
        (host_end,) = wait_for_links(host)
        time.sleep(0.2)  # into the wait
        began = time.monotonic()
        host.stop()
        assert time.monotonic() - began < 0.9  # a call that nothing interrupts takes a second
        assert not any(thread.is_alive() for thread in host._threads)
        assert host_end._sock.fileno() == -1
        with pytest.raises(PeerDiedError):
            link.recv(deadline=patience())


def test_an_abort_frees_nothing_that_a_native_call_uses(host: ExpertHost) -> None:
    """The call is in its computation: the link's memory and descriptor stay until it has ended."""
    with warm(host) as link:
        (host_end,) = wait_for_links(host)
        inside, go = threading.Event(), threading.Event()
        table = host._held.table
        real = type_of_experts()(table.structure.experts)

        def held_up(*arguments: Any) -> int:
            inside.set()
            assert go.wait(20)
            return int(real(*arguments))

        hold = type_of_experts()(held_up)
        table.structure.experts = ctypes.cast(hold, ctypes.c_void_p).value
        send(link, work())
        assert inside.wait(20)
        host_end.abort()
        state: Any = host_end
        assert state._sock.fileno() != -1
        assert state._outgoing is not None
        go.set()
        wait_until(lambda: host_end not in host._links)
        assert state._sock.fileno() == -1
        assert state._outgoing is None


def test_a_router_that_dies_takes_only_its_link_along(host: ExpertHost, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moray.expert_host")
    with warm(host) as link:
        other = connect(host, "router-1")
        ask(other, work())
        for tensors in ((), work()):  # idle, and with a request that nobody waits for any more
            dying = connect(host, "router-2")
            ask(dying, work())
            if tensors:
                send(dying, tensors)
            dying.close()
            wait_until(lambda: len(host._links) == 2)
        assert ask(link, work())[0].kind is Kind.DONE
        assert ask(other, work())[0].kind is Kind.DONE
        other.close()
    assert "link to router-2" in caplog.text


def test_epochs_come_and_go_under_traffic(host: ExpertHost, python: ExpertHost, checkpoint: Path) -> None:
    """A router that goes on with its epoch gets the bits of that epoch, or is told that it is not served any more."""
    wanted = expected(python, work())
    done = threading.Event()

    def ask_on() -> int:
        answered = 0
        with warm(host) as link:
            while not done.is_set():
                assert_same(ask(link, work()), wanted)
                answered += 1
        return answered

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask_on)
        for epoch in range(EPOCH + 1, EPOCH + 21):
            host.load(checkpoint, ((epoch % 8, 1), (2,)), epoch=epoch)
            host.abandon(epoch)
        done.set()
        assert asking.result(20) > 0
    host.load(checkpoint, SLOTS, epoch=30)
    with warm(host) as link:
        time.sleep(0.2)  # into the native wait: it has the epochs of before
        host.retire(30)
        reply, _ = ask(link, work())
        assert reply.reason.endswith("placement epoch 3 is not served here; [30] are")
        assert_same(ask(link, work(), header(epoch=30)), expected(host, work(), header(epoch=30)))


@pytest.mark.parametrize("traffic", [False, True], ids=["idle", "traffic"])
def test_what_is_retired_is_freed_soon(host: ExpertHost, checkpoint: Path, traffic: bool) -> None:
    with warm(host) as link:
        host.load(checkpoint, ((2, 3), (5,)), epoch=4)
        ask(link, work())
        packed: list[Any] = [host._held.layer(EPOCH, layer)[0].gate_up for layer in (1, 2)]
        retired = [weakref.ref(weight.tiles) for weight in packed]
        del packed
        tensors, head = work(slots=2), header(epoch=4)
        ask(link, tensors, head)
        host.retire(4)
        deadline = patience()
        while any(one() is not None for one in retired):
            assert not deadline.passed
            if traffic:
                ask(link, tensors, head)
            else:
                time.sleep(0.02)
            gc.collect()
        assert ask(link, tensors, head)[0].kind is Kind.DONE


# ---- without it ----------------------------------------------------------------------------------------------------------


def test_without_the_library_python_serves_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, checkpoint: Path, host: ExpertHost
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, package=None: None if package == "moray.actors" else find(name, package),
    )
    native_library._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, logger="moray.expert_host"):
            plain, _ = [ExpertHost("expert-host-1", compute=Compute.native()) for _ in range(2)]
    finally:
        native_library._load.cache_clear()
    assert [record.message.partition(":")[0] for record in caplog.records] == ["event=no_native_actors"]
    plain.load(checkpoint, SLOTS, epoch=EPOCH)
    with warm(plain) as link:
        assert_same(ask(link, work()), expected(host, work()))
    assert plain.report().pairs == 2 * 3
    plain.stop()


def test_experts_that_are_not_packed_are_pythons(checkpoint: Path) -> None:
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu(torch.bfloat16))
    host.load(checkpoint, SLOTS, epoch=EPOCH)
    assert len(host._held.table) == 0
    with warm(host) as link:
        assert_same(ask(link, work()), expected(host, work()))
        assert native_frames(host) == 0
    host.stop()


def test_a_broken_link_stays_broken(host: ExpertHost) -> None:
    with warm(host) as link:
        (host_end,) = wait_for_links(host)
        link._sock.send(b"nonsense")
        wait_until(lambda: host_end not in host._links)
        assert host._loop is not None
        with pytest.raises(LinkError, match="closed on this side"):
            host._loop.serve(host_end, host._held.table)
