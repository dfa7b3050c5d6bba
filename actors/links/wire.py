"""The bytes of control messages: a fixed head, then tensor specs, then the caller's header. No pickle anywhere.

    head (36 bytes)   magic, version, type, tensor count, header bytes, body bytes, sequence, payload bytes, crc32
    body              one spec per tensor (dtype code, number of dimensions, dimensions), then the header

The payload (the tensors' bytes) travels elsewhere: through shared memory or a process group. Where each tensor lies in
it follows from the specs alone, so both ends compute the same offsets and only the shapes are sent. Every length is
bounded before anything is read or allocated because of it, and the crc covers head and body: corruption is an error,
never a wrong shape.
"""

from __future__ import annotations

import functools
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

import torch

from ...configs.errors import LinkError
from .base import MAX_HEADER_BYTES, TensorForm

MAGIC: Final = 0x59524F4D  # "MORY", little-endian
WIRE_VERSION: Final = 2
MAX_TENSORS: Final = 64
MAX_DIMS: Final = 8
MAX_PAYLOAD_BYTES: Final = 1 << 30
"""Largest payload of one frame, 1 GiB: 9 times 8192 tokens x 7168 in bf16. It bounds what a corrupt length can cost."""

_LAYOUTS_KEPT: Final = 256
"""Layouts that are remembered: a step's frames have few shapes, and the same in every layer."""

ALIGNMENT: Final = 64
"""Tensors start on cache lines, which also satisfies every dtype's own alignment."""

_HEAD = struct.Struct("<IBBHIIQQ")
_CRC = struct.Struct("<I")
_SPEC = struct.Struct("<BB")
HEAD_BYTES: Final = _HEAD.size + _CRC.size
MAX_BODY_BYTES: Final = MAX_HEADER_BYTES + MAX_TENSORS * (_SPEC.size + 8 * MAX_DIMS)
MAX_MESSAGE_BYTES: Final = HEAD_BYTES + MAX_BODY_BYTES

# The codes are part of the protocol: append, never renumber.
_DTYPE_OF_CODE: Final[dict[int, torch.dtype]] = {
    1: torch.float32,
    2: torch.bfloat16,
    3: torch.float16,
    4: torch.float8_e4m3fn,
    5: torch.int32,
    6: torch.int64,
    7: torch.uint8,
}
_CODE_OF_DTYPE: Final = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}


class MessageType(IntEnum):
    """What a control message is for."""

    FRAME = 1  # a frame; its payload follows by the link's own way
    PAGE = 2  # shm: the control page, as a file descriptor
    ARENA = 3  # shm: a larger arena for the frames that follow, as a file descriptor
    SPACE = 4  # shm: a slot was freed while the sender waited for one
    STORE = 5  # process groups: a key and a value of the rendezvous
    READY = 6  # process groups: the rendezvous is over


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a payload: where it lies and what it is.

    Attributes:
        offset: bytes from the payload's start, a multiple of `ALIGNMENT`.
        nbytes: bytes of the tensor's elements; 0 for an empty tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Payload:
    """The layout of a frame's tensors.

    Attributes:
        nbytes: size of the whole, 0 if no tensor has elements.
        encoded: the specs as they are in a message's body.
    """

    specs: tuple[TensorSpec, ...]
    nbytes: int
    encoded: bytes


class Message(NamedTuple):
    """One decoded control message."""

    type: MessageType
    sequence: int
    header: bytes
    payload: Payload


class Head(NamedTuple):
    """A checked head: how many bytes of body to read, and what is needed to check them."""

    type: MessageType
    tensors: int
    header_bytes: int
    body_bytes: int
    sequence: int
    payload_bytes: int
    crc: int
    partial_crc: int


EMPTY_PAYLOAD: Final = Payload((), 0, b"")


def plan_payload(tensors: Sequence[torch.Tensor]) -> Payload:
    """Lay `tensors` out in a payload.

    Raises:
        ValueError: too many tensors or dimensions, a dtype without a code, or more than `MAX_PAYLOAD_BYTES`.
    """
    return plan_forms(tuple([(tensor.dtype, tensor.shape) for tensor in tensors]))


@functools.lru_cache(_LAYOUTS_KEPT)
def plan_forms(forms: tuple[TensorForm, ...]) -> Payload:
    """`plan_payload` for tensors of these forms."""
    if len(forms) > MAX_TENSORS:
        raise ValueError(f"a frame carries at most {MAX_TENSORS} tensors, not {len(forms)}")
    specs: list[TensorSpec] = []
    encoded: list[bytes] = []
    end = 0
    for dtype, shape in forms:
        if dtype not in _CODE_OF_DTYPE:
            raise ValueError(f"links do not carry {dtype}; send one of {', '.join(map(str, _CODE_OF_DTYPE))}")
        if len(shape) > MAX_DIMS:
            raise ValueError(f"links carry at most {MAX_DIMS} dimensions, not {len(shape)}")
        offset = _aligned(end)
        nbytes = math.prod(shape) * dtype.itemsize
        specs.append(TensorSpec(dtype, tuple(shape), offset, nbytes))
        encoded.append(_SPEC.pack(_CODE_OF_DTYPE[dtype], len(shape)) + struct.pack(f"<{len(shape)}Q", *shape))
        end = offset + nbytes
    if end > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a frame carries at most {MAX_PAYLOAD_BYTES} bytes, not {end}: send it in parts")
    return Payload(tuple(specs), end, b"".join(encoded))


def check_header(header: bytes) -> None:
    """Raise `ValueError` if `header` is longer than `MAX_HEADER_BYTES`."""
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(f"a frame's header has at most {MAX_HEADER_BYTES} bytes, not {len(header)}")


