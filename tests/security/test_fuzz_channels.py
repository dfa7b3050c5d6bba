"""A peer that holds the secret and talks nonsense breaks its own connection: nobody else's, and not the process."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moray.actors import front_channel
from moray.actors.deadline import Deadline
from moray.actors.expert_host import ExpertHost
from moray.actors.links import Frame, Link, LinkAddress, dial
from moray.actors.links.handshake import authenticate
from moray.actors.links.shm import CHANNEL as SHM
from moray.actors.links.shm_memory import ControlPage
from moray.actors.links.sockets import split_endpoint
from moray.actors.links.wire import MAGIC, MAX_TENSORS, WIRE_VERSION, MessageType, encode, plan_payload
from moray.actors.moe_frames import Kind, MoeHeader
from moray.actors.request_checks import check_request
from moray.actors.testing import SECRET
from moray.configs.errors import MorayError
from moray.model.compute import Compute
from moray.model.testing import write_random_checkpoint

deterministic = settings(
    max_examples=100,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
few = settings(deterministic, max_examples=25)

EXPECTED = (ValueError, TypeError, LookupError)
"""What both ends of the front channel catch: they drop the connection then."""

# ---- between front and router ---------------------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=10,
)
kinds = st.sampled_from(["generate", "cancel", "stats", "alive", "accepted", "refused", "outputs", "ending", "other"])


@deterministic
@given(st.one_of(st.binary(max_size=200), values.map(msgpack.packb), st.binary(max_size=50).map(lambda b: b"\x95" + b)))
def test_any_bytes_are_a_message_or_refused(body: bytes) -> None:
    try:
        message = front_channel.decode(body)
    except ValueError:
        return
    assert isinstance(message, list)
    assert isinstance(message[0], str)


@deterministic
@given(kinds, st.lists(values, max_size=7))
def test_any_message_is_understood_or_refused(kind: str, parts: list[Any]) -> None:
    message = front_channel.decode(msgpack.packb([kind, *parts]))
    for reader in (front_channel.request_from, front_channel.outputs_from, front_channel.refusal_from):
        with contextlib.suppress(*EXPECTED):
            reader(message)


SAMPLING: dict[str, Any] = {
    "max_tokens": 1,
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "logprobs": None,
    "stop_token_ids": [],
}


@deterministic
@given(st.sampled_from(sorted(SAMPLING)), values, st.binary(max_size=12).map(lambda b: b[: len(b) // 4 * 4]))
def test_any_request_is_one_that_can_be_served_or_refused(name: str, value: Any, tokens: bytes) -> None:
    """What passes the checks reaches the router's own thread, where an error would end the router."""
    message = ["generate", "id", tokens or bytes(4), b"", {**SAMPLING, name: value}]
    try:
        request = front_channel.request_from(front_channel.decode(msgpack.packb(message)))
        check_request(request, vocab_size=512, max_context=100)
    except (*EXPECTED, MorayError):
        return
    sampling = request.sampling
    assert 1 <= sampling.max_tokens <= 100
    assert 0 <= sampling.temperature < float("inf")
    assert all(isinstance(token, int) for token in (*sampling.stop_token_ids, sampling.seed, sampling.top_k))


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdd\x03\x00\x00\x00" * 500,
        b"\xdc\x40\x00" * 500,
        b"\xdf\x03\x00\x00\x00" * 500,
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["list", "lists", "lists-within-bounds", "maps", "text", "bytes", "deep", "extension"],
)
def test_what_a_message_claims_to_hold_is_not_allocated(bomb: bytes) -> None:
    body = bomb + bytes(1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):  # noqa: PT011  # msgpack words them all differently
            front_channel.decode(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 << 20


def test_a_length_is_not_allocated_before_its_bytes_are_there() -> None:
    arriving = front_channel.MessageBuffer()
    tracemalloc.start()
    try:
        assert list(arriving.feed(struct.pack("<I", front_channel.MAX_MESSAGE_BYTES) + b"x")) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
    with pytest.raises(ValueError, match="exceeds"):
        list(front_channel.MessageBuffer().feed(struct.pack("<I", front_channel.MAX_MESSAGE_BYTES + 1)))


# ---- between router and expert host ---------------------------------------------------------------------------------

HIDDEN = 192
SLOTS = ((4, 1, 6), (0, 7))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ExpertHost]:
    checkpoint = write_random_checkpoint(tmp_path_factory.mktemp("fp8"), dtype="fp8", seed=9)
    host = ExpertHost("expert-host-0", compute=Compute.on_cpu())
    host.load(checkpoint, SLOTS, epoch=3)
    yield host
    host.stop()


@pytest.fixture(scope="module", params=["shm", "gloo"])
def address(host: ExpertHost, request: pytest.FixtureRequest) -> LinkAddress:
    return host.listen(request.param, bind_host="127.0.0.1", secret=SECRET)


@pytest.fixture(scope="module")
def honest(address: LinkAddress) -> Iterator[Link]:
    """A router's link, which must work whatever others do."""
    link = dial(address, secret=SECRET, identity="router-0", deadline=Deadline.after(20))
    yield link
    link.close()


def work() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(7))
    return hidden, torch.tensor([[0, 1, 1], [0, 0, 2]], dtype=torch.int32)


