"""What the native loop of an expert host leaves to Python must fare as with Python alone, word for word."""

from __future__ import annotations

import contextlib
import logging
import operator
import os
import socket
import struct
import zlib
from functools import partial
from pathlib import Path

import pytest
import torch

from moray.actors.expert_host import ExpertHost
from moray.actors.links.base import TensorForm
from moray.actors.links.shm_memory import SLOTS as ARENA_SLOTS
from moray.actors.links.shm_memory import place_of
from moray.actors.links.wire import MessageType, encode, plan_payload
from moray.actors.moe_frames import Kind
from moray.configs.errors import PeerDiedError

from .packed_hosts import (
    EPOCH,
    HIDDEN,
    Tensors,
    ask,
    assert_same,
    connect,
    expected,
    header,
    native_frames,
    patience,
    receive,
    send,
    wait_for_links,
    wait_until,
    warm,
    work,
)

# ---- what is left to Python ----------------------------------------------------------------------------------------------


def changed(pairs: list[list[int]]) -> Tensors:
    return work()[0], torch.tensor(pairs, dtype=torch.int32)


LEFT: dict[str, tuple[bytes, Tensors]] = {
    "unknown epoch": (header(epoch=4), work()),
    "layer without experts": (header(layer=0), work()),
    "layer too high": (header(layer=3), work()),
    "another kind": (header(kind=Kind.DONE), work()),
    "longer header": (header() + b"more", work()),
    "slot too high": (header(), changed([[0, 1], [0, 3]])),
    "slot negative": (header(), changed([[0, 1], [-1, 0]])),
    "slot absurd": (header(), changed([[0, 1], [0, 2**31 - 1]])),
    "slots descend": (header(), changed([[0, 1], [2, 1]])),
    "row too high": (header(), changed([[0, 2], [0, 0]])),
    "row negative": (header(), changed([[-1, 0], [0, 0]])),
    "no pairs": (header(), (work()[0], torch.zeros(2, 0, dtype=torch.int32))),
    "no tokens": (header(), (torch.zeros(0, HIDDEN, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int32))),
    "nothing": (header(), ()),
    "three tensors": (header(), (*work(), torch.zeros(1))),
    "another hidden size": (header(), (torch.zeros(2, 128, dtype=torch.bfloat16), work()[1])),
    "fp32": (header(), (work()[0].float(), work()[1])),
    "integers": (header(), (work()[0].int(), work()[1])),
    "pairs of int64": (header(), (work()[0], work()[1].long())),
    "pairs in three rows": (header(), (work()[0], torch.zeros(3, 2, dtype=torch.int32))),
    "flat hidden states": (header(), (work()[0].flatten(), work()[1])),
    "more than a frame carries": (header(), (work(1)[0], torch.zeros(2, 3_000_000, dtype=torch.int32))),
}


@pytest.mark.parametrize("case", LEFT)
def test_refuses_in_pythons_words_and_goes_on(host: ExpertHost, python: ExpertHost, case: str) -> None:
    head, tensors = LEFT[case]
    with warm(host) as link:
        assert_same(ask(link, tensors, head), expected(python, tensors, head))
        assert native_frames(host) == 0
        ask(link, work())
        assert native_frames(host) == 1


def test_an_empty_slot_is_refused_in_pythons_words(host: ExpertHost, python: ExpertHost, checkpoint: Path) -> None:
    for one in (host, python):
        one.load(checkpoint, ((4, -1, 6), (0, 7)), epoch=EPOCH)
    with warm(host) as link:
        tensors = changed([[0, 0], [0, 1]])
        reply = ask(link, tensors)
        assert reply[0].reason.endswith("[0, 2] hold an expert'")
        assert_same(reply, expected(python, tensors))
        assert host.report().pairs == 0


