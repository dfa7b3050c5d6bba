"""Memory for packed weights: in huge pages, whatever the size of a matrix.

Linux gives a huge page (2 MB) only to a range that is mapped as a whole when it is first written to. Matrices that are
allocated one by one are in pages of 4 KB unless they are far larger than 2 MB each, and reading them takes longer, for each of
these pages is looked up anew in every step: experts of 1.5 MB by a tenth, a step of one token by 7% (a virtual machine with
Zen 4). So matrices are cut from large regions here. What is no longer used goes back to the system as far as it is whole huge
pages, and is given out again.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import threading
import weakref
from bisect import insort
from collections import deque

import torch

HUGE = 2 << 20
REGION = 256 << 20
"""Least size of a region: addresses alone, which cost nothing until they are written to."""

ALIGNMENT = 64

_NO_RESERVE = 0x4000  # MAP_NORESERVE, which Python's mmap does not know


class WeightMemory:
    """Hands out memory for weights, and takes it back when the last tensor over it is gone. For any thread."""

    def __init__(self, region: int = REGION) -> None:
        self._region = region
        self._regions: list[_Region] = []
        self._lock = threading.Lock()
        self._returned: deque[tuple[_Region, int, int]] = deque()

    def empty(self, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor of this shape, whose elements are not set; aligned to 64 bytes.

        Raises:
            OSError: the system has no more addresses.
        """
        size = math.prod(shape) * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        room = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._take_in()
            region, begin = self._find(room)
        piece = memoryview(region.mapping)[begin : begin + size]
        # Not when the interpreter ends: the mappings may be gone then.
        weakref.finalize(piece, self._give_back, region, begin, begin + room).atexit = False
        self._settle()
        with torch.inference_mode(False):  # whatever mode is on: who is given them may not be in it
            return torch.frombuffer(piece, dtype=torch.uint8).view(dtype).view(shape)

    @property
    def free(self) -> int:
        """Bytes of regions that nobody has."""
        with self._lock:
            self._take_in()
            return sum(end - begin for region in self._regions for begin, end in region.free)

    def _find(self, room: int) -> tuple[_Region, int]:
        for region in self._regions:
            begin = region.take(room)
            if begin is not None:
                return region, begin
        region = _Region(max(self._region, -(-room // HUGE) * HUGE))
        self._regions.append(region)
        begin = region.take(room)
        assert begin is not None, "a new region is large enough"
        return region, begin

    def _give_back(self, region: _Region, begin: int, end: int) -> None:
        # Runs wherever the interpreter collects garbage, in a thread that has the lock perhaps: it must not wait for it.
        self._returned.append((region, begin, end))
        self._settle()

    def _settle(self) -> None:
        while self._returned and self._lock.acquire(blocking=False):
            try:
                self._take_in()
            finally:
                self._lock.release()

    def _take_in(self) -> None:
        while self._returned:
            region, begin, end = self._returned.popleft()
            region.give_back(begin, end)


class _Region:
    """One mapping, and its ranges (begin, end) that nobody has, ascending and never adjacent."""

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self.mapping = mmap.mmap(-1, size + HUGE, flags=flags)
        with contextlib.suppress(OSError):  # no kernel need have such pages
            self.mapping.madvise(mmap.MADV_HUGEPAGE)
        self._first = -ctypes.addressof(ctypes.c_char.from_buffer(self.mapping)) % HUGE  # where whole huge pages begin
        self.free = [(self._first, self._first + size)]

    def take(self, size: int) -> int | None:
        """Where the first free range of so many bytes begins, which is free no more; None if there is none."""
        for number, (begin, end) in enumerate(self.free):
            if end - begin >= size:
                self.free[number : number + 1] = [(begin + size, end)] if begin + size < end else []
                return begin
        return None

    def give_back(self, begin: int, end: int) -> None:
        """A range is free again: it joins those beside it, and the whole huge pages in it go to the system."""
        beside = [one for one in self.free if one[1] == begin or one[0] == end]
        for one in beside:
            self.free.remove(one)
        begin, end = min([begin, *(one[0] for one in beside)]), max([end, *(one[1] for one in beside)])
        insort(self.free, (begin, end))
        inner = self._first - (self._first - begin) // HUGE * HUGE
        pages = (end - inner) // HUGE
        if pages > 0:
            self.mapping.madvise(mmap.MADV_DONTNEED, inner, pages * HUGE)


weight_memory = WeightMemory()
"""That of this process."""
