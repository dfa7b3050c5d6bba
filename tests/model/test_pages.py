"""The page pool: every page is in exactly one state, and prefixes are found as long as their pages hold them."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from moray.model.pages import OutOfPagesError, PagePool, prefix_hashes


def counts(pool: PagePool) -> tuple[int, int, int]:
    pool.check()
    return pool.free, pool.cached, pool.in_use


def key(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def test_pages_are_handed_out_once() -> None:
    pool = PagePool(4, 8)
    taken = pool.allocate(3) + pool.allocate(1)
    assert sorted(taken) == [0, 1, 2, 3]
    assert counts(pool) == (0, 0, 4)


def test_too_many_take_nothing() -> None:
    pool = PagePool(4, 8)
    pool.allocate(2)
    with pytest.raises(OutOfPagesError, match="3 pages wanted, 2 available of 4"):
        pool.allocate(3)
    assert counts(pool) == (2, 0, 2)


def test_released_pages_stay_cached_if_known() -> None:
    pool = PagePool(4, 8)
    known, unknown = pool.allocate(2)
    pool.remember(known, key("a"))
    pool.release([known, unknown])
    assert counts(pool) == (3, 1, 0)
    assert pool.available == 4
    assert pool.match([key("a")]) == [known]
    assert counts(pool) == (3, 0, 1)


def test_free_pages_go_before_cached_ones_and_the_oldest_cached_first() -> None:
    pool = PagePool(5, 8)
    pages = pool.allocate(4)
    for page, name in zip(pages, "abcd", strict=True):
        pool.remember(page, key(name))
    pool.release(pages[2:])  # c, d: d ages first, as a prefix is of no use without the pages before it
    pool.release(pages[:2])  # a, b: younger; b before a
    assert pool.allocate(1) == [4], "the free one"
    assert [pool.allocate(1)[0] for _ in range(4)] == [pages[3], pages[2], pages[1], pages[0]]
    assert pool.match([key("a")]) == []


def test_a_hit_makes_a_page_young_again() -> None:
    pool = PagePool(2, 8)
    first, second = pool.allocate(2)
    pool.remember(first, key("a"))
    pool.remember(second, key("b"))
    pool.release([first])
    pool.release([second])
    pool.release(pool.match([key("a")]))
    assert pool.allocate(1) == [second]


def test_shared_pages_are_counted_by_reference() -> None:
    pool = PagePool(3, 8)
    (page,) = pool.allocate(1)
    pool.remember(page, key("a"))
    assert pool.match([key("a")]) == [page]
    pool.release([page])
    assert counts(pool) == (2, 0, 1)
    pool.release([page])
    assert counts(pool) == (2, 1, 0)
    with pytest.raises(KeyError):
        pool.release([page])


def test_matching_stops_at_the_first_unknown_page() -> None:
    pool = PagePool(3, 8)
    pages = pool.allocate(3)
    pool.remember(pages[0], key("a"))
    pool.remember(pages[2], key("c"))
    assert pool.match([key("a"), key("b"), key("c")]) == [pages[0]]


def test_a_prefix_that_another_page_holds_is_left_there() -> None:
    pool = PagePool(2, 8)
    first, second = pool.allocate(2)
    pool.remember(first, key("a"))
    pool.remember(second, key("a"))
    pool.release([first, second])
    assert counts(pool) == (1, 1, 0)
    assert pool.match([key("a")]) == [first]


def test_only_pages_in_use_are_remembered() -> None:
    with pytest.raises(AssertionError, match="not in use"):
        PagePool(1, 8).remember(0, key("a"))


def test_promised_pages_are_shared_before_they_are_filled() -> None:
    pool = PagePool(3, 8)
    (page,) = pool.allocate(1)
    pool.promise(page, key("a"))
    assert pool.match([key("a"), key("b")]) == [page]
    assert pool.shared(page)
    assert not pool.holds(page)
    pool.remember(page, key("a"))
    assert pool.holds(page)
    pool.release([page])
    assert not pool.shared(page)
    pool.release([page])
    assert counts(pool) == (2, 1, 0)


def test_a_promise_that_nobody_keeps_is_forgotten() -> None:
    pool = PagePool(3, 8)
    (page,) = pool.allocate(1)
    pool.promise(page, key("a"))
    pool.match([key("a")])
    pool.release([page])
    assert pool.match([key("a")]) == [page], "another sequence holds it still"
    pool.release([page])
    pool.release([page])
    assert counts(pool) == (3, 0, 0)
    assert pool.match([key("a")]) == []


def test_a_prefix_is_promised_once() -> None:
    pool = PagePool(3, 8)
    first, second = pool.allocate(2)
    pool.promise(first, key("a"))
    pool.promise(second, key("a"))
    assert pool.match([key("a")]) == [first]
    pool.remember(second, key("a"))
    assert not pool.holds(second)
    assert not pool.holds(first)


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2), (9, 2)])
def test_one_hash_a_full_page(tokens: int, pages: int) -> None:
    assert len(prefix_hashes(range(tokens), 4)) == pages


def test_hashes_cover_everything_before() -> None:
    whole = prefix_hashes(range(12), 4)
    assert prefix_hashes(range(12), 4, known=whole[:1]) == whole
    assert prefix_hashes(range(12), 4, known=whole) == whole
    changed = prefix_hashes([99, *range(1, 12)], 4)
    assert not set(whole) & set(changed), "a token changes its own page's hash and all later ones"
    assert len({*prefix_hashes([1, 2, 3, 4] * 3, 4)}) == 3
    assert prefix_hashes([1, 0x10000], 1) != prefix_hashes([1, 0x100], 1)


class Pool(RuleBasedStateMachine):
    """Random use by several sequences against a model of what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(6, 4)
        self.held: list[list[int]] = []
        self.names = 0
        self.contents: dict[int, bytes] = {}  # the prefix that each page holds, or is promised to, as far as it has one
        self.promised: set[int] = set()

    @rule(count=st.integers(0, 7))
    def allocate(self, count: int) -> None:
        if count > self.pool.available:
            before = counts(self.pool)
            with pytest.raises(OutOfPagesError):
                self.pool.allocate(count)
            assert counts(self.pool) == before
            return
        pages = self.pool.allocate(count)
        assert len(set(pages)) == count
        assert not {p for sequence in self.held for p in sequence} & set(pages), "a page in use was handed out"
        for page in pages:
            self.contents.pop(page, None)
        self.held.append(pages)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 20))
    def release(self, index: int) -> None:
        self.pool.release(self.held.pop(index % len(self.held)))
        for page in self.promised - {page for sequence in self.held for page in sequence}:
            self.promised.remove(page)
            del self.contents[page]

    @precondition(lambda self: any(self.held))
    @rule(index=st.integers(0, 20), name=st.integers(0, 5), filled=st.booleans())
    def name(self, index: int, name: int, filled: bool) -> None:
        pages = [page for sequence in self.held for page in sequence]
        page = pages[index % len(pages)]
        known = set(self.contents.values())
        if filled:
            self.pool.remember(page, key(str(name)))
            self.promised.discard(page)
        else:
            self.pool.promise(page, key(str(name)))
        if key(str(name)) not in known and page not in self.contents:
            self.contents[page] = key(str(name))
            if not filled:
                self.promised.add(page)

    @rule(names=st.lists(st.integers(0, 5), max_size=4))
    def match(self, names: list[int]) -> None:
        wanted = [key(str(name)) for name in names]
        pages = self.pool.match(wanted)
        assert [self.contents[page] for page in pages] == wanted[: len(pages)], "a page holds something else"
        assert len(pages) == len(wanted) or wanted[len(pages)] not in self.contents.values()
        self.held.append(pages)

    @invariant()
    def adds_up(self) -> None:
        in_use = {page for sequence in self.held for page in sequence}
        free, cached, used = counts(self.pool)
        assert used == len(in_use)
        assert {page for page in self.contents if self.pool.holds(page)} == self.contents.keys() - self.promised
        assert all(self.pool.shared(page) == (sum(page in s for s in self.held) > 1) for page in in_use)
        assert free + cached == self.pool.available == self.pool.total - used

    def teardown(self) -> None:
        for pages in self.held:
            self.pool.release(pages)
        assert self.pool.in_use == 0
        self.pool.check()


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None, derandomize=True)