def fate(
    host: ExpertHost, caplog: pytest.LogCaptureFixture, packet: bytes, fd: int | None = None
) -> tuple[object, ...]:
    """What becomes of a host's link that an ordinary frame's memory, but these bytes, are sent over."""
    caplog.clear()
    forms: tuple[TensorForm, ...] = tuple((t.dtype, tuple(t.shape)) for t in work())
    link = connect(host)
    with contextlib.closing(link):
        (host_end,) = wait_for_links(host)
        ask(link, work())
        for place, tensor in zip(link.prepare(forms, deadline=patience()), work(), strict=True):
            place.copy_(tensor)
        for slot in range(ARENA_SLOTS):  # wherever the packet says that it lies
            link._outgoing.slot(slot).copy_(link._outgoing.slot(link._slot))
        if fd is None:
            link._sock.send(packet)
        else:
            socket.send_fds(link._sock, [packet], [fd])
        try:
            head, tensors = receive(link)
            return head, *(t.tolist() for t in tensors)
        except PeerDiedError:
            wait_until(lambda: host_end not in host._links)
            return tuple(record.message for record in caplog.records)


def packet_of(frame: int, slot: int = 0, tensors: Tensors | None = None) -> bytes:
    return encode(MessageType.FRAME, place_of(frame, slot), header(), plan_payload(tensors or work()))


PACKET = packet_of(1)


def with_checksum(packet: bytes) -> bytes:
    crc = zlib.crc32(packet[36:], zlib.crc32(packet[:32]))
    return packet[:32] + struct.pack("<I", crc) + packet[36:]


@pytest.mark.parametrize("slot", range(ARENA_SLOTS))
def test_a_frame_is_found_in_any_slot(
    host: ExpertHost, python: ExpertHost, caplog: pytest.LogCaptureFixture, slot: int
) -> None:
    found = fate(host, caplog, packet_of(1, slot))
    assert found == fate(python, caplog, packet_of(1, slot))
    assert host.report().pairs == 2 * len(work()[1][0]), "both requests were answered"


@pytest.mark.parametrize("valid", [True, False], ids=["checksum right", "checksum wrong"])
def test_every_wrong_byte_has_the_same_fate(
    host: ExpertHost, python: ExpertHost, caplog: pytest.LogCaptureFixture, valid: bool
) -> None:
    caplog.set_level(logging.INFO, "moray.expert_host")
    for at in range(len(PACKET)):
        wrong = bytearray(PACKET)
        wrong[at] ^= 0x41
        packet = with_checksum(bytes(wrong)) if valid else bytes(wrong)
        fates = []
        for one in (python, host):
            fates.append(fate(one, caplog, packet))
            wait_until(partial(operator.not_, one._links))
        assert fates[0] == fates[1], at
        assert fates[0], at


@pytest.mark.parametrize(
    "packet",
    [
        PACKET[:-1],
        PACKET + b"x",
        b"x",
        encode(MessageType.STORE, 1),
        packet_of(2),
        packet_of(0),
        packet_of(1, tensors=(work(200)[0], work()[1])),
    ],
    ids=["short", "long", "garbage", "wrong type", "too early", "again", "larger than the arena"],
)
def test_every_wrong_packet_has_the_same_fate(
    host: ExpertHost, python: ExpertHost, caplog: pytest.LogCaptureFixture, packet: bytes
) -> None:
    caplog.set_level(logging.INFO, "moray.expert_host")
    found = fate(host, caplog, packet)
    assert found == fate(python, caplog, packet)
    assert "router-0" in str(found)


def test_a_file_descriptor_beside_ordinary_work_is_refused(host: ExpertHost, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moray.expert_host")
    with open(os.devnull, "rb") as file:
        _, message = fate(host, caplog, PACKET, file.fileno())
    assert "sent a file descriptor with a FRAME message" in str(message)


def test_a_corrupt_control_page_is_an_error(host: ExpertHost, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moray.expert_host")
    with warm(host) as link:
        (host_end,) = wait_for_links(host)
        link._page.release(77)
        send(link, work())
        wait_until(lambda: host_end not in host._links)
    assert "corrupted the control page" in caplog.text


def fill(sock: socket.socket) -> None:
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(encode(MessageType.SPACE, 0))


def test_a_reply_that_the_socket_does_not_take_at_once(host: ExpertHost, python: ExpertHost) -> None:
    with warm(host) as link:
        (host_end,) = wait_for_links(host)
        sock = host_end._sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        fill(sock)
        send(link, work())
        wait_until(lambda: native_frames(host) == 1)
        assert_same(receive(link), expected(python, work()))
        assert_same(ask(link, work(seed=1)), expected(python, work(seed=1)))
