"""Rows have the same bits alone and in company: what lets every other test demand equality instead of tolerance."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moray.kernels.attention_plan import QUERY_TILE, AttentionPlan, Segment
from moray.kernels.experts import ExpertWeights, MlpWeights, grouped_mlp, swiglu_mlp
from moray.kernels.fp8 import BlockWeight, quantize_blocks
from moray.kernels.gate import select_experts
from moray.kernels.linear import ROW_TILE, head_linear, linear, sigmoid, silu
from moray.kernels.mla import paged_mla_attention
from moray.kernels.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16]
COUNTS = [*range(1, 2 * ROW_TILE + 2), 33, 64, 129]


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n}-threads", autouse=True)
def _threads(request: pytest.FixtureRequest, _one_torch_thread: None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(256, 128), (160, 96), (7, 33), (100, 257), (256, 1), (1024, 512), (7168, 40)])
def test_linear(k: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k * n)
    x = torch.randn(129, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    whole = linear(x, weight)
    for rows in COUNTS:
        assert torch.equal(linear(x[:rows], weight), whole[:rows]), f"{rows} rows"
        assert torch.equal(linear(x[-rows:], weight), whole[-rows:]), f"the last {rows} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("k", "n"), [(256, 128), (160, 96), (7, 33), (100, 257), (1024, 512)])
def test_fp8_linear(k: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(k * n)
    x = torch.randn(129, k, generator=generator).to(dtype)
    weight = BlockWeight(*quantize_blocks(torch.randn(n, k, generator=generator)))
    whole = linear(x, weight)
    assert whole.dtype is dtype
    for rows in COUNTS:
        assert torch.equal(linear(x[:rows], weight), whole[:rows]), f"{rows} rows"
        assert torch.equal(linear(x[-rows:], weight), whole[-rows:]), f"the last {rows} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "k", "n"), [(4, 32, 128), (3, 22, 45), (16, 128, 512)])
def test_head_linear(heads: int, k: int, n: int, dtype: torch.dtype) -> None:
    x = torch.randn(129, heads, k).to(dtype)
    weight = torch.randn(heads, k, n).to(dtype)
    whole = head_linear(x, weight)
    for rows in COUNTS:
        assert torch.equal(head_linear(x[:rows], weight), whole[:rows]), f"{rows} rows"


@pytest.mark.parametrize("width", [33, 256, 7168])
def test_rms_norm(width: int) -> None:
    x, weight = torch.randn(129, width), torch.randn(width)
    whole = rms_norm(x, weight, 1e-6)
    for rows in COUNTS:
        assert torch.equal(rms_norm(x[:rows], weight, 1e-6), whole[:rows]), f"{rows} rows"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [8, 12, 501, 2048])
def test_activations(width: int, dtype: torch.dtype) -> None:
    """Widths that do not fill vectors: torch's own sigmoid and silu fail this for 8 to 501 columns of float32."""
    gate, _ = torch.randn(129, 2 * width, generator=torch.Generator().manual_seed(width)).to(dtype).chunk(2, dim=-1)
    for activation in (sigmoid, silu):
        whole = activation(gate)
        for rows in COUNTS:
            assert torch.equal(activation(gate[:rows].clone()), whole[:rows]), f"{rows} rows"
            assert torch.equal(activation(gate[-rows:].clone()), whole[-rows:]), f"the last {rows} rows"


