from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moray.kernels import launch
from moray.kernels.block_gemm import block_gemm, block_gemm_reference
from moray.kernels.fp8 import BlockWeight, QuantizedRows, dequantize_blocks, quantize_blocks
from moray.kernels.quantize import quantize_rows

ARCHITECTURES = [80, 90]  # through fp16, and in FP8


def operands(tokens: int, N: int, K: int, device: torch.device) -> tuple[QuantizedRows, BlockWeight]:
    torch.manual_seed(tokens * 10007 + N * 101 + K)
    x = torch.randn(tokens, K, device=device) * torch.exp(torch.randn(tokens, 1, device=device))
    codes, scale_inv = quantize_blocks(torch.randn(N, K, device=device))
    return quantize_rows(x), BlockWeight(codes, scale_inv * torch.rand_like(scale_inv))


def exact(x: QuantizedRows, weight: BlockWeight) -> torch.Tensor:
    """The product in fp64."""
    scales = x.scales.repeat_interleave(128, dim=1)[:, : x.codes.shape[1]].double()
    return (x.codes.double() * scales) @ dequantize_blocks(weight.codes, weight.scale_inv).double().T


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("tokens", "N", "K"), [(1, 64, 128), (5, 200, 300), (17, 130, 7), (40, 64, 256), (3, 576, 384)]
)
def test_against_reference(
    tokens: int, N: int, K: int, architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    as_architecture(architecture)
    x, weight = operands(tokens, N, K, device)
    actual = block_gemm(x, weight, torch.float32)
    expected = exact(x, weight)
    # fp32 sums; the tensor cores of Hopper and Ada keep some 14 bits of each 128 products.
    tolerance = 2**-20 if device.type == "cpu" else 2**-11
    assert float((actual - expected).abs().max() / expected.abs().max()) < tolerance
    assert (
        float((actual - block_gemm_reference(x, weight, torch.float32)).abs().max() / expected.abs().max()) < tolerance
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_results_are_rounded_once(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = operands(4, 96, 256, device)
    assert torch.equal(block_gemm(x, weight, dtype), block_gemm(x, weight, torch.float32).to(dtype))


def test_generations_agree(device: torch.device, as_architecture: Callable[[int], None]) -> None:
    """fp16 holds every e4m3 code, the smallest too: with exact dot products not a bit differs."""
    if device.type == "cuda":
        pytest.skip("one device is one generation")
    x, weight = operands(6, 96, 300, device)
    x.codes.view(torch.uint8)[0] = torch.arange(300, dtype=torch.int64).to(torch.uint8) % 127
    x.codes.view(torch.uint8)[1] = 1  # the smallest subnormal
    results = []
    for architecture in launch.ARCHITECTURES:
        as_architecture(architecture)
        results.append(block_gemm(x, weight, torch.float32))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_rows_do_not_depend_on_their_company(
    architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    """Across every token tile: 16, 32, 64 and 128."""
    as_architecture(architecture)
    x, weight = operands(131, 40, 300, device)
    whole = block_gemm(x, weight, torch.bfloat16)
    for start, stop in ((0, 1), (130, 131), (3, 19), (2, 19), (0, 32), (10, 43), (60, 131), (3, 131)):
        part = QuantizedRows(x.codes[start:stop], x.scales[start:stop])
        assert torch.equal(block_gemm(part, weight, torch.bfloat16), whole[start:stop]), f"{start}:{stop}"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_what_is_poisoned_stays_in_its_row(
    architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    """A row beside NaN codes, whose last group is ragged: what follows its end is the next row, and is not read."""
    as_architecture(architecture)
    x, weight = operands(4, 70, 200, device)
    expected = block_gemm(x, weight, torch.float32)
    values = x.codes.float()
    values[1, 3] = float("nan")
    poisoned = quantize_rows(values)
    codes = x.codes.clone()
    codes[1] = poisoned.codes[1]
    scales = x.scales.clone()
    scales[1] = poisoned.scales[1]
    actual = block_gemm(QuantizedRows(codes, scales), weight, torch.float32)
    assert actual[1].isnan().all()
    assert torch.equal(actual[[0, 2, 3]], expected[[0, 2, 3]])


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_the_largest_and_smallest_codes(
    architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    as_architecture(architecture)
    K = 256
    for code, value in ((0x7E, 448.0), (0x01, 2**-9), (0xFE, -448.0)):
        codes = torch.full((3, K), code, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        x = QuantizedRows(codes, torch.full((3, 2), 2.0**-40, device=device))
        weight = BlockWeight(codes[:1].expand(20, K).contiguous(), torch.full((1, 2), 2.0**30, device=device))
        assert torch.equal(
            block_gemm(x, weight, torch.float32), torch.full((3, 20), K * value**2 * 2**-10, device=device)
        )


def test_no_rows(device: torch.device) -> None:
    x, weight = operands(3, 64, 128, device)
    empty = QuantizedRows(x.codes[:0], x.scales[:0])
    assert block_gemm(empty, weight, torch.bfloat16).shape == (0, 64)
