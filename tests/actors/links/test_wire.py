from __future__ import annotations

import struct
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moray.actors.links.base import MAX_HEADER_BYTES
from moray.actors.links.wire import (
    ALIGNMENT,
    HEAD_BYTES,
    MAGIC,
    MAX_BODY_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_TENSORS,
    WIRE_VERSION,
    MessageType,
    decode,
    decode_head,
    encode,
    plan_payload,
    read_payload,
    write_payload,
)
from moray.configs.errors import LinkError

TENSORS = [
    torch.arange(6, dtype=torch.float32).view(2, 3),
    torch.randn(3, 5).to(torch.bfloat16),
    torch.randn(7).to(torch.float16),
    torch.randn(2, 2, 2).to(torch.float8_e4m3fn),
    torch.empty(0, 7168, dtype=torch.bfloat16),
    torch.tensor(5, dtype=torch.int64),
    torch.arange(3, dtype=torch.int32),
    torch.arange(3, dtype=torch.uint8),
]
EXAMPLE = encode(MessageType.FRAME, 41, b"layer 3", plan_payload(TENSORS))


def test_a_message_survives_the_round_trip() -> None:
    message = decode(EXAMPLE, "peer")
    assert (message.type, message.sequence, message.header) == (MessageType.FRAME, 41, b"layer 3")
    assert message.payload == plan_payload(TENSORS)
    assert [spec.shape for spec in message.payload.specs] == [tuple(tensor.shape) for tensor in TENSORS]
    assert all(spec.offset % ALIGNMENT == 0 for spec in message.payload.specs)


def test_a_payload_survives_the_round_trip() -> None:
    payload = plan_payload(TENSORS)
    buffer = torch.full((payload.nbytes,), 0xFF, dtype=torch.uint8)
    write_payload(buffer, payload, TENSORS)
    for sent, received in zip(TENSORS, read_payload(buffer, payload), strict=True):
        assert received.dtype == sent.dtype
        assert received.shape == sent.shape
        assert torch.equal(received.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))


def test_the_largest_message_fits_its_bound() -> None:
    deepest = torch.zeros([1] * 8, dtype=torch.uint8)
    payload = plan_payload([deepest] * MAX_TENSORS)
    assert len(encode(MessageType.FRAME, 2**64 - 1, bytes(MAX_HEADER_BYTES), payload)) == MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ([torch.zeros(1)] * (MAX_TENSORS + 1), "at most 64 tensors"),
        ([torch.zeros(1, dtype=torch.complex64)], "do not carry torch.complex64"),
        ([torch.zeros([1] * 9)], "at most 8 dimensions"),
        ([torch.zeros(1, dtype=torch.uint8).expand(MAX_PAYLOAD_BYTES + 1)], "send it in parts"),
    ],
    ids=["tensors", "dtype", "dimensions", "bytes"],
)
def test_what_the_format_cannot_carry_is_refused(tensors: list[torch.Tensor], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        plan_payload(tensors)


def test_a_long_header_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 4096 bytes, not 4097"):
        encode(MessageType.FRAME, 0, bytes(MAX_HEADER_BYTES + 1))


@given(st.binary(max_size=300))
def test_random_bytes_are_a_link_error(data: bytes) -> None:
    with pytest.raises(LinkError):
        decode(data, "peer")


@given(st.integers(0, len(EXAMPLE) - 1), st.integers(1, 255))
def test_any_corrupt_byte_is_noticed(at: int, flip: int) -> None:
    corrupt = bytearray(EXAMPLE)
    corrupt[at] ^= flip
    with pytest.raises(LinkError):
        decode(bytes(corrupt), "peer")


@given(st.integers(0, len(EXAMPLE) - 1))
def test_any_missing_tail_is_noticed(size: int) -> None:
    with pytest.raises(LinkError):
        decode(EXAMPLE[:size], "peer")


def with_valid_crc(head: bytes, body: bytes) -> bytes:
    return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))) + body


@given(
    tensors=st.integers(0, 2**16 - 1),
    header=st.integers(0, 2**32 - 1),
    body=st.integers(0, 2**32 - 1),
    payload=st.integers(0, 2**64 - 1),
)
def test_hostile_lengths_never_announce_a_large_read(tensors: int, header: int, body: int, payload: int) -> None:
    """A head is believed only as far as its bounds, valid checksum or not."""
    raw = struct.pack("<IBBHIIQQ", MAGIC, WIRE_VERSION, MessageType.FRAME, tensors, header, body, 0, payload) + bytes(4)
    try:
        head = decode_head(raw, "peer")
    except LinkError:
        return
    assert head.body_bytes <= MAX_BODY_BYTES
    assert head.payload_bytes <= MAX_PAYLOAD_BYTES


@given(body=st.binary(max_size=200), tensors=st.integers(0, 5), data=st.data())
def test_hostile_bodies_with_valid_checksums_are_errors_or_consistent(
    body: bytes, tensors: int, data: st.DataObject
) -> None:
    header = data.draw(st.integers(0, len(body)))
    head = struct.pack("<IBBHIIQQ", MAGIC, WIRE_VERSION, MessageType.FRAME, tensors, header, len(body), 0, 0)
    assert len(head) + 4 == HEAD_BYTES
    try:
        message = decode(with_valid_crc(head, body), "peer")
    except LinkError:
        return
    assert message.payload.nbytes == 0
    assert len(message.payload.specs) == tensors


def test_a_zero_dimension_does_not_hide_absurd_ones() -> None:
    body = struct.pack("<BB3Q", 1, 3, 2**40, 0, 2**40)
    head = struct.pack("<IBBHIIQQ", MAGIC, WIRE_VERSION, MessageType.FRAME, 1, 0, len(body), 0, 0)
    with pytest.raises(LinkError, match="more than"):
        decode(with_valid_crc(head, body), "peer")


def test_another_version_is_named() -> None:
    other = bytearray(EXAMPLE)
    other[4] = 9
    with pytest.raises(LinkError, match="speaks version 9 of the frame format, this side 2"):
        decode(bytes(other), "peer")
