"""Hosts that answer something else, over real links: what comes of it is what Python alone makes of it, word for word."""

from __future__ import annotations

import os
import random
import socket
import struct
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moray.actors.links import Frame
from moray.actors.links.shm_memory import SLOTS, place_of
from moray.actors.links.wire import MessageType, encode, plan_payload
from moray.actors.moe_frames import Kind, MoeHeader
from moray.kernels.combine import combine

from .played_hosts import HIDDEN, PlayedCluster, PlayedHost, Step, lent, outcome, patience

Play = Callable[..., PlayedCluster]
Act = Callable[[PlayedHost, Frame], None]
"""How a host answers a request."""


def fate(cluster: PlayedCluster, act: Act, one: Step) -> tuple[object, ...]:
    """What becomes of a layer that the first host answers so, and of the next one."""
    dispatch = cluster.dispatch
    dispatch._counts.sequence = 100  # which has counted frames, too, that were native and then Python's: errors tell it
    claim = dispatch.start(3, *one)
    assert cluster.exchange is None or cluster.exchange.claim is claim
    act(cluster[0], cluster[0].take())
    for host in list(cluster.hosts.values())[1:]:
        host.answer()
    first = outcome(dispatch.finish, claim), dict(dispatch.broken)
    assert lent(dispatch) == []

    def go_on() -> torch.Tensor:
        claim = dispatch.start(4, *one)
        cluster.answer_all()
        return dispatch.finish(claim)

    second = outcome(go_on), dict(dispatch.broken)
    assert lent(dispatch) == []
    return *first, *second, dispatch.expert_tokens.tolist(), dispatch.unlinked


# ---- frames that are not what was asked for ------------------------------------------------------------------------------


def sends(change: Callable[[torch.Tensor], tuple[torch.Tensor, ...]], more: bytes = b"", **changes: Any) -> Act:
    """Tensors made of the right ones, under a header of which some is changed."""
    return lambda host, request: host.send(request, *change(host.outputs(request)), more=more, **changes)


