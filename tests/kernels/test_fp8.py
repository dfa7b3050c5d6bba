"""Block-quantised FP8 weights: decoding is exact, encoding as close as e4m3 allows, ragged edges included."""

from __future__ import annotations

import pytest
import torch

from moray.kernels.fp8 import BLOCK, E4M3_MAX, decode_e4m3, dequantize_blocks, quantize_blocks, scale_shape

SHAPES = [(1, 1), (128, 128), (127, 129), (160, 192), (5, 300), (1100, 40)]


def shape_id(shape: tuple[int, int]) -> str:
    return f"{shape[0]}x{shape[1]}"


def random_weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_decode_agrees_with_torch_on_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    decoded, expected = decode_e4m3(codes), codes.to(torch.float32)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded.isnan(), expected.isnan())
    assert decoded.isnan().sum() == 2
    finite = ~expected.isnan()
    # Bits, not values: minus zero stays minus zero.
    assert torch.equal(decoded[finite].view(torch.int32), expected[finite].view(torch.int32))


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dequantize_multiplies_each_element_by_its_blocks_scale(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    codes = random_weight(shape).to(torch.float8_e4m3fn)
    scale_inv = random_weight(scale_shape(rows, columns), seed=1).abs()
    expected = codes.to(torch.float32)
    for row in range(rows):
        for block in range(scale_inv.shape[1]):
            expected[row, block * BLOCK : (block + 1) * BLOCK] *= scale_inv[row // BLOCK, block]
    decoded = dequantize_blocks(codes, scale_inv, dtype)
    assert decoded.is_contiguous()
    assert torch.equal(decoded, expected.to(dtype))


def test_one_nan_code_poisons_one_element() -> None:
    codes = torch.ones(130, 130).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[129, 3] = 0xFF
    decoded = dequantize_blocks(codes, torch.ones(2, 2))
    assert decoded.isnan().nonzero().tolist() == [[129, 3]]


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_quantize_is_as_close_as_e4m3_allows(shape: tuple[int, int]) -> None:
    weight = random_weight(shape)
    codes, scale_inv = quantize_blocks(weight)
    assert codes.shape == weight.shape
    assert codes.dtype == torch.float8_e4m3fn
    assert scale_inv.shape == scale_shape(*shape)
    assert scale_inv.dtype == torch.float32
    decoded = dequantize_blocks(codes, scale_inv)
    # Half a step of a 3-bit mantissa is 1/16 of the value; of a subnormal, 2**-10 of the block's unit.
    unit = scale_inv.repeat_interleave(BLOCK, 0)[: shape[0]].repeat_interleave(BLOCK, 1)[:, : shape[1]]
    allowed = torch.maximum(weight.abs() / 16, unit * 2**-10) * (1 + 1e-6)
    assert bool(((decoded - weight).abs() <= allowed).all())


def test_largest_element_of_a_block_becomes_the_largest_code() -> None:
    weight = random_weight((200, 200)) * 1e-5
    codes, _ = quantize_blocks(weight)
    for rows in (slice(0, 128), slice(128, 200)):
        for columns in (slice(0, 128), slice(128, 200)):
            assert codes[rows, columns].to(torch.float32).abs().max() == E4M3_MAX


def test_an_outlier_costs_its_own_block_only() -> None:
    weight = random_weight((128, 256))
    codes, _ = quantize_blocks(weight)
    weight[0, 0] = 1e6
    with_outlier, _ = quantize_blocks(weight)
    assert torch.equal(codes.view(torch.uint8)[:, 128:], with_outlier.view(torch.uint8)[:, 128:])


def test_an_all_zero_block_stays_zero() -> None:
    weight = torch.zeros(130, 128)
    weight[128:] = 1.0
    codes, scale_inv = quantize_blocks(weight)
    assert torch.equal(dequantize_blocks(codes, scale_inv)[:128], weight[:128])
    assert bool((scale_inv > 0).all())
    assert bool(scale_inv.isfinite().all())


def test_a_quantized_weight_quantizes_to_itself() -> None:
    codes, scale_inv = quantize_blocks(random_weight((160, 192)))
    again, scale_again = quantize_blocks(dequantize_blocks(codes, scale_inv))
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))
    torch.testing.assert_close(scale_again, scale_inv, rtol=1e-6, atol=0)