def answer(link: Link) -> torch.Tensor:
    """The answer to the same work each time."""
    link.send(MoeHeader(Kind.WORK, 1, 3, 1).pack(), work(), deadline=Deadline.after(20))
    frame = link.recv(deadline=Deadline.after(20))
    assert MoeHeader.unpack(frame.header).kind is Kind.DONE
    return frame.tensors[0].clone()


def a_peer(address: LinkAddress) -> socket.socket:
    """An authenticated connection without a link on it: what follows is up to the test."""
    if address.kind == "shm":
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(f"\0{address.endpoint}")
    else:
        sock = socket.create_connection(split_endpoint(address.endpoint))
    channel = SHM if address.kind == "shm" else f"link/{address.kind}"
    deadline = Deadline.after(20)
    authenticate(sock, secret=SECRET, identity="router-9", channel=channel, initiator=True, deadline=deadline)
    sock.settimeout(20)
    return sock


def with_valid_crc(head: bytes, body: bytes) -> bytes:
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


heads = st.builds(
    lambda kind, tensors, header, body, sequence, payload: with_valid_crc(
        struct.pack("<IBBHIIQQ", MAGIC, WIRE_VERSION, kind, tensors, header, len(body), sequence, payload), body
    ),
    st.integers(0, 255),
    st.integers(0, MAX_TENSORS + 1),
    st.integers(0, 60),
    st.binary(max_size=60),
    st.integers(0, 2),
    st.sampled_from([0, 64, 1 << 30, (1 << 64) - 1]),
)
nonsense = st.one_of(
    st.binary(min_size=1, max_size=200),
    heads,
    st.builds(encode, st.sampled_from(MessageType), st.integers(0, 1), st.binary(max_size=40)),
)


@few
@example([encode(MessageType.FRAME, 0, b"x", plan_payload([torch.zeros(3)]))], True)
@example([encode(MessageType.FRAME, 0, b"", plan_payload([]))], True)
@example([encode(MessageType.STORE, 0, b"no separator")], False)
@example([encode(MessageType.READY, 0)], False)
@given(st.lists(nonsense, min_size=1, max_size=3), st.booleans())
def test_nonsense_on_a_connection_ends_it_and_no_other(
    address: LinkAddress, honest: Link, packets: list[bytes], begin_well: bool
) -> None:
    before = answer(honest)
    with a_peer(address) as sock:
        if address.kind == "shm" and begin_well:
            _, fd = ControlPage.create()
            socket.send_fds(sock, [encode(MessageType.PAGE, 0)], [fd])
            os.close(fd)
        with contextlib.suppress(OSError):  # it hangs up as soon as it has seen enough
            for packet in packets:
                sock.send(packet)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
    assert torch.equal(answer(honest), before)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.float8_e4m3fn])
tensors = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, HIDDEN]), max_size=4).filter(lambda shape: len(shape) < 4 or 0 in shape),
    dtypes,
    st.sampled_from([0.0, 1.0, -1.0, 5.0, float(1 << 20)]),
)


@deterministic
@example(Kind.WORK, 1, 3, [torch.zeros(1, 1 << 20), torch.zeros(2, 4, dtype=torch.int32)])
@example(Kind.WORK, 1, 3, [torch.zeros(1, HIDDEN), torch.zeros(2, 1 << 21, dtype=torch.int32)])
@example(Kind.WORK, 1, 3, [torch.zeros(0, HIDDEN), torch.zeros(2, 1, dtype=torch.int32)])
@example(Kind.WORK, 1, 3, [torch.zeros(1, HIDDEN), torch.full((2, 1), 1 << 30, dtype=torch.int32)])
@example(Kind.WORK, 1, 3, [torch.zeros(1, HIDDEN), torch.full((2, 1), -1, dtype=torch.int32)])
@example(Kind.FETCH, 1, 3, [torch.zeros(1 << 20, 4, dtype=torch.int64)])
@example(Kind.FETCH, 1, 3, [torch.full((1, 4), 1 << 62, dtype=torch.int64)])
@given(
    st.sampled_from(Kind),
    st.sampled_from([0, 1, 2, 3, 65535]),
    st.sampled_from([3, 0, (1 << 32) - 1]),
    st.lists(tensors, max_size=4),
)
def test_any_frame_is_answered_and_changes_nothing(
    host: ExpertHost, kind: Kind, layer: int, epoch: int, tensors: list[torch.Tensor]
) -> None:
    good = Frame(MoeHeader(Kind.WORK, 1, 3, 1).pack(), work())
    before = host.handle(good)[1][0].clone()
    tracemalloc.start()
    try:
        header, _ = host.handle(Frame(MoeHeader(kind, layer, epoch, 9).pack(), tuple(tensors)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert MoeHeader.unpack(header).kind in (Kind.DONE, Kind.WEIGHTS, Kind.FAILED)
    assert MoeHeader.unpack(header).sequence == 9
    assert peak < 8 << 20
    assert torch.equal(host.handle(good)[1][0], before)


@deterministic
@given(st.binary(max_size=40))
def test_any_header_is_one_or_refused(host: ExpertHost, data: bytes) -> None:
    with contextlib.suppress(ValueError):
        host.handle(Frame(data, ()))
