"""Buffers that frames are received into, used again by size.

Who owns a buffer, and what may be done with it:

    free     the pool alone refers to its memory                  the next `take` that it is large enough for may have it
    taken    the link holds the view that `take` returned         a transfer writes it
    handed   the caller holds a tensor of the frame, or a view    nobody writes it, however many frames follow
    given    handed, and no longer the pool's: newer buffers      the caller's memory, like any tensor
             have taken its place

Nothing is handed back: a buffer is free again when the last tensor over it is gone. On a GPU that is when the host has let
go of it; what it has started before may still read, hence a transfer into the buffer comes after all that (see
`PairGroup.start_recv`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .base import FRAMES_IN_FLIGHT

_MIN_BYTES = 64 * 1024

_KEPT = FRAMES_IN_FLIGHT + 1
"""Buffers a pool keeps: a frame the caller looks at, the next one it has not let go of yet, and a larger or smaller one."""


@dataclass(frozen=True, slots=True)
class _Buffer:
    memory: torch.Tensor
    storage: torch.UntypedStorage
    own_references: int

    @classmethod
    def allocate(cls, nbytes: int, device: torch.device) -> _Buffer:
        memory = allocate_bytes(nbytes, device)
        storage = memory.untyped_storage()
        return cls(memory, storage, _references(storage))

    @property
    def nbytes(self) -> int:
        return self.memory.numel()

    @property
    def is_free(self) -> bool:
        # Views share the storage, and every tensor over it counts, arrays that numpy made of one included. Another thread
        # can only let go of what it holds: a buffer without holders gets none.
        return _references(self.storage) == self.own_references


class ReceiveBuffers:
    """The buffers of one direction of a link, for one thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[_Buffer] = []

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer as uint8 [nbytes] that no tensor received earlier lies in; a free one if one is large enough."""
        usable = [buffer for buffer in self._buffers if buffer.nbytes >= nbytes and buffer.is_free]
        if usable:
            return min(usable, key=lambda buffer: buffer.nbytes).memory.narrow(0, 0, nbytes)
        while len(self._buffers) >= _KEPT:
            # Free ones first, then the smallest: the large ones cost most to have again.
            self._buffers.remove(min(self._buffers, key=lambda buffer: (not buffer.is_free, buffer.nbytes)))
        self._buffers.append(_Buffer.allocate(size_class(nbytes), self._device))
        return self._buffers[-1].memory.narrow(0, 0, nbytes)


def size_class(nbytes: int) -> int:
    """The size of the buffer that is allocated for so many bytes: a power of two, at least 64 KiB."""
    return max(_MIN_BYTES, 1 << max(0, nbytes - 1).bit_length())


def allocate_bytes(nbytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [nbytes], uninitialised; no inference tensor, whatever the caller's mode, as it is written in other modes too."""
    with torch.inference_mode(False):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _references(storage: torch.UntypedStorage) -> int:
    # Private to torch, like nothing public it tells whether views exist; CUDA graph trees rely on it in torch itself.
    return torch._C._storage_Use_Count(storage._cdata)