def same(outputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (outputs,)


FRAMES: dict[str, Act] = {
    "right": sends(same),
    "another sequence": sends(same, sequence=1),
    "no sequence": sends(same, sequence=(1 << 64) - 1),
    "another layer": sends(same, layer=4),
    "another epoch": sends(same, epoch=2),
    "a longer header": sends(same, more=b"x"),
    "a shorter header": lambda host, request: host.link.send(b"short", [host.outputs(request)], deadline=patience()),
    "a kind that is none": lambda host, request: host.link.send(
        b"\x63" + request.header[1:], [host.outputs(request)], deadline=patience()
    ),
    "a request": sends(same, kind=Kind.WORK),
    "weights": sends(same, kind=Kind.WEIGHTS),
    "a refusal": sends(lambda outputs: (), kind=Kind.FAILED, more=b"why"),
    "a refusal with outputs": sends(same, kind=Kind.FAILED),
    "nothing": sends(lambda outputs: ()),
    "a row more": sends(lambda outputs: (torch.cat([outputs, outputs[:1]]),)),
    "a row less": sends(lambda outputs: (outputs[1:],)),
    "no rows": sends(lambda outputs: (outputs[:0],)),
    "as many bytes in other rows": sends(lambda outputs: (outputs.view(2 * len(outputs), -1),)),
    "wider rows": sends(lambda outputs: (outputs.repeat(1, 2),)),
    "one dimension": sends(lambda outputs: (outputs.flatten(),)),
    "three dimensions": sends(lambda outputs: (outputs[None],)),
    "fp32": sends(lambda outputs: (outputs.float(),)),
    "fp16": sends(lambda outputs: (outputs.half(),)),
    "two tensors": sends(lambda outputs: (outputs, outputs)),
}


# ---- packets -------------------------------------------------------------------------------------------------------------


def packet(host: PlayedHost, request: Frame, *, frames_later: int = 0) -> bytes:
    """That of the right answer, whose outputs are where they belong then."""
    outputs = host.outputs(request)
    (place,) = host.link.prepare(((outputs.dtype, tuple(outputs.shape)),), deadline=patience())
    place.copy_(outputs)
    header = MoeHeader.unpack(request.header)._replace(kind=Kind.DONE).pack()
    place = place_of(host.link._state.sent + frames_later, host.link._slot)
    return encode(MessageType.FRAME, place, header, plan_payload((outputs,)))


def raw(packets: Callable[[bytes], tuple[bytes, ...]], *, then: Act | None = None) -> Act:
    """Packets made of the right one, and whatever is to follow."""

    def act(host: PlayedHost, request: Frame) -> None:
        for data in packets(packet(host, request)):
            host.link._sock.send(data)
        if then is not None:
            then(host, request)

    return act


def hang_up(host: PlayedHost, request: Frame) -> None:
    host.link.close()


def with_a_file(host: PlayedHost, request: Frame) -> None:
    with open(os.devnull, "rb") as file:
        socket.send_fds(host.link._sock, [packet(host, request)], [file.fileno()])


def twice(host: PlayedHost, request: Frame) -> None:
    for _ in range(2):
        host.send(request, host.outputs(request))


def out_of_order(host: PlayedHost, request: Frame) -> None:
    host.link._sock.send(packet(host, request, frames_later=1))


def with_a_page(write: Callable[[Any], None]) -> Act:
    """The right answer, after something was written to the page that both ends write to."""

    def act(host: PlayedHost, request: Frame) -> None:
        write(host.link._page)
        host.send(request, host.outputs(request))

    return act


def through_arenas_of(slot_bytes: int) -> Act:
    def act(host: PlayedHost, request: Frame) -> None:
        host.link._send_through(host.link._offer_arena(slot_bytes, patience()))
        host.send(request, host.outputs(request))

    return act


NOISE = random.Random(0).randbytes(71)
PACKETS: dict[str, Act] = {
    "right": raw(lambda right: (right,), then=hang_up),
    "garbage as long": raw(lambda right: (NOISE[:70],)),
    "zeros as long": raw(lambda right: (bytes(70),)),
    "garbage a byte longer": raw(lambda right: (NOISE,)),
    "one byte": raw(lambda right: (b"x",)),
    "a byte less": raw(lambda right: (right[:-1],)),
    "a byte more": raw(lambda right: (right + b"x",)),
    "half of it, and the end": raw(lambda right: (right[:35],), then=hang_up),
    "the end": hang_up,
    "the end after it": raw(lambda right: (right,), then=hang_up),
    "another type": raw(lambda right: (encode(MessageType.STORE, 0),)),
    "news of room before it": raw(lambda right: (encode(MessageType.SPACE, 0), right), then=hang_up),
    "a file beside it": with_a_file,
    "it twice": twice,
    "the one after it": out_of_order,
    "through a larger arena": through_arenas_of(1 << 17),
    "a page that says nonsense": with_a_page(lambda page: page.release(77)),
    "a page that says the most": with_a_page(lambda page: page.release((1 << 64) - 1)),
    "a page that asks for news": with_a_page(lambda page: page.wait_for_slot(True)),
}


@pytest.mark.parametrize("name", [f"frame: {name}" for name in FRAMES] + [f"packet: {name}" for name in PACKETS])
def test_every_answer_has_the_fate_that_python_alone_gives_it(play: Play, name: str) -> None:
    kind, _, case = name.partition(": ")
    act = (FRAMES if kind == "frame" else PACKETS)[case]
    found = []
    for native in (True, False):
        cluster = play((0, 1, 2), (3, 4, 5), native=native)
        cluster.warm()
        found.append(fate(cluster, act, cluster.step(12)))
    assert found[0] == found[1]


@pytest.mark.parametrize("valid", [True, False], ids=["checksum right", "checksum wrong"])
def test_every_wrong_byte_has_the_fate_that_python_alone_gives_it(play: Play, valid: bool) -> None:
    for at in range(70):

        def change(right: bytes, at: int = at) -> tuple[bytes, ...]:
            wrong = bytearray(right)
            wrong[at] ^= 0x41
            if valid and not 32 <= at < 36:
                wrong[32:36] = struct.pack("<I", zlib.crc32(wrong[36:], zlib.crc32(wrong[:32])))
            return (bytes(wrong),)

        found = []
        for native in (True, False):
            cluster = play((0, 1, 2), native=native)
            cluster.warm()
            found.append(fate(cluster, raw(change), cluster.step(12))[:2])
            cluster.close()
        assert found[0] == found[1], at
        assert valid or isinstance(found[0][0], tuple), "an error"


def announce_outputs(host: PlayedHost) -> None:
    """Say that outputs are there for what was asked, whatever the memory for them."""
    request = host.take()
    header = MoeHeader.unpack(request.header)._replace(kind=Kind.DONE).pack()
    payload = plan_payload((host.outputs(request),))
    host.link._sock.send(encode(MessageType.FRAME, place_of(host.link._state.sent, 0), header, payload))


# ---- memory that is not there --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_outputs_without_an_arena(play: Play, native: bool) -> None:
    """The host has only ever refused, which takes no memory."""
    cluster = play((0, 1, 2), native=native)
    host, one = cluster[0], cluster.step()
    for _ in range(2):
        claim = cluster.dispatch.start(3, *one)
        sends(lambda outputs: (), kind=Kind.FAILED)(host, host.take())
        outcome(cluster.dispatch.finish, claim)
    claim = cluster.dispatch.start(3, *one)
    assert cluster.exchange is None or cluster.exchange.claim is claim
    announce_outputs(host)
    why = "sent 960 bytes without an arena that holds them"
    assert why in str(outcome(cluster.dispatch.finish, claim))


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
def test_outputs_that_are_larger_than_the_arena(play: Play, native: bool) -> None:
    cluster = play((0, 1, 2), native=native)
    cluster.warm()
    host = cluster[0]
    one = cluster.step(600)
    claim = cluster.dispatch.start(3, *one)
    assert cluster.exchange is None or cluster.exchange.claim is claim
    announce_outputs(host)
    why = f"sent {1200 * HIDDEN * 2} bytes without an arena that holds them"
    assert why in str(outcome(cluster.dispatch.finish, claim))


@pytest.mark.parametrize("native", [True, False], ids=["native", "python"])
@pytest.mark.parametrize("more", [1, 2, 32])
def test_an_arena_whose_slots_are_not_aligned_is_refused(play: Play, native: bool, more: int) -> None:
    """There, a tensor's elements are where the processor, or torch, does not take them."""
    cluster = play((0, 1, 2), (3, 4, 5), native=native)
    cluster.warm()
    fate(cluster, through_arenas_of((1 << 16) + more), cluster.step(12))
    assert cluster.dispatch.broken == {"h0": f"link to h0: sent an arena with slots of {(1 << 16) + more} bytes"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.0])