def test_activations_are_what_they_say() -> None:
    x = torch.cat((torch.linspace(-200, 200, 999), torch.tensor([0.0, -0.0, 1e-30])))
    torch.testing.assert_close(sigmoid(x), torch.sigmoid(x), rtol=1e-6, atol=1e-37)
    torch.testing.assert_close(silu(x), torch.nn.functional.silu(x), rtol=1e-6, atol=1e-34)
    assert silu(x.bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("experts", [8, 12, 256])
def test_gate(experts: int, scoring: str) -> None:
    generator = torch.Generator().manual_seed(experts)
    logits, bias = torch.randn(129, experts, generator=generator), torch.randn(experts, generator=generator)

    def select(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return select_experts(
            rows,
            top_k=4,
            scoring=scoring,
            correction_bias=bias,
            groups=4,
            kept_groups=2,
            normalise=True,
            scale=2.5,
        )

    ids, weights = select(logits)
    for rows in COUNTS:
        for found, whole in zip(select(logits[-rows:].clone()), (ids, weights), strict=True):
            assert torch.equal(found, whole[-rows:]), f"the last {rows} rows"


def test_grouped_mlp_equals_one_pair_at_a_time() -> None:
    weights = ExpertWeights({slot: MlpWeights(torch.randn(64, 40), torch.randn(40, 32)) for slot in (1, 4, 9)})
    x = torch.randn(20, 40)
    slots = torch.tensor([1] * 3 + [4] * 17 + [9])
    rows = torch.cat((torch.tensor([5, 0, 19]), torch.arange(17), torch.tensor([2])))
    grouped = grouped_mlp(x, rows, slots, weights)
    for pair, (row, slot) in enumerate(zip(rows.tolist(), slots.tolist(), strict=True)):
        assert torch.equal(grouped[pair : pair + 1], swiglu_mlp(x[row : row + 1], weights[slot])), (row, slot)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "rope", "value", "page"), [(4, 32, 128, 16), (3, 10, 45, 16), (1, 8, 24, 64), (16, 64, 512, 32)]
)
def test_attention_does_not_depend_on_chunks_or_company(
    heads: int, rope: int, value: int, page: int, dtype: torch.dtype
) -> None:
    """One sequence whole, in chunks, token by token and beside another one; pages nobody may read hold NaN."""
    dim, length, other = value + rope, 3 * page + 5, 2 * page + 1
    counts = [-(-n // page) for n in (length, other)]
    pages = torch.full((sum(counts) + 3, page, dim), float("nan"), dtype=dtype)
    order = torch.randperm(sum(counts) + 3).tolist()
    never_read = 10**9  # an entry past the end that would fault
    tables = [[*order[: counts[0]], never_read], [*order[counts[0] : sum(counts)], never_read]]
    for n, blocks in ((length, tables[0]), (other, tables[1])):
        rows = torch.randn(n, dim).to(dtype)
        for position in range(n):
            pages[blocks[position // page], position % page] = rows[position]
    queries = torch.randn(length, heads, dim).to(dtype)
    beside = torch.randn(other, heads, dim).to(dtype)

    def attend(q: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        plan = AttentionPlan.build(segments, page)
        return paged_mla_attention(q, pages, plan, value_dim=value, softmax_scale=0.1)

    whole = attend(queries, [Segment(0, length, 0, tables[0])])
    assert torch.isfinite(whole).all()
    for chunk in (1, 7, QUERY_TILE, QUERY_TILE + 1):
        parts = [
            attend(queries[at : at + chunk], [Segment(0, len(queries[at : at + chunk]), at, tables[0])])
            for at in range(0, length, chunk)
        ]
        assert torch.equal(torch.cat(parts), whole), f"chunks of {chunk}"
    company = attend(
        torch.cat((beside, queries[-3:], queries[:2])),
        [
            Segment(0, other, 0, tables[1]),
            Segment(other, 3, length - 3, tables[0]),
            Segment(other + 3, 2, 0, tables[0]),
        ],
    )
    assert torch.equal(company[other:], torch.cat((whole[-3:], whole[:2]))), "beside another sequence"
    decode = attend(
        torch.cat((beside[-1:], queries[-1:])),
        [Segment(0, 1, other - 1, tables[1]), Segment(1, 1, length - 1, tables[0])],
    )
    assert torch.equal(decode, torch.cat((company[other - 1 : other], whole[-1:]))), "decoding beside another sequence"


def test_attention_equals_the_plain_softmax() -> None:
    queries, keys = torch.randn(20, 4, 24), torch.randn(20, 24)
    pages = torch.zeros(2, 16, 24)
    pages.view(-1, 24)[:20] = keys
    plan = AttentionPlan.build([Segment(0, 20, 0, [0, 1])], 16)
    found = paged_mla_attention(queries, pages, plan, value_dim=16, softmax_scale=0.3)
    scores = torch.einsum("qhd,kd->hqk", queries, keys) * 0.3
    scores = scores.masked_fill(torch.ones(20, 20, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.einsum("hqk,kd->qhd", scores.softmax(-1), keys[:, :16])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
