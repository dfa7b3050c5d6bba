"""The shared memory of a shm link: anonymous (`memfd_create`), so that no name can ever be left behind.

Who owns what, for each of the two directions:

| memory        | created by | written by          | read by             |
|---------------|------------|---------------------|---------------------|
| arena         | sender     | sender              | receiver            |
| `released`    | initiator  | receiver            | sender              |
| `waiting`     | initiator  | sender              | receiver            |

Every region is sealed against resizing: a peer cannot shrink one and turn this side's reads into SIGBUS.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from typing import Final

import torch

from ...configs.errors import LinkError
from .wire import ALIGNMENT, MAX_PAYLOAD_BYTES, Payload, read_payload

SLOTS: Final = 3
"""Frames of one direction in memory at a time: two that the peer has not asked for (`FRAMES_IN_FLIGHT`), and one that
it may still be reading."""

MIN_SLOT_BYTES: Final = 64 * 1024
"""First arena: holds 4 tokens x 7168 in bf16. Untouched pages cost nothing, so sizes grow by powers of two."""

MAX_SLOT_BYTES: Final = MAX_PAYLOAD_BYTES

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_PAGE_BYTES: Final = 4096
_LAYOUTS_KEPT: Final = 64
"""Frames' tensors over an arena that are kept for the next frames of the same shapes: making them anew costs more than
everything else that a small frame's memory does."""

_LINE: Final = 8
"""Counters are 8 words, one cache line, apart: the two ends never write to the same line."""


def place_of(frame: int, slot: int) -> int:
    """What the packet of the `frame`-th frame says: its number, and in which slot the sender has put it, in one word."""
    return frame * SLOTS + slot


def frame_and_slot(place: int) -> tuple[int, int]:
    """The inverse of `place_of`."""
    return divmod(place, SLOTS)


def slot_bytes_for(payload_bytes: int) -> int:
    """The slot size of an arena that takes frames of `payload_bytes`."""
    return max(MIN_SLOT_BYTES, 1 << (payload_bytes - 1).bit_length())


class Arena:
    """`SLOTS` equally large slots for the frames of one direction, each in the first one that is free.

    In turn they would be three times the memory: where frames are megabytes, those of 64 tokens and two hosts filled 27 MB, and
    each was read and written through the memory, not through a cache that both ends share.
    """

    def __init__(self, mapping: mmap.mmap, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        # The tensor and every view of it keep the mapping alive: memory is unmapped when the last frame is gone.
        with torch.inference_mode(False):  # whatever mode is on: who receives them may not be in it
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)
        self._tensors: dict[tuple[int, bytes], tuple[torch.Tensor, ...]] = {}

    @classmethod
    def create(cls, slot_bytes: int) -> tuple[Arena, int]:
        """A new arena and its file descriptor, which the caller passes on and closes."""
        fd, mapping = _create("moray-arena", SLOTS * slot_bytes)
        return cls(mapping, slot_bytes), fd

    @classmethod
    def attach(cls, fd: int, slot_bytes: int, peer: str) -> Arena:
        """Map a peer's arena; closes `fd`. Raises `LinkError` if it is not what the peer says."""
        if not MIN_SLOT_BYTES <= slot_bytes <= MAX_SLOT_BYTES or slot_bytes % ALIGNMENT:  # else tensors are not, either
            os.close(fd)
            raise LinkError(peer, f"sent an arena with slots of {slot_bytes} bytes")
        return cls(_attach(fd, SLOTS * slot_bytes, peer), slot_bytes)

    @property
    def address(self) -> int:
        """Where it begins; valid as long as the arena is there."""
        return self._bytes.data_ptr()

    def slot(self, slot: int) -> torch.Tensor:
        """A slot as uint8 [slot_bytes]."""
        return self._bytes.narrow(0, slot * self.slot_bytes, self.slot_bytes)

    def tensors(self, slot: int, payload: Payload) -> tuple[torch.Tensor, ...]:
        """The tensors of a frame, in its slot."""
        key = slot, payload.encoded
        found = self._tensors.get(key)
        if found is None:
            if len(self._tensors) == _LAYOUTS_KEPT:
                self._tensors.clear()
            with torch.inference_mode(False):
                found = self._tensors[key] = read_payload(self.slot(slot), payload)
        return found


class ControlPage:
    """Two counters per direction, both ends' only writable state in common.

    Loads and stores of an aligned word are single instructions. A receiver stores `released` in the call after the one
    that read the slot, a sender loads it before it writes to it: that order needs no fence of its own.
    """

    def __init__(self, mapping: mmap.mmap, *, initiator: bool) -> None:
        self._words = memoryview(mapping).cast("Q")
        self._address = ctypes.addressof(ctypes.c_uint64.from_buffer(mapping))  # valid as long as the view is there
        outgoing, incoming = (0, 2) if initiator else (2, 0)
        self._released_by_peer = outgoing * _LINE
        self._waiting_here = (outgoing + 1) * _LINE
        self._released_here = incoming * _LINE
        self._waiting_peer = (incoming + 1) * _LINE

    @classmethod
    def create(cls) -> tuple[ControlPage, int]:
        """The initiator's page and its file descriptor, which the caller passes on and closes."""
        fd, mapping = _create("moray-control", _PAGE_BYTES)
        return cls(mapping, initiator=True), fd

    @classmethod
    def attach(cls, fd: int, peer: str) -> ControlPage:
        """Map the initiator's page; closes `fd`. Raises `LinkError` if it is not one."""
        return cls(_attach(fd, _PAGE_BYTES, peer), initiator=False)

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Where native code finds what `release` writes, `peer_waits` and `released_by_peer`; valid as long as the page is."""
        at, size = self._address, self._words.itemsize
        return at + size * self._released_here, at + size * self._waiting_peer, at + size * self._released_by_peer

    @property
    def released_by_peer(self) -> int:
        """How many of this end's frames the peer is done with."""
        return self._words[self._released_by_peer]

    def release(self, frames: int) -> None:
        """Tell the peer that this end is done with its first `frames` frames."""
        self._words[self._released_here] = frames

    @property
    def peer_waits(self) -> bool:
        """Whether the peer waits for a slot and wants to be told of one."""
        return self._words[self._waiting_peer] != 0

    def wait_for_slot(self, waiting: bool) -> None:
        """Tell the peer whether this end waits for a slot."""
        self._words[self._waiting_here] = int(waiting)


def _create(name: str, size: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        return fd, mmap.mmap(fd, size)
    except BaseException:
        os.close(fd)
        raise


def _attach(fd: int, size: int, peer: str) -> mmap.mmap:
    try:
        actual = os.fstat(fd).st_size
        if actual != size or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise LinkError(peer, f"sent shared memory of {actual} bytes where {size} sealed ones belong")
        # Writable, so that tensors over it are ordinary ones; the peer never reads what it has sent.
        return mmap.mmap(fd, size)
    except OSError as error:
        raise LinkError(peer, f"sent something that cannot be mapped ({error.strerror})") from error
    finally:
        os.close(fd)
