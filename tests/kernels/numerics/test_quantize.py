from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moray.kernels.fp8 import BLOCK, E4M3_MAX, QuantizedRows
from moray.kernels.quantize import quantize_rows, quantize_rows_reference

ARCHITECTURES = [80, 90]  # without and with FP8 as a type


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    torch.manual_seed(rows * 10007 + width)
    scale = torch.exp(torch.randn(rows, 1, device=device) * 3)
    return (torch.randn(rows, width, device=device) * scale).to(dtype)


def equal(actual: QuantizedRows, expected: QuantizedRows) -> None:
    """Bit for bit; all NaN alike."""
    assert actual.codes.shape == expected.codes.shape
    assert actual.codes.dtype == torch.float8_e4m3fn
    assert actual.codes.is_contiguous()
    torch.testing.assert_close(actual.scales, expected.scales, rtol=0, atol=0, equal_nan=True)
    nan = expected.codes.float().isnan()
    assert torch.equal(actual.codes.float().isnan(), nan)
    assert torch.equal(actual.codes.view(torch.uint8)[~nan], expected.codes.view(torch.uint8)[~nan])


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["any-scale", "ue8m0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("rows", "width"), [(1, 7168), (3, 128), (2, 300), (5, 7), (2, 1152)])
def test_bits_of_the_reference(
    rows: int,
    width: int,
    dtype: torch.dtype,
    power_of_two: bool,
    architecture: int,
    device: torch.device,
    as_architecture: Callable[[int], None],
) -> None:
    as_architecture(architecture)
    x = inputs(rows, width, dtype, device)
    actual = quantize_rows(x, power_of_two_scales=power_of_two)
    equal(actual, quantize_rows_reference(x, power_of_two_scales=power_of_two))
    decoded = actual.codes.float() * actual.scales.repeat_interleave(BLOCK, dim=1)[:, :width]
    # Half a step of a 3-bit mantissa is 1/16 of the value, of a subnormal 2**-10 of the group's unit.
    unit = actual.scales.repeat_interleave(BLOCK, dim=1)[:, :width]
    assert bool(((decoded - x.float()).abs() <= torch.maximum(x.float().abs() / 16, unit * 2**-10) * 1.00001).all())


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_every_code_and_every_tie(
    architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    """With 448 in every group the scale is 1, and the codes are the roundings of the numbers themselves."""
    as_architecture(architecture)
    values = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    top = torch.full((1,), E4M3_MAX, device=device)
    x = torch.stack((torch.cat((values, top)), torch.cat((-values, top)), torch.cat((ties, top, top))))
    quantized = quantize_rows(x)
    assert torch.equal(quantized.scales, torch.ones_like(quantized.scales))
    code = quantized.codes.view(torch.uint8)
    magnitude = torch.arange(127, dtype=torch.uint8, device=device)
    assert torch.equal(code[0, :127], magnitude)
    assert torch.equal(code[1, :127], magnitude + 128), "minus zero stays"
    assert torch.equal(code[2, :126], (magnitude[:126] + 1) // 2 * 2), "to the even neighbour"


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)
def test_nan_infinity_and_zero_stay_in_their_group(
    architecture: int, device: torch.device, as_architecture: Callable[[int], None]
) -> None:
    as_architecture(architecture)
    x = inputs(3, 3 * BLOCK, torch.bfloat16, device)
    x[0, 5], x[1, 130], x[2, :BLOCK], x[2, 300] = float("nan"), float("-inf"), 0.0, 1e-30
    quantized = quantize_rows(x)
    equal(quantized, quantize_rows_reference(x))
    assert quantized.scales.isnan().tolist() == [[True, False, False], [False, True, False], [False] * 3]
    by_group = quantized.codes.float().view(3, 3, BLOCK)
    assert torch.equal(by_group.isnan(), quantized.scales.isnan()[..., None].expand(3, 3, BLOCK))
    assert not by_group[2, 0].any()
    assert float(quantized.scales[2, 0]) > 0


def test_powers_of_two_are_the_next_ones_up(device: torch.device) -> None:
    x = torch.zeros(3, 2 * BLOCK, device=device)
    x[:, 0] = torch.tensor([E4M3_MAX, 449.0, 1e-20])
    x[:, BLOCK] = torch.tensor([E4M3_MAX / 4, 3e38, 895.0])
    exact, rounded = quantize_rows(x).scales, quantize_rows(x, power_of_two_scales=True).scales
    assert torch.equal(rounded.log2(), exact.log2().ceil())
    assert rounded[0].tolist() == [1.0, 0.25], "a power of two stays"


def test_columns_of_a_wider_row(device: torch.device) -> None:
    """A slice has a row stride of its own, and its neighbours are not read."""
    wide = torch.full((3, 400), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, :300] = inputs(3, 300, torch.bfloat16, device)
    equal(quantize_rows(wide[:, :300]), quantize_rows_reference(wide[:, :300].contiguous()))
    columns = inputs(40, 3, torch.float32, device).T
    equal(quantize_rows(columns), quantize_rows_reference(columns.contiguous()))


def test_no_rows(device: torch.device) -> None:
    quantized = quantize_rows(torch.empty(0, 300, device=device))
    assert (quantized.codes.shape, quantized.scales.shape) == ((0, 300), (0, 3))
