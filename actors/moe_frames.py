"""The frames an expert host exchanges with routers, one request and one reply for each layer and host of a step:

    request  WORK   tensors: hidden_states [T, H]   each token once, however many of its experts are on the host
                             pairs [2, P] int32     row 0: token of each pair, row 1: its slot, ascending
    reply    DONE   tensors: outputs [P, H]         in the order of the pairs
             FAILED header ends in the reason as UTF-8

and with hosts that copy its experts, one request and one reply for each few MB:

    request  FETCH  tensors: pieces [P, 4] int64    of each: expert, number of its tensor, first row, row after the last
                             forms [0, columns]...  one for each tensor an expert should have, of its dtype
    reply    WEIGHTS tensors: [rows, columns]...    one for each piece
             FAILED as above

The header carries the placement epoch (which the router works with, or for which experts are copied) and a sequence number
that the reply repeats, so that a late answer can never be taken for another one.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

import torch

from .links.base import MAX_HEADER_BYTES

_HEADER = struct.Struct("<BxHIQ")


class Kind(IntEnum):
    """What a frame is."""

    WORK = 1
    DONE = 2
    FAILED = 3
    FETCH = 4
    WEIGHTS = 5


_KINDS = {int(kind): kind for kind in Kind}


class MoeHeader(NamedTuple):
    """Header of every frame; `reason` is empty but for FAILED."""

    kind: Kind
    layer: int
    epoch: int
    sequence: int
    reason: str = ""

    def pack(self) -> bytes:
        """As bytes; an over-long reason is cut."""
        packed = _HEADER.pack(self.kind, self.layer, self.epoch, self.sequence)
        return packed + self.reason.encode()[: MAX_HEADER_BYTES - _HEADER.size] if self.reason else packed

    @classmethod
    def unpack(cls, data: bytes) -> MoeHeader:
        """The header in `data`.

        Raises:
            ValueError: the bytes are not a header.
        """
        if len(data) < _HEADER.size:
            raise ValueError(f"{len(data)} bytes are too few for an expert header of {_HEADER.size}")
        kind, layer, epoch, sequence = _HEADER.unpack_from(data)
        reason = data[_HEADER.size :].decode(errors="replace") if len(data) > _HEADER.size else ""
        return cls(_KINDS.get(kind) or Kind(kind), layer, epoch, sequence, reason)


def check_pairs(pairs: torch.Tensor, tokens: int) -> None:
    """Refuse pairs [2, P] (rows, slots) that a kernel would follow out of its tensors.

    Raises:
        ValueError: a row is no token of the frame, or the slots do not ascend.
    """
    rows, slots = pairs.unbind()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < tokens:
        raise ValueError(f"rows {int(rows.min())} to {int(rows.max())} of {tokens} tokens")
    if slots.numel() and (int(slots[0]) < 0 or bool((slots.diff() < 0).any())):
        raise ValueError("slots do not ascend from 0 on")
