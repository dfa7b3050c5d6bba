"""Bookkeeping of KV pages: which are free, which are in use, and which still hold a prefix worth keeping.

Plain integers: the tensors live elsewhere. A page is in exactly one of three states, and their counts always add up:

    free     its contents mean nothing
    in use   some sequence's block table names it (several may: shared prefixes are counted by reference)
    cached   no sequence uses it, but it holds the keys of a known token prefix; the oldest is taken when free runs out

A full page is known by the hash of all tokens up to its end, so equal prompts share pages. Reuse changes no bits of an
answer: a cached row has the bits that computing it again would give (kernels/linear.py). A page in use may be promised to a
prefix before it holds it, so that a prompt can share the pages of one that is being computed.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import pairwise


class OutOfPagesError(Exception):
    """Fewer pages can be had than were asked for; the scheduler answers by preempting."""


class PagePool:
    """Hands out page numbers 0 .. total - 1 of `page_size` positions each."""

    def __init__(self, total: int, page_size: int) -> None:
        assert total > 0, "a pool needs a page"
        assert page_size > 0, "a page needs a position"
        self.total = total
        self.page_size = page_size
        self._free: deque[int] = deque(range(total))
        self._references: dict[int, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, least recently used first
        self._page_of_prefix: dict[bytes, int] = {}
        self._prefix_of_page: dict[int, bytes] = {}
        self._unfilled: set[int] = set()  # promised to their prefix, and always in use

    @property
    def free(self) -> int:
        """Pages whose contents mean nothing."""
        return len(self._free)

    @property
    def cached(self) -> int:
        """Pages kept for their prefix alone."""
        return len(self._cached)

    @property
    def in_use(self) -> int:
        """Pages named by at least one sequence."""
        return len(self._references)

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return self.free + self.cached

    def check(self) -> None:
        """Assert the invariants above."""
        assert self.free + self.cached + self.in_use == self.total, (self.free, self.cached, self.in_use, self.total)
        assert all(count > 0 for count in self._references.values())
        assert len(self._page_of_prefix) == len(self._prefix_of_page)
        assert all(self._prefix_of_page[page] == prefix for prefix, page in self._page_of_prefix.items())
        assert all(page in self._references and page in self._prefix_of_page for page in self._unfilled)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages, the oldest cached ones once none is free.

        Raises:
            OutOfPagesError: fewer are available; nothing was taken.
        """
        if count > self.available:
            raise OutOfPagesError(f"{count} pages wanted, {self.available} available of {self.total}")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.popleft()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._references[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drop one reference to each page; those that hold a known prefix stay cached, later pages aging first."""
        # A prefix is of no use without the pages before it, so the last page must be the first to be taken again.
        for page in reversed(pages):
            self._references[page] -= 1
            if self._references[page] == 0:
                del self._references[page]
                if page in self._unfilled:  # a promise that nobody is left to keep
                    self._unfilled.remove(page)
                    self._forget(page)
                if page in self._prefix_of_page:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def match(self, prefixes: Sequence[bytes]) -> list[int]:
        """Take a reference to each page of the longest run of `prefixes` (from `prefix_hashes`) that pages hold or are
        promised to; `holds` tells which."""
        pages: list[int] = []
        for prefix in prefixes:
            page = self._page_of_prefix.get(prefix)
            if page is None:
                break
            self._cached.pop(page, None)
            self._references[page] = self._references.get(page, 0) + 1
            pages.append(page)
        return pages

    def promise(self, page: int, prefix: bytes) -> None:
        """Note that `page`, in use, is being filled with this prefix. One that another page has already is left there."""
        if self._name(page, prefix):
            self._unfilled.add(page)

    def remember(self, page: int, prefix: bytes) -> None:
        """Note that `page`, in use and full, holds this prefix. One that another page has already is left there."""
        self._name(page, prefix)
        self._unfilled.discard(page)

    def holds(self, page: int) -> bool:
        """Whether the page is full with a known prefix."""
        return page in self._prefix_of_page and page not in self._unfilled

    def shared(self, page: int) -> bool:
        """Whether several references to the page, which is in use, are held."""
        return self._references[page] > 1

    def _name(self, page: int, prefix: bytes) -> bool:
        assert page in self._references, f"page {page} is not in use"
        if prefix in self._page_of_prefix or page in self._prefix_of_page:
            return False
        self._page_of_prefix[prefix] = page
        self._prefix_of_page[page] = prefix
        return True

    def _forget(self, page: int) -> None:
        del self._page_of_prefix[self._prefix_of_page.pop(page)]


def prefix_hashes(token_ids: Sequence[int], page_size: int, *, known: Sequence[bytes] = ()) -> list[bytes]:
    """One hash for each full page of `token_ids`, over all tokens up to the page's end; `known` are the first ones."""
    hashes = list(known)
    for start, end in pairwise(range(len(hashes) * page_size, len(token_ids) + 1, page_size)):
        digest = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=16)
        digest.update(array("I", token_ids[start:end]).tobytes())
        hashes.append(digest.digest())
    return hashes
