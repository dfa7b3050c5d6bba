from __future__ import annotations

import pytest
import torch

from moray.kernels.block_gemm import block_gemm
from moray.kernels.dense_gemm import dense_gemm_by_head_reference, dense_gemm_reference
from moray.kernels.fp8 import BlockWeight, dequantize_blocks, quantize_blocks
from moray.kernels.linear import head_linear, linear
from moray.kernels.quantize import quantize_rows

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}
PARTS = ((0, 1), (130, 131), (3, 19), (2, 19), (0, 32), (10, 43), (60, 131), (3, 131))


def random(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    torch.manual_seed(sum(shape))
    return torch.randn(*shape, device=device).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Sums in fp32 in another order, rounded once: half an ulp of the dtype of the largest result, and as much again."""
    assert actual.dtype == expected.dtype
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(error) <= 2 * EPSILON[actual.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "N", "K"), [(1, 64, 128), (5, 33, 300), (17, 100, 7), (70, 16, 256)])
def test_dense(tokens: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
    x, weight = random(tokens, K, dtype=dtype, device=device), random(N, K, dtype=dtype, device=device)
    close(linear(x, weight), dense_gemm_reference(x, weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "K", "N"), [(1, 3, 128, 64), (5, 2, 22, 45), (17, 1, 130, 70)])
def test_by_head(tokens: int, heads: int, K: int, N: int, dtype: torch.dtype, device: torch.device) -> None:
    weight = random(heads, K, N, dtype=dtype, device=device)
    wide = torch.full((tokens, heads, K + 5), float("nan"), dtype=dtype, device=device)  # a query: nope, then rope
    wide[..., :K] = random(tokens, heads, K, dtype=dtype, device=device)
    found = head_linear(wide[..., :K], weight)
    assert found.is_contiguous()
    close(found, dense_gemm_by_head_reference(wide[..., :K], weight))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_rows_do_not_depend_on_their_company(dtype: torch.dtype, device: torch.device) -> None:
    """Across every token tile of 16-bit products: 16, 32, 64 and 128."""
    x, weight = random(131, 200, dtype=dtype, device=device), random(8, 200, dtype=dtype, device=device)
    whole = linear(x, weight)
    by_head = head_linear(x[:, None], weight.T[None])[:, 0]
    for start, stop in PARTS:
        assert torch.equal(linear(x[start:stop], weight), whole[start:stop]), f"{start}:{stop}"
        assert torch.equal(head_linear(x[start:stop, None], weight.T[None])[:, 0], by_head[start:stop])


def test_fp32_rows_of_a_prompt_and_of_decode(device: torch.device) -> None:
    """fp32 has its own two configurations, of which the second begins at 513 tokens."""
    x, weight = random(530, 40, dtype=torch.float32, device=device), random(6, 40, dtype=torch.float32, device=device)
    whole = linear(x, weight)
    assert torch.equal(linear(x[500:530], weight), whole[500:530])


def test_fp32_is_not_rounded_to_tf32(device: torch.device) -> None:
    x = torch.zeros(1, 32, device=device)
    x[0, 0] = 1 + 2**-20
    assert torch.equal(linear(x, torch.eye(32, device=device)), x)
    assert torch.equal(head_linear(x[:, None], torch.eye(32, device=device)[None])[:, 0], x)


def test_a_ragged_row_ends_before_its_neighbour(device: torch.device) -> None:
    x, weight = (random(n, 70, dtype=torch.bfloat16, device=device) for n in (4, 20))
    expected = linear(x, weight)
    x[1], weight[7] = float("nan"), float("nan")
    found = linear(x, weight)
    kept = [n for n in range(20) if n != 7]
    assert torch.equal(found[[0, 2, 3]][:, kept], expected[[0, 2, 3]][:, kept])
    assert found[1].isnan().all()
    assert found[:, 7].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8_weights_quantize_the_activations_too(dtype: torch.dtype, device: torch.device) -> None:
    x = random(5, 300, dtype=dtype, device=device)
    weight = BlockWeight(*quantize_blocks(torch.randn(90, 300, device=device)))
    found = linear(x, weight)
    assert torch.equal(found, block_gemm(quantize_rows(x), weight, dtype))
    decoded = x.double() @ dequantize_blocks(weight.codes, weight.scale_inv).double().T
    # Independent errors of at most 1/16, uniform: their sum over the row grows as its norm does.
    assert float((found.double() - decoded).square().mean().sqrt() / decoded.square().mean().sqrt()) < 1 / 16


def test_no_rows(device: torch.device) -> None:
    weight = torch.ones(20, 64, device=device)
    assert linear(torch.empty(0, 64, device=device), weight).shape == (0, 20)
    assert head_linear(torch.empty(0, 2, 64, device=device), torch.ones(2, 64, 20, device=device)).shape == (0, 2, 20)
    assert linear(torch.empty(0, 64, device=device), BlockWeight(*quantize_blocks(weight))).shape == (0, 20)