def test_any_outputs_are_summed_as_they_are(play: Play, value: float) -> None:
    """Also those that a host changes after it has said that they are there."""
    found = []
    for native in (True, False):
        cluster = play((0, 1, 2), (3, 4, 5), native=native)
        cluster.warm()
        one = cluster.step(12)
        claim = cluster.dispatch.start(3, *one)
        cluster.answer_all()
        host = cluster[0]
        last = (host.link._state.sent - 1) % SLOTS
        host.link._outgoing.slot(host.link._state.slots[last]).view(torch.bfloat16).fill_(value)
        before = cluster.layers
        result = cluster.dispatch.finish(claim)
        assert cluster.layers - before == native
        hidden_states, ids, weights = one
        outputs = hidden_states[:, None] * (ids + 1).to(hidden_states.dtype)[:, :, None]
        outputs[ids < 3] = value
        assert torch.equal(result.view(torch.int32), combine(outputs, weights).view(torch.int32))
        found.append(result)
    assert torch.equal(found[0].view(torch.int32), found[1].view(torch.int32))


def test_a_host_that_waits_for_room_is_told_of_it_by_python(play: Play) -> None:
    cluster = play((0, 1, 2), (3, 4, 5))
    cluster.warm()
    before = cluster.layers
    page = cluster[0].link._page
    for waits, layers in [(True, 0), (True, 0), (False, 1), (True, 1), (False, 2)]:
        page.wait_for_slot(waits)
        cluster.run()
        assert cluster.layers - before == layers
