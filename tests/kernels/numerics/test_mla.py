from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from moray.kernels.attention_plan import DECODED_QUERIES, AttentionPlan, Segment
from moray.kernels.kv_pages import KvFormat
from moray.kernels.mla import paged_mla_attention, paged_mla_attention_reference

SCALE = 0.2
SPLIT = 64
"""Keys a split in these tests: a few tiles of 32, so that short sequences have several splits."""
ABSURD = 2**31 - 1

DTYPES = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest difference allowed to the reference, relative to the largest value: the weights are rounded to the dtype before
they meet the values, here and there, relative to peaks that may differ; then the result is rounded again."""


@dataclass
class Cache:
    """Pages of which nothing may be read but the rows of `sequences`: the rest holds NaN."""

    pages: torch.Tensor
    tables: list[list[int]]
    value: int
    form: KvFormat

    def attend(self, queries: torch.Tensor, segments: list[Segment], split_keys: int = SPLIT) -> torch.Tensor:
        plan = AttentionPlan.build(segments, self.pages.shape[1], queries.device, split_keys=split_keys)
        found = paged_mla_attention(queries, self.pages, plan, value_dim=self.value, softmax_scale=SCALE)
        assert torch.isfinite(found).all()
        return found

    def expected(self, queries: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """In fp32, from what the pages say."""
        pages = self.form.decode(self.pages, queries.dtype).float()
        return paged_mla_attention_reference(
            queries.float(), pages, segments, value_dim=self.value, softmax_scale=SCALE
        )


def make_cache(
    lengths: list[int],
    page: int,
    value: int,
    rope: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    fp8: bool = False,
) -> Cache:
    torch.manual_seed(sum(lengths) + page + value)
    form = KvFormat(value, rope, torch.uint8 if fp8 else dtype)
    counts = [-(-length // page) for length in lengths]
    pages = form.create(1, sum(counts) + 2, page, device)[0]
    pages.view(torch.uint8).fill_(0xFF)  # NaN in every type
    order = torch.randperm(sum(counts) + 2).tolist()
    tables = []
    for length, count in zip(lengths, counts, strict=True):
        table = [order.pop() for _ in range(count)]
        rows = form.encode(torch.randn(length, value + rope, device=device).to(dtype) * 2)
        for position in range(length):
            pages[table[position // page], position % page] = rows[position]
        tables.append([*table, ABSURD, -ABSURD])
    return Cache(pages, tables, value, form)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    bound = DTYPES[found.dtype] * float(expected.abs().max())
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=bound)


SHAPES = [(4, 128, 32, 16), (3, 45, 10, 32), (18, 24, 8, 64), (1, 16, 2, 48)]
IDS = ["4x128+32-page16", "3x45+10-page32", "18x24+8-page64", "1x16+2-page48"]


@pytest.mark.parametrize(
    ("dtype", "fp8"), [*((dtype, False) for dtype in DTYPES), (torch.bfloat16, True), (torch.float32, True)], ids=str
)
@pytest.mark.parametrize(("heads", "value", "rope", "page"), SHAPES, ids=IDS)
def test_against_reference(
    heads: int, value: int, rope: int, page: int, dtype: torch.dtype, fp8: bool, device: torch.device
) -> None:
    """Decode beside a short chunk, a first prompt and the middle of another, and a sequence without queries."""
    lengths = [140, 9, 70, 33, 5]
    cache = make_cache(lengths, page, value, rope, dtype, device, fp8=fp8)
    segments, start = [], 0
    for table, length, count in zip(cache.tables, lengths, [1, 9, 5, 3, 0], strict=True):
        segments.append(Segment(start, count, length - count, table))
        start += count
    queries = torch.randn(start, heads, value + rope, device=device).to(dtype)
    close(cache.attend(queries, segments), cache.expected(queries, segments))


@pytest.mark.parametrize("fp8", [False, True], ids=["plain", "fp8"])
def test_the_sizes_of_deepseek_r1(fp8: bool, device: torch.device) -> None:
    cache = make_cache([75, 40], 32, 512, 64, torch.bfloat16, device, fp8=fp8)
    queries = torch.randn(7, 16, 576, device=device).bfloat16()
    segments = [Segment(0, 1, 74, cache.tables[0]), Segment(1, 6, 34, cache.tables[1])]
    close(cache.attend(queries, segments), cache.expected(queries, segments))


@pytest.mark.parametrize(("architecture", "fp8"), [(90, False), (90, True), (80, True)], ids=["90", "90-fp8", "80-fp8"])
@pytest.mark.parametrize(("heads", "value", "rope", "page"), SHAPES[:2], ids=IDS[:2])
def test_chunks_and_company_change_no_bit(
    heads: int,
    value: int,
    rope: int,
    page: int,
    architecture: int,
    fp8: bool,
    device: torch.device,
    as_architecture: Callable[[int], None],
) -> None:
    """Prefilled at once, in chunks (of which decode takes the short ones), and beside longer and shorter sequences."""
    as_architecture(architecture)
    length, other = SPLIT + 11, 2 * SPLIT + 20
    cache = make_cache([length, other], page, value, rope, torch.bfloat16, device, fp8=fp8)
    ours, theirs = cache.tables
    first = SPLIT - 6  # queries stand on both sides of the end of a split
    queries = torch.randn(length - first, heads, value + rope, device=device).bfloat16()
    whole = cache.attend(queries, [Segment(0, len(queries), first, ours)])
    for chunk in (DECODED_QUERIES, DECODED_QUERIES + 1):
        parts = [
            cache.attend(part, [Segment(0, len(part), first + at, ours)])
            for at, part in zip(range(0, len(queries), chunk), queries.split(chunk), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole), f"chunks of {chunk}"
    beside = torch.randn(1, heads, value + rope, device=device).bfloat16()
    together = cache.attend(
        torch.cat((beside, queries[:1], queries[-9:], beside)),
        [
            Segment(0, 1, other - 1, theirs),
            Segment(1, 1, first, ours),
            Segment(2, 9, length - 9, ours),
            Segment(11, 1, 3, theirs),
        ],
    )
    assert torch.equal(together[1:11], torch.cat((whole[:1], whole[-9:]))), "beside another sequence"


def test_the_torch_path_reads_fp8_too(device: torch.device) -> None:
    cache = make_cache([70, 20], 16, 45, 10, torch.bfloat16, device, fp8=True)
    queries = torch.randn(6, 3, 55, device=device).bfloat16()
    segments = [Segment(0, 1, 69, cache.tables[0]), Segment(1, 5, 15, cache.tables[1])]
    found, expected = (
        paged_mla_attention_reference(queries, pages, segments, value_dim=45, softmax_scale=SCALE)
        for pages in (cache.pages, cache.form.decode(cache.pages, torch.bfloat16))
    )
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("count", [1, 6], ids=["decode", "prefill"])
def test_one_split_or_several_agree(count: int, device: torch.device) -> None:
    cache = make_cache([130], 32, 32, 16, torch.float32, device)
    queries = torch.randn(count, 2, 48, device=device)
    segments = [Segment(0, count, 130 - count, cache.tables[0])]
    close(cache.attend(queries, segments, 1024), cache.attend(queries, segments, 32))


@pytest.mark.parametrize("count", [1, 6], ids=["decode", "prefill"])
def test_scores_far_apart(count: int, device: torch.device) -> None:
    """Scores of -1e4 and +1e4 in different splits: nothing overflows, and the largest decides."""
    cache = make_cache([100], 16, 16, 16, torch.float32, device)
    rows = cache.pages[torch.tensor(cache.tables[0][:7], device=device)]
    rows[..., 16:] = -50.0
    rows[2, 5, 16:] = 50.0
    cache.pages[torch.tensor(cache.tables[0][:7], device=device)] = rows
    queries = torch.full((count, 2, 32), 0.0, device=device)
    queries[..., 16:] = 60.0
    found = cache.attend(queries, [Segment(0, count, 100 - count, cache.tables[0])])
    assert torch.equal(found, rows[2, 5, :16].expand_as(found))


@pytest.mark.parametrize("count", [1, 6], ids=["decode", "prefill"])
@pytest.mark.parametrize("what", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence(what: float, count: int, device: torch.device) -> None:
    cache = make_cache([40, 40], 16, 16, 16, torch.bfloat16, device)
    cache.pages[cache.tables[0][0], 3, 2] = what
    queries = torch.randn(2 * count, 3, 32, device=device).bfloat16()
    segments = [Segment(i * count, count, 40 - count, cache.tables[i]) for i in range(2)]
    plan = AttentionPlan.build(segments, 16, device, split_keys=SPLIT)
    found = paged_mla_attention(queries, cache.pages, plan, value_dim=16, softmax_scale=SCALE)
    assert found[:count, :, 2].isnan().all()
    close(found[count:], cache.expected(queries, segments)[count:])


def test_pages_shared_by_two_sequences(device: torch.device) -> None:
    """A common prefix: the same page in two tables, unpacked once."""
    cache = make_cache([50, 40], 16, 32, 16, torch.bfloat16, device, fp8=True)
    table = [*cache.tables[0][:2], *cache.tables[1][2:]]
    queries = torch.randn(10, 2, 48, device=device).bfloat16()
    segments = [Segment(0, 5, 45, cache.tables[0]), Segment(5, 5, 35, table)]
    plan = AttentionPlan.build(segments, 16, device)
    assert not isinstance(plan.tiles, tuple)
    assert plan.tiles.prefill_pages.tolist() == [*cache.tables[0][:4], cache.tables[1][2]]
    close(cache.attend(queries, segments), cache.expected(queries, segments))


def test_no_queries(device: torch.device) -> None:
    cache = make_cache([5], 16, 16, 16, torch.bfloat16, device)
    assert cache.attend(torch.empty(0, 2, 32, device=device).bfloat16(), []).shape == (0, 2, 16)
    assert cache.attend(torch.empty(0, 2, 32, device=device).bfloat16(), [Segment(0, 0, 5, [0])]).shape == (0, 2, 16)


def test_queries_as_a_slice(device: torch.device) -> None:
    cache = make_cache([40], 16, 16, 16, torch.bfloat16, device)
    wide = torch.randn(6, 3, 48, device=device).bfloat16()
    segments = [Segment(0, 6, 34, cache.tables[0])]
    assert torch.equal(cache.attend(wide[..., 8:40], segments), cache.attend(wide[..., 8:40].contiguous(), segments))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    cache = make_cache([5], 16, 16, 16, torch.bfloat16, device)
    queries = torch.zeros(1, 2, 32, device=device).bfloat16()
    segments = [Segment(0, 1, 4, cache.tables[0])]
    plan = AttentionPlan.build(segments, 16, device)

    def attend(queries: torch.Tensor, plan: AttentionPlan) -> None:
        paged_mla_attention(queries, cache.pages, plan, value_dim=16, softmax_scale=SCALE)

    with pytest.raises(ValueError, match="pages of 16 positions, the plan is for 32"):
        attend(queries, AttentionPlan.build(segments, 32, device))
    with pytest.raises(ValueError, match=r"rows of 32 .*; 16 \+ 8 need 24"):
        attend(queries[..., :24], plan)
    with pytest.raises(ValueError, match=r"pages in torch\.bfloat16, queries in torch\.float32"):
        attend(queries.float(), plan)
    with pytest.raises(ValueError, match="splits of 100 keys; they must be multiples of 32"):
        AttentionPlan.build(segments, 16, device, split_keys=100)
