from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moray.kernels.linear import silu
from moray.kernels.quantize import quantize_rows
from moray.kernels.silu_quantize import silu_mul, silu_mul_quantize, silu_mul_reference

ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-21}


def inputs(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    torch.manual_seed(rows * 10007 + width)
    return (torch.randn(rows, 2 * width, device=device) * 4).to(dtype)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Two roundings to the dtype, of which the GPU's exponential may tip either: two ulp."""
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2 * ULP[actual.dtype], atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", ULP, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (3, 300), (4, 7), (2, 1152)])
def test_against_reference(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
    gate_up = inputs(rows, width, dtype, device)
    close(silu_mul(gate_up), silu_mul_reference(gate_up))


def test_rounds_where_the_reference_does(device: torch.device) -> None:
    """Without the rounding between silu and product, a quarter of bf16 results would come out otherwise."""
    gate_up = inputs(2, 2048, torch.bfloat16, device)
    assert float((silu_mul(gate_up) == silu_mul_reference(gate_up)).float().mean()) > 0.99


@pytest.mark.parametrize("architecture", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["any-scale", "ue8m0"])
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (3, 300), (4, 7)])
def test_fusing_changes_no_bit(
    rows: int,
    width: int,
    power_of_two: bool,
    architecture: int,
    device: torch.device,
    as_architecture: Callable[[int], None],
) -> None:
    as_architecture(architecture)
    gate_up = inputs(rows, width, torch.bfloat16, device)
    fused = silu_mul_quantize(gate_up, power_of_two_scales=power_of_two)
    separate = quantize_rows(silu_mul(gate_up), power_of_two_scales=power_of_two)
    assert fused.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(fused.codes.view(torch.uint8), separate.codes.view(torch.uint8))
    assert torch.equal(fused.scales, separate.scales)


def test_the_cpu_path_multiplies_what_silu_rounded() -> None:
    gate_up = inputs(5, 300, torch.bfloat16, torch.device("cpu"))
    gate, up = gate_up.chunk(2, dim=-1)
    assert torch.equal(silu_mul(gate_up), silu(gate) * up)
    quantized, separate = silu_mul_quantize(gate_up), quantize_rows(silu(gate) * up)
    assert torch.equal(quantized.codes.view(torch.uint8), separate.codes.view(torch.uint8))


def test_nan_infinity_and_zero(device: torch.device) -> None:
    gate_up = inputs(5, 200, torch.float32, device)
    gate_up[0, 3], gate_up[1, 203], gate_up[2, 7] = float("nan"), float("inf"), float("-inf")
    gate_up[3, 9], gate_up[3, 10], gate_up[4] = 1000.0, -1000.0, 0.0
    close(silu_mul(gate_up), silu_mul_reference(gate_up))
    quantized = silu_mul_quantize(gate_up)
    assert quantized.scales.isnan().tolist() == [[True, False], [True, False], [True, False], [False] * 2, [False] * 2]
    assert not quantized.codes[4].float().any()


def test_rows_with_a_stride(device: torch.device) -> None:
    wide = torch.full((3, 500), float("nan"), dtype=torch.bfloat16, device=device)
    wide[:, :400] = inputs(3, 200, torch.bfloat16, device)
    assert torch.equal(silu_mul(wide[:, :400]), silu_mul(wide[:, :400].contiguous()))
    columns = wide[:, :400].T.contiguous().T
    assert torch.equal(silu_mul(columns), silu_mul(wide[:, :400]))


def test_no_rows(device: torch.device) -> None:
    assert silu_mul(torch.empty(0, 40, device=device)).shape == (0, 20)
    assert silu_mul_quantize(torch.empty(0, 40, device=device)).codes.shape == (0, 20)