def encode(type: MessageType, sequence: int, header: bytes = b"", payload: Payload = EMPTY_PAYLOAD) -> bytes:
    """The bytes of one control message, at most `MAX_MESSAGE_BYTES`."""
    check_header(header)
    body = payload.encoded + header
    head = _HEAD.pack(MAGIC, WIRE_VERSION, type, len(payload.specs), len(header), len(body), sequence, payload.nbytes)
    return b"".join((head, _CRC.pack(zlib.crc32(body, zlib.crc32(head))), body))


def decode_head(data: bytes, peer: str) -> Head:
    """Check the first `HEAD_BYTES` of a message.

    Raises:
        LinkError: not a head of ours, another version, an unknown type, or a length out of bounds.
    """
    if len(data) < HEAD_BYTES:
        raise LinkError(peer, f"sent {len(data)} bytes where a message head has {HEAD_BYTES}")
    magic, version, type_code, tensors, header_bytes, body_bytes, sequence, payload_bytes = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise LinkError(peer, f"sent something that is no Moray message (magic {magic:#010x})")
    if version != WIRE_VERSION:
        raise LinkError(peer, f"speaks version {version} of the frame format, this side {WIRE_VERSION}")
    kind = _KNOWN_TYPES.get(type_code)
    if kind is None:
        raise LinkError(peer, f"sent a message of unknown type {type_code}")
    if (
        tensors > MAX_TENSORS
        or header_bytes > min(MAX_HEADER_BYTES, body_bytes)
        or body_bytes > MAX_BODY_BYTES
        or payload_bytes > MAX_PAYLOAD_BYTES
    ):
        raise LinkError(
            peer,
            f"sent lengths out of bounds: {tensors} tensors, header {header_bytes}, body {body_bytes}, "
            f"payload {payload_bytes} bytes",
        )
    (crc,) = _CRC.unpack_from(data, _HEAD.size)
    partial_crc = zlib.crc32(data[: _HEAD.size])
    return Head(kind, tensors, header_bytes, body_bytes, sequence, payload_bytes, crc, partial_crc)


def decode_body(head: Head, body: bytes, peer: str) -> Message:
    """The message whose head is `head`.

    Raises:
        LinkError: the crc does not match, or specs and lengths contradict each other.
    """
    if len(body) != head.body_bytes:
        raise LinkError(peer, f"sent a body of {len(body)} bytes and announced {head.body_bytes}")
    if zlib.crc32(body, head.partial_crc) != head.crc:
        raise LinkError(peer, "sent a corrupt message: its checksum does not match")
    specs_end = head.body_bytes - head.header_bytes
    try:
        payload = _decode_specs(head.tensors, body[:specs_end])
    except ValueError as error:
        raise LinkError(peer, str(error)) from None
    if payload.nbytes != head.payload_bytes:
        raise LinkError(peer, f"sent specs of {payload.nbytes} bytes for a payload of {head.payload_bytes}")
    return Message(head.type, head.sequence, body[specs_end:], payload)


@functools.lru_cache(_LAYOUTS_KEPT)
def _decode_specs(tensors: int, encoded: bytes) -> Payload:
    """The payload that so many encoded specs describe; `ValueError` if they are none of ours."""
    specs: list[TensorSpec] = []
    at = end = 0
    for _ in range(tensors):
        if at + _SPEC.size > len(encoded):
            raise ValueError("sent fewer tensor specs than it announced")
        code, dims = _SPEC.unpack_from(encoded, at)
        at += _SPEC.size
        if code not in _DTYPE_OF_CODE or dims > MAX_DIMS or at + 8 * dims > len(encoded):
            raise ValueError(f"sent a bad tensor spec: dtype code {code}, {dims} dimensions")
        shape: tuple[int, ...] = struct.unpack_from(f"<{dims}Q", encoded, at)
        at += 8 * dims
        dtype = _DTYPE_OF_CODE[code]
        # A zero dimension must not hide absurd ones: torch multiplies them into strides.
        if math.prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_PAYLOAD_BYTES:
            raise ValueError(f"sent a tensor of shape {shape} in {dtype}: more than {MAX_PAYLOAD_BYTES} bytes")
        offset = _aligned(end)
        nbytes = math.prod(shape) * dtype.itemsize
        specs.append(TensorSpec(dtype, shape, offset, nbytes))
        end = offset + nbytes
    if at != len(encoded):
        raise ValueError(f"sent {tensors} tensor specs and {len(encoded) - at} bytes more")
    return Payload(tuple(specs), end, encoded)


def decode(data: bytes, peer: str) -> Message:
    """`decode_head` and `decode_body` for transports that keep message boundaries."""
    head = decode_head(data, peer)
    return decode_body(head, data[HEAD_BYTES:], peer)


def write_payload(buffer: torch.Tensor, payload: Payload, tensors: Sequence[torch.Tensor]) -> None:
    """Copy `tensors` to their places in `buffer` (uint8 [>= payload.nbytes]), from whichever device they are on."""
    for spec, tensor in zip(payload.specs, tensors, strict=True):
        if spec.nbytes:
            _window(buffer, spec).copy_(tensor.detach())


def read_payload(buffer: torch.Tensor, payload: Payload) -> tuple[torch.Tensor, ...]:
    """The payload's tensors as views of `buffer` (uint8 [at least payload.nbytes])."""
    return tuple(
        _window(buffer, spec) if spec.nbytes else torch.empty(spec.shape, dtype=spec.dtype, device=buffer.device)
        for spec in payload.specs
    )


def _window(buffer: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    return buffer.narrow(0, spec.offset, spec.nbytes).view(spec.dtype).view(spec.shape)


def _aligned(offset: int) -> int:
    return (offset + ALIGNMENT - 1) & -ALIGNMENT


_KNOWN_TYPES: Final = {int(kind): kind for kind in MessageType}
